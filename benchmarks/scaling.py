"""An estimate of tensor parallelism: bytes and time of an MLP for 1 to 8 devices.

    python benchmarks/scaling.py [--hidden 8192] [--inner 28672] [--product A2]

Nothing here is measured. A layer pair (column-wise up, row-wise down, A8W8) takes at least the
larger of reading its weights and multiplying, on one device's part, and then one all-reduce of the
output. Peaks are the published figures that `lq_graph.explain` uses; those of the interconnect are
below, with their sources. No kernel and no collective reaches its peak: read the ratios.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from lq_graph.rules.tables import PEAKS, Peak


@dataclass(frozen=True)
class Link:
    """The published bandwidth from a device to the others of its node."""

    bytes_per_second: float  # one direction
    source: str


LINKS = {
    "A2": Link(196e9, "HCCS of Atlas 800 A2: 392 GB/s both ways over 7 links, commonly published"),
    "A3": Link(196e9, "unified bus of CloudMatrix384: 392 GB/s one way a 910C, half for each die"),
}
LATENCY = 10e-6  # seconds; an assumption: the cost of one small all-reduce of any size
ROWS = (1, 16, 256, 4096)
DEVICES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Estimate:
    """One MLP with `m` rows on `devices`."""

    weights: float  # bytes a device
    sent: float  # bytes a device sends for one all-reduce
    compute: float  # seconds: the larger of reading weights and multiplying
    wire: float  # seconds

    @property
    def total(self) -> float:
        """Seconds; nothing overlaps, for the all-reduce waits for the product."""
        return self.compute + self.wire


def estimate(
    m: int, hidden: int, inner: int, devices: int, width: int, peak: Peak, link: Link
) -> Estimate:
    """Estimate an up and a down layer.

    Args:
        m: rows.
        hidden, inner: k and n of the layer up, n and k of the layer down.
        devices: number of devices that share it.
        width: bytes of an element that is summed: 2 for a float output, 4 for int32 accumulators.
        peak, link: of the product.
    """
    weights = 2 * hidden * inner / devices
    multiply = 2 * m * 2 * hidden * inner / devices / peak.int8_ops
    compute = max(weights / peak.bytes_per_second, multiply)
    if devices == 1:
        return Estimate(weights, 0.0, compute, 0.0)
    # reduce-scatter and all-gather, each of all parts except the device's own
    sent = 2 * (devices - 1) / devices * m * hidden * width
    return Estimate(weights, sent, compute, LATENCY + sent / link.bytes_per_second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--inner", type=int, default=28672)
    parser.add_argument("--product", choices=sorted(LINKS), default="A2")
    args = parser.parse_args()
    peak, link = PEAKS[args.product], LINKS[args.product]
    print(
        f"One MLP, {args.hidden} -> {args.inner} -> {args.hidden}, A8W8. Nothing is measured here."
    )
    print(f"  {peak}")
    print(f"  {link.bytes_per_second / 1e9:g} GB/s to the others: {link.source}")
    print(f"  {LATENCY * 1e6:g} us for any all-reduce: an assumption\n")
    print(
        f"{'m':>5} {'devices':>8} {'weights':>9} {'compute':>9}   "
        f"{'summed as bfloat16':^31}   {'summed as int32 (exact)':^31}"
    )
    part = f"{'sent':>9} {'wire':>10} {'speedup':>10}"
    print(f"{'':5} {'':8} {'MB each':>9} {'us':>9}   {part}   {part}")
    for m in ROWS:
        for devices in DEVICES:
            cells = []
            for width in (2, 4):
                e, one = (
                    estimate(m, args.hidden, args.inner, d, width, peak, link) for d in (devices, 1)
                )
                speedup = one.total / e.total
                cells.append(f"{e.sent / 1e3:>6,.0f} kB {e.wire * 1e6:>7,.1f} us {speedup:>9.2f}x")
            print(
                f"{m:>5} {devices:>8} {e.weights / 1e6:>9,.0f} {e.compute * 1e6:>9,.1f}   "
                f"{cells[0]:>31}   {cells[1]:>31}"
            )
        print()


if __name__ == "__main__":
    main()
