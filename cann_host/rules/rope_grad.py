"""Gradients of rotary embeddings: RotaryPositionEmbeddingGrad and RotaryMulGrad.

Source: hicann/ops-transformer 9.1.0, posembedding/rotary_position_embedding_grad: definition and
tiling under op_host; docs for the codes of an eager call and the limits of sizes. RotaryMulGrad has
no public definition; its rules are cann_host's own.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A2, P310, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal
from .rope import RotaryCall, check_rotary_mul

__all__ = ["RotaryGradCall", "check_rotary_grad", "check_rotary_mul_grad"]

_DTYPES = ("float16", "bfloat16", "float32")
_MOST_D = 896
_MOST_HEADS = 1000  # each of B and N; B * N of mode 1
_MOST_SUMMED = 1024  # B * N, if dcos and dsin are computed


class RotaryGradCall(NamedTuple):
    """A call of RotaryPositionEmbeddingGrad or RotaryMulGrad.

    Attributes:
        soc: name of the chip.
        dy: gradient of the result, four dims.
        cos, sin: each dim is dy's, or 1.
        x: input of the embedding, like dy; None: dcos and dsin are not computed.
        mode: number of ROTARY_MODES.
    """

    soc: str
    dy: TensorDesc
    cos: TensorDesc
    sin: TensorDesc
    x: TensorDesc | None = None
    mode: int = 0

    @property
    def forward(self) -> RotaryCall:
        """The embedding that it is the gradient of."""
        return RotaryCall(self.soc, self.dy, self.cos, self.sin, self.mode)


@lru_cache(maxsize=4096)
def check_rotary_grad(call: RotaryGradCall) -> Refusal | None:
    """Why an eager RotaryPositionEmbeddingGrad is refused; None if it is accepted."""
    dy, cos, sin, x = call.dy, call.cos, call.sin, call.x
    if soc_family(call.soc) == P310:
        return Refusal(f"RotaryPositionEmbeddingGrad has no kernel on {call.soc}", NO_KERNEL)
    if soc_family(call.soc) != A2:
        return Refusal(
            f"cann_host does not compute RotaryPositionEmbeddingGrad of {call.soc}", None
        )
    tensors = {"dy": dy, "cos": cos, "sin": sin} | ({} if x is None else {"x": x})
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.dtype != dy.dtype:
            allowed = "they must be the same, float16, bfloat16 or float32"
            return Refusal(f"{name} is {tensor.dtype} and dy {dy.dtype}; {allowed}", INVALID)
    shapes = f"dy has shape {dy.shape} and cos {cos.shape}"
    if not len(dy.shape) == len(cos.shape) == len(sin.shape) == 4:
        return Refusal(f"{shapes}, sin {sin.shape}; they must have four dims each", TILING)
    if cos.shape != sin.shape:
        return Refusal(f"cos has shape {cos.shape} and sin {sin.shape}", TILING)
    if cos.shape[-1] != dy.shape[-1]:
        return Refusal(f"{shapes}; their last dims must be the same", TILING)
    refusal = _check_pairs(call, shapes) if call.mode == 1 else _check_halves(call, shapes)
    return refusal or _check_own(call, shapes)


def _check_halves(call: RotaryGradCall, shapes: str) -> Refusal | None:
    """rope_half_grad_tiling.cpp"""
    d = call.dy.shape[-1]
    if d > _MOST_D or d % 2:
        return Refusal(f"{shapes}; D must be even, at most {_MOST_D}", TILING)
    if call.dy.shape == call.cos.shape:
        return None
    sizes = _batch_and_heads(call)
    if sizes is None:
        return Refusal(f"{shapes}; this broadcast is not supported", TILING)
    limit = _MOST_SUMMED if call.x is not None else _MOST_HEADS**2
    if max(sizes) >= _MOST_HEADS or prod(sizes) > limit:
        return _too_many(shapes, sizes)
    return None


def _batch_and_heads(call: RotaryGradCall) -> tuple[int, int] | None:
    """B and N of BSND, BNSD or SBND, in the order in which the tiling looks for them."""
    (a, b, c), (p, q, r) = call.dy.shape[:3], call.cos.shape[:3]
    if q == b and r == 1 and ((p == 1 and a != 1) or (p == a and a < b)):
        return a, c  # BSND
    if q == 1 and r == c and ((p == 1 and a != 1) or (p == a and a < c)):
        return a, b  # BNSD
    if p == a and r == 1 and ((q == 1 and b != 1) or q == b):
        return b, c  # SBND
    return None


def _check_pairs(call: RotaryGradCall, shapes: str) -> Refusal | None:
    """rope_interleaved_grad_tiling.cpp"""
    x, cos = call.dy.shape, call.cos.shape
    for step in (1, 2, 0):
        others = [axis for axis in range(3) if axis != step]
        if x[step] == cos[step] and all(cos[axis] == 1 for axis in others):
            sizes = x[others[0]], x[others[1]]
            return _too_many(shapes, sizes) if prod(sizes) >= _MOST_HEADS else None
    return Refusal(f"{shapes}; one dim of cos is dy's, and two are 1", TILING)


def _too_many(shapes: str, sizes: tuple[int, int]) -> Refusal:
    return Refusal(
        f"{shapes}; B and N are {sizes[0]} and {sizes[1]}, above what CANN's documents allow. CANN "
        "does not check it; cann_host does",
        None,
    )


def _check_own(call: RotaryGradCall, shapes: str) -> Refusal | None:
    """What the tilings do not check."""
    if 0 in call.dy.shape or 0 in call.cos.shape:
        why = "they cannot be empty"
    elif call.dy.shape[-1] % 2 or call.dy.shape[-1] > _MOST_D:
        why = f"D must be even, at most {_MOST_D}"
    elif call.x is not None and call.x.shape != call.dy.shape:
        why = f"x {call.x.shape} must be like dy"
    else:
        return None
    return Refusal(f"{shapes}; {why}. CANN does not check it; cann_host does", None)


@lru_cache(maxsize=4096)
def check_rotary_mul_grad(call: RotaryGradCall) -> Refusal | None:
    """Why cann_host refuses a RotaryMulGrad; None if it computes it."""
    assert call.x is not None
    if call.x != call.dy:
        return Refusal(f"x is {call.x} and dy {call.dy}; cann_host takes equal ones", None)
    return check_rotary_mul(call.forward)
