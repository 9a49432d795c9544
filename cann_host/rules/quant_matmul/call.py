"""A call of the quantized matmul, as the checks read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..descriptors import ND, NZ, TensorDesc
from ..products import P310, soc_family
from ..refusal import INVALID, TILING, Refusal

__all__ = ["Entry", "QuantMatmulCall"]

# The entry of a call:
#   graph  the graph operator; its tiling has the checks that aclnn's parameter check has eagerly
#   v5     aclnnQuantMatmulV5
#   nz     aclnnQuantMatmulWeightNz, which has other checks
#   v4     aclnnQuantMatmulV3 and V4, with the checks of nz; torch_npu calls V4 before train 26.0
Entry = Literal["graph", "v5", "nz", "v4"]


class QuantMatmulCall(NamedTuple):
    """A call of the quantized matmul.

    Attributes:
        soc: SoC name, such as Ascend910B2.
        x1: (..., m, k), or (..., k, m) if transposed; int8 or int4.
        x2: (..., k, n), or (..., n, k) if transposed; ND or FRACTAL_NZ.
        scale: (1,) or (n,).
        out_dtype: dtype of the result.
        offset: (1,) or (n,).
        bias: (n,) or (batch, 1, n).
        pertoken_scale: (m,).
        out_shape: shape of the tensor an eager call writes to, if known.
        entry: the function that is called, or "graph".
    """

    soc: str
    x1: TensorDesc
    x2: TensorDesc
    scale: TensorDesc
    out_dtype: str
    offset: TensorDesc | None = None
    bias: TensorDesc | None = None
    pertoken_scale: TensorDesc | None = None
    out_shape: tuple[int, ...] | None = None
    entry: Entry = "v5"

    @property
    def family(self) -> str | None:
        return soc_family(self.soc)

    @property
    def is_graph(self) -> bool:
        return self.entry == "graph"

    @property
    def has_checks_of_v4(self) -> bool:
        """Whether the checks are those of [nz]."""
        return self.entry in ("nz", "v4")

    @property
    def x2_format(self) -> str:
        """The format of x2 in the kernel.

        An eager call on 310P casts an ND x2 to FRACTAL_NZ itself, transposed as its kernel needs
        it: TransposeAndTransDataForInputs of [v5] and [nz].
        """
        casts = self.family == P310 and not self.is_graph
        return NZ if casts and self.x2.format == ND else self.x2.format

    @property
    def batch(self) -> tuple[int, ...] | None:
        """Batch dims of the result; None if those of x1 and x2 do not broadcast."""
        return _broadcast(self.x1.shape[:-2], self.x2.shape[:-2])

    def refused(self, reason: str, code: int | None = None) -> Refusal:
        """A refusal of CANN. Its code is `code`, else that of parameters, in a graph of tiling."""
        return Refusal(reason, code or (TILING if self.is_graph else INVALID), self.soc)


def _broadcast(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...] | None:
    """Broadcast batch dims; None if they do not."""
    size = max(len(left), len(right))
    padded = [(1,) * (size - len(dims)) + tuple(dims) for dims in (left, right)]
    if any(a != b and 1 not in (a, b) for a, b in zip(*padded, strict=True)):
        return None
    return tuple(max(a, b) for a, b in zip(*padded, strict=True))
