"""What a rule knows of a tensor."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ND", "NZ", "TensorDesc"]

ND = "ND"
NZ = "FRACTAL_NZ"


class TensorDesc(NamedTuple):
    """A tensor without its data. Hashable: rules are cached by their calls.

    Attributes:
        dtype: name as in torch without the prefix: "int8", "uint64", "bfloat16"; "int4" for int4
            values, also where an int32 tensor carries eight of them.
        shape: logical (origin) shape in the order of the memory. An int32 tensor that carries int4
            has eight times the last dim here.
        format: "ND" or "FRACTAL_NZ".
        is_transposed: whether a matmul reads the last two dims the other way round: an x2 of shape
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
