"""The operators: schema, fake kernel and registrations side by side.

    lq_graph::linear_quant        quantized linear layer, A8W8 or A4W4 (int4 in int32)
    lq_graph::trans_quant_param   scale and offset folded into the packed int64 scale
    lq_graph::dynamic_quant       float activations to int8 or int4, a scale for each token
    lq_graph::static_quant        float activations to int8, by a scale that is known

`Library.define` is used rather than `custom_op`, whose Python wrapper costs more per call than
the epilogue of a small layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _lazy_converters
from .backends import cpu, npu
from .backends.derivatives import tell_of_gradients, under_torch_func
from .rules.activations import plan_dynamic_quant, plan_static_quant
from .rules.devices import check_devices
from .rules.plan import plan, plan_trans_quant_param

__all__ = ["dynamic_quant", "linear_quant", "static_quant", "trans_quant_param"]

_lib = torch.library.Library("lq_graph", "DEF")

_lib.define(
    "linear_quant(Tensor x1, Tensor weight, Tensor scale, Tensor? offset=None, "
    "Tensor? pertoken_scale=None, Tensor? bias=None, *, ScalarType? output_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "trans_quant_param(Tensor scale, Tensor? offset=None, int round_mode=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "dynamic_quant(Tensor x, *, ScalarType? dtype=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "static_quant(Tensor x, Tensor scale_reciprocal, Tensor? offset=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("lq_graph::linear_quant", lib=_lib)
def _linear_quant_fake(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    check_devices(
        "linear_quant",
        x1=x1,
        weight=weight,
        scale=scale,
        offset=offset,
        pertoken_scale=pertoken_scale,
        bias=bias,
    )
    tell_of_gradients("linear_quant", scale, offset, pertoken_scale, bias)
    p = plan(x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype)
    return x1.new_empty(p.output_shape, dtype=p.output_dtype)


@torch.library.register_fake("lq_graph::trans_quant_param", lib=_lib)
def _trans_quant_param_fake(
    scale: Tensor, offset: Tensor | None = None, round_mode: int = 0
) -> Tensor:
    check_devices("trans_quant_param", scale=scale, offset=offset)
    tell_of_gradients("trans_quant_param", scale, offset)
    shape = plan_trans_quant_param(scale, offset, round_mode)
    return scale.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("lq_graph::dynamic_quant", lib=_lib)
def _dynamic_quant_fake(x: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    tell_of_gradients("dynamic_quant", x)
    p = plan_dynamic_quant(x, dtype)
    quantized = x.new_empty(p.output_shape, dtype=p.row.output_dtype)
    return quantized, x.new_empty(p.scale_shape, dtype=torch.float32)


@torch.library.register_fake("lq_graph::static_quant", lib=_lib)
def _static_quant_fake(x: Tensor, scale_reciprocal: Tensor, offset: Tensor | None = None) -> Tensor:
    check_devices("static_quant", x=x, scale_reciprocal=scale_reciprocal, offset=offset)
    tell_of_gradients("static_quant", x, scale_reciprocal, offset)
    p = plan_static_quant(x, scale_reciprocal, offset)
    return x.new_empty(p.output_shape, dtype=p.row.output_dtype)


_dynamic_quant = torch.ops.lq_graph.dynamic_quant.default
_linear_quant = torch.ops.lq_graph.linear_quant.default
_static_quant = torch.ops.lq_graph.static_quant.default
_trans_quant_param = torch.ops.lq_graph.trans_quant_param.default

# "PrivateUse1" is what the npu device is called before torch_npu renames it.
for _kernels, _key in ((cpu, "CPU"), (npu, "PrivateUse1")):
    _lib.impl("linear_quant", _kernels.linear_quant, _key)
    _lib.impl("trans_quant_param", _kernels.trans_quant_param, _key)
    _lib.impl("dynamic_quant", _kernels.dynamic_quant, _key)
    _lib.impl("static_quant", _kernels.static_quant, _key)

# What comes out requires no grad. torch's own fallback would give it one that is undefined, of
# which the backward of what comes after dies, traced by torch.compile even if nobody calls it.
for _op in (_linear_quant, _trans_quant_param, _dynamic_quant, _static_quant):
    _lib.impl(_op, torch.library.fallthrough_kernel, "Autograd")

# torch.func's transforms; what they make of the operators is in derivatives.py
for _op in (_linear_quant, _trans_quant_param, _dynamic_quant, _static_quant):
    _lib.impl(_op, under_torch_func(_op), "FuncTorchDynamicLayerFrontMode")


def _under_autocast(device: str, key: str) -> dict[str, Callable[..., Any]]:
    """What autocast does to the operators that take float activations: a cast, as nn.Linear's."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def dynamic_quant(x: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(below):
            out: tuple[Tensor, Tensor] = _dynamic_quant(_cast(x, autocast_dtype()), dtype=dtype)
            return out

    def static_quant(x: Tensor, scale_reciprocal: Tensor, offset: Tensor | None = None) -> Tensor:
        # the dtype of the scale is part of the layer's numbers, so x takes it
        with torch._C._ExcludeDispatchKeyGuard(below):
            out: Tensor = _static_quant(_cast(x, scale_reciprocal.dtype), scale_reciprocal, offset)
            return out

    def autocast_dtype() -> torch.dtype:
        return torch.get_autocast_dtype(device)

    return {"dynamic_quant": dynamic_quant, "static_quant": static_quant}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: floats, but not float64."""
    casts = x.is_floating_point() and x.dtype not in (dtype, torch.float64)
    return x.to(dtype) if casts else x


# "npu" is how torch_npu has torch.get_autocast_dtype ask for PrivateUse1.
for _device, _key in (("cpu", "AutocastCPU"), ("npu", "AutocastPrivateUse1")):
    for _name, _kernel in _under_autocast(_device, _key).items():
        _lib.impl(_name, _kernel, _key)

_lazy_converters.install(_linear_quant, _trans_quant_param, _dynamic_quant, _static_quant)


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
        offset: float32, (1,) or (n,); int8 output only. Ignored where scale is packed: the
            packed word carries its own.
        pertoken_scale: float32, (m,); float16 and bfloat16 outputs only.
        bias: int32 (added before the scale), or a float dtype where the table has it (added
            last); (n,) or (batch, 1, n).
        output_dtype: torch.int8 (default), float16, bfloat16 or int32.

    Returns:
        (..., m, n) of output_dtype.

    Raises:
        LinearQuantTypeError: a dtype, or a combination of dtypes, the product has no row for.
        LinearQuantValueError: a shape outside the specification, or tensors on several devices.

    Source: torch_npu.contrib.module.LinearQuant; aclnnQuantMatmulV4.md (hicann/ops-nn).
    """
    out: Tensor = _linear_quant(
        x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype
    )
    return out


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """Fold scale and offset into the packed int64 scale the kernel reads.

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
    out: Tensor = _trans_quant_param(scale, offset, round_mode)
    return out


def dynamic_quant(x: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Quantize activations per token, each row of k values by its own largest magnitude.

    Args:
        x: float16 or bfloat16 (Atlas inference: float16, and k a multiple of 32), (..., m, k), 2 to
            8 dims.
        dtype: torch.int8 (default), or torch.int32 for int4, eight to an int32; then k is a
            multiple of 8.

    Returns:
        The quantized tensor, int8 (..., m, k) or int32 (..., m, k/8), and the scales, float32
        (..., m): peak / 127, or peak / 7 for int4. A row of zeros has scale 0; infinity or NaN in
        a row makes its scale infinite or NaN. The chips differ in the last bit: each is computed
        as its own kernel does (`lq_graph.kernels.Arithmetic`).

    Under autocast a float x is cast to autocast's dtype, as nn.Linear's.

    Warns:
        UserWarning: x requires grad; no gradient passes (derivatives.py).

    Raises:
        LinearQuantTypeError: a dtype the product has no row for, or torch.func or forward mode asks
            for a derivative.
        LinearQuantValueError: a shape outside the specification.

    Source: torch_npu.npu_dynamic_quant; aclnnDynamicQuant.md (hicann/ops-nn).
    """
    out: tuple[Tensor, Tensor] = _dynamic_quant(x, dtype=dtype)
    return out


def static_quant(x: Tensor, scale_reciprocal: Tensor, offset: Tensor | None = None) -> Tensor:
    """Quantize activations by a scale that calibration has found.

    Args:
        x: float16, float32 or bfloat16 (not on Atlas inference), (..., k), 1 to 8 dims.
        scale_reciprocal: 1 / scale, in the dtype of x, (1,) or (k,). It is what the chip multiplies
            by, so its rounding is part of the numbers.
        offset: the integer that stands for 0, as scale_reciprocal; None for 0.

    Returns:
        int8, x's shape: x * scale_reciprocal + offset in float32, rounded half to even, clamped to
        [-128, 127].

    Under autocast a float x is cast to scale_reciprocal's dtype.

    Warns:
        UserWarning: x requires grad; no gradient passes (derivatives.py).

    Raises:
        LinearQuantTypeError: a dtype the product has no row for, or another than x's; or torch.func
            or forward mode asks for a derivative.
        LinearQuantValueError: a shape outside the specification, or tensors on several devices.

    Source: torch_npu.npu_quantize with div_mode=False; aclnnAscendQuantV3.md (hicann/ops-nn).
    """
    out: Tensor = _static_quant(x, scale_reciprocal, offset)
    return out
