"""Norms, which models call before and after their quantized layers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cann_host.graph.ops.nn import add_rms_norm, rms_norm
from cann_host.rules import INVALID, TILING, RmsNormCall, check_rms_norm

from .checks import compute_base_format_only, need
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor, describe

__all__ = ["OPERATORS"]


class RmsNormArguments(NamedTuple):
    x: AclTensor
    gamma: AclTensor
    epsilon: float
    y: AclTensor
    rstd: AclTensor


class AddRmsNormArguments(NamedTuple):
    x1: AclTensor
    x2: AclTensor
    gamma: AclTensor
    epsilon: float
    y: AclTensor
    rstd: AclTensor
    x: AclTensor  # the sum


def _check_rms_norm(call: RmsNormArguments, soc: str, *, x2: AclTensor | None = None) -> None:
    """Source: hicann/ops-nn norm/rms_norm and, with x2, norm/add_rms_norm."""
    x, gamma, epsilon, y, rstd = call
    need(x=x, gamma=gamma, y=y, rstd=rstd)
    raise_refusal(check_rms_norm(RmsNormCall(soc, x.desc, gamma.desc, epsilon, describe(x2))))
    if y.dtype != x.dtype or rstd.dtype != torch.float32:
        raise RefusedError(f"y is {y.dtype_name} and rstd {rstd.dtype_name}; x is {x.dtype_name}")
    compute_base_format_only(x=x, gamma=gamma, y=y, rstd=rstd)
    if y.shape != x.shape:
        code = TILING if x2 is None else INVALID
        raise RefusedError(f"x has shape {x.shape} and y {y.shape}", code)
    kept = x.shape[: len(x.shape) - len(gamma.shape)]
    if rstd.shape != (*kept, *(1 for _ in gamma.shape)):
        raise RefusedError(f"rstd has shape {rstd.shape}", TILING)


def _rms_norm(call: RmsNormArguments, _soc: str) -> None:
    if 0 in call.x.shape:
        return
    y, rstd = rms_norm(call.x.view(), call.gamma.view(), epsilon=call.epsilon)
    call.y.write(y)
    call.rstd.write(rstd)


def _check_add_rms_norm(call: AddRmsNormArguments, soc: str) -> None:
    x1, x2, gamma, epsilon, y, rstd, x = call
    need(x1=x1, x2=x2, gamma=gamma, y=y)
    if rstd is None:
        raise RefusedError("cann_host implements aclnnAddRmsNorm with rstd and x", None)
    need(x=x)
    _check_rms_norm(RmsNormArguments(x1, gamma, epsilon, y, rstd), soc, x2=x2)
    compute_base_format_only(x2=x2, x=x)
    if (x.shape, x.dtype) != (x1.shape, x1.dtype):
        raise RefusedError(f"x1 is {x1.desc} and x {x.desc}")


def _add_rms_norm(call: AddRmsNormArguments, soc: str) -> None:
    x1, x2, gamma = call.x1, call.x2, call.gamma
    if 0 in x1.shape or 0 in gamma.shape:
        return
    results = add_rms_norm(soc, x1.view(), x2.view(), gamma.view(), epsilon=call.epsilon)
    for tensor, values in zip((call.y, call.rstd, call.x), results, strict=True):
        tensor.write(values)


OPERATORS = (
    Operator("aclnnRmsNorm", RmsNormArguments, _check_rms_norm, _rms_norm),
    Operator("aclnnAddRmsNorm", AddRmsNormArguments, _check_add_rms_norm, _add_rms_norm),
)
