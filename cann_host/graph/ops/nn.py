"""Activations, norms and float matmuls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cann_host import chips
from cann_host.chips import NormRoundings
from cann_host.graph import executor
from cann_host.graph.executor import GraphError, Host, describe, dtype_name, ints, op, optional_desc
from cann_host.rules import RmsNormCall, check_layer_norm, check_rms_norm


@op("Relu")
def _relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@op("Sigmoid")
def _sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@op("Tanh")
def _tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@op("Gelu")
def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")  # GE's Gelu is the tanh form


@op("GeluV2")
def _gelu_v2(x: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


@op("Softplus")
def _softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x)


@op("Swish")
def _swish(x: Tensor, *, scale: float = 1.0) -> Tensor:
    return torch.nn.functional.silu(x) if scale == 1.0 else x * torch.sigmoid(x * scale)


@op("Elu")
def _elu(x: Tensor, *, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    result: Tensor = torch.ops.aten.elu(x, alpha, scale, input_scale)
    return result


@op("GLU")
def _glu(x: Tensor, *, dim: int = -1) -> Tensor:
    return torch.nn.functional.glu(x, dim)


@op("HardSigmoid")
def _hard_sigmoid(input_x: Tensor, *, alpha: float = 1 / 6, beta: float = 0.5) -> Tensor:
    return (input_x.float() * alpha + beta).clamp(0, 1).to(input_x.dtype)


@op("HardSwish")
def _hard_swish(x: Tensor) -> Tensor:
    return torch.nn.functional.hardswish(x)


@op("LeakyRelu")
def _leaky_relu(x: Tensor, *, negative_slope: float = 0.0) -> Tensor:
    return torch.nn.functional.leaky_relu(x, negative_slope)


@op("LogSigmoid")
def _log_sigmoid(x: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x)


@op("Mish")
def _mish(x: Tensor) -> Tensor:
    return torch.nn.functional.mish(x)


@op("ThresholdV2")
def _threshold(x: Tensor, threshold: Tensor, value: Tensor | None = None) -> Tensor:
    """x where it is above the threshold, else the value; without one 0."""
    other = torch.zeros_like(x) if value is None else value.to(x.dtype)
    return torch.where(x > threshold, x, other)


@op("SoftmaxV2")
def _softmax(x: Tensor, *, axes: Sequence[int] = (-1,), half_to_float: bool = False) -> Tensor:
    if len(axes) != 1:
        raise GraphError(f"SoftmaxV2 over axes {list(axes)} is not implemented by cann_host")
    return torch.softmax(x, axes[0], dtype=torch.float32 if half_to_float else None)


@op("LogSoftmaxV2")
def _log_softmax(logits: Tensor, *, axes: Sequence[int] = (-1,)) -> Tensor:
    if len(axes) != 1:
        raise GraphError(f"LogSoftmaxV2 over axes {list(axes)} is not implemented by cann_host")
    return torch.log_softmax(logits, axes[0])


@op("Conv2D")
def _conv2d(
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int] = (1, 1, 1, 1),
    groups: int = 1,
    data_format: str = "NHWC",
    offset_x: int = 0,
) -> Tensor:
    if data_format != "NCHW" or offset_w is not None or offset_x or x.dim() != 4:
        raise GraphError(
            f"Conv2D of {x.dim()} dims, data_format {data_format}, or with an offset is not "
            "implemented by cann_host; it does NCHW"
        )
    top, bottom, left, right = pads
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    bias = None if bias is None else bias.to(x.dtype)
    return torch.conv2d(padded, filter, bias, strides[2:], 0, dilations[2:], groups)


def _reciprocal_rms(value: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    dims = list(range(-gamma.dim(), 0))
    return torch.rsqrt(value.square().mean(dims, keepdim=True) + epsilon)


def rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y and rstd."""
    value = x.to(torch.float32)
    rstd = _reciprocal_rms(value, gamma, epsilon)
    return (value * rstd * gamma.to(torch.float32)).to(x.dtype), rstd


def norm_of_sum(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float, rounds: NormRoundings
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x1 + x2 in float32, rstd, and the sum in x1's dtype."""

    def after(rounded: bool, value: Tensor) -> Tensor:
        return value.to(x1.dtype).to(torch.float32) if rounded else value

    total = x1.to(torch.float32) + x2.to(torch.float32)
    value = after(rounds.total, total)
    rstd = _reciprocal_rms(value, gamma, epsilon)
    normalized = after(rounds.normalized, value * rstd)
    return after(rounds.product, normalized * gamma.to(torch.float32)), rstd, total.to(x1.dtype)


def add_rms_norm(
    soc: str, x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """y, rstd and the sum, as a chip's kernels compute them."""
    y, rstd, total = norm_of_sum(x1, x2, gamma, epsilon, chips.add_rms_norm_roundings(soc))
    return y.to(x1.dtype), rstd, total


def _check_rms_norm(x: Tensor, gamma: Tensor, epsilon: float, x2: Tensor | None = None) -> None:
    other = optional_desc(x2)
    call = RmsNormCall(
        executor.soc_name(), describe(x), describe(gamma), epsilon, other, is_graph=True
    )
    if refusal := check_rms_norm(call):
        raise GraphError(refusal)


@op("RmsNorm")
def _rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    _check_rms_norm(x, gamma, epsilon)
    return rms_norm(x, gamma, epsilon=epsilon)


@op("AddRmsNorm")
def _add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rms_norm(x1, gamma, epsilon, x2)
    return add_rms_norm(executor.soc_name(), x1, x2, gamma, epsilon=epsilon)


@op("LayerNormV4")
def _layer_norm(
    x: Tensor,
    normalized_shape: Host,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    last = ints(normalized_shape)
    given = [dtype_name(t) for t in (gamma, beta) if t is not None]
    if refusal := check_layer_norm(dtype_name(x), given, x.dim(), len(last)):
        raise GraphError(refusal)
    gamma, beta = (None if t is None else t.to(torch.float32) for t in (gamma, beta))
    y, mean, rstd = torch.native_layer_norm(x.to(torch.float32), last, gamma, beta, epsilon)
    return y.to(x.dtype), mean, rstd


@op("MatMul", "MatMulV2")
def _matmul(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
    *,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    offset_x: int = 0,
) -> Tensor:
    if offset_w is not None or offset_x:
        raise GraphError("MatMul with an offset is not implemented by cann_host")
    left, right = x1.mT if transpose_x1 else x1, x2.mT if transpose_x2 else x2
    if bias is None:
        return torch.matmul(left, right)
    # the bias is added to the accumulator before the sum is rounded
    return (torch.matmul(left.float(), right.float()) + bias.float()).to(x1.dtype)


@op("BatchMatMul", "BatchMatMulV2")
def _batch_matmul(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
    *,
    adj_x1: bool = False,
    adj_x2: bool = False,
    offset_x: int = 0,
) -> Tensor:
    return _matmul(
        x1, x2, bias, offset_w, transpose_x1=adj_x1, transpose_x2=adj_x2, offset_x=offset_x
    )
