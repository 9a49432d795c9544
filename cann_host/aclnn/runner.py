"""The table of operators, and what the library calls for one."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from cann_host import watched
from cann_host.bindings import give, int64s
from cann_host.graph.executor import GraphError
from cann_host.rules import INNER, INVALID

from . import activations, copies, norms, quant_matmul
from .operator import Operator
from .refusal import RefusedError
from .tensors import AclTensor, read_arguments

__all__ = ["OPERATORS", "Runner"]

OPERATORS: dict[str, Operator[Any]] = {
    operator.name: operator
    for family in (copies, norms, quant_matmul, activations)
    for operator in family.OPERATORS
}


class Runner:
    """Runs the operators that a library asks for, until `close`.

    Attributes:
        library: the stand-in's.
        soc: name of the chip that is stood in for.
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
            # A default device or a function mode of the caller must not reach these tensors.
            with torch._C.DisableTorchFunction():
                operator, values = OPERATORS[name], read_arguments(int64s(words, count))
                function = operator.compute if phase else operator.check
                function(operator.arguments(*values), self.soc)
                if phase == 0:
                    watched.note(v.address for v in values if isinstance(v, AclTensor))
        except GraphError as error:  # what the GE operator of the same meaning refuses
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
        """Take the operators away: a late launch then fails by name instead of entering an
        interpreter that ends."""
        give(self.library.cann_host_set_aclnn_executor, None)
        self.library.cann_host_leave()
