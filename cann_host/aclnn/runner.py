"""The table of operators, and the function that the library calls to run one."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from cann_host import watched
from cann_host.bindings import CAPTURES, TRACKS, give
from cann_host.graph.executor import GraphError
from cann_host.rules import INNER, INVALID

from .operator import Operator
from .refusal import RefusedError
from .tensors import read_arguments, tensors_of

__all__ = ["OPERATORS", "Runner"]

_FAMILIES = (
    "activations",
    "attention",
    "attention_flash",
    "cache",
    "copies",
    "fused_norms",
    "fused_swiglu",
    "kv_cache",
    "norms",
    "quant_matmul",
    "rope",
)

OPERATORS: dict[str, Operator[Any]] = {
    operator.name: operator
    for family in _FAMILIES
    for operator in import_module(f".{family}", __package__).OPERATORS
}

_MOST_CALLS = 4096


class _Call:
    """The arguments of a call, and the check that they passed."""

    __slots__ = ("arguments", "passed")

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments
        self.passed: tuple[Callable[[Any, str], None], str] | None = None  # and on which chip


class Runner:
    """Runs operators for a library, until `close`.

    Attributes:
        library: the stand-in's.
        soc: name of the chip that the stand-in reports.
    """

    def __init__(self, library: ctypes.CDLL, soc: str) -> None:
        self.library, self.soc = library, soc
        self._calls: dict[tuple[str, bytes], _Call] = {}
        give(library.cann_host_set_aclnn_executor, self._run)

    def _run(self, name: str, phase: int, words: int, count: int) -> int:
        """Check (phase 0) or compute (phase 1) an operator.

        Returns:
            CANN's code, 0 for success. The message goes to the library.
        """
        try:
            operator = OPERATORS[name]
            known = self._read(operator, ctypes.string_at(words, count * 8))
            # A default device or a function mode of the caller must not affect these tensors.
            with torch._C.DisableTorchFunction():
                if phase:
                    self._compute(operator, known.arguments)
                else:
                    self._check(operator, known)
        except GraphError as error:  # a refusal of the same GE operator
            return self._fail(f"{name}: {error}", INVALID)
        except RefusedError as error:
            return self._fail(f"{name}: {error}", error.code)
        except Exception as error:
            return self._fail(f"{name}: cann_host failed: {type(error).__name__}: {error}", INNER)
        return 0

    def _read(self, operator: Operator[Any], words: bytes) -> _Call:
        """A call of the operator. Earlier calls are kept: a model makes calls with the same words
        at each step."""
        key = operator.name, words
        found = self._calls.get(key)
        if found is None:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            numbers = struct.unpack(f"<{len(words) // 8}q", words)
            found = self._calls[key] = _Call(operator.arguments(*read_arguments(numbers)))
        return found

    def _check(self, operator: Operator[Any], call: _Call) -> None:
        now = operator.check, self.soc
        if call.passed != now:
            operator.check(call.arguments, self.soc)
            if operator.is_check_pure:
                call.passed = now
        if self.library.cann_host_state() & CAPTURES:
            watched.note(tensor.address for tensor in tensors_of(call.arguments))

    def _compute(self, operator: Operator[Any], call: Any) -> None:
        try:
            operator.compute(call, self.soc)
        finally:
            if self.library.cann_host_state() & TRACKS:
                for name, value in zip(call._fields, call, strict=True):
                    if name not in operator.only_reads:
                        for tensor in tensors_of((value,)):
                            self.library.cann_host_wrote(*tensor.bytes)

    def _fail(self, message: str, code: int) -> int:
        self.library.cann_host_set_error(message.encode(errors="replace"))
        return code

    def close(self) -> None:
        """Remove the operators: a late launch then fails by name instead of calling an interpreter
        that ends."""
        give(self.library.cann_host_set_aclnn_executor, None)
        self.library.cann_host_leave()
