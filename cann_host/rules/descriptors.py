"""What a rule reads of a tensor."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ND", "NZ", "TensorDesc"]

ND = "ND"
NZ = "FRACTAL_NZ"


class TensorDesc(NamedTuple):
    """A tensor without its data. Hashable, because the results of rules are cached by call.

    Attributes:
        dtype: torch's name without the prefix: "int8", "uint64", "bfloat16"; "int4" for int4
            values, also if they are packed in an int32 tensor.
        shape: logical (origin) shape in the order of the memory. The last dim counts int4 values,
            also if they are packed in an int32 tensor.
        format: "ND" or "FRACTAL_NZ".
        is_transposed: whether a matmul reads the last two dims in the other order: an x2 of shape
            (n, k) for example.
        storage_shape: storage shape of a FRACTAL_NZ tensor, if it is known.
    """

    dtype: str
    shape: tuple[int, ...]
    format: str = ND
    is_transposed: bool = False
    storage_shape: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        """Rows of the matrix as a matmul reads it."""
        return self.shape[-1 if self.is_transposed else -2]

    @property
    def columns(self) -> int:
        """Columns of the matrix as a matmul reads it."""
        return self.shape[-2 if self.is_transposed else -1]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"
