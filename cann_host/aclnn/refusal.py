"""How an aclnn operator refuses a call."""

from __future__ import annotations

from cann_host.rules import INVALID, Refusal

__all__ = ["RefusedError", "raise_refusal"]


class RefusedError(Exception):
    """A call that CANN, or cann_host, refuses.

    Attributes:
        refusal: why, with CANN's code.
    """

    def __init__(self, refusal: Refusal | str, code: int | None = INVALID) -> None:
        """
        Args:
            refusal: as a rule returns it; or its reason, which names the argument, what was given
                and what is allowed.
            code: CANN's error code for a reason; None if only cann_host refuses.
        """
        self.refusal = Refusal(refusal, code) if isinstance(refusal, str) else refusal
        super().__init__(str(self.refusal))

    @property
    def code(self) -> int:
        """The code that the aclnn function returns; for a refusal of cann_host's own it is that of
        an invalid parameter."""
        return self.refusal.code or INVALID


def raise_refusal(refusal: Refusal | None) -> None:
    """Raise the refusal that a rule returned.

    Raises:
        RefusedError: the rule refuses.
    """
    if refusal is not None:
        raise RefusedError(refusal)
