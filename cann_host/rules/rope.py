"""Rotary embeddings: ApplyRotaryPosEmb, RotaryPositionEmbedding, InterleaveRope and RotaryMul.

Source: hicann/ops-transformer 9.1.0, posembedding/apply_rotary_pos_emb, rotary_position_embedding
and interleave_rope: definition and tiling under op_host, op_api for an eager call. RotaryMul has no
public definition; its rules are cann_host's own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A2, A950, P310, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal, one_of

__all__ = [
    "HALF",
    "INTERLEAVE",
    "INTERLEAVE_HALF",
    "LAYOUTS",
    "QUARTER",
    "ROTARY_MODES",
    "ApplyRotaryCall",
    "RotaryCall",
    "apply_rotary_ignores",
    "check_apply_rotary",
    "check_interleave_rope",
    "check_rotary",
    "check_rotary_mul",
    "rotary_ignores",
]

HALF, INTERLEAVE, QUARTER, INTERLEAVE_HALF = "half", "interleave", "quarter", "interleave-half"
ROTARY_MODES = (HALF, INTERLEAVE, QUARTER, INTERLEAVE_HALF)  # as RotaryPositionEmbedding numbers
_PARTS = {HALF: 2, INTERLEAVE: 2, QUARTER: 4, INTERLEAVE_HALF: 2}  # that D is divided into

# ApplyRotaryPosEmb's attribute layout
LAYOUTS = {1: "BSND", 2: "SBND", 3: "BNSD", 4: "TND"}
_APPLY_LAYOUTS = {P310: (1, 4), A2: (1, 4), A950: (1, 2, 3, 4)}
_APPLY_MODES = (HALF, INTERLEAVE, QUARTER)
_APPLY_D = (64, 128)

_FLOATS = ("float16", "bfloat16", "float32")
_DTYPES = {P310: ("float16", "float32"), A2: _FLOATS, A950: _FLOATS}
_INTERLEAVE_DTYPES: dict[str, tuple[str, ...]] = {A2: ("float16", "bfloat16")}
_INTERLEAVE_D = 64

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_UNIFIED_BUFFER = {P310: 256 * 1024, A2: 192 * 1024}  # bytes of a vector core
_MOST_D = {P310: 896, A2: 896, A950: 1024}  # rope_rotate_half_tiling.cpp, rope_regbase_tiling_base
_D_310P = (32, 64, 96, 128)
_FEW_CORES = ("Ascend910B3", "Ascend910B4")


class ApplyRotaryCall(NamedTuple):
    """A call of ApplyRotaryPosEmb.

    Attributes:
        soc: name of the chip.
        query, key: in the dims of the layout.
        cos, sin: like query, with one head; D may be smaller: the first values of a head rotate.
        layout: of LAYOUTS.
        mode: rotary_mode.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    query: TensorDesc
    key: TensorDesc
    cos: TensorDesc
    sin: TensorDesc
    layout: int = 1
    mode: str = HALF
    is_graph: bool = False


class RotaryCall(NamedTuple):
    """A call of RotaryPositionEmbedding, InterleaveRope or RotaryMul.

    Attributes:
        soc: name of the chip.
        x: (..., D), three or four dims.
        cos, sin: each dim is x's, or 1.
        mode: number of ROTARY_MODES.
        rotate: (D, D), by which x is multiplied instead of rotated.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    x: TensorDesc
    cos: TensorDesc
    sin: TensorDesc
    mode: int = 0
    rotate: TensorDesc | None = None
    is_graph: bool = False


def _vector_cores(soc: str) -> int:
    if soc_family(soc) == P310:
        return 8
    return 40 if soc.startswith(_FEW_CORES) else 48


def _check_dtypes(
    table: dict[str, tuple[str, ...]], soc: str, code: int, **tensors: TensorDesc
) -> Refusal | None:
    """The first tensor has a dtype of the table; the others have the same."""
    allowed = table.get(soc_family(soc) or "")
    if allowed is None:
        return Refusal(f"cann_host has no rules for {soc}", None)
    (first, one), *others = tensors.items()
    if one.dtype not in allowed:
        return Refusal(f"{first} is {one.dtype}; {soc} allows {one_of(allowed)}", code)
    for name, other in others:
        if other.dtype != one.dtype:
            return Refusal(f"{name} is {other.dtype} and {first} {one.dtype}", code)
    return None


# ---- ApplyRotaryPosEmb ----


def apply_rotary_ignores(soc: str, mode: str) -> str | None:
    """What an accepted ApplyRotaryPosEmb does not do, if there is something."""
    if mode == HALF or soc_family(soc) == A950:
        return None
    return (
        f"rotary_mode {mode} has no effect on {soc}: its documents have half only, its tiling does "
        "not read the attribute, and the kernel rotates halves"
    )


@lru_cache(maxsize=4096)  # a model makes the same few calls again and again
def check_apply_rotary(call: ApplyRotaryCall) -> Refusal | None:
    """Why an ApplyRotaryPosEmb is refused; None if it is accepted."""
    tensors = {"query": call.query, "key": call.key, "cos": call.cos, "sin": call.sin}
    code = NO_KERNEL if call.is_graph else INVALID
    if refusal := _check_dtypes(_DTYPES, call.soc, code, **tensors):
        return refusal
    layouts = _APPLY_LAYOUTS[soc_family(call.soc) or ""]
    if call.layout not in layouts:
        names = one_of(f"{number} ({LAYOUTS[number]})" for number in layouts)
        return Refusal(f"layout is {call.layout}; {call.soc} allows {names}", TILING)
    layout = LAYOUTS[call.layout]
    for name, tensor in tensors.items():
        if len(tensor.shape) != len(layout):
            return Refusal(
                f"{name} has {len(tensor.shape)} dims; layout {layout} has {len(layout)}", TILING
            )
        if 0 in tensor.shape:
            return Refusal(f"{name} has shape {tensor.shape}; it cannot be empty", TILING)
    if call.cos.shape != call.sin.shape:
        return Refusal(f"cos has shape {call.cos.shape} and sin {call.sin.shape}", TILING)
    q, k, c = (dict(zip(layout, t.shape, strict=True)) for t in (call.query, call.key, call.cos))
    shapes = f"query has shape {call.query.shape}, key {call.key.shape} and cos {call.cos.shape}"
    if c["N"] != 1:
        return Refusal(f"{shapes}, layout {layout}; N of cos must be 1", TILING)
    if soc_family(call.soc) == A950:
        refusal = _check_apply_950(call, q, k, c, shapes)
    else:
        refusal = _check_apply_halves(call, q, k, c, shapes)
    if refusal is None and q["D"] != k["D"]:
        return Refusal(
            f"{shapes}; query and key must have the same D. CANN does not check it; cann_host does",
            None,
        )
    return refusal


def _check_apply_950(
    call: ApplyRotaryCall, q: dict[str, int], k: dict[str, int], c: dict[str, int], shapes: str
) -> Refusal | None:
    """apply_rotary_pos_emb_tiling_base_arch35.cpp"""
    if call.mode not in _APPLY_MODES:
        return Refusal(f"rotary_mode is {call.mode!r}; it must be {one_of(_APPLY_MODES)}", TILING)
    step = "T" if "T" in q else "S"
    if not q[step] == k[step] == c[step]:
        return Refusal(f"{shapes}; {step} must be the same", TILING)
    if "B" in q and (q["B"] != k["B"] or c["B"] not in (1, q["B"])):
        return Refusal(f"{shapes}; B must be the same, or 1 in cos", TILING)
    parts = _PARTS[call.mode]
    if not (k["D"] <= q["D"] <= _MOST_D[A950] and c["D"] <= q["D"]) or q["D"] % parts:
        return Refusal(
            f"{shapes}; D of query must be a multiple of {parts}, at most {_MOST_D[A950]}, and the "
            "largest",
            TILING,
        )
    if c["D"] % parts:
        return Refusal(
            f"{shapes}; D of cos must be a multiple of {parts}. CANN does not check it; cann_host "
            "does",
            None,
        )
    return None


def _check_apply_halves(
    call: ApplyRotaryCall, q: dict[str, int], k: dict[str, int], c: dict[str, int], shapes: str
) -> Refusal | None:
    """apply_rotary_pos_emb_tiling.cpp"""
    for letter in "BST":
        if letter in q and not q[letter] == k[letter] == c[letter]:
            return Refusal(f"{shapes}; {letter} must be the same", TILING)
    if c["D"] not in _APPLY_D or q["D"] not in _APPLY_D or q["D"] < c["D"]:
        return Refusal(
            f"{shapes}; D must be {one_of(map(str, _APPLY_D))}, in cos at most query's", TILING
        )
    heads = q["N"] + k["N"]
    if heads > 255:
        return Refusal(f"{shapes}; query and key can have 255 heads together", TILING)
    size, is_cast = _BYTES[call.query.dtype], call.query.dtype == "bfloat16"
    row, one = heads * c["D"] * max(size, 4 * is_cast), c["D"] * size
    cast = is_cast * c["D"] * 8
    rows = math.prod(size for letter, size in q.items() if letter in "BST")
    # a core that has one row needs less
    one_each = rows <= _vector_cores(call.soc)
    needed = cast + (4 * row + 2 * one if one_each else 5 * row + 4 * one)
    room = _UNIFIED_BUFFER[soc_family(call.soc) or ""]
    if needed > room:
        return Refusal(
            f"{shapes}; a row of all heads takes {needed} bytes of the unified buffer, which has "
            f"{room}",
            TILING,
        )
    return None


# ---- RotaryPositionEmbedding ----


def rotary_ignores(call: RotaryCall) -> str | None:
    """What an accepted RotaryPositionEmbedding does not do, if there is something."""
    family = soc_family(call.soc)
    if call.rotate is not None:
        return None if family == A2 else f"rotate has no effect on {call.soc}"
    if family == A950 or call.mode in (0, 1):
        return None
    return f"mode {call.mode} has no effect on {call.soc}: the kernel rotates halves"


@lru_cache(maxsize=4096)
def check_rotary(call: RotaryCall) -> Refusal | None:
    """Why a RotaryPositionEmbedding is refused; None if it is accepted."""
    x, cos, sin, rotate = call.x, call.cos, call.sin, call.rotate
    family = soc_family(call.soc)
    if rotate is not None and family != A2 and not call.is_graph:
        return Refusal(f"rotate is given; {call.soc} does not have it", INVALID)
    tensors = {"x": x, "cos": cos, "sin": sin} | ({} if rotate is None else {"rotate": rotate})
    if refusal := _check_dtypes(_DTYPES, call.soc, NO_KERNEL, **tensors):
        return refusal
    shapes = f"x has shape {x.shape} and cos {cos.shape}"
    allowed = (4,) if rotate is not None and family == A2 else (3, 4)
    if len(x.shape) not in allowed or not len(x.shape) == len(cos.shape) == len(sin.shape):
        dims = one_of(map(str, allowed))
        return Refusal(f"{shapes}, sin {sin.shape}; they must have {dims} dims each", TILING)
    if cos.shape != sin.shape:
        return Refusal(f"cos has shape {cos.shape} and sin {sin.shape}", TILING)
    if cos.shape[-1] != x.shape[-1]:
        return Refusal(f"{shapes}; their last dims must be the same", TILING)
    if 0 in x.shape or 0 in cos.shape:
        return Refusal(f"{shapes}; they cannot be empty", TILING)
    if family == A950:
        refusal = _check_rotary_950(call, shapes)
    elif rotate is not None and family == A2:
        refusal = _check_matrix(call, rotate, shapes)
    elif call.mode == 1:
        refusal = _check_interleaved(call, shapes)
    else:
        refusal = _check_halves(call, shapes)
    return refusal or _check_broadcast(x, cos)


def _check_broadcast(x: TensorDesc, cos: TensorDesc) -> Refusal | None:
    """The tilings choose a way of broadcasting by which dims differ, and do not check that the
    others are 1."""
    if all(c in (1, n) for n, c in zip(x.shape, cos.shape, strict=True)):
        return None
    return Refusal(
        f"x has shape {x.shape} and cos {cos.shape}; each dim of cos must be x's or 1 (refused by "
        "cann_host)",
        None,
    )


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """TND counts as a batch of one."""
    return shape if len(shape) == 4 else (1, *shape)


def _ways(call: RotaryCall) -> tuple[bool, ...]:
    """Which of the first three dims cos has as x."""
    x, cos = _padded(call.x.shape), _padded(call.cos.shape)
    return tuple(c == n for n, c in zip(x[:3], cos[:3], strict=True))


def _check_rotary_950(call: RotaryCall, shapes: str) -> Refusal | None:
    """rope_regbase_tiling_base.cpp"""
    if not 0 <= call.mode < len(ROTARY_MODES):
        return Refusal(f"mode is {call.mode}; it must be 0 to {len(ROTARY_MODES) - 1}", TILING)
    parts, d = _PARTS[ROTARY_MODES[call.mode]], call.x.shape[-1]
    if d > _MOST_D[A950] or d % parts:
        return Refusal(
            f"{shapes}; D must be a multiple of {parts}, at most {_MOST_D[A950]}", TILING
        )
    if any(c not in (1, n) for n, c in zip(call.x.shape, call.cos.shape, strict=True)):
        return Refusal(f"{shapes}; each dim of cos must be x's or 1", TILING)
    return None


def _check_halves(call: RotaryCall, shapes: str) -> Refusal | None:
    """rope_rotate_half_tiling.cpp"""
    d, family = call.x.shape[-1], soc_family(call.soc) or ""
    if d > _MOST_D[family] or d % 2:
        return Refusal(f"{shapes}; D must be even, at most {_MOST_D[family]}", TILING)
    if family == P310 and d not in _D_310P:
        return Refusal(f"{shapes}; {call.soc} allows D {one_of(map(str, _D_310P))}", TILING)
    x, cos, same = _padded(call.x.shape), _padded(call.cos.shape), _ways(call)
    if same == (False, True, True) and 1 not in cos[1:3]:
        return Refusal(f"{shapes}; this broadcast is not supported", TILING)
    if cos[:3] == (1, 1, 1) and 1 not in x[:3]:
        return Refusal(
            f"{shapes}; CANN takes it and its kernel computes nothing; cann_host refuses it", None
        )
    if not same[0] and not same[1] and cos[:3] != (1, 1, 1):
        # BNSD with few steps: the tiling asks for small operators instead, by measured thresholds
        repeats, steps = x[0] * x[1], x[2]
        is_aligned = (d // 2) % (32 // _BYTES[call.x.dtype]) == 0
        each_core = -(-steps // _vector_cores(call.soc))
        if (is_aligned and repeats > 8 * steps) or (
            not is_aligned and 2 * repeats > each_core and d < 80
        ):
            return Refusal(
                f"{shapes}; the tiling refuses BNSD with so many heads for {steps} steps", TILING
            )
    return None


def _check_interleaved(call: RotaryCall, shapes: str) -> Refusal | None:
    """rope_interleaved_tiling.cpp"""
    if soc_family(call.soc) == P310:
        return Refusal(f"mode is 1 (interleave); {call.soc} has half only", TILING)
    x, cos, same = _padded(call.x.shape), _padded(call.cos.shape), _ways(call)
    if not any(
        same[axis] and all(cos[other] == 1 for other in range(3) if other != axis)
        for axis in range(3)
    ):
        return Refusal(f"{shapes}; one dim of cos is x's, and two are 1", TILING)
    if x[-1] % 2:
        return Refusal(f"{shapes}; an odd D, which CANN takes, is refused by cann_host", None)
    size = _BYTES[call.x.dtype]
    step = 8 if size == 4 else 16
    aligned = -(-x[-1] // step) * step
    if aligned * (3 * size + 4 + (12 if size == 2 else 0)) > _UNIFIED_BUFFER[A2]:
        return Refusal(f"{shapes}; D is too large for the unified buffer", TILING)
    return None


def _check_matrix(call: RotaryCall, rotate: TensorDesc, shapes: str) -> Refusal | None:
    """rope_rotate_matrix_tiling.cpp"""
    d = call.x.shape[-1]
    if d > _MOST_D[A2] or d % 2:
        return Refusal(f"{shapes}; D must be even, at most {_MOST_D[A2]}", TILING)
    if rotate.shape != (d, d):
        return Refusal(f"rotate has shape {rotate.shape}; it must be {(d, d)}", TILING)
    if call.mode == 1:
        return _check_interleaved(call, shapes)
    return None


# ---- InterleaveRope, RotaryMul ----


@lru_cache(maxsize=4096)
def check_interleave_rope(call: RotaryCall) -> Refusal | None:
    """Why an InterleaveRope is refused; None if it is accepted. Ascend 950 has it as
    RotaryPositionEmbedding, for an eager call only."""
    x, cos, sin = call.x, call.cos, call.sin
    if soc_family(call.soc) == A950 and not call.is_graph:
        return check_rotary(call._replace(mode=ROTARY_MODES.index(INTERLEAVE_HALF)))
    if soc_family(call.soc) in (A950, P310):
        return Refusal(f"{call.soc} does not have InterleaveRope", NO_KERNEL)
    code = NO_KERNEL if call.is_graph else INVALID
    if refusal := _check_dtypes(_INTERLEAVE_DTYPES, call.soc, code, x=x, cos=cos, sin=sin):
        return refusal
    shapes = f"x has shape {x.shape} and cos {cos.shape}"
    if len(x.shape) != 4 or len(cos.shape) != 4 or 0 in x.shape or x.shape[-1] != _INTERLEAVE_D:
        return Refusal(f"{shapes}; they must be (B, N, S, {_INTERLEAVE_D}), not empty", TILING)
    if cos.shape != sin.shape:
        return Refusal(f"cos has shape {cos.shape} and sin {sin.shape}", TILING)
    b, _, s, d = x.shape
    if cos.shape not in ((b, 1, s, d), (b, 1, 1, d)):
        return Refusal(f"{shapes}; cos must be {(b, 1, s, d)} or {(b, 1, 1, d)}", TILING)
    return None


@lru_cache(maxsize=4096)
def check_rotary_mul(call: RotaryCall) -> Refusal | None:
    """Why cann_host refuses a RotaryMul; None if it computes it."""
    x, r1, r2 = call.x, call.cos, call.sin
    if refusal := _check_dtypes(_DTYPES, call.soc, NO_KERNEL, x=x, r1=r1, r2=r2):
        return refusal
    if len(x.shape) != 4 or len(r1.shape) != 4 or r1.shape != r2.shape or x.shape[-1] % 2:
        return Refusal(
            f"x has shape {x.shape}, r1 {r1.shape} and r2 {r2.shape}; cann_host takes four dims, "
            "an even D, and r2 like r1",
            None,
        )
    return _check_broadcast(x, r1)
