"""Arguments of aclnn operators, as csrc/aclnn.cpp sends them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from cann_host.memory import FRACTAL_NZ, flat_over, has_overlap, offsets, view_over
from cann_host.rules import TensorDesc

from .refusal import RefusedError

__all__ = [
    "ACL_DTYPES",
    "BASE_FORMATS",
    "AclTensor",
    "Argument",
    "describe",
    "read_arguments",
    "tensors_of",
]

BASE_FORMATS = {0: "NCHW", 1: "NHWC", 2: "ND", 27: "NDHWC", 30: "NCDHW", 47: "NCL"}

# aclDataType of the public header acl_base_rt.h
ACL_DTYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    7: torch.uint16,
    8: torch.uint32,
    9: torch.int64,
    10: torch.uint64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
    33: torch.complex32,
    35: torch.float8_e5m2,
    36: torch.float8_e4m3fn,
}
_DTYPE_NAMES = {code: str(dtype).removeprefix("torch.") for code, dtype in ACL_DTYPES.items()}

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

T = TypeVar("T")


def _of_dtype(table: dict[int, T], code: int) -> T:
    try:
        return table[code]
    except KeyError:
        raise RefusedError(f"cann_host does not know aclDataType {code}", None) from None


class AclTensor(NamedTuple):
    """A copy of an aclTensor: a strided view of device memory, or of a FRACTAL_NZ storage."""

    address: int
    dtype_code: int
    format: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return _of_dtype(ACL_DTYPES, self.dtype_code)

    @property
    def dtype_name(self) -> str:
        """The dtype's name as the rules spell it: without the prefix."""
        return _of_dtype(_DTYPE_NAMES, self.dtype_code)

    @property
    def desc(self) -> TensorDesc:
        """Its dtype and shape, for the rules."""
        return TensorDesc(self.dtype_name, self.shape)

    @property
    def is_transposed(self) -> bool:
        """Whether the last two dims are a transposed view of contiguous memory, by CANN's rule."""
        if len(self.shape) < 2:
            return False
        rows, columns = self.shape[-2:]
        return self.strides[-2] == 1 and self.strides[-1] == rows and (rows, columns) != (1, 1)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape with the last two dims in the order of the memory."""
        if self.is_transposed:
            return (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return self.shape

    @property
    def bytes(self) -> tuple[int, int]:
        """The address and the number of the bytes from its first element to its last, or of its
        FRACTAL_NZ storage."""
        width = self.dtype.itemsize
        if self.format == FRACTAL_NZ:
            return self.address, math.prod(self.storage) * width
        if 0 in self.shape:
            return self.address, 0
        reach = 1 + sum(
            (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
        )
        return self.address + self.offset * width, reach * width

    def view(self) -> Tensor:
        """A tensor over the memory, no copy. Do not change its metadata: later calls get it too."""
        return view_over(self.address, self.dtype, self.shape, self.strides, self.offset)

    def write(self, values: Tensor) -> None:
        """Write values of its shape, or of one that expands to it.

        Raises:
            RefusedError: elements share memory and would get different values. CANN writes them in
                an order that it does not document.
        """
        if not has_overlap(self.shape, self.strides):
            self.view().copy_(values)
            return
        bits = _BITS.get(self.dtype.itemsize, self.dtype)  # indexing does not take every dtype
        wanted = values.to(self.dtype).expand(self.shape).flatten().view(bits)
        address, size = self.bytes
        memory = flat_over(address, bits, size // bits.itemsize)
        places, made = offsets(self.shape, self.strides), memory.clone()
        made[places] = wanted
        if not torch.equal(made[places], wanted):
            raise RefusedError(
                f"elements of a result of shape {self.shape} and strides {self.strides} share "
                "memory and get different values. CANN takes the call, and the order of its writes "
                "is not documented; this refusal is cann_host's own",
                None,
            )
        memory.copy_(made)

    def nz_view(self) -> Tensor:
        """A tensor over the FRACTAL_NZ storage, no copy."""
        return view_over(self.address, self.dtype, self.storage)


# The kinds of arguments, the first word of each
_ABSENT, _NUMBER, _REAL, _INTEGERS, _TEXT, _TENSORS = 0, 2, 3, 4, 5, 6  # and 1, a tensor

# An argument of an operator; None is an absent one.
Argument: TypeAlias = (
    "AclTensor | int | float | str | tuple[int, ...] | tuple[AclTensor | None, ...] | None"
)


def read_arguments(words: Sequence[int]) -> list[Argument]:
    """Read the arguments from words; csrc/aclnn.h describes the words."""
    arguments: list[Argument] = []
    at = 0
    while at < len(words):
        argument, at = _read(words, at)
        arguments.append(argument)
    return arguments


def _read(words: Sequence[int], at: int) -> tuple[Argument, int]:
    """The argument that begins at a word, and where the next begins."""
    kind = words[at]
    if kind == _ABSENT:
        return None, at + 1
    if kind == _NUMBER:
        return words[at + 1], at + 2
    if kind == _REAL:
        return struct.unpack("<d", struct.pack("<q", words[at + 1]))[0], at + 2
    if kind == _INTEGERS:
        end = at + 2 + words[at + 1]
        return tuple(words[at + 2 : end]), end
    if kind == _TEXT:
        size = words[at + 1]
        end = at + 2 + (size + 7) // 8
        text = struct.pack(f"<{end - at - 2}q", *words[at + 2 : end])[:size]
        return text.decode(errors="replace"), end
    if kind == _TENSORS:
        count, at = words[at + 1], at + 2
        tensors = []
        for _ in range(count):
            tensor, at = _read(words, at)
            tensors.append(tensor)
        return cast("tuple[AclTensor | None, ...]", tuple(tensors)), at
    address, dtype, format_, offset, rank = words[at + 1 : at + 6]
    at += 6
    shape = tuple(words[at : at + rank])
    strides = tuple(words[at + rank : at + 2 * rank])
    at += 2 * rank
    storage = tuple(words[at + 1 : at + 1 + words[at]])
    at += 1 + len(storage)
    return AclTensor(address, dtype, format_, offset, shape, strides, storage), at


def tensors_of(arguments: Iterable[Argument]) -> Iterator[AclTensor]:
    """The tensors among arguments, also those of lists."""
    for argument in arguments:
        if isinstance(argument, AclTensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from (item for item in argument if isinstance(item, AclTensor))


def describe(tensor: AclTensor | None) -> TensorDesc | None:
    """The descriptor of an optional tensor."""
    return None if tensor is None else tensor.desc
