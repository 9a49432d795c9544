"""The operators, one record for each, and the functions that call them.

    lq_graph::linear_quant        quantized linear layer, A8W8 or A4W4 (int4 in int32)
    lq_graph::trans_quant_param   scale and offset folded into the packed int64 scale
    lq_graph::dynamic_quant       float activations to int8 or int4, a scale for each token
    lq_graph::static_quant        float activations to int8, with a scale from calibration
    lq_graph::quantized_linear    a quantizer and linear_quant at once, in Inductor's graphs only

docs/add.md tells how to add an operator: its functions, then its record in OPERATORS. A record
names functions as "module:function": `import lq_graph` registers the operators and must stay light.
It loads this module, errors.py and torch only; a function's module is imported at the first call.

Some arguments of the operators are for the fusions of a graph alone, and no kernel reads them. The
operators that replace ours read them, and a graph could compute them only by more kernels. They
hold the numbers of other arguments once more, so the functions do not take them: only our layers,
which derive them, pass them to the operators.

    linear_quant    float_scale: the values of a packed scale, float32 with its shape
    static_quant    scale, zero_point: 1 / scale_reciprocal and offset, float32 (1,)
                    reciprocals, zero_points: scale_reciprocal and offset for each of k, (k,):
                    float32 and int32, or both bfloat16 if x is bfloat16

`Library.define` is used rather than `custom_op`, whose Python wrapper costs more per call than
the epilogue of a small layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import LinearQuantError

if TYPE_CHECKING:
    from torch._ops import OpOverload

__all__ = [
    "OPERATORS",
    "NotNeeded",
    "Operator",
    "dynamic_quant",
    "linear_quant",
    "load",
    "static_quant",
    "trans_quant_param",
]

# ---- the records ----


@dataclass(frozen=True)
class NotNeeded:
    """In a record, instead of a function: the operator does not need one."""

    reason: str


@dataclass(frozen=True)
class Operator:
    """All that lq_graph has for one operator. Functions are named "module:function".

    Attributes:
        schema: the schema after the operator's name.
        plan: decides whether a call is legal; fake, cpu, npu and converter all call it.
        fake: returns shape and dtype under fake tensors, on meta and in graphs.
        cpu, npu: the kernels.
        autocast: the cast under autocast, for the operators that take float activations.
        converter: lowers a call to GE nodes, for torchair.
        sharding: how DTensor may split a call.
        public: whether lq_graph has a function of that name, and users may call the operator.
        torch_func: the kernel inside torch.func's transforms.
        for_fusions: the arguments of the schema that lq_graph's function does not take.
    """

    name: str
    schema: str
    plan: str
    fake: str
    cpu: str
    npu: str
    autocast: str | NotNeeded
    converter: str | NotNeeded
    sharding: str | NotNeeded
    public: bool = True
    torch_func: str = "backends.derivatives:under_torch_func"
    for_fusions: tuple[str, ...] = ()

    @property
    def overload(self) -> OpOverload:
        """The operator as torch calls it."""
        found: OpOverload = getattr(torch.ops.lq_graph, self.name).default
        return found


OPERATORS = (
    Operator(
        name="linear_quant",
        schema="(Tensor x1, Tensor weight, Tensor scale, Tensor? offset=None, "
        "Tensor? pertoken_scale=None, Tensor? bias=None, *, ScalarType? output_dtype=None, "
        "Tensor? float_scale=None) -> Tensor",
        plan="rules.plan:plan",
        fake="backends.fake:linear_quant",
        cpu="backends.cpu:linear_quant",
        npu="backends.npu:linear_quant",
        autocast=NotNeeded("its activations are int8 or int4"),
        converter="converters.linear_quant:linear_quant",
        sharding="parallel.sharding:linear_quant",
        for_fusions=("float_scale",),
    ),
    Operator(
        name="trans_quant_param",
        schema="(Tensor scale, Tensor? offset=None, int round_mode=0) -> Tensor",
        plan="rules.plan:plan_trans_quant_param",
        fake="backends.fake:trans_quant_param",
        cpu="backends.cpu:trans_quant_param",
        npu="backends.npu:trans_quant_param",
        autocast=NotNeeded("it takes parameters, no activations"),
        converter="converters.linear_quant:trans_quant_param",
        sharding="parallel.sharding:trans_quant_param",
    ),
    Operator(
        name="dynamic_quant",
        schema="(Tensor x, *, ScalarType? dtype=None) -> (Tensor, Tensor)",
        plan="rules.activations:plan_dynamic_quant",
        fake="backends.fake:dynamic_quant",
        cpu="backends.cpu:dynamic_quant",
        npu="backends.npu:dynamic_quant",
        autocast="backends.autocast:dynamic_quant",
        converter="converters.linear_quant:dynamic_quant",
        sharding="parallel.sharding:dynamic_quant",
    ),
    Operator(
        name="static_quant",
        schema="(Tensor x, Tensor scale_reciprocal, Tensor? offset=None, *, Tensor? scale=None, "
        "Tensor? zero_point=None, Tensor? reciprocals=None, Tensor? zero_points=None) -> Tensor",
        plan="rules.activations:plan_static_quant",
        fake="backends.fake:static_quant",
        cpu="backends.cpu:static_quant",
        npu="backends.npu:static_quant",
        autocast="backends.autocast:static_quant",
        converter="converters.linear_quant:static_quant",
        sharding="parallel.sharding:static_quant",
        for_fusions=("scale", "zero_point", "reciprocals", "zero_points"),
    ),
    Operator(
        name="quantized_linear",
        schema="(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None, Tensor? bias=None, "
        "Tensor? scale_reciprocal=None, Tensor? input_offset=None, *, "
        "ScalarType? output_dtype=None) -> Tensor",
        plan="rules.plan:plan",
        fake="backends.whole_layer:fake",
        cpu="backends.whole_layer:cpu",
        npu="backends.whole_layer:npu",
        autocast=NotNeeded("autocast has done its casts when Inductor gets a graph"),
        converter=NotNeeded("torchair gets no graph of Inductor's"),
        sharding=NotNeeded("Inductor's graphs hold the parts of split tensors"),
        public=False,
    ),
)

# ---- registration ----


def load(where: str) -> Callable[..., Any]:
    """Import the module of a function that a record names, and return the function."""
    module, _, name = where.partition(":")
    found = getattr(import_module(f"{__package__}.{module}"), name, None)
    if found is None:
        raise AttributeError(f"a record of lq_graph.ops names {where}, which does not exist")
    function: Callable[..., Any] = found
    return function


def _lazy(where: str, *bound: Any) -> Callable[..., Any]:
    """The function that a record names, with `bound` as its first arguments; its module is imported
    at the first call.

    The first call sets the function of the partial, as unpickling does. Each later call costs
    0.03 us more than the function itself; a wrapper written in Python costs 0.2 us.
    """

    def first(*args: Any, **kwargs: Any) -> Any:
        function = load(where)
        kernel.__setstate__((function, bound, {}, None))  # type: ignore[attr-defined]
        return function(*bound, *args, **kwargs)

    kernel = partial(first)
    return kernel


class _LazyConverter:
    """Registers an operator with torchair without importing torchair.

    When torchair lowers a graph, it finds the converter in the attribute `_ge_converter` of the
    operator (6.0.rc3 to torch_npu 2.13's). This converter imports lq_graph.converters, which
    replaces it, and calls the new one. So `import lq_graph` works before or after torchair, or
    without it.
    """

    require_meta = True  # torchair passes meta_outputs to converters that declare it

    def __init__(self, op: OpOverload) -> None:
        self._op = op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        load("converters:register")()
        return self._op._ge_converter(*args, **kwargs)  # type: ignore[attr-defined]


def _traced(where: str) -> Callable[..., Any]:
    """A fake kernel. A program that compiles has imported the compiler by the first trace; then
    the compiler gets to know our passes."""
    kernel = _lazy(where)

    def fake(*args: Any, **kwargs: Any) -> Any:
        if "torch_npu" in sys.modules:
            load("fusion.torchair:register")()
        if "torch._inductor.compile_fx" in sys.modules:
            load("fusion.inductor:register")()
        return kernel(*args, **kwargs)

    return fake


# "PrivateUse1" is what the npu device is called before torch_npu renames it.
_AUTOCAST = {"AutocastCPU": "cpu", "AutocastPrivateUse1": "npu"}


def _register(lib: torch.library.Library, operator: Operator) -> None:
    name = operator.name
    lib.define(name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lq_graph::{name}", _traced(operator.fake), lib=lib)
    lib.impl(name, _lazy(operator.cpu), "CPU")
    lib.impl(name, _lazy(operator.npu), "PrivateUse1")
    # The output requires no grad. torch's own fallback would give it an undefined gradient. The
    # backward of the operators after it would then fail: torch.compile traces it even if nobody
    # calls it.
    lib.impl(name, torch.library.fallthrough_kernel, "Autograd")
    op = operator.overload
    lib.impl(name, _lazy(operator.torch_func, op), "FuncTorchDynamicLayerFrontMode")
    if not isinstance(operator.autocast, NotNeeded):
        for key, device in _AUTOCAST.items():
            lib.impl(name, _lazy(operator.autocast, key, device), key)
    if not isinstance(operator.converter, NotNeeded) and not hasattr(op, "_ge_converter"):
        op._ge_converter = _LazyConverter(op)  # type: ignore[attr-defined]


_lib = torch.library.Library("lq_graph", "DEF")
for _operator in OPERATORS:
    _register(_lib, _operator)

# ---- the functions ----

_dynamic_quant = torch.ops.lq_graph.dynamic_quant.default
_linear_quant = torch.ops.lq_graph.linear_quant.default
_static_quant = torch.ops.lq_graph.static_quant.default
_trans_quant_param = torch.ops.lq_graph.trans_quant_param.default
_NAMED = "backends.layer_names:named"  # adds the layer's name to an error


def linear_quant(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantized linear layer: `x1 @ weight.T`, scaled, on CPU, NPU, meta and in graphs.

    Args:
        x1: int8 (..., m, k), or int32 (..., m, k/8) carrying eight int4; 2 to 6 dims.
        weight: dtype of x1; (..., n, k) untransposed, batch dims broadcast with x1; int4
            exactly (n, k/8).
        scale: float32, bfloat16, or int64 packed by `trans_quant_param`; (1,) per-tensor or
            (n,) per-channel.
        offset: float32, (1,) or (n,); int8 output only. Ignored if scale is packed: the packed
            scale contains the offset.
        pertoken_scale: float32, (m,); float16 and bfloat16 outputs only.
        bias: int32 (added before the scale), or a float dtype if the row of the support table has
            it (added last); (n,) or (batch, 1, n).
        output_dtype: torch.int8 (default), float16, bfloat16 or int32.

    Returns:
        (..., m, n) of output_dtype.

    Raises:
        LinearQuantTypeError: a dtype, or a combination of dtypes, that the product has no row for.
        LinearQuantValueError: a shape outside the specification, or tensors on several devices.

    Source: torch_npu.contrib.module.LinearQuant; aclnnQuantMatmulV4.md (hicann/ops-nn).
    """
    operands = x1, weight, scale, offset, pertoken_scale, bias
    try:
        if torch.compiler.is_dynamo_compiling():
            from .backends.fake import check_linear_quant
            from .backends.traced import check_traced

            check_traced(check_linear_quant, *operands, output_dtype)
        out: Tensor = _linear_quant(*operands, output_dtype=output_dtype)
    except LinearQuantError as error:
        raise load(_NAMED)(error) from None
    return out


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """Fold scale and offset into the packed int64 scale that the kernel reads.

    Args:
        scale: float32, (1,), (n,) or (1, n); finite.
        offset: float32, as scale; rounded half to even and clamped to [-256, 255]. With 1 dim
            each, one of length 1 broadcasts.
        round_mode: 0 truncates the scale to 19 bits (sign, exponent, 10 mantissa bits), 1
            rounds it half to even, and subnormals to zero.

    Returns:
        int64, shape of the longer operand.

    Raises:
        LinearQuantTypeError: a dtype other than float32.
        LinearQuantValueError: shapes that do not fit, another round_mode, and, on CPU, NaN or
            infinite values.

    Source: aclnnTransQuantParamV2 and V3 (hicann/ops-nn, quant/trans_quant_param_v2).
    """
    try:
        if torch.compiler.is_dynamo_compiling():
            from .backends.fake import check_trans_quant_param
            from .backends.traced import check_traced

            check_traced(check_trans_quant_param, scale, offset, round_mode)
        out: Tensor = _trans_quant_param(scale, offset, round_mode)
    except LinearQuantError as error:
        raise load(_NAMED)(error) from None
    return out


def dynamic_quant(x: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Quantize activations per token, each row of k values by its own largest magnitude.

    Args:
        x: float16 or bfloat16 (Atlas inference: float16, and k a multiple of 32), (..., m, k), 2 to
            8 dims.
        dtype: torch.int8 (default), or torch.int32 for int4, eight values in an int32; then k is a
            multiple of 8.

    Returns:
        The quantized tensor, int8 (..., m, k) or int32 (..., m, k/8), and the scales, float32
        (..., m): peak / 127, or peak / 7 for int4. A row of zeros has scale 0; infinity or NaN in
        a row makes its scale infinite or NaN. The chips differ in the last bit: the result is that
        of the product's own kernel (`lq_graph.kernels.Arithmetic`).

    Autocast casts a float x to its dtype, as for nn.Linear.

    Warns:
        UserWarning: x requires grad; no gradient passes (backends/derivatives.py).

    Raises:
        LinearQuantTypeError: a dtype that the product has no row for, or a derivative by torch.func
            or in forward mode.
        LinearQuantValueError: a shape outside the specification.

    Source: torch_npu.npu_dynamic_quant; aclnnDynamicQuant.md (hicann/ops-nn).
    """
    try:
        if torch.compiler.is_dynamo_compiling():
            from .backends.fake import check_dynamic_quant
            from .backends.traced import check_traced

            check_traced(check_dynamic_quant, x, dtype)
        # a dtype that is not passed on saves 0.4 us
        out: tuple[Tensor, Tensor] = (
            _dynamic_quant(x) if dtype is None else _dynamic_quant(x, dtype=dtype)
        )
    except LinearQuantError as error:
        raise load(_NAMED)(error) from None
    return out


def static_quant(x: Tensor, scale_reciprocal: Tensor, offset: Tensor | None = None) -> Tensor:
    """Quantize activations with a scale from calibration.

    Args:
        x: float16, float32 or bfloat16 (not on Atlas inference), (..., k), 1 to 8 dims.
        scale_reciprocal: 1 / scale, in the dtype of x, (1,) or (k,). The chip multiplies by it, so
            its rounding changes the numbers.
        offset: the zero point, with the dtype and shape of scale_reciprocal; None for 0.

    Returns:
        int8, x's shape: x * scale_reciprocal + offset in float32, rounded half to even, clamped to
        [-128, 127].

    Autocast casts a float x to the dtype of scale_reciprocal.

    Warns:
        UserWarning: x requires grad; no gradient passes (backends/derivatives.py).

    Raises:
        LinearQuantTypeError: a dtype that the product has no row for, or different dtypes; or a
            derivative by torch.func or in forward mode.
        LinearQuantValueError: a shape outside the specification, or tensors on several devices.

    Source: torch_npu.npu_quantize with div_mode=False; aclnnAscendQuantV3.md (hicann/ops-nn).
    """
    try:
        if torch.compiler.is_dynamo_compiling():
            from .backends.fake import check_static_quant
            from .backends.traced import check_traced

            check_traced(check_static_quant, x, scale_reciprocal, offset)
        out: Tensor = _static_quant(x, scale_reciprocal, offset)
    except LinearQuantError as error:
        raise load(_NAMED)(error) from None
    return out
