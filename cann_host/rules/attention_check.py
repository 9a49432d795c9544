"""Why an inference attention is refused."""

from __future__ import annotations

from .attention import (
    PROMPT,
    AttentionCall,
    check_attention_dtypes,
    check_out,
    check_unsupported,
    kind_of,
)
from .attention_incre import check_incre
from .attention_prompt import check_prompt
from .refusal import Refusal

__all__ = ["check_attention"]


def check_attention(call: AttentionCall) -> Refusal | None:
    """Why a call is refused; None if it is accepted."""
    for check in (check_attention_dtypes, check_unsupported, check_out):
        refusal = check(call)
        if refusal is not None:
            return refusal
    return check_prompt(call) if kind_of(call) == PROMPT else check_incre(call)
