"""The table of operators, and the function that the library calls to run one."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from cann_host import watched
from cann_host.bindings import give, int64s
from cann_host.graph.executor import GraphError
from cann_host.rules import INNER, INVALID

from . import activations, attention, attention_flash, copies, norms, quant_matmul
from .operator import Operator
from .refusal import RefusedError
from .tensors import read_arguments, tensors_of

__all__ = ["OPERATORS", "Runner"]

OPERATORS: dict[str, Operator[Any]] = {
    operator.name: operator
    for family in (copies, norms, quant_matmul, activations, attention, attention_flash)
    for operator in family.OPERATORS
}


class Runner:
    """Runs operators for a library, until `close`.

    Attributes:
        library: the stand-in's.
        soc: name of the chip that the stand-in reports.
    """

    def __init__(self, library: ctypes.CDLL, soc: str) -> None:
        self.library, self.soc = library, soc
        give(library.cann_host_set_aclnn_executor, self._run)

    def _run(self, name: str, phase: int, words: int, count: int) -> int:
        """Check (phase 0) or compute (phase 1) an operator.

        Returns:
            CANN's code, 0 for success. The message goes to the library.
        """
        try:
            # A default device or a function mode of the caller must not affect these tensors.
            with torch._C.DisableTorchFunction():
                operator, values = OPERATORS[name], read_arguments(int64s(words, count))
                function = operator.compute if phase else operator.check
                function(operator.arguments(*values), self.soc)
                if phase == 0:
                    watched.note(tensor.address for tensor in tensors_of(values))
        except GraphError as error:  # a refusal of the same GE operator
            return self._fail(f"{name}: {error}", INVALID)
        except RefusedError as error:
            return self._fail(f"{name}: {error}", error.code)
        except Exception as error:
            return self._fail(f"{name}: cann_host failed: {type(error).__name__}: {error}", INNER)
        return 0

    def _fail(self, message: str, code: int) -> int:
        self.library.cann_host_set_error(message.encode(errors="replace"))
        return code

    def close(self) -> None:
        """Remove the operators: a late launch then fails by name instead of calling an interpreter
        that ends."""
        give(self.library.cann_host_set_aclnn_executor, None)
        self.library.cann_host_leave()
