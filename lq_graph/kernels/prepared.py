"""Weights that were packed beforehand for the compiled kernels."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from .calls import DONE, MATMUL, refuse, weight_of
from .library import loaded

__all__ = ["drop", "prepare", "prepared_of"]


@dataclass(frozen=True)
class _Prepared:
    """A copy of a weight in the order in which an instruction set reads it fastest.

    Attributes:
        packed: uint8, the copy.
        instruction_set: whose order it is.
        weight: refers to the tensor that was prepared.
        was: its address, shape, stride and version then.
    """

    packed: Tensor
    instruction_set: str
    weight: weakref.ref[Tensor]
    was: tuple[int, torch.Size, tuple[int, ...], int]


# By id of the weight. State dicts, copies and files do not see it.
_all: dict[int, _Prepared] = {}


def _state(weight: Tensor) -> tuple[int, torch.Size, tuple[int, ...], int]:
    version = -1 if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.shape, weight.stride(), version


def prepare(weight: Tensor) -> int:
    """Pack a weight for the compiled kernels, which then read the copy for 16 rows of x or more.

    The copy is freed with the weight, or at the first call after the weight was written in place or
    got other memory (`weight.data = tensor`).

    Args:
        weight: int8 (n, k), or int32 (n, k/8) carrying int4, on the CPU.

    Returns:
        Bytes of the copy; 0 if the kernels would not be faster with one, or do not compute this
        weight.
    """
    library = loaded()
    if library is None or type(weight) not in (Tensor, Parameter) or not weight.is_cpu:
        return 0
    found = _all.get(id(weight))
    if found is not None and _is_valid(found, weight, library.instruction_set):
        return found.packed.nbytes
    drop(weight)
    stored = weight_of(weight)
    if stored is None:
        return 0
    call = MATMUL.pack(
        0, stored.address, 0, 0, 0, 0, 0, 0, 0, 0, stored.n, stored.row_bytes, 0, stored.stride, 0,
        0, stored.step, stored.int4, 0, 0, torch.get_num_threads(),
    )  # fmt: skip
    size = library.prepared_bytes(call, len(call))
    if not size:
        return 0
    packed = torch.empty(size, dtype=torch.uint8)
    if (answer := library.prepare(call, len(call), packed.data_ptr())) != DONE:
        refuse(answer)
    key = id(weight)
    reference = weakref.ref(weight, lambda _: _all.pop(key, None))
    _all[key] = _Prepared(packed, library.instruction_set, reference, _state(weight))
    return packed.nbytes


def drop(weight: Tensor) -> None:
    """Free the copy that `prepare` made."""
    _all.pop(id(weight), None)


def _is_valid(found: _Prepared, weight: Tensor, instruction_set: str) -> bool:
    return (
        found.weight() is weight
        and found.was == _state(weight)
        and found.instruction_set == instruction_set
    )


def prepared_of(weight: Tensor, instruction_set: str) -> Tensor | None:
    """The copy of a weight; None if there is none, or if the weight has changed since.

    A write through `weight.data` changes nothing that is compared here. The kernel compares some
    values of the copy and of the weight at each call, and reads the weight if they differ.
    """
    found = _all.get(id(weight)) if _all else None
    if found is None:
        return None
    if not _is_valid(found, weight, instruction_set):
        drop(weight)
        return None
    return found.packed
