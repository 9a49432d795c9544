"""What CANN refuses in a quantized matmul and the operators around it, as tables.

The stand-in must reject what a device rejects, else a green run here would lie. Both ways into
the operator use this file: compiled graphs (`cann_host.executor`) and eager calls
(`cann_host.aclnn`). It is written from CANN's public operator sources and shares nothing with
`lq_graph.rules.plan`, so each checks the other.

Sources, in the public repository hicann/ops-nn under `matmul/quant_batch_matmul_v3`:

    [check]  op_api/quant_matmul_checker.cpp                     dtype and shape checks of aclnn
    [tiling] op_host/op_tiling/quant_batch_matmul_v3_tiling.cpp  the same of the graph operator
    [arch35] op_host/op_tiling/arch35/quant_batch_matmul_v3_checker.cpp  and of Ascend 950's
    [v5]     ../quant_batch_matmul_v4/op_host/op_api/aclnn_quant_matmul_v5.cpp
    [nz]     op_api/aclnn_quant_matmul_v4.cpp                    aclnnQuantMatmulWeightNz is here
    [arch20] op_host/op_tiling/arch20                            pertoken on 310P
    [def]    op_host/quant_batch_matmul_v3_def.cpp               dtypes of the graph operator
    [base]   op_host/op_tiling/quant_batch_matmul_v3_tiling_base.cpp
    [bin]    op_host/config/<soc>/quant_batch_matmul_v3_binary.json  kernels that exist
    [doc]    docs/aclnnQuantMatmulV4.md
    [proto]  op_graph/quant_batch_matmul_v3_proto.h

and beside it, for each operator its definition, tiling, InferShape and what aclnn checks:
quant/trans_quant_param_v2, dynamic_quant and dynamic_quant_v2, ascend_quant_v2, quantize,
norm/rms_norm, add_rms_norm and layer_norm_v4; definitions of activation/*.

What CANN refuses is said with its code. What it takes, and a kernel then reads from beside its
inputs, or what the stand-in does not compute, is refused in the stand-in's own name, with none.
tests/support/cann_tables.py asks CANN's public tests the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = [
    "DEFINED",
    "KERNELS",
    "Kernel",
    "PackedWords",
    "ascend_quant_axis",
    "check_ascend_quant",
    "check_definition",
    "check_dynamic_quant",
    "check_layer_norm",
    "check_quant_matmul",
    "check_quantize",
    "check_rms_norm",
    "check_trans_quant_param",
    "dynamic_quant_ignores",
    "dynamic_quant_scale_shape",
    "packed_words",
    "soc_family",
    "trans_quant_param_shape",
]

INVALID = 161002  # ACLNN_ERR_PARAM_INVALID
TILING = 561002  # ACLNN_ERR_INNER_TILING_ERROR
NO_KERNEL = 561003  # ACLNN_ERR_INNER_FIND_KERNEL_ERROR
_NAMES = {INVALID: "invalid parameter", TILING: "tiling", NO_KERNEL: "kernel not found"}

LAST_DIM_MAX = 65535  # [tiling] LAST_AXIS_LIMIT
INT32_MAX = 2**31 - 1
DIMS = range(2, 7)  # [base] MIN_DIM_NUM_ND, MAX_DIM_NUM_ND

ND = "ND"
NZ = "FRACTAL_NZ"

# dtypes Ascend 950 multiplies too; torch has names for some
_BEYOND = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2", "hifloat8")
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
_L0C2UB_PT = "[check] CheckOnlyL0c2ubPertoken, [bin] ascend310p"
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
    Kernel(_310P, "int8", True, ("float32",), _INT, False, "float16", (NZ,), _L0C2UB_PT),
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
    entry: str = "v5",
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
        entry: of an eager call: "v5" for aclnnQuantMatmulV5; "nz" for aclnnQuantMatmulWeightNz,
            whose checks are other ones; "v4" for V3 and V4, which have those too, and which
            torch_npu no longer calls.

    Returns:
        None if accepted, else a text that names the argument and CANN's error code.
    """
    code = TILING if graph else INVALID

    def refuse(text: str, error: int = code) -> str:
        return f"{text} (CANN error {error}, {_NAMES[error]}; {soc})"

    weight_nz = not graph and entry != "v5"
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
    others = set(_BEYOND) & {x1_dtype, x2_dtype}
    if arch35 and others:
        return f"x1 is {x1_dtype} and x2 {x2_dtype}; cann_host computes int8 and int4 only"
    if (x1_dtype, x2_dtype) == ("int8", "int4") and family == _A2 and not graph:
        return "x1 is int8 and x2 int4 (A8W4), which cann_host does not compute"
    if x1_dtype != x2_dtype:
        return refuse(f"x1 is {x1_dtype} and x2 is {x2_dtype}; they must be the same")
    has_pertoken = pertoken_dtype is not None
    # IsPerblock of [check]; in a graph 950 has them too
    wide = len(scale_shape) > 1 and len(pertoken_shape or ()) > 1
    floats = (scale_dtype, pertoken_dtype) == ("float32", "float32")
    blocks = x1_dtype == "int8" and wide and floats
    if blocks and family != _310P and (arch35 or not graph):
        return (
            f"scale has shape {tuple(scale_shape)} and pertoken_scale {pertoken_shape}: scales for "
            "blocks, which cann_host does not compute"
        )
    # An eager call on 310P brings an ND x2 to FRACTAL_NZ itself, transposing both as its kernel
    # wants them: TransposeAndTransDataForInputs of [v5] and [nz].
    stored = NZ if family == _310P and not graph and x2_format == ND else x2_format
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
            lambda k: offset_dtype is None or _takes_offset(k, graph, weight_nz),
        ),
        ("x2 format", x2_format, lambda k: stored in k.x2_formats),
    ):
        left = [k for k in rows if matches(k)]
        if not left:
            return refuse(f"{argument} {given} is not supported here; {_allowed(argument, rows)}")
        rows = left
    if has_pertoken and pertoken_dtype != "float32":
        return refuse(f"pertoken_scale is {pertoken_dtype}; it must be float32")
    if graph and family == _310P and has_pertoken:
        return _ours(
            "pertoken_scale in a graph for 310P: its kernel takes x1 in FRACTAL_NZ; whether GE "
            "makes it so is not public. cann_host has the eager call"
        )
    # Before Ascend 950 the tiling never reads offset; [def] gives its dtype.
    ignored = offset_dtype is not None and not rows[0].offset
    if offset_dtype is not None and offset_dtype != "float32":
        of_definition = (graph and not arch35) or (ignored and not arch35)
        return refuse(
            f"offset is {offset_dtype}; it must be float32", NO_KERNEL if of_definition else code
        )
    if x1_dtype == "int4" and x2_format == NZ and not (graph or weight_nz):
        # [check] CheckFormatInt4
        return refuse(
            "int4 x2 is FRACTAL_NZ; aclnnQuantMatmulV5 takes ND, and npu_quant_matmul calls it for "
            "int4 except with a float32 scale that it packs itself"
        )
    if x1_format != ND:
        return refuse(f"x1 has format {x1_format}; it must be ND")
    if entry == "nz" and not graph and x2_format != NZ:
        return refuse(f"x2 has format {x2_format}; it must be FRACTAL_NZ")

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
            f"they must not exceed {LAST_DIM_MAX}",
            INVALID if weight_nz else TILING,  # [check] does not look, [nz] does
        )
    batch = _broadcast(x1_shape[:-2], x2_shape[:-2])
    if batch is None:
        return refuse(f"the batch dims of x1 {tuple(x1_shape)} and x2 {tuple(x2_shape)} differ")

    if family == _310P and has_pertoken and x1_shape[:-2] != x2_shape[:-2]:  # [arch20]
        return refuse(
            f"the batch dims of x1 {tuple(x1_shape)} and x2 {tuple(x2_shape)} must be equal", TILING
        )
    # Before Ascend 950 [tiling] CheckShape lets 2-D scales through, such as the (1, n) that
    # TransQuantParamV2 gives, and [nz] CheckDimRange those of as many dims as x2. Both look at the
    # first dim only.
    scale = tuple(scale_shape)
    flat = scale in {(1,), (n,)}
    two_dims = not arch35 and len(scale) == (2 if graph else len(x2_shape) if weight_nz else 1)
    if not flat and not (two_dims and scale[0] in (1, n)):
        return refuse(f"scale has shape {scale}; it must be (1,) or ({n},)")
    if math.prod(scale) not in (1, n):
        return _ours(
            f"scale has shape {scale}; CANN looks at its first dim only, and the kernel reads {n} "
            f"values: give (1,), ({n},) or (1, {n})"
        )
    looks_at_offset = not graph or (arch35 and out_dtype == "int8")
    if offset_shape is not None and looks_at_offset and tuple(offset_shape) not in {(1,), (n,)}:
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

    if stored == NZ:
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
    lies = (graph and transpose_x1) or (x2_format == NZ and not transpose_x2)
    if family == _310P and lies:
        # [base] AnalyzeAttrs
        return refuse(
            "this product only supports transpose_x1=False with transpose_x2=True", TILING
        )
    return None


def _ours(text: str) -> str:
    """A refusal that is not CANN's: it names cann_host and no code."""
    return text if "cann_host" in text else f"{text} (cann_host's own refusal; CANN does not look)"


def _takes_offset(kernel: Kernel, graph: bool, weight_nz: bool) -> bool:
    """Whether an offset may come with a row: with int8 results, and where nothing looks at it."""
    if kernel.offset:
        return True
    packed_int4 = kernel.x == "int4" and not kernel.pertoken
    if kernel.family == _950:
        return graph and packed_int4  # [arch35] CheckShapeInRangeForOptionalInputs
    if graph:
        return True  # [tiling]
    # [check] CheckL0c2outPertensorPerchannel, CheckOnlyL0c2outPertoken,
    # CheckDtypeValidOnOnlyL0c2outForA4W4; [nz] CheckDtypeValid wants an int8 result
    is_a2 = kernel.family == _A2
    return is_a2 and not weight_nz and (kernel.out == "int32" or kernel.pertoken or packed_int4)


def check_trans_quant_param(
    soc: str,
    scale: tuple[str, Sequence[int]],
    offset: tuple[str, Sequence[int]] | None,
    round_mode: int = 0,
    *,
    graph: bool = True,
) -> str | None:
    """Say why TransQuantParamV2, or the aclnn functions on it, would be refused.

    Source: hicann/ops-nn `quant/trans_quant_param_v2/op_host`: the tiling, which never looks at
    offset, for a graph; op_api/aclnn_trans_quant_param_v2.cpp for an eager call. Only the latter
    compares the two lengths, and only if offset has one dim: see `packed_words`.

    Args:
        soc: name of the chip.
        scale: dtype and shape: (n,) or (1, n); on Ascend 950 any in a graph, (g, n) eagerly.
        offset: dtype and shape, or None.
        round_mode: 0 or 1.
        graph: whether it is the graph's operator.

    Returns:
        None if accepted, else a text with CANN's error code.
    """
    is_950 = soc_family(soc) == _950
    code = TILING if graph else INVALID
    shapes = {"scale": tuple(scale[1])} | ({} if offset is None else {"offset": tuple(offset[1])})
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None and tensor[0] != "float32":
            return _code(f"{name} is {tensor[0]}; it must be float32", NO_KERNEL if graph else code)
    if round_mode not in (0, 1):
        return _code(f"round_mode is {round_mode}; it must be 0 or 1", code)
    for name, shape in shapes.items():
        if graph and (is_950 or name == "offset"):
            continue
        rows = len(shape) == 2 and (shape[0] == 1 or (is_950 and name == "scale"))
        if min(shape, default=0) <= 0 or not (len(shape) == 1 or rows):
            return _code(f"{name} has shape {shape}; it must be (n,) or (1, n)", code)
    if not graph and len(shapes.get("offset", ())) == 1:
        lengths = (shapes["scale"][0], shapes["offset"][0])
        if min(lengths) > 1 and lengths[0] != lengths[1]:
            return _code(
                f"offset has shape {shapes['offset']} but scale {shapes['scale']}; they must agree "
                "or have one element",
                code,
            )
    return None


def trans_quant_param_shape(
    soc: str, scale: Sequence[int], offset: Sequence[int] | None
) -> tuple[int, ...]:
    """The shape InferShape declares for TransQuantParamV2's result.

    That of scale, or of an offset of more dims; on Ascend 950 also of a longer offset, both of one
    dim.
    """
    if offset is None:
        return tuple(scale)
    longer = len(scale) == len(offset) == 1 and offset[0] > scale[0]
    if len(offset) > len(scale) or (longer and soc_family(soc) == _950):
        return tuple(offset)
    return tuple(scale)


@dataclass(frozen=True)
class PackedWords:
    """What TransQuantParamV2's kernel does to the words it has room for.

    Attributes:
        refusal: why cann_host does not compute it, though CANN takes it: a word would come from
            beside scale or offset, or from nowhere.
        overrun: the sentence for words that are written past the result.
    """

    refusal: str | None = None
    overrun: str | None = None


def packed_words(
    scale: Sequence[int], offset: Sequence[int] | None, room: Sequence[int]
) -> PackedWords:
    """Compare what TransQuantParamV2 reads and writes with the room for it.

    The kernel (op_kernel/trans_quant_param_v2.h) writes as many words as the longer of scale and
    offset has values, whatever the shape of its result, and repeats an operand of one value.

    Args:
        scale: shape of scale.
        offset: shape of offset, or None.
        room: shape of the result, as InferShape declares it or the caller of aclnn made it.
    """
    lengths = {"scale": math.prod(scale), "offset": 0 if offset is None else math.prod(offset)}
    words, places = max(lengths.values()), math.prod(room)
    given = f"scale {tuple(scale)} and offset {None if offset is None else tuple(offset)}"
    for name, length in lengths.items():
        if length < min(words, places) and length != 1 and (name == "scale" or length):
            return PackedWords(
                refusal=f"{given}: {name} has {length} values and {words} are read; CANN does not "
                "look, and cann_host has no values for the rest"
            )
    if places > words:
        return PackedWords(
            refusal=f"{given}: {words} words for a result of shape {tuple(room)}; CANN does not "
            "look, and cann_host has no values for the rest"
        )
    if places == words:
        return PackedWords()
    reads = ", and a matmul reads word 0 for every column" if places == 1 else ""
    return PackedWords(
        overrun=f"TransQuantParamV2 with {given}: its result has shape {tuple(room)}, and the "
        f"kernel writes {words} words: {words - places} overwrite other memory{reads}. Expand "
        "scale to offset's length, as lq_graph does. (cann_host's caution; CANN says nothing.)"
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


_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "hifloat8")  # Ascend 950 quantizes to these too


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
    if y in _FLOAT8 and soc_family(soc) == _950:
        return f"y is {y}, which cann_host does not compute"
    if y not in outputs:
        return f"y is {y}; {soc} allows {' or '.join(outputs)}"
    parts = {"int4": 2, "int32": 8}.get(y, 1)
    if x_shape and x_shape[-1] % parts:
        return f"x has last dim {x_shape[-1]}; for {y} it must be a multiple of {parts}"
    return None


def _code(text: str, error: int) -> str:
    return f"{text} (CANN error {error}, {_NAMES[error]})"


def _coded(text: str | None, graph: bool) -> str | None:
    if text is None or "cann_host" in text:  # not CANN's refusal
        return text
    return _code(text, TILING if graph else INVALID)


QUANT_MODES = ("pertoken", "pertensor", "perchannel")
MOST_GROUPS = 1024  # [dynamic] MAX_EXPERT_NUM
DST_TYPE_MAX = 32768  # of HiFloat8
HALF_OFFSET_MOST = 4096  # DYNAMIC_QUANT_FP16_LAST_DIM_LIMITATION_310P


def dynamic_quant_scale_shape(x_shape: Sequence[int], mode: str) -> tuple[int, ...]:
    """Shape of DynamicQuant's scale, and of its offset, for a quant_mode."""
    if mode == "pertensor":
        return (1,)
    return (*x_shape[:-2], x_shape[-1]) if mode == "perchannel" else tuple(x_shape[:-1])


def check_dynamic_quant(
    soc: str,
    x: str,
    x_shape: Sequence[int],
    y: str,
    smooth: tuple[str, Sequence[int]] | None = None,
    groups: tuple[str, Sequence[int]] | None = None,
    graph: bool = False,
    mode: str = "pertoken",
    dst_type_max: float = 0.0,
    symmetric: bool = True,
) -> str | None:
    """Why a DynamicQuant, DynamicQuantV2 in a graph or aclnnDynamicQuantV2 to V4, is refused.

    What aclnn does not look at comes to tiling, and its code, all the same. smooth_scales on 310P,
    and group_index there or without smooth_scales, have no effect: see `dynamic_quant_ignores`.

    Args:
        soc: name of the chip.
        x: dtype of the input, and its shape.
        y: dtype of the quantized output; "int32" for eight int4 each.
        smooth: dtype and shape of smooth_scales, if given: a factor for each of the last dim, and
            with groups a row of them for each group; for "perchannel" one for each of the last but
            one dim.
        groups: dtype and shape of group_index, if given.
        graph: whether it is the graph's operator.
        mode: quant_mode.
        dst_type_max: attribute of that name.
        symmetric: without an offset.
    """
    family = soc_family(soc)
    text = _check_activation(_DYNAMIC_QUANT, soc, x, x_shape, y, graph)
    dims = len(x_shape)
    if text is None and mode not in QUANT_MODES:
        text = f"quant_mode is {mode!r}; it must be one of {', '.join(QUANT_MODES)}"
    if text is None and mode == "perchannel" and groups is not None:
        text = "group_index is given and quant_mode is perchannel"
    # tiling has no upper limit, on 310P none at all
    if text is None and not (
        (family == _310P and graph and dims) or 2 <= dims <= (dims if graph else 8)
    ):
        text = f"x has {dims} dims; it must have {'2 or more' if graph else '2 to 8'}"
    if text is not None:
        return _coded(text, graph)
    if math.prod(x_shape) == 0 and not graph:  # aclnn returns before its kernel is asked
        text = _check_smooth(family, x, x_shape, smooth, groups, graph, mode)
        return text if text is not None and f"CANN error {INVALID}" in text else None
    if family == _310P and x_shape[-1] % 32:  # CorrectNumCopyRow of dynamic_quant_tiling_310P.cpp
        return _code(f"x has last dim {x_shape[-1]}; {soc} wants a multiple of 32", TILING)
    if family == _310P and not symmetric and x_shape[-1] > HALF_OFFSET_MOST:
        return (
            f"an offset for rows of {x_shape[-1]} on {soc}: its kernel for more than "
            f"{HALF_OFFSET_MOST} values never writes one. CANN takes it; cann_host does not"
        )
    if graph and x_shape[-1] == 0 and family != _950:
        return _code(f"x has shape {tuple(x_shape)}; its last dim cannot be 0", TILING)
    if not 0 <= dst_type_max <= DST_TYPE_MAX and family == _950:
        return _code(f"dst_type_max is {dst_type_max}; it must be in 0 to {DST_TYPE_MAX}", TILING)
    if graph and family != _950:
        declared = dynamic_quant_scale_shape(x_shape, mode)
        if family == _A2 and declared != tuple(x_shape[:-1]):
            return _code(
                f"quant_mode {mode} gives scale the shape {declared}; {soc} has pertoken only, "
                f"{tuple(x_shape[:-1])}",
                TILING,
            )
    return _check_smooth(family, x, x_shape, smooth, groups, graph, mode)


def dynamic_quant_ignores(soc: str, smooth: bool, groups: bool) -> str | None:
    """Which input of a DynamicQuant that is taken has no effect, if one has none."""
    if smooth and soc_family(soc) == _310P:
        return f"smooth_scales has no effect on {soc}: the kernel there does not read it"
    if groups and not smooth:
        return "group_index has no effect without smooth_scales"
    return None


def _check_smooth(
    family: str | None,
    x: str,
    x_shape: Sequence[int],
    smooth: tuple[str, Sequence[int]] | None,
    groups: tuple[str, Sequence[int]] | None,
    graph: bool,
    mode: str,
) -> str | None:
    """What DynamicQuant refuses of smooth_scales and group_index."""
    unread = family == _310P and graph  # tiling does not look there
    if smooth is None or unread:
        if groups is not None and groups[0] != "int32":
            return _code(f"group_index is {groups[0]}; it must be int32", NO_KERNEL)
        return None
    first = TILING if graph else INVALID
    dtype, shape = smooth[0], tuple(smooth[1])
    along = x_shape[-2 if mode == "perchannel" else -1]
    if dtype != x:
        return _code(f"smooth_scales is {dtype}; it must be {x}", first)
    if groups is None or (family == _A2 and tuple(groups[1]) == (0,)):
        if groups is not None and groups[0] not in ("int32", "int64"):
            return _code(f"group_index is {groups[0]}; it must be int32", first)
        if shape != (along,):
            code = first if groups is None else TILING
            return _code(f"smooth_scales has shape {shape}; it must be ({along},)", code)
        return None
    count = groups[1][-1] if groups[1] else 0
    if len(groups[1]) != 1 or groups[0] not in ("int32", "int64"):
        if graph and groups[0] == "int32" and count:
            pass  # only aclnn counts its dims
        else:
            given = f"{groups[0]} {tuple(groups[1])}"
            return _code(f"group_index is {given}; it must be int32, one dim", first)
    if family == _310P:
        return None
    if groups[0] != "int32":
        return _code(f"group_index is {groups[0]}; it must be int32", TILING)
    if not 1 <= count <= MOST_GROUPS:
        return _code(f"group_index has {count} values; it must have 1 to {MOST_GROUPS}", TILING)
    if shape != (count, x_shape[-1]):
        wanted = (count, x_shape[-1])
        return _code(
            f"smooth_scales has shape {shape}; with group_index it must be {wanted}", TILING
        )
    return None


# family: dtypes of x and of scales, of zero_points, of out. hicann/ops-nn
# quant/quantize/op_api/aclnn_quantize.cpp, GetSocSupportDtypeMap; HiFloat8 is no dtype of torch.
_HALVES = ("float32", "float16")
_WHOLE = ("int8", "uint8", "int32")
_QUANTIZE: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    _310P: (_HALVES, _WHOLE, _WHOLE),
    _A2: ((*_HALVES, "bfloat16"), (*_WHOLE, "bfloat16"), _WHOLE),
    _950: (
        (*_HALVES, "bfloat16"),
        (*_WHOLE, "float32", "bfloat16"),
        (*_WHOLE, "float8_e4m3fn", "float8_e5m2"),
    ),
}


def check_quantize(
    soc: str,
    x: tuple[str, Sequence[int]],
    scales: tuple[str, Sequence[int]],
    zero_points: tuple[str, Sequence[int]] | None,
    out: tuple[str, Sequence[int]],
    axis: int,
) -> str | None:
    """Why aclnnQuantize, a quantization by division, is refused; None if it is not.

    Args:
        soc: name of the chip.
        x, scales, zero_points, out: dtype and shape of each.
        axis: the dim of x that scales is along, if it has more than one value.
    """
    floats, points, outs = _QUANTIZE.get(soc_family(soc) or "", ((), (), ()))
    if not floats:
        return _coded(f"cann_host has no rules for {soc}", False)
    dims, length = len(x[1]), scales[1][0] if scales[1] else 0
    text = None
    if dims > 8:
        text = f"x has {dims} dims; it must have 8 or fewer"
    elif tuple(out[1]) != tuple(x[1]):
        text = f"out has shape {tuple(out[1])}; it must have x's, {tuple(x[1])}"
    elif len(scales[1]) != 1:
        text = f"scales has shape {tuple(scales[1])}; it must have one dim"
    elif zero_points is not None and tuple(zero_points[1]) != tuple(scales[1]):
        text = f"zero_points has shape {tuple(zero_points[1])}; it must be {tuple(scales[1])}"
    elif length != 1 and not -dims <= axis < dims:
        text = f"axis is {axis} and x has {dims} dims"
    elif length != 1 and length != x[1][axis]:
        text = f"scales has shape {tuple(scales[1])}; it must have 1 or {x[1][axis]} values"
    else:
        given = {"x": (x, floats), "scales": (scales, floats), "out": (out, outs)}
        if zero_points is not None:
            given["zero_points"] = (zero_points, points)
        for name, (tensor, allowed) in given.items():
            if tensor[0] not in allowed:
                text = f"{name} is {tensor[0]}; {soc} allows {' or '.join(allowed)}"
                break
        others = [scales[0], *([] if zero_points is None else [zero_points[0]])]
        if text is None and "bfloat16" in others and {x[0], *others} != {"bfloat16"}:
            text = (
                f"x is {x[0]}, scales and zero_points {' and '.join(others)}; if one of these is "
                "bfloat16 all must be"
            )
    return _coded(text, False)


# family: (dtype of x, dtype of gamma). hicann/ops-nn norm/rms_norm/op_host/rms_norm_def.cpp, and
# add_rms_norm_def.cpp, where both are one dtype.
_SAME = {"float16": ("float16",), "float32": ("float32",), "bfloat16": ("bfloat16",)}
_RMS_NORM: dict[str, dict[str, tuple[str, ...]]] = {
    _310P: {"float16": ("float16",), "float32": ("float32",)},
    _A2: {**_SAME, "float16": ("float16", "float32"), "bfloat16": ("bfloat16", "float32")},
    _950: {**_SAME, "float16": ("float16", "float32"), "bfloat16": ("bfloat16", "float32")},
}


def check_rms_norm(
    soc: str,
    x: tuple[str, Sequence[int]],
    gamma: tuple[str, Sequence[int]],
    epsilon: float,
    *,
    x2: tuple[str, Sequence[int]] | None = None,
    graph: bool = False,
) -> str | None:
    """Why an RmsNorm, with x2 an AddRmsNorm, is refused; None if it is not.

    Args:
        soc: name of the chip.
        x: dtype and shape of x, or of x1.
        gamma: dtype and shape; its dims are the last ones of x.
        epsilon: not negative.
        x2: dtype and shape of what AddRmsNorm adds.
        graph: whether it is the graph's operator: a dtype its definition does not have is then a
            kernel that is not found, and an empty x is refused too.
    """
    table = _RMS_NORM.get(soc_family(soc) or "")
    if table is None:
        return _coded(f"cann_host has no rules for {soc}", graph)
    allowed = table.get(x[0], ()) if x2 is None else (x[0],) * (x[0] in table)
    of_dtype = NO_KERNEL if graph else INVALID
    if not allowed:
        return _code(f"x is {x[0]}; {soc} allows {' or '.join(table)}", of_dtype)
    if gamma[0] not in allowed:
        return _code(
            f"gamma is {gamma[0]} and x {x[0]}; {soc} allows {' or '.join(allowed)}", of_dtype
        )
    if x2 is not None and (x2[0] != x[0] or tuple(x2[1]) != tuple(x[1])):
        code = of_dtype if x2[0] != x[0] else TILING if graph else INVALID
        return _code(f"x1 is {x[0]} {tuple(x[1])} and x2 {x2[0]} {tuple(x2[1])}", code)
    shape, last = tuple(x[1]), tuple(gamma[1])
    if x2 is not None and not graph:
        if not (1 <= len(shape) <= 8 and 1 <= len(last) <= 8):
            return _coded(
                f"x1 has {len(shape)} dims and gamma {len(last)}; 1 to 8 are allowed", False
            )
        if 0 in shape or 0 in last:
            return None  # aclnn returns before its kernel is asked
    if not 1 <= len(last) <= len(shape) <= 8:
        return _code(
            f"x has {len(shape)} dims and gamma {len(last)}; 1 to 8, gamma's within x's", TILING
        )
    if shape[len(shape) - len(last) :] != last:
        return _code(f"gamma has shape {last}; it must be the last dims of x, {shape}", TILING)
    if 0 in last or (graph and 0 in shape):
        return _code(f"x has shape {shape} and gamma {last}; they cannot be empty", TILING)
    if epsilon < 0:
        return _code(f"epsilon is {epsilon}; it cannot be negative", TILING)
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
    if graph:  # EnsureNotScalar of the tiling
        x_shape, scale_shape = x_shape or (1,), scale_shape or (1,)
        offset_shape = offset_shape if offset_shape is None else offset_shape or (1,)
    text = _check_activation(_ASCEND_QUANT, soc, x, x_shape, y, graph)
    if text is None:
        text = _check_factors(
            soc, x, x_shape, scale, scale_shape, offset, offset_shape, axis, graph
        )
    if text is None and graph and soc_family(soc) == _950 and 0 in x_shape:
        text = f"x has shape {tuple(x_shape)}; it cannot be empty"
    return _coded(text, graph)


def ascend_quant_axis(soc: str, axis: int) -> int:
    """The axis AscendQuantV2's tiling goes by in a graph: on 310P it makes it the last."""
    return -1 if soc_family(soc) == _310P else axis


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
    if not dims or (dims > 8 and not graph):
        return f"x has {dims} dims; it must have 1 to 8"
    axis = ascend_quant_axis(soc, axis) if graph else axis
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


# What the definitions of other graph operators have: op_host/<operator>_def.cpp under activation
# and norm of hicann/ops-nn. Those of the older chips that are not there are not known here either.
_FLOATS3 = ("float16", "bfloat16", "float32")
DEFINED: dict[str, dict[str, tuple[str, ...]]] = {
    "Gelu": {_950: _FLOATS3},
    "GeluV2": {_950: _FLOATS3},
    "LayerNormV4": {_310P: ("float16",), _A2: _FLOATS3, _950: _FLOATS3},
    "LogSoftmaxV2": {_950: _FLOATS3},
    "Relu": {_950: (*_FLOATS3, "int8", "int32", "int64")},
    "Sigmoid": {_950: _FLOATS3},
    "SoftmaxV2": {_950: _FLOATS3},
    "Softplus": {_950: _FLOATS3},
    "SwiGlu": {_310P: ("float16", "float32"), _A2: _FLOATS3, _950: _FLOATS3},
    "Swish": {_950: _FLOATS3},
}


def check_definition(type_: str, soc: str, x: str) -> str | None:
    """Why a graph operator has no kernel for the dtype of its first input; None if it may have one.

    Args:
        type_: GE op type.
        soc: name of the chip.
        x: dtype of the first input.
    """
    allowed = DEFINED.get(type_, {}).get(soc_family(soc) or "")
    if allowed is None or x in allowed:
        return None
    return _code(f"x is {x}; {soc} allows {' or '.join(allowed)}", NO_KERNEL)


def check_layer_norm(x: str, parameters: Sequence[str], dims: int, normalized: int) -> str | None:
    """Why a LayerNormV4 is refused; None if it is not.

    Source: hicann/ops-nn norm/layer_norm_v4/op_host, its definition and tiling base.

    Args:
        x: dtype of x.
        parameters: dtypes of gamma and beta, those that are given.
        dims: of x.
        normalized: how many of its last ones are normalized.
    """
    if len(set(parameters)) > 1 or not set(parameters) <= {x, "float32"}:
        return _code(
            f"gamma and beta are {' and '.join(parameters)} and x {x}; they must be both {x} or "
            "both float32",
            NO_KERNEL,
        )
    if normalized > dims:
        return _code(f"x has {dims} dims and normalized_shape {normalized}", TILING)
    return None
