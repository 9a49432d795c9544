"""The record of one operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Operator"]

Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class Operator(Generic[Arguments]):
    """An operator of libopapi.

    Attributes:
        name: of the aclnn function.
        arguments: a NamedTuple of its arguments, in the order of CANN's own header.
        check: refuses a call, with RefusedError or GraphError; takes the arguments and the name of
            the chip.
        compute: computes a call that was checked; takes the same arguments. The memory of each
            tensor was checked too: `AclTensor.view` lies inside its allocation.
        is_check_pure: whether `check` depends on the descriptors only, not on data, and warns of
            nothing. It then runs once for calls with the same words.
        only_reads: names of arguments that it does not write. A weight that is named here stays
            converted (cann_host/weights.py) from one call to the next.
    """

    name: str
    arguments: Callable[..., Arguments]
    check: Callable[[Arguments, str], None]
    compute: Callable[[Arguments, str], None]
    is_check_pure: bool = False
    only_reads: frozenset[str] = frozenset()
