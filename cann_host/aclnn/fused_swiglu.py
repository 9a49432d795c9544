"""SwiGLU, its gradient, and SwiGLU that dequantizes and quantizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cann_host.graph.executor import INT4
from cann_host.graph.ops.fused_swiglu import (
    SwiGluOptions,
    dequant_swiglu_quant,
    swi_glu,
    swi_glu_grad,
    swi_glu_quant,
)
from cann_host.graph.ops.quant import quantized_name
from cann_host.rules import (
    TILING,
    DequantSwigluQuantCall,
    SwiGluCall,
    SwiGluGradCall,
    SwiGluQuantCall,
    check_dequant_swiglu_quant,
    check_swi_glu,
    check_swi_glu_grad,
    check_swi_glu_quant,
)
from lq_graph import kernels

from .checks import compute_base_format_only, need
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor, describe

__all__ = ["OPERATORS"]


def _view(tensor: AclTensor | None) -> Tensor | None:
    return None if tensor is None else tensor.view()


def _need_results(y: AclTensor, scale: AclTensor, y_shape: tuple[int, ...]) -> None:
    if y.dtype != torch.int8 or y.shape != y_shape:
        raise RefusedError(f"y is {y.desc}; it must be int8 {y_shape}", TILING)
    if scale.dtype != torch.float32 or scale.shape != y_shape[:-1]:
        raise RefusedError(f"scale is {scale.desc}; it must be float32 {y_shape[:-1]}", TILING)


# ---- SwiGlu ----


class SwiGluArguments(NamedTuple):
    x: AclTensor
    dim: int
    out: AclTensor


def _check_swi_glu(call: SwiGluArguments, soc: str) -> None:
    """Source: hicann/ops-nn activation/swi_glu/docs/aclnnSwiGlu.md."""
    x, dim, out = call
    need(x=x, out=out)
    compute_base_format_only(x=x, out=out)
    raise_refusal(check_swi_glu(SwiGluCall(soc, x.desc, dim)))
    shape = [size // 2 if i == dim % len(x.shape) else size for i, size in enumerate(x.shape)]
    if out.dtype != x.dtype or out.shape != tuple(shape):
        raise RefusedError(f"out is {out.desc}; it must be {x.dtype_name} {tuple(shape)}")


def _swi_glu(call: SwiGluArguments, _soc: str) -> None:
    call.out.view().copy_(swi_glu(call.x.view(), call.dim))


class SwiGluGradArguments(NamedTuple):
    y_grad: AclTensor
    x: AclTensor
    dim: int
    out: AclTensor


def _check_swi_glu_grad(call: SwiGluGradArguments, soc: str) -> None:
    """Source: hicann/ops-nn activation/swi_glu_grad/docs/aclnnSwiGluGrad.md."""
    y_grad, x, dim, out = call
    need(yGrad=y_grad, x=x, out=out)
    compute_base_format_only(yGrad=y_grad, x=x, out=out)
    raise_refusal(check_swi_glu_grad(SwiGluGradCall(y_grad.desc, SwiGluCall(soc, x.desc, dim))))
    if (out.dtype, out.shape) != (x.dtype, x.shape):
        raise RefusedError(f"out is {out.desc} and x {x.desc}")


def _swi_glu_grad(call: SwiGluGradArguments, _soc: str) -> None:
    call.out.view().copy_(swi_glu_grad(call.y_grad.view(), call.x.view(), call.dim))


# ---- DequantSwigluQuant ----


class DequantSwigluQuantV2Arguments(NamedTuple):
    x: AclTensor
    weight_scale: AclTensor | None
    activation_scale: AclTensor | None
    bias: AclTensor | None
    quant_scale: AclTensor | None
    quant_offset: AclTensor | None
    group_index: AclTensor | None
    activate_left: int
    quant_mode: str | None
    dst_type: int
    round_mode: str | None
    activate_dim: int
    swiglu_mode: int
    clamp_limit: float
    glu_alpha: float
    glu_bias: float
    y: AclTensor
    scale: AclTensor

    def described(self, soc: str) -> DequantSwigluQuantCall:
        return DequantSwigluQuantCall(
            soc,
            self.x.desc,
            describe(self.weight_scale),
            describe(self.activation_scale),
            describe(self.bias),
            describe(self.quant_scale),
            describe(self.quant_offset),
            describe(self.group_index),
            "static" if self.quant_mode is None else self.quant_mode,
            quantized_name(self.dst_type),
            "rint" if self.round_mode is None else self.round_mode,
            self.activate_dim,
            self.swiglu_mode,
        )


class DequantSwigluQuantArguments(NamedTuple):
    x: AclTensor
    weight_scale: AclTensor | None
    activation_scale: AclTensor | None
    bias: AclTensor | None
    quant_scale: AclTensor | None
    quant_offset: AclTensor | None
    group_index: AclTensor | None
    activate_left: int
    quant_mode: str | None
    y: AclTensor
    scale: AclTensor

    def as_v2(self) -> DequantSwigluQuantV2Arguments:
        plain = (2, None, -1, 0, 7.0, 1.702, 1.0)
        return DequantSwigluQuantV2Arguments(*self[:9], *plain, *self[9:])


def _check_dequant_swiglu_quant(call: DequantSwigluQuantV2Arguments, soc: str) -> None:
    """Source: hicann/ops-nn quant/dequant_swiglu_quant/op_host and docs."""
    need(x=call.x, y=call.y, scale=call.scale)
    compute_base_format_only(
        **{name: t for name, t in call._asdict().items() if isinstance(t, AclTensor)}
    )
    raise_refusal(check_dequant_swiglu_quant(call.described(soc)))
    shape = call.x.shape
    _need_results(call.y, call.scale, (*shape[:-1], shape[-1] // 2))


def _dequant_swiglu_quant(call: DequantSwigluQuantV2Arguments, soc: str) -> None:
    options = SwiGluOptions(
        bool(call.activate_left),
        call.swiglu_mode,
        call.clamp_limit,
        call.glu_alpha,
        call.glu_bias,
    )
    values, steps = dequant_swiglu_quant(
        call.described(soc),
        call.x.view(),
        _view(call.weight_scale),
        _view(call.activation_scale),
        _view(call.bias),
        _view(call.quant_scale),
        _view(call.quant_offset),
        _view(call.group_index),
        options,
    )
    _fill_rows(call.y, values)
    if steps is not None:
        _fill_rows(call.scale, steps)


def _fill_rows(tensor: AclTensor, values: Tensor) -> None:
    """Write the first rows of a result; the kernel leaves the others as they are."""
    view = tensor.view()
    rows = view.reshape(-1, *values.shape[1:])
    if rows.data_ptr() == view.data_ptr():
        rows[: len(values)] = values
        return
    whole = rows.clone()
    whole[: len(values)] = values
    view.copy_(whole.reshape(view.shape))


def _check_dequant_swiglu_quant_v1(call: DequantSwigluQuantArguments, soc: str) -> None:
    _check_dequant_swiglu_quant(call.as_v2(), soc)


def _dequant_swiglu_quant_v1(call: DequantSwigluQuantArguments, soc: str) -> None:
    _dequant_swiglu_quant(call.as_v2(), soc)


# ---- SwiGluQuant ----


class SwiGluQuantArguments(NamedTuple):
    x: AclTensor
    smooth_scales: AclTensor | None
    offsets: AclTensor | None
    group_index: AclTensor | None
    activate_left: int
    quant_mode: str | None
    group_list_type: int
    dst_type: int
    y: AclTensor
    scale: AclTensor

    def described(self, soc: str) -> SwiGluQuantCall:
        return SwiGluQuantCall(
            soc,
            self.x.desc,
            describe(self.smooth_scales),
            describe(self.offsets),
            describe(self.group_index),
            self.quant_mode or "",
            self.group_list_type,
            quantized_name(self.dst_type),
        )


def _check_swi_glu_quant(call: SwiGluQuantArguments, soc: str) -> None:
    """Source: hicann/ops-nn quant/swi_glu_quant/op_host and docs."""
    need(x=call.x, y=call.y, scale=call.scale, quant_mode=call.quant_mode)
    compute_base_format_only(
        **{name: t for name, t in call._asdict().items() if isinstance(t, AclTensor)}
    )
    raise_refusal(check_swi_glu_quant(call.described(soc)))
    *rows, columns = call.x.shape
    parts = 4 if call.dst_type == INT4 else 2  # two int4 values in each byte of y
    _need_results(call.y, call.scale, (*rows, columns // parts))


def _int4_pairs(values: Tensor, count: int) -> Tensor:
    """int4 values, two in each of `count` bytes, the first in the low half."""
    flat = torch.nn.functional.pad(values.flatten(), (0, -2 * count % 8))
    return kernels.pack_int4(flat).view(torch.int8)[:count]


def _swi_glu_quant(call: SwiGluQuantArguments, soc: str) -> None:
    if 0 in call.x.shape:
        return
    assert call.smooth_scales is not None
    values, factors = swi_glu_quant(
        call.described(soc),
        call.x.view(),
        call.smooth_scales.view(),
        _view(call.offsets),
        _view(call.group_index),
        activate_left=bool(call.activate_left),
    )
    y = call.y.view()
    y.copy_(
        _int4_pairs(values, y.numel()).view_as(y) if call.dst_type == INT4 else values.view_as(y)
    )
    if factors is not None:
        call.scale.view().copy_(factors.reshape(call.scale.shape))


OPERATORS = (
    Operator("aclnnSwiGlu", SwiGluArguments, _check_swi_glu, _swi_glu),
    Operator("aclnnSwiGluGrad", SwiGluGradArguments, _check_swi_glu_grad, _swi_glu_grad),
    Operator(
        "aclnnDequantSwigluQuant",
        DequantSwigluQuantArguments,
        _check_dequant_swiglu_quant_v1,
        _dequant_swiglu_quant_v1,
    ),
    Operator(
        "aclnnDequantSwigluQuantV2",
        DequantSwigluQuantV2Arguments,
        _check_dequant_swiglu_quant,
        _dequant_swiglu_quant,
    ),
    Operator("aclnnSwiGluQuantV2", SwiGluQuantArguments, _check_swi_glu_quant, _swi_glu_quant),
)
