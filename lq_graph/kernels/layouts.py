"""FRACTAL_NZ, the blocked layout of weights.

Source: CANN's description of FRACTAL_NZ; torch_npu-npu_format_cast.md for the size of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import aligned

__all__ = ["NZ_ROW_BYTES", "NzWeight", "nd_to_nz", "nz_shape", "nz_to_nd"]

NZ_ROW_BYTES = 32  # a row of a block


def nz_shape(rows: int, cols: int, c0: int) -> tuple[int, int, int, int]:
    """The blocks of (rows, cols) in FRACTAL_NZ: (ceil(cols/c0), ceil(rows/16), 16, c0)."""
    return -(-cols // c0), -(-rows // 16), 16, c0


def nd_to_nz(x: Tensor, c0: int) -> Tensor:
    """Lay out ND (..., R, C) as FRACTAL_NZ, (..., ceil(C/c0), ceil(R/16), 16, c0), zero padded.

    Args:
        x: ND, 2 dims or more.
        c0: elements in a block's row, a multiple of 8 bytes (CANN's blocks have 32).
    """
    rows, cols = x.shape[-2:]
    if not x.numel():
        return x.new_empty((*x.shape[:-2], *nz_shape(rows, cols, c0)))
    if rows % 16 or cols % c0:
        x = torch.nn.functional.pad(x, (0, -cols % c0, 0, -rows % 16))
    # words of 8 bytes move faster than elements
    words = aligned(x).view(torch.int64)
    blocks: Tensor = words.unflatten(-1, (-1, c0 * x.element_size() // 8)).unflatten(-3, (-1, 16))
    return blocks.movedim(-2, -4).contiguous().view(x.dtype)  # (..., C/c0, R/16, 16, c0)


def nz_to_nd(x: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `nd_to_nz`: (..., C/c0, R/16, 16, c0) to (..., rows, cols), padding dropped."""
    if not x.numel():
        return x.new_empty((*x.shape[:-4], rows, cols))
    words = aligned(x).view(torch.int64).movedim(-4, -2).flatten(-2).flatten(-3, -2)
    return words.contiguous().view(x.dtype)[..., :rows, :cols].contiguous()


@dataclass(frozen=True)
class NzWeight:
    """A weight stored as FRACTAL_NZ.

    Attributes:
        blocks: (ceil(columns / c0), ceil(n / 16), 16, c0), contiguous; 32 bytes in a block's row.
        n, columns: the shape in ND, (n, k) of int8 or (n, k/8) of int32.
    """

    blocks: Tensor
    n: int
    columns: int

    def __post_init__(self) -> None:
        if not self.fits(self.blocks, (self.n, self.columns)):
            raise ValueError(
                f"blocks {tuple(self.blocks.shape)} do not hold a weight ({self.n}, {self.columns})"
            )

    @staticmethod
    def fits(blocks: Tensor, shape: tuple[int, ...]) -> bool:
        """Whether blocks hold all values of this ND shape, which a kernel will read."""
        if len(shape) != 2:
            return False
        wanted = nz_shape(*shape, NZ_ROW_BYTES // blocks.element_size())
        return tuple(blocks.shape) == wanted and blocks.is_contiguous()

    def rows(self, index: Tensor) -> Tensor:
        """A copy of some rows in ND.

        Args:
            index: int64, one dim, each from 0 to n - 1.
        """
        parts = self.blocks.flatten(1, 2)[:, : self.n]  # (columns/c0, n, c0)
        parts = parts.index_select(1, index)
        return parts.movedim(0, 1).flatten(1)[:, : self.columns]

    def nd(self) -> Tensor:
        """A copy in ND."""
        return nz_to_nd(self.blocks, self.n, self.columns)
