"""What CANN refuses in a quantized matmul and the operators around it, as tables.

The stand-in must reject what a device rejects, else a green run here would lie. Both ways into
the operator use this file: compiled graphs (`cann_host.executor`) and eager calls
(`cann_host.aclnn`). It is written from CANN's public operator sources and shares nothing with
`lq_graph.plan`, so each checks the other.

Sources, in the public repository hicann/ops-nn under `matmul/quant_batch_matmul_v3`:

    [check]  op_api/quant_matmul_checker.cpp                     dtype and shape checks of aclnn
    [tiling] op_host/op_tiling/quant_batch_matmul_v3_tiling.cpp  the same of the graph operator
    [arch35] op_host/op_tiling/arch35/quant_batch_matmul_v3_checker.cpp  and of Ascend 950's
    [v5]     ../quant_batch_matmul_v4/op_host/op_api/aclnn_quant_matmul_v5.cpp
    [base]   op_host/op_tiling/quant_batch_matmul_v3_tiling_base.cpp
    [bin]    op_host/config/<soc>/quant_batch_matmul_v3_binary.json  kernels that exist
    [doc]    docs/aclnnQuantMatmulV4.md
    [proto]  op_graph/quant_batch_matmul_v3_proto.h

and under `quant`: dynamic_quant/op_host/op_api/aclnn_dynamic_quant.cpp, its definition and tiling
beside it, ascend_quant_v2/op_host/op_api/aclnn_ascend_quant_v3.cpp and its definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = [
    "KERNELS",
    "Kernel",
    "check_ascend_quant",
    "check_dynamic_quant",
    "check_quant_matmul",
    "check_trans_quant_param",
    "soc_family",
]

INVALID = 161002  # ACLNN_ERR_PARAM_INVALID
TILING = 561002  # ACLNN_ERR_INNER_TILING_ERROR
NO_KERNEL = 561003  # ACLNN_ERR_INNER_FIND_KERNEL_ERROR

LAST_DIM_MAX = 65535  # [tiling] LAST_AXIS_LIMIT
INT32_MAX = 2**31 - 1
DIMS = range(2, 7)  # [base] MIN_DIM_NUM_ND, MAX_DIM_NUM_ND

ND = "ND"
NZ = "FRACTAL_NZ"

_PACKED = ("int64", "uint64")
_FLOATS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Kernel:
    """One way a family of chips can compute a quantized matmul.

    Attributes:
        family: see `soc_family`.
        x: dtype of x1 and x2.
        pertoken: whether pertoken_scale is present (then float32).
        scale: dtypes scale may have.
        bias: dtypes bias may have; it may always be absent.
        offset: whether an offset may be given.
        out: dtype of the result.
        x2_formats: formats x2 may have.
        source: where it is written.
    """

    family: str
    x: str
    pertoken: bool
    scale: tuple[str, ...]
    bias: tuple[str, ...]
    offset: bool
    out: str
    x2_formats: tuple[str, ...]
    source: str


_A2 = "Atlas A2/A3"
_310P = "Atlas inference (310P)"
_950 = "Ascend 950"
_BOTH = (ND, NZ)
_PT_BF16 = ("int32", "bfloat16", "float32")
_PT_FP16 = ("int32", "float16", "float32")
_INT = ("int32",)
_PLAIN = "[check] CheckL0c2outAndL0c2ubPertensorPerchannel, [tiling] CheckDtypeOnOnlyL0c2out, [bin]"
_PT = "[check] CheckOnlyL0c2outPertoken, [tiling] CheckDtypeOnOnlyL0c2outForPertoken, [bin]"
_A4W4 = (
    "[check] CheckDtypeValidOnOnlyL0c2outForA4W4, [tiling] CheckDtypeOnOnlyL0c2outForA4W4, [bin]"
)
_L0C2UB = "[tiling] CheckDtypeOnOnlyL0c2ub, [bin] ascend310p"
_ARCH35 = "[check] CheckL0c2outOrL0c2ubPertensorPerchannel4Int8Input, [arch35], [bin] ascend950"
_ARCH35_PT = "[check] CheckL0c2outOrL0c2ubPertoken, [arch35] CheckScaleDtypeWithPertoken, [bin]"

KERNELS: tuple[Kernel, ...] = (
    # family, x, pertoken, scale, bias, offset, out, x2 formats, source
    Kernel(_A2, "int8", False, _PACKED, _INT, True, "int8", _BOTH, _PLAIN),
    Kernel(_A2, "int8", False, _PACKED, _INT, False, "float16", _BOTH, _PLAIN),
    Kernel(_A2, "int8", False, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _PLAIN),
    Kernel(_A2, "int8", False, _FLOATS, _INT, False, "int32", _BOTH, _PLAIN),
    Kernel(_A2, "int8", True, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _PT),
    Kernel(_A2, "int8", True, ("float32",), _PT_FP16, False, "float16", _BOTH, _PT),
    Kernel(_A2, "int4", False, _PACKED, _INT, False, "float16", _BOTH, _A4W4),
    Kernel(_A2, "int4", True, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _PT),
    Kernel(_A2, "int4", True, ("float32",), _PT_FP16, False, "float16", _BOTH, _PT),
    Kernel(_950, "int8", False, _PACKED, _INT, True, "int8", _BOTH, _ARCH35),
    Kernel(_950, "int8", False, _PACKED, _INT, False, "float16", _BOTH, _ARCH35),
    Kernel(_950, "int8", False, _PACKED, _INT, False, "bfloat16", _BOTH, _ARCH35),
    Kernel(_950, "int8", False, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _ARCH35),
    Kernel(_950, "int8", False, _FLOATS, _INT, False, "int32", _BOTH, _ARCH35),
    Kernel(_950, "int8", True, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _ARCH35_PT),
    Kernel(_950, "int8", True, ("float32",), _PT_FP16, False, "float16", _BOTH, _ARCH35_PT),
    Kernel(_950, "int4", False, _PACKED, _INT, False, "float16", (ND,), _ARCH35),
    Kernel(_950, "int4", True, _FLOATS, _PT_BF16, False, "bfloat16", (ND,), _ARCH35_PT),
    Kernel(_950, "int4", True, ("float32",), _PT_FP16, False, "float16", (ND,), _ARCH35_PT),
    Kernel(_310P, "int8", False, _PACKED, _INT, True, "int8", (NZ,), _L0C2UB),
    Kernel(_310P, "int8", False, _PACKED, _INT, False, "float16", (NZ,), _L0C2UB),
)

_SOC_PREFIXES = (
    ("Ascend910_93", _A2),
    ("Ascend910B", _A2),
    ("Ascend310P", _310P),
    ("Ascend910_95", _950),
    ("Ascend950", _950),
)


def soc_family(soc: str) -> str | None:
    """The family whose rules hold for a SoC name such as Ascend910B2; None if it has none here."""
    return next((family for prefix, family in _SOC_PREFIXES if soc.startswith(prefix)), None)


@lru_cache(maxsize=4096)  # a model asks the same few questions on every call
def check_quant_matmul(
    *,
    soc: str,
    x1_dtype: str,
    x1_shape: tuple[int, ...],
    x2_dtype: str,
    x2_shape: tuple[int, ...],
    scale_dtype: str,
    scale_shape: tuple[int, ...],
    out_dtype: str,
    offset_dtype: str | None = None,
    offset_shape: tuple[int, ...] | None = None,
    bias_dtype: str | None = None,
    bias_shape: tuple[int, ...] | None = None,
    pertoken_dtype: str | None = None,
    pertoken_shape: tuple[int, ...] | None = None,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    x1_format: str = ND,
    x2_format: str = ND,
    x2_storage_shape: tuple[int, ...] | None = None,
    out_shape: tuple[int, ...] | None = None,
    graph: bool = False,
) -> str | None:
    """Say why CANN would refuse this quantized matmul.

    Shapes are logical (origin) shapes: an int32 tensor that carries int4 comes as "int4" with
    eight times the last dim. An absent optional tensor has dtype None.

    Args:
        soc: SoC name, such as Ascend910B2.
        x1_dtype: dtype name as in torch without the prefix: "int8", "int4", "uint64", ...
        x1_shape: (..., m, k), or (..., k, m) if transpose_x1.
        x2_dtype: like x1_dtype.
        x2_shape: (..., k, n), or (..., n, k) if transpose_x2.
        scale_dtype: dtype name.
        scale_shape: (1,) or (n,).
        out_dtype: dtype name.
        offset_dtype: dtype name or None.
        offset_shape: (1,) or (n,).
        bias_dtype: dtype name or None.
        bias_shape: (n,) or (batch, 1, n).
        pertoken_dtype: dtype name or None.
        pertoken_shape: (m,).
        transpose_x1: whether x1 is stored transposed.
        transpose_x2: whether x2 is stored transposed.
        x1_format: "ND" or "FRACTAL_NZ".
        x2_format: "ND" or "FRACTAL_NZ".
        x2_storage_shape: the storage shape of a FRACTAL_NZ x2, if known.
        out_shape: shape of the tensor an eager call writes to, if any.
        graph: the check happens inside a graph, where tiling reports what aclnn's own parameter
            check reports for an eager call.

    Returns:
        None if accepted, else a text that names the argument and CANN's error code.
    """
    code = TILING if graph else INVALID

    def refuse(text: str, error: int = code) -> str:
        names = {INVALID: "invalid parameter", TILING: "tiling", NO_KERNEL: "kernel not found"}
        return f"{text} (CANN error {error}, {names[error]}; {soc})"

    family = soc_family(soc)
    if family is None:
        known = ", ".join(prefix for prefix, _ in _SOC_PREFIXES)
        return refuse(f"cann_host has no rules for this SoC; it knows {known}", NO_KERNEL)

    arch35 = family == _950
    if arch35 and not graph and min(len(x1_shape), len(x2_shape)) >= 2:
        # [v5] returns before any other check; with a FRACTAL_NZ x2 for m = 0 only
        m = x1_shape[-1 if transpose_x1 else -2]
        n = x2_shape[-2 if transpose_x2 else -1]
        if m == 0 or (n == 0 and x2_format == ND):
            return None
    if x1_dtype != x2_dtype:
        return refuse(f"x1 is {x1_dtype} and x2 is {x2_dtype}; they must be the same")
    has_pertoken = pertoken_dtype is not None
    rows = [k for k in KERNELS if k.family == family]
    for argument, given, matches in (
        ("x1 dtype", x1_dtype, lambda k: k.x == x1_dtype),
        (
            "pertoken_scale",
            "given" if has_pertoken else "absent",
            lambda k: k.pertoken == has_pertoken,
        ),
        ("output dtype", out_dtype, lambda k: k.out == out_dtype),
        ("scale dtype", scale_dtype, lambda k: scale_dtype in k.scale),
        ("bias dtype", bias_dtype, lambda k: bias_dtype is None or bias_dtype in k.bias),
        (
            "offset",
            "given" if offset_dtype else "absent",
            lambda k: offset_dtype is None or k.offset,
        ),
        ("x2 format", x2_format, lambda k: x2_format in k.x2_formats),
    ):
        left = [k for k in rows if matches(k)]
        if not left:
            return refuse(f"{argument} {given} is not supported here; {_allowed(argument, rows)}")
        rows = left
    if has_pertoken and pertoken_dtype != "float32":
        return refuse(f"pertoken_scale is {pertoken_dtype}; it must be float32")
    if offset_dtype is not None and offset_dtype != "float32":
        return refuse(f"offset is {offset_dtype}; it must be float32")
    if x1_format != ND:
        return refuse(f"x1 has format {x1_format}; it must be ND")

    if len(x1_shape) not in DIMS or len(x2_shape) not in DIMS:
        return refuse(f"x1 has {len(x1_shape)} dims and x2 {len(x2_shape)}; 2 to 6 are allowed")
    if x1_dtype == "int4":
        # [proto] and [check] CheckShapeInt4
        if transpose_x1:
            return refuse("transpose_x1 is not possible with int4 inputs")
        if len(x2_shape) != 2 and not (graph and (has_pertoken or arch35)):
            return refuse(f"int4 x2 has {len(x2_shape)} dims; it must have 2")
        if x1_shape[-1] % 2 or x2_shape[-1] % 2:
            return refuse(
                f"the last dims of int4 x1 and x2 are {x1_shape[-1]} and {x2_shape[-1]}; "
                "they must be even"
            )
    m, k = (x1_shape[-1], x1_shape[-2]) if transpose_x1 else (x1_shape[-2], x1_shape[-1])
    k2, n = (x2_shape[-1], x2_shape[-2]) if transpose_x2 else (x2_shape[-2], x2_shape[-1])
    if max(*x1_shape, *x2_shape) > INT32_MAX:  # [tiling] CheckShapeInBoundary
        return refuse(f"a dim of x1 {tuple(x1_shape)} or x2 {tuple(x2_shape)} exceeds int32")
    if 0 in x1_shape or 0 in x2_shape:
        return refuse(f"x1 is {tuple(x1_shape)} and x2 {tuple(x2_shape)}; they cannot be empty")
    if k != k2:
        return refuse(f"k is {k} in x1 {tuple(x1_shape)} and {k2} in x2 {tuple(x2_shape)}")
    # [tiling] CheckShapeInBoundary, [doc] constraints: pertoken with a 1-D float scale is exempt,
    # and [arch35] has no such limit
    pertoken_1d = x1_dtype == "int8" and has_pertoken and len(scale_shape) == 1
    exempt = arch35 or (family == _A2 and pertoken_1d)
    if max(x1_shape[-1], x2_shape[-1]) > LAST_DIM_MAX and not exempt:
        return refuse(
            f"the last dims of x1 and x2 are {x1_shape[-1]} and {x2_shape[-1]}; "
            f"they must not exceed {LAST_DIM_MAX}"
        )
    batch = _broadcast(x1_shape[:-2], x2_shape[:-2])
    if batch is None:
        return refuse(f"the batch dims of x1 {tuple(x1_shape)} and x2 {tuple(x2_shape)} differ")

    # [tiling] CheckShape lets 2-D scales through: a graph may carry the (1, n) that
    # TransQuantParamV2 gives for (1, n).
    if tuple(scale_shape) not in {(1,), (n,)} and not (graph and tuple(scale_shape) == (1, n)):
        return refuse(f"scale has shape {tuple(scale_shape)}; it must be (1,) or ({n},)")
    if offset_shape is not None and tuple(offset_shape) not in {(1,), (n,)}:
        return refuse(f"offset has shape {tuple(offset_shape)}; it must be (1,) or ({n},)")
    if pertoken_shape is not None and tuple(pertoken_shape) != (m,):
        return refuse(f"pertoken_scale has shape {tuple(pertoken_shape)}; it must be ({m},)")
    if bias_shape is not None:
        allowed: list[tuple[int, ...]] = [(n,)]
        # [check] CheckBiasShape: a 3-D bias needs exactly one batch dim in the result
        if len(batch) == 1 and (x1_dtype != "int4" or (graph and arch35)):
            allowed.append((batch[0], 1, n))
        if tuple(bias_shape) not in allowed:
            shapes = " or ".join(map(str, allowed))
            return refuse(f"bias has shape {tuple(bias_shape)}; it must be {shapes}")

    if out_shape is not None:
        # [check] CheckOutShape: for 2-D inputs out may also be (m, 1, n)
        wanted_out = [(*batch, m, n)] + ([(m, 1, n)] if len(x1_shape) == len(x2_shape) == 2 else [])
        if tuple(out_shape) not in wanted_out:
            shapes = " or ".join(map(str, wanted_out))
            return refuse(f"out has shape {tuple(out_shape)}; it must be {shapes}")

    if x2_format == NZ:
        # [check] CheckDimValue, [base] CheckShape4WeightNz
        if 1 in (k, n):
            return refuse(f"x2 is FRACTAL_NZ with k={k} and n={n}; neither may be 1")
        if x2_storage_shape is not None:
            rows_, cols = (n, k) if transpose_x2 else (k, n)
            c0 = 64 if x1_dtype == "int4" else 32
            wanted = (-(-cols // c0), -(-rows_ // 16), 16, c0)
            if tuple(x2_storage_shape[-4:]) != wanted:
                return refuse(
                    f"x2 is FRACTAL_NZ with storage shape {tuple(x2_storage_shape)}; "
                    f"its last dims must be {wanted}"
                )
    if family == _310P and (transpose_x1 or not transpose_x2):
        # [base] AnalyzeAttrs
        return refuse("this product only supports transpose_x1=False with transpose_x2=True")
    return None


def check_trans_quant_param(
    scale_shape: Sequence[int], offset_shape: Sequence[int] | None, round_mode: int = 0
) -> str | None:
    """Say why the graph operator TransQuantParamV2 would refuse these shapes.

    Source: hicann/ops-nn `quant/trans_quant_param_v2/op_host`: tiling for the shapes of scale and
    the round mode; for the result, InferShape takes scale's shape (before arch35) even if offset
    is longer, so a (1,) scale with an (n,) offset has room for one parameter only.

    Args:
        scale_shape: (n,) or (1, n).
        offset_shape: the same, or None.
        round_mode: 0 or 1.

    Returns:
        None if accepted, else a text with CANN's error code.
    """
    if round_mode not in (0, 1):
        return f"round_mode is {round_mode}; it must be 0 or 1 (CANN error {TILING}, tiling)"
    scale = tuple(scale_shape)
    if len(scale) not in (1, 2) or 0 in scale or (len(scale) == 2 and scale[0] != 1):
        return f"scale has shape {scale}; it must be (n,) or (1, n) (CANN error {TILING}, tiling)"
    if offset_shape is None or tuple(offset_shape) == scale:
        return None
    offset = tuple(offset_shape)
    if len(offset) == 1 and len(scale) == 1 and offset == (1,):
        return None
    if scale[-1] == 1 and offset[-1] > 1:
        return (
            f"scale has shape {scale} and offset {offset}: InferShape gives the result scale's "
            "shape, too small for the parameters; expand scale first "
            f"(CANN error {INVALID}, invalid parameter)"
        )
    if offset[-1] in (1, scale[-1]):
        return None
    return (
        f"offset has shape {offset} but scale {scale}; they must agree or have one element "
        f"(CANN error {INVALID}, invalid parameter)"
    )


# family: (dtypes of x, dtypes of y). Graphs know int4, aclnn also int32 that carries eight of them.
_DYNAMIC_QUANT = {
    _310P: (("float16",), ("int8",)),
    _A2: (("float16", "bfloat16"), ("int8", "int4", "int32")),
    _950: (("float16", "bfloat16"), ("int8", "int4", "int32")),
}
_ASCEND_QUANT = {
    _310P: (("float16", "float32"), ("int8",)),
    _A2: (("float16", "bfloat16", "float32"), ("int8", "int4", "int32")),
    _950: (("float16", "bfloat16", "float32"), ("int8", "int4", "int32")),
}


def _check_activation(
    table: dict[str, tuple[tuple[str, ...], tuple[str, ...]]],
    soc: str,
    x: str,
    x_shape: Sequence[int],
    y: str,
    graph: bool,
) -> str | None:
    """What the two operators refuse alike, without an error code."""
    inputs, outputs = table.get(soc_family(soc) or "", ((), ()))
    outputs = tuple(dtype for dtype in outputs if not (graph and dtype == "int32"))
    if not inputs:
        return f"cann_host has no rules for {soc}"
    if x not in inputs:
        return f"x is {x}; {soc} allows {' or '.join(inputs)}"
    if y not in outputs:
        return f"y is {y}; {soc} allows {' or '.join(outputs)}"
    parts = {"int4": 2, "int32": 8}.get(y, 1)
    if x_shape and x_shape[-1] % parts:
        return f"x has last dim {x_shape[-1]}; for {y} it must be a multiple of {parts}"
    return None


def _coded(text: str | None, graph: bool) -> str | None:
    if text is None:
        return None
    return f"{text} (CANN error {TILING if graph else INVALID}, " + (
        "tiling)" if graph else "invalid parameter)"
    )


def check_dynamic_quant(
    soc: str,
    x: str,
    x_shape: Sequence[int],
    y: str,
    smooth: tuple[str, Sequence[int]] | None = None,
    groups: tuple[str, Sequence[int]] | None = None,
    graph: bool = False,
) -> str | None:
    """Why a per-token DynamicQuant is refused; None if it is not.

    Args:
        soc: name of the chip.
        x: dtype of the input, and its shape.
        y: dtype of the quantized output; "int32" for eight int4 each.
        smooth: dtype and shape of smooth_scales, if given: a factor for each of the last dim, and
            with groups a row of them for each group.
        groups: dtype and shape of group_index, if given.
        graph: whether it is the graph's operator, whose tiling also refuses rows without elements.
    """
    text = _check_activation(_DYNAMIC_QUANT, soc, x, x_shape, y, graph)
    if text is None and not 2 <= len(x_shape) <= 8:
        text = f"x has {len(x_shape)} dims; it must have 2 to 8"
    if text is None and graph and x_shape[-1] == 0:
        text = f"x has shape {tuple(x_shape)}; its last dim cannot be 0"
    if text is None:
        text = _check_smooth(soc, x, x_shape, smooth, groups)
    return _coded(text, graph)


def _check_smooth(
    soc: str,
    x: str,
    x_shape: Sequence[int],
    smooth: tuple[str, Sequence[int]] | None,
    groups: tuple[str, Sequence[int]] | None,
) -> str | None:
    """What DynamicQuant refuses of smooth_scales and group_index, without an error code."""
    wanted: tuple[int, ...] = (x_shape[-1],)
    if groups is not None:
        if smooth is None or soc_family(soc) == _310P:
            return "group_index is given without smooth_scales, or on 310P"
        if groups[0] != "int32" or len(groups[1]) != 1 or not 1 <= groups[1][0] <= 1024:
            given = f"{groups[0]} {tuple(groups[1])}"
            return f"group_index is {given}; it must be int32, 1 to 1024 of them"
        wanted = (groups[1][0], *wanted)
    if smooth is not None and (smooth[0], tuple(smooth[1])) != (x, wanted):
        return f"smooth_scales is {smooth[0]} {tuple(smooth[1])}; it must be {x} {wanted}"
    return None


def check_ascend_quant(
    soc: str,
    x: str,
    x_shape: Sequence[int],
    scale: str,
    scale_shape: Sequence[int],
    offset: str | None,
    offset_shape: Sequence[int] | None,
    y: str,
    axis: int,
    graph: bool = False,
) -> str | None:
    """Why an AscendQuant is refused; None if it is not. Dtypes and shapes of its tensors.

    Args:
        axis: the dim of x that scale is along.
        graph: whether it is the graph's operator, whose definition wants one dtype for all.
    """
    text = _check_activation(_ASCEND_QUANT, soc, x, x_shape, y, graph)
    if text is None:
        text = _check_factors(
            soc, x, x_shape, scale, scale_shape, offset, offset_shape, axis, graph
        )
    return _coded(text, graph)


def _check_factors(
    soc: str,
    x: str,
    x_shape: Sequence[int],
    scale: str,
    scale_shape: Sequence[int],
    offset: str | None,
    offset_shape: Sequence[int] | None,
    axis: int,
    graph: bool,
) -> str | None:
    """What AscendQuant refuses of scale, offset and axis, without an error code."""
    family = soc_family(soc) or ""
    floats = _ASCEND_QUANT[family][0]
    if scale not in floats:
        return f"scale is {scale}; {soc} allows {' or '.join(floats)}"
    if offset is not None and (offset, offset_shape) != (scale, scale_shape):
        return f"offset is {offset} {offset_shape} and scale {scale} {scale_shape}; they must agree"
    if scale != x and (graph or x != "float32"):
        return f"scale is {scale} and x {x}; they must be of one dtype"
    dims = len(x_shape)
    if not 1 <= dims <= 8:
        return f"x has {dims} dims; it must have 1 to 8"
    last, before = axis in (-1, dims - 1), axis in (-2, dims - 2) and -dims <= axis < dims
    if not last and not (before and family != _310P):
        return f"axis is {axis}; it must be one of the last two dims, on 310P the last"
    along, size = axis % dims, x_shape[axis]
    one_dim = len(scale_shape) == 1
    wide = [1] * along + [size] + [1] * (dims - along - 1)
    if not (one_dim and scale_shape[0] in (1, size)) and list(scale_shape) not in (
        wide,
        [1] * dims,
    ):
        return f"scale has shape {tuple(scale_shape)}; it must have 1 or {size} values"
    return None


def _allowed(argument: str, rows: list[Kernel]) -> str:
    """What one argument may be in the rows that the arguments before it left over."""
    values: set[str] = set()
    for row in rows:
        values.update(
            {
                "x1 dtype": (row.x,),
                "pertoken_scale": ("given" if row.pertoken else "absent",),
                "output dtype": (row.out,),
                "scale dtype": row.scale,
                "bias dtype": (*row.bias, "absent"),
                "offset": ("given or absent" if row.offset else "absent",),
                "x2 format": row.x2_formats,
            }[argument]
        )
    row = rows[0]
    fixed = {
        "pertoken_scale": f"x1 {row.x}",
        "output dtype": f"x1 {row.x}, pertoken_scale {'given' if row.pertoken else 'absent'}",
    }
    context = fixed.get(
        argument,
        f"x1 {row.x}, output {row.out}, pertoken_scale {'given' if row.pertoken else 'absent'}",
    )
    where = "" if argument == "x1 dtype" else f" with {context}"
    return f"allowed{where}: {', '.join(sorted(values))}"


def _broadcast(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...] | None:
    """Broadcast batch dims; None if they do not."""
    size = max(len(left), len(right))
    padded = [(1,) * (size - len(dims)) + tuple(dims) for dims in (left, right)]
    if any(a != b and 1 not in (a, b) for a, b in zip(*padded, strict=True)):
        return None
    return tuple(max(a, b) for a, b in zip(*padded, strict=True))
