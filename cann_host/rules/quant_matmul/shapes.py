"""Formats and shapes of a quantized matmul."""

from __future__ import annotations

import math

from ..descriptors import ND, NZ
from ..products import A2, A950, P310
from ..refusal import INVALID, TILING, Refusal
from .call import QuantMatmulCall

__all__ = ["check_formats_and_shapes"]

LAST_DIM_MAX = 65535  # [tiling] LAST_AXIS_LIMIT
INT32_MAX = 2**31 - 1
DIMS = range(2, 7)  # [base] MIN_DIM_NUM_ND, MAX_DIM_NUM_ND


def check_formats_and_shapes(call: QuantMatmulCall) -> Refusal | None:
    """Why the formats or shapes are refused; None if they are accepted. The dtypes are already
    accepted."""
    return next((refusal for check in _IN_ORDER if (refusal := check(call))), None)


# ---- formats, dims ----


def _check_formats(call: QuantMatmulCall) -> Refusal | None:
    if call.x2.dtype == "int4" and call.x2.format == NZ and call.entry == "v5":
        # [check] CheckFormatInt4
        return call.refused(
            "int4 x2 is FRACTAL_NZ; aclnnQuantMatmulV5 takes ND, and npu_quant_matmul calls it for "
            "int4 except with a float32 scale that it packs itself"
        )
    if call.x1.format != ND:
        return call.refused(f"x1 has format {call.x1.format}; it must be ND")
    if call.entry == "nz" and call.x2.format != NZ:
        return call.refused(f"x2 has format {call.x2.format}; it must be FRACTAL_NZ")
    return None


def _check_number_of_dims(call: QuantMatmulCall) -> Refusal | None:
    x1_dims, x2_dims = len(call.x1.shape), len(call.x2.shape)
    if x1_dims not in DIMS or x2_dims not in DIMS:
        return call.refused(f"x1 has {x1_dims} dims and x2 {x2_dims}; 2 to 6 are allowed")
    return None


def _check_int4(call: QuantMatmulCall) -> Refusal | None:
    """[proto] and [check] CheckShapeInt4."""
    x1, x2 = call.x1, call.x2
    if x1.dtype != "int4":
        return None
    if x1.is_transposed:
        return call.refused("transpose_x1 is not possible with int4 inputs")
    has_batches = call.is_graph and (call.pertoken_scale is not None or call.family == A950)
    if len(x2.shape) != 2 and not has_batches:
        return call.refused(f"int4 x2 has {len(x2.shape)} dims; it must have 2")
    if x1.shape[-1] % 2 or x2.shape[-1] % 2:
        return call.refused(
            f"the last dims of int4 x1 and x2 are {x1.shape[-1]} and {x2.shape[-1]}; "
            "they must be even"
        )
    return None


def _check_sizes(call: QuantMatmulCall) -> Refusal | None:
    x1, x2 = call.x1, call.x2
    if max(*x1.shape, *x2.shape) > INT32_MAX:  # [tiling] CheckShapeInBoundary
        return call.refused(f"a dim of x1 {x1.shape} or x2 {x2.shape} exceeds int32")
    if 0 in x1.shape or 0 in x2.shape:
        return call.refused(f"x1 is {x1.shape} and x2 {x2.shape}; they cannot be empty")
    if x1.columns != x2.rows:
        return call.refused(f"k is {x1.columns} in x1 {x1.shape} and {x2.rows} in x2 {x2.shape}")
    return None


def _check_last_dims(call: QuantMatmulCall) -> Refusal | None:
    """[tiling] CheckShapeInBoundary and [doc] constraints: int8 per-token calls with a scale of one
    dim are exempt on A2; [arch35] has no such limit."""
    last = call.x1.shape[-1], call.x2.shape[-1]
    per_token = call.pertoken_scale is not None and len(call.scale.shape) == 1
    exempt = call.family == A950 or (call.family == A2 and call.x1.dtype == "int8" and per_token)
    if max(last) <= LAST_DIM_MAX or exempt:
        return None
    return call.refused(
        f"the last dims of x1 and x2 are {last[0]} and {last[1]}; "
        f"they must not exceed {LAST_DIM_MAX}",
        INVALID if call.has_checks_of_v4 else TILING,  # [nz] checks this, [check] does not
    )


def _check_batch(call: QuantMatmulCall) -> Refusal | None:
    x1, x2 = call.x1.shape, call.x2.shape
    if call.batch is None:
        return call.refused(f"the batch dims of x1 {x1} and x2 {x2} differ")
    if call.family == P310 and call.pertoken_scale is not None and x1[:-2] != x2[:-2]:  # [arch20]
        return call.refused(f"the batch dims of x1 {x1} and x2 {x2} must be equal", TILING)
    return None


# ---- shapes of the other tensors ----


def _check_scale(call: QuantMatmulCall) -> Refusal | None:
    """Before Ascend 950, [tiling] CheckShape accepts 2-D scales, such as the (1, n) that
    TransQuantParamV2 returns, and [nz] CheckDimRange accepts scales with as many dims as x2. Both
    check the first dim only."""
    shape, n = call.scale.shape, call.x2.columns
    dims = 2 if call.is_graph else len(call.x2.shape) if call.has_checks_of_v4 else 1
    by_first_dim = call.family != A950 and len(shape) == dims and shape[0] in (1, n)
    if shape not in {(1,), (n,)} and not by_first_dim:
        return call.refused(f"scale has shape {shape}; it must be (1,) or ({n},)")
    if math.prod(shape) not in (1, n):
        return Refusal(
            f"scale has shape {shape}; CANN checks its first dim only, and the kernel reads {n} "
            f"values: pass (1,), ({n},) or (1, {n}) (cann_host's own refusal, not CANN's)",
            None,
        )
    return None


def _check_offset(call: QuantMatmulCall) -> Refusal | None:
    looks = not call.is_graph or (call.family == A950 and call.out_dtype == "int8")
    if call.offset is None or not looks:
        return None
    shape, n = call.offset.shape, call.x2.columns
    if shape in {(1,), (n,)}:
        return None
    return call.refused(f"offset has shape {shape}; it must be (1,) or ({n},)")


def _check_pertoken_scale(call: QuantMatmulCall) -> Refusal | None:
    pertoken, m = call.pertoken_scale, call.x1.rows
    if pertoken is None or pertoken.shape == (m,):
        return None
    return call.refused(f"pertoken_scale has shape {pertoken.shape}; it must be ({m},)")


def _check_bias(call: QuantMatmulCall) -> Refusal | None:
    """[check] CheckBiasShape: a bias of three dims needs exactly one batch dim in the result."""
    if call.bias is None:
        return None
    n, batch = call.x2.columns, call.batch or ()
    allowed: list[tuple[int, ...]] = [(n,)]
    int4_takes_three = call.is_graph and call.family == A950
    if len(batch) == 1 and (call.x1.dtype != "int4" or int4_takes_three):
        allowed.append((batch[0], 1, n))
    return _check_one_of(call, "bias", call.bias.shape, allowed)


def _check_out(call: QuantMatmulCall) -> Refusal | None:
    """[check] CheckOutShape: with 2-D inputs out may also be (m, 1, n)."""
    if call.out_shape is None:
        return None
    m, n = call.x1.rows, call.x2.columns
    allowed: list[tuple[int, ...]] = [(*(call.batch or ()), m, n)]
    if len(call.x1.shape) == len(call.x2.shape) == 2:
        allowed.append((m, 1, n))
    return _check_one_of(call, "out", call.out_shape, allowed)


def _check_one_of(
    call: QuantMatmulCall, name: str, shape: tuple[int, ...], allowed: list[tuple[int, ...]]
) -> Refusal | None:
    if shape in allowed:
        return None
    shapes = " or ".join(map(str, allowed))
    return call.refused(f"{name} has shape {shape}; it must be {shapes}")


def _check_fractal_nz(call: QuantMatmulCall) -> Refusal | None:
    """[check] CheckDimValue, [base] CheckShape4WeightNz."""
    if call.x2_format != NZ:
        return None
    k, n, storage = call.x2.rows, call.x2.columns, call.x2.storage_shape
    if 1 in (k, n):
        return call.refused(f"x2 is FRACTAL_NZ with k={k} and n={n}; neither may be 1")
    if storage is None:
        return None
    rows, columns = call.x2.shape[-2:]
    c0 = 64 if call.x1.dtype == "int4" else 32
    wanted = (-(-columns // c0), -(-rows // 16), 16, c0)
    if storage[-4:] == wanted:
        return None
    return call.refused(
        f"x2 is FRACTAL_NZ with storage shape {storage}; its last dims must be {wanted}"
    )


def _check_transposition(call: QuantMatmulCall) -> Refusal | None:
    """[base] AnalyzeAttrs."""
    x1_wrong = call.is_graph and call.x1.is_transposed
    x2_wrong = call.x2.format == NZ and not call.x2.is_transposed
    if call.family == P310 and (x1_wrong or x2_wrong):
        return call.refused(
            "this product only supports transpose_x1=False with transpose_x2=True", TILING
        )
    return None


# in the order in which CANN checks; each check relies on the earlier ones
_IN_ORDER = (
    _check_formats,
    _check_number_of_dims,
    _check_int4,
    _check_sizes,
    _check_last_dims,
    _check_batch,
    _check_scale,
    _check_offset,
    _check_pertoken_scale,
    _check_bias,
    _check_out,
    _check_fractal_nz,
    _check_transposition,
)
