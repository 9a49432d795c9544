"""Norms that quantize, or that give a second dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cann_host.graph.ops.fused_norms import (
    add_rms_norm_cast,
    add_rms_norm_dynamic_quant,
    add_rms_norm_quant,
    rms_norm_quant,
    warn_of_more_scales,
)
from cann_host.graph.ops.nn import add_rms_norm
from cann_host.rules import (
    INVALID,
    NULL_POINTER,
    TILING,
    AddRmsNormDynamicQuantCall,
    AddRmsNormQuantCall,
    RmsNormCall,
    RmsNormQuantCall,
    check_add_rms_norm_cast,
    check_add_rms_norm_dynamic_quant,
    check_add_rms_norm_quant,
    check_rms_norm,
    check_rms_norm_quant,
)
from lq_graph import kernels

from .checks import compute_base_format_only, need
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor, describe

__all__ = ["OPERATORS"]


def _view(tensor: AclTensor | None) -> Tensor | None:
    return None if tensor is None else tensor.view()


def _store(y: AclTensor, values: Tensor) -> None:
    """Quantized values; an int32 y holds eight int4 values of the last dim in each element."""
    y.write(kernels.pack_int4(values) if y.dtype == torch.int32 else values)


def _quantized_shape(y: AclTensor) -> tuple[int, ...]:
    """The shape of the values in y."""
    return (*y.shape[:-1], kernels.logical_k(y.shape[-1], y.dtype)) if y.shape else ()


def _need_like(code: int | None, wanted: AclTensor, **tensors: AclTensor | None) -> None:
    """Refuse a tensor whose dtype or shape is not that of another one."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
            raise RefusedError(f"{name} is {tensor.desc}; it must be {wanted.desc}", code)


# ---- AddRmsNormDynamicQuant ----


class AddRmsNormDynamicQuantArguments(NamedTuple):
    x1: AclTensor
    x2: AclTensor
    gamma: AclTensor
    smooth_scale1: AclTensor | None
    smooth_scale2: AclTensor | None
    beta: AclTensor | None
    epsilon: float
    output_mask: tuple[int, ...] | None
    y1: AclTensor
    y2: AclTensor
    x: AclTensor  # the sum
    scale1: AclTensor
    scale2: AclTensor

    def described(self, soc: str) -> AddRmsNormDynamicQuantCall:
        mask = tuple(bool(flag) for flag in self.output_mask or ())
        call = AddRmsNormDynamicQuantCall(
            soc,
            self.x1.desc,
            self.x2.desc,
            self.gamma.desc,
            smooth_scale1=describe(self.smooth_scale1),
            smooth_scale2=describe(self.smooth_scale2),
            beta=describe(self.beta),
            epsilon=self.epsilon,
            output_mask=mask,
        )
        y = self.y1 if call.wanted[0] else self.y2
        return call if y is None else call._replace(y_dtype=y.dtype_name)


def _check_add_rms_norm_dynamic_quant(call: AddRmsNormDynamicQuantArguments, soc: str) -> None:
    """Source: hicann/ops-nn norm/add_rms_norm_dynamic_quant/op_host/op_api, V2."""
    need(x1=call.x1, x2=call.x2, gamma=call.gamma, x=call.x, y1=call.y1, y2=call.y2)
    need(scale1=call.scale1, scale2=call.scale2)
    if call.output_mask is not None and len(call.output_mask) != 2:
        raise RefusedError(f"output_mask has {len(call.output_mask)} values; it must have 2")
    described = call.described(soc)
    pairs = ((call.y1, call.scale1), (call.y2, call.scale2))
    wanted = [pair for pair, want in zip(pairs, described.wanted, strict=True) if want]
    if len(wanted) == 2 and call.y1.dtype != call.y2.dtype:
        raise RefusedError(f"y1 is {call.y1.dtype_name} and y2 {call.y2.dtype_name}")
    compute_base_format_only(
        **{name: t for name, t in call._asdict().items() if isinstance(t, AclTensor)}
    )
    raise_refusal(check_add_rms_norm_dynamic_quant(described))
    x1 = call.x1
    rows = x1.shape[:-1]
    for y, scale in wanted:
        if _quantized_shape(y) != x1.shape:
            code = INVALID if y.dtype == torch.int32 else TILING
            raise RefusedError(f"y has shape {y.shape} and x1 {x1.shape}", code)
        # [tiling] rows, or the number of rows
        if scale.dtype != torch.float32 or scale.shape not in (rows, (_count(rows),)):
            raise RefusedError(f"scale is {scale.desc}; it must be float32 {rows}", TILING)
    _need_like(TILING, x1, x=call.x)


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _add_rms_norm_dynamic_quant(call: AddRmsNormDynamicQuantArguments, soc: str) -> None:
    if 0 in call.x1.shape or 0 in call.gamma.shape:
        return
    described = call.described(soc)
    smooth = tuple(
        None if t is None or 0 in t.shape else t.view()
        for t in (call.smooth_scale1, call.smooth_scale2)
    )
    beta = None if call.beta is None or 0 in call.beta.shape else call.beta.view()
    results, total = add_rms_norm_dynamic_quant(
        soc,
        call.x1.view(),
        call.x2.view(),
        call.gamma.view(),
        smooth,
        beta,
        call.epsilon,
        described.wanted,
        8 if described.y_dtype == "int8" else 4,
    )
    call.x.write(total)
    for (y, scale), result in zip(
        ((call.y1, call.scale1), (call.y2, call.scale2)), results, strict=True
    ):
        if result is not None:
            _store(y, result[0])
            scale.write(result[1].reshape(scale.shape))


# ---- AddRmsNormQuant ----


class AddRmsNormQuantV2Arguments(NamedTuple):
    x1: AclTensor
    x2: AclTensor
    gamma: AclTensor
    scales1: AclTensor
    scales2: AclTensor | None
    zero_points1: AclTensor | None
    zero_points2: AclTensor | None
    beta: AclTensor | None
    axis: int
    epsilon: float
    div_mode: int
    y1: AclTensor
    y2: AclTensor
    x: AclTensor  # the sum
    rms_norm_out: AclTensor | None

    def described(self, soc: str, entry: str) -> AddRmsNormQuantCall:
        return AddRmsNormQuantCall(
            soc,
            self.x1.desc,
            self.x2.desc,
            self.gamma.desc,
            self.scales1.desc,
            describe(self.scales2),
            describe(self.zero_points1),
            describe(self.zero_points2),
            describe(self.beta),
            self.y1.dtype_name,
            bool(self.div_mode),
            entry,
        )


class AddRmsNormQuantArguments(NamedTuple):
    x1: AclTensor
    x2: AclTensor
    gamma: AclTensor
    scales1: AclTensor
    scales2: AclTensor | None
    zero_points1: AclTensor | None
    zero_points2: AclTensor | None
    axis: int
    epsilon: float
    div_mode: int
    y1: AclTensor
    y2: AclTensor
    x: AclTensor

    def as_v2(self) -> AddRmsNormQuantV2Arguments:
        return AddRmsNormQuantV2Arguments(*self[:7], None, *self[7:], None)


def _check_add_rms_norm_quant(
    call: AddRmsNormQuantV2Arguments, soc: str, *, entry: str = "v2"
) -> None:
    """Source: hicann/ops-nn norm/add_rms_norm_quant_v2/op_host/op_api."""
    need(x1=call.x1, x2=call.x2, gamma=call.gamma, scales1=call.scales1, y1=call.y1, y2=call.y2)
    if call.rms_norm_out is not None:
        raise RefusedError("cann_host implements aclnnAddRmsNormQuantV2 without rmsNormOut", None)
    if call.x is None:
        raise RefusedError("x is null, and rmsNormOut too", NULL_POINTER)
    compute_base_format_only(
        **{name: t for name, t in call._asdict().items() if isinstance(t, AclTensor)}
    )
    described = call.described(soc, entry)
    raise_refusal(check_add_rms_norm_quant(described))
    for name, tensor in (("y1", call.y1), ("y2", call.y2)):
        if tensor.dtype != call.y1.dtype or tensor.shape != call.x1.shape:
            raise RefusedError(
                f"{name} is {tensor.desc}; it must be {call.y1.dtype_name} {call.x1.shape}",
                described.code,
            )
    _need_like(described.code, call.x1, x=call.x)


def _add_rms_norm_quant(call: AddRmsNormQuantV2Arguments, soc: str, *, entry: str = "v2") -> None:
    if 0 in call.x1.shape or 0 in call.gamma.shape:
        return
    results, total = add_rms_norm_quant(
        call.described(soc, entry),
        call.x1.view(),
        call.x2.view(),
        call.gamma.view(),
        (call.scales1.view(), _view(call.scales2)),
        (_view(call.zero_points1), _view(call.zero_points2)),
        _view(call.beta),
        call.epsilon,
    )
    call.x.write(total)
    for y, values in zip((call.y1, call.y2), results, strict=True):
        if values is not None:
            y.write(values)


def _check_add_rms_norm_quant_v1(call: AddRmsNormQuantArguments, soc: str) -> None:
    _check_add_rms_norm_quant(call.as_v2(), soc, entry="v1")


def _add_rms_norm_quant_v1(call: AddRmsNormQuantArguments, soc: str) -> None:
    _add_rms_norm_quant(call.as_v2(), soc, entry="v1")


# ---- RmsNormQuant ----


class RmsNormQuantArguments(NamedTuple):
    x: AclTensor
    gamma: AclTensor
    beta: AclTensor
    scale: AclTensor
    offset: AclTensor
    epsilon: float
    y: AclTensor


def _check_rms_norm_quant(call: RmsNormQuantArguments, soc: str) -> None:
    """Source: hicann/ops-nn norm/rms_norm_quant/op_host/op_api."""
    x, gamma, beta, scale, offset, epsilon, y = call
    need(x=x, gamma=gamma, beta=beta, scale=scale, offset=offset, y=y)
    compute_base_format_only(x=x, gamma=gamma, beta=beta, scale=scale, offset=offset, y=y)
    given = RmsNormQuantCall(
        soc, x.desc, gamma.desc, beta.desc, scale.desc, offset.desc, y.dtype_name, epsilon
    )
    raise_refusal(check_rms_norm_quant(given))
    shape = _quantized_shape(y)
    if shape[-1:] != x.shape[-1:]:
        raise RefusedError(f"y has shape {y.shape} and x {x.shape}")
    if shape != x.shape:
        raise RefusedError(
            f"y has shape {y.shape} and x {x.shape}; CANN compares the last dims only, cann_host "
            "all",
            None,
        )


def _rms_norm_quant(call: RmsNormQuantArguments, _soc: str) -> None:
    warn_of_more_scales(call.scale.shape)
    x, gamma, beta, scale, offset = (tensor.view() for tensor in call[:5])
    bits = 8 if call.y.dtype == torch.int8 else 4
    _store(call.y, rms_norm_quant(x, gamma, beta, scale, offset, call.epsilon, bits))


# ---- AddRmsNorm with other results ----


class AddRmsNormCastArguments(NamedTuple):
    x1: AclTensor
    x2: AclTensor
    gamma: AclTensor
    epsilon: float
    y1: AclTensor  # float32
    y2: AclTensor
    rstd: AclTensor
    x: AclTensor  # the sum


def _need_rstd(x: AclTensor, gamma: AclTensor, rstd: AclTensor) -> None:
    kept = x.shape[: len(x.shape) - len(gamma.shape)]
    wanted = (*kept, *(1 for _ in gamma.shape))
    if rstd.dtype != torch.float32 or rstd.shape != wanted:
        raise RefusedError(f"rstd is {rstd.desc}; it must be float32 {wanted}", TILING)


def _check_add_rms_norm_cast(call: AddRmsNormCastArguments, soc: str) -> None:
    """Source: hicann/ops-nn norm/add_rms_norm_cast/op_host."""
    x1, x2, gamma, epsilon, y1, y2, rstd, x = call
    need(x1=x1, x2=x2, gamma=gamma, y1=y1, y2=y2, rstd=rstd, x=x)
    compute_base_format_only(x1=x1, x2=x2, gamma=gamma, y1=y1, y2=y2, rstd=rstd, x=x)
    given = RmsNormCall(soc, x1.desc, gamma.desc, epsilon, x2.desc)
    raise_refusal(check_add_rms_norm_cast(given))
    _need_like(TILING, x1, y2=y2, x=x)
    if y1.dtype != torch.float32 or y1.shape != x1.shape:
        raise RefusedError(f"y1 is {y1.desc}; it must be float32 {x1.shape}", TILING)
    _need_rstd(x1, gamma, rstd)


def _add_rms_norm_cast(call: AddRmsNormCastArguments, soc: str) -> None:
    if 0 in call.x1.shape or 0 in call.gamma.shape:
        return
    results = add_rms_norm_cast(
        soc, call.x1.view(), call.x2.view(), call.gamma.view(), call.epsilon
    )
    for tensor, values in zip(call[4:], results, strict=True):
        assert isinstance(tensor, AclTensor)
        tensor.write(values)


class InplaceAddRmsNormArguments(NamedTuple):
    x1: AclTensor  # becomes y
    x2: AclTensor  # becomes the sum
    gamma: AclTensor
    epsilon: float
    rstd: AclTensor


def _check_inplace_add_rms_norm(call: InplaceAddRmsNormArguments, soc: str) -> None:
    """Source: hicann/ops-nn norm/inplace_add_rms_norm/op_host."""
    x1, x2, gamma, epsilon, rstd = call
    need(x1=x1, x2=x2, gamma=gamma, rstd=rstd)
    compute_base_format_only(x1=x1, x2=x2, gamma=gamma, rstd=rstd)
    raise_refusal(check_rms_norm(RmsNormCall(soc, x1.desc, gamma.desc, epsilon, x2.desc)))
    _need_rstd(x1, gamma, rstd)


def _inplace_add_rms_norm(call: InplaceAddRmsNormArguments, soc: str) -> None:
    x1, x2, gamma = call.x1, call.x2, call.gamma
    if 0 in x1.shape or 0 in gamma.shape:
        return
    y, rstd, total = add_rms_norm(soc, x1.view(), x2.view(), gamma.view(), epsilon=call.epsilon)
    x1.write(y)
    x2.write(total)
    call.rstd.write(rstd)


OPERATORS = (
    Operator(
        "aclnnAddRmsNormDynamicQuantV2",
        AddRmsNormDynamicQuantArguments,
        _check_add_rms_norm_dynamic_quant,
        _add_rms_norm_dynamic_quant,
    ),
    Operator(
        "aclnnAddRmsNormQuant",
        AddRmsNormQuantArguments,
        _check_add_rms_norm_quant_v1,
        _add_rms_norm_quant_v1,
    ),
    Operator(
        "aclnnAddRmsNormQuantV2",
        AddRmsNormQuantV2Arguments,
        _check_add_rms_norm_quant,
        _add_rms_norm_quant,
    ),
    Operator("aclnnRmsNormQuant", RmsNormQuantArguments, _check_rms_norm_quant, _rms_norm_quant),
    Operator(
        "aclnnAddRmsNormCast", AddRmsNormCastArguments, _check_add_rms_norm_cast, _add_rms_norm_cast
    ),
    Operator(
        "aclnnInplaceAddRmsNorm",
        InplaceAddRmsNormArguments,
        _check_inplace_add_rms_norm,
        _inplace_add_rms_norm,
    ),
)
