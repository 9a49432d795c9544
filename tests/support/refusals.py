"""Refusals of cann_host's rules."""

from __future__ import annotations

from cann_host.rules import Refusal, TensorDesc


def described(shape: tuple[int, ...], dtype: str = "float16") -> TensorDesc:
    return TensorDesc(dtype, shape)


def told(refusal: Refusal | None, code: int | None, *texts: str) -> None:
    """Check that a refusal has a code, and its message these texts."""
    assert refusal is not None and refusal.code == code, refusal
    for text in texts:
        assert text in str(refusal), (text, str(refusal))
    assert code is not None or "cann_host" in str(refusal)
