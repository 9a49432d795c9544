"""Why a call is refused, with CANN's error code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["INNER", "INVALID", "NO_KERNEL", "NULL_POINTER", "TILING", "Refusal", "one_of"]

NULL_POINTER = 161001  # ACLNN_ERR_PARAM_NULLPTR
INVALID = 161002  # ACLNN_ERR_PARAM_INVALID
INNER = 561000  # ACLNN_ERR_INNER
TILING = 561002  # ACLNN_ERR_INNER_TILING_ERROR
NO_KERNEL = 561003  # ACLNN_ERR_INNER_FIND_KERNEL_ERROR
_NAMES = {
    NULL_POINTER: "null pointer",
    INVALID: "invalid parameter",
    INNER: "inner error",
    TILING: "tiling",
    NO_KERNEL: "kernel not found",
}


@dataclass(frozen=True)
class Refusal:
    """Why CANN, or cann_host, refuses a call. `str()` gives the message.

    Attributes:
        reason: names the argument, what was given and what is allowed. A refusal of cann_host's own
            names cann_host.
        code: CANN's error code; None if CANN takes the call and cann_host does not.
        soc: name of the chip, if the message ends with it.
    """

    reason: str
    code: int | None
    soc: str = ""

    def __str__(self) -> str:
        if self.code is None:
            return self.reason
        where = f"; {self.soc}" if self.soc else ""
        return f"{self.reason} (CANN error {self.code}, {_NAMES[self.code]}{where})"


def one_of(allowed: Iterable[str]) -> str:
    """The allowed values as a message lists them."""
    return " or ".join(allowed)
