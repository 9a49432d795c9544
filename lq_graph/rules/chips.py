"""The chips of each product: cores, published peaks, memory and links, each with its source.

Chips of one family differ, public figures disagree, and no kernel reaches its peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LinearQuantValueError

__all__ = ["CHIPS", "MEASURED", "Chip", "chip_of"]

GIB, MIB, TIB = 2**30, 2**20, 2**40


@dataclass(frozen=True)
class Chip:
    """One chip as a program sees it: a die on Atlas A3.

    Attributes:
        name: "A3-752T": the product's key, and the class that the vendor names by float16 (A2) or
            int8 (A3) operations.
        product: key of the product, as in `lq_graph.rules.tables`.
        cores: with a matrix unit each.
        bf16_ops, int8_ops, int4_ops: dense operations per second; a multiply-accumulate is two.
            int4_ops is None where the matrix unit has no int4.
        bytes_per_second: bandwidth of the memory.
        memory: bytes.
        l2: bytes of the cache that all cores share.
        link: bytes per second, one way, to all other devices together.
        mesh: how many devices have a link to each other; their bandwidth is split among the links,
            so two devices have one link of them. 0: a switch gives all of it to any number.
        pair: bytes per second between the two dies of a card; 0 if there are none.
        soc: the name of the SoC that CANN and npu-smi report and the figures are of.
        also: SoCs of the same class, which have no file of their own in the sources.
        source: where the figures are published.
    """

    name: str
    product: str
    cores: int
    bf16_ops: float
    int8_ops: float
    int4_ops: float | None
    bytes_per_second: float
    memory: int
    l2: int
    link: float
    soc: str
    source: str
    mesh: int = 0
    pair: float = 0.0
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def link_of(self, devices: int) -> float:
        """Bytes per second, one way, that a device receives from the others in a group.

        Raises:
            LinearQuantValueError: more devices than the mesh has.
        """
        if self.mesh and devices > self.mesh:
            raise LinearQuantValueError(
                f"forecast: {devices} devices of {self.name}; its links join {self.mesh}. What to "
                f"do: ask for --tp {self.mesh} or less."
            )
        if devices == 2 and self.pair:
            return self.pair
        return self.link * (devices - 1) / (self.mesh - 1) if self.mesh else self.link

    def peak(self, dtype: str) -> float:
        """Operations per second of a product of two matrices of this dtype.

        Raises:
            LinearQuantValueError: the chip's matrix unit does not compute it.
        """
        if dtype == "int8":
            return self.int8_ops
        if dtype == "int4":
            if self.int4_ops is None:
                raise LinearQuantValueError(
                    f"forecast: the matrix unit of {self.name} has no int4. What to do: ask for "
                    "w8a8, or for another product."
                )
            return self.int4_ops
        return self.bf16_ops


_PLATFORM = "platform_config of leideng/CANN-8.1.RC1@4332a013"
_DEVICE = "tensor_cast/device.py of Ascend/msmodeling@84fec853"
_GUIDE = "cross_platform_migration_guide.md of hicann/ops-nn@e5c3fa93"
# bf16: cores x 8192 operations x the rated clock. int4: the platform files have int4 tiles of twice
# the k of int8. Bandwidth: ops-nn says 1.6 TB/s, msmodeling 1.6 TiB/s; the lower one is taken.
# fmt: off
CHIPS: tuple[Chip, ...] = (
    # name, product, cores, bf16, int8, int4, bandwidth, memory, L2, link, SoC
    Chip("A2-376T", "A2", 24, 353.9e12, 752e12, 1504e12, 1.6e12, 64 * GIB, 192 * MIB, 196e9,
         "Ascend910B1", f"Ascend910B1.ini, {_PLATFORM}; {_DEVICE}; {_GUIDE}", mesh=8,
         also=("Ascend910B2",)),
    Chip("A2-313T", "A2", 20, 294.9e12, 626e12, 1252e12, 1.6e12, 64 * GIB, 192 * MIB, 196e9,
         "Ascend910B3", f"Ascend910B3.ini, {_PLATFORM}; {_DEVICE}", mesh=8),
    Chip("A2-280T", "A2", 20, 245.8e12, 560e12, 1120e12, 0.8 * TIB, 32 * GIB, 96 * MIB, 196e9,
         "Ascend910B4", f"Ascend910B4.ini, {_PLATFORM}; {_DEVICE}", mesh=8),
    Chip("A3-752T", "A3", 24, 353.9e12, 752e12, 1504e12, 1.6e12, 64 * GIB, 192 * MIB, 196e9,
         "Ascend910_9391", f"Ascend910_9391.ini, {_PLATFORM}; {_DEVICE}", pair=224e9),
    Chip("A3-560T", "A3", 20, 245.8e12, 560e12, 1120e12, 1.6e12, 64 * GIB, 168 * MIB, 196e9,
         "Ascend910_9362",
         f"Ascend910_9362.ini, {_PLATFORM} (says 32 GiB); {_DEVICE} (64 GiB)", pair=224e9),
    Chip("950PR", "950", 32, 426e12, 757e12, None, 1.6e12, 128 * 10**9, 128 * MIB, 159e9,
         "Ascend910_95",
         f"Ascend910_95.ini, {_PLATFORM}; {_GUIDE} (no int4 in the matrix unit); {_DEVICE}",
         mesh=4),
    Chip("310P3", "310P", 8, 69.5e12, 138.9e12, None, 204e9, 24 * 10**9, 16 * MIB, 64e9,
         "Ascend310P3",
         f"Ascend310P3.ini, {_PLATFORM}; Atlas 300I Duo has 408 GB/s for two; {_DEVICE} (PCIe)"),
)
# fmt: on
MEASURED = "A3-752T"  # on which the kernels of the fit were measured
_DEFAULTS = {"310P": "310P3", "A2": "A2-376T", "A3": MEASURED, "950": "950PR"}


def chip_of(name: str) -> Chip:
    """The chip of a product's key ("A3"), a chip's name ("A3-560T") or a SoC ("Ascend910B3").

    Raises:
        LinearQuantValueError: there is none; the text has the names.
    """
    wanted = _DEFAULTS.get(name.upper(), name).upper()
    for chip in CHIPS:
        if wanted in map(str.upper, (chip.name, chip.soc, *chip.also)):
            return chip
    keys = ", ".join(_DEFAULTS)
    names = ", ".join(f"{chip.name} ({chip.soc})" for chip in CHIPS)
    raise LinearQuantValueError(
        f"forecast: product {name!r} is not known; allowed are {keys}, and the chips {names}"
    )
