"""The quantized matmul and its epilogue.

Sources: aclnnQuantMatmulV4 document of CANN (hicann/ops-nn, matmul/quant_batch_matmul_v3/docs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import native
from .errors import NotFiniteError
from .layouts import NzWeight
from .memory import check_held, without_overlap
from .packing import pack_scale, unpack_finite_scale, unpack_int4

__all__ = ["TensorLike", "epilogue", "is_cut", "matmul_int32", "quant_matmul"]

_FLOAT16_MAX = 65504.0


class TensorLike(Protocol):
    """A tensor, a fake tensor, or any record of a dtype and a shape."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Sequence[int]: ...


def is_cut(
    scale: TensorLike,
    pertoken_scale: TensorLike | None,
    bias: TensorLike | None,
    output_dtype: torch.dtype,
    *,
    per_tensor: bool,
) -> bool:
    """Whether Ascend 950 multiplies by a scale of one value on the way out of the matrix unit,
    which keeps 19 bits of it (`s19`): in the int8 matmul to bfloat16, if no other step follows.

    Args:
        scale, pertoken_scale, bias, output_dtype: of the call.
        per_tensor: whether the scale is of one value; in a graph its size may be a symbol.
    """
    return (
        scale.dtype == torch.float32
        and output_dtype == torch.bfloat16
        and pertoken_scale is None
        and (bias is None or bias.dtype == torch.int32)
        and per_tensor
    )


def matmul_int32(x1: Tensor, weight: Tensor) -> Tensor:
    """Exact int32 product of int8 matrices, the weight untransposed.

    Args:
        x1: int8, (..., m, k).
        weight: int8, (..., n, k); batch dims broadcast with those of x1.

    Returns:
        int32, (..., m, n), batch dims broadcast.
    """
    if 0 in x1.shape or 0 in weight.shape:
        batch = torch.broadcast_shapes(x1.shape[:-2], weight.shape[:-2])
        sizes = (*batch, x1.shape[-2], weight.shape[-2])
        return torch.zeros(sizes, dtype=torch.int32, device=x1.device)
    if x1.shape[-1] == 1:
        # torch._int_mm (2.13, CPU) returns garbage for k = 1 and n > 1
        return x1.to(torch.int32) * weight.to(torch.int32).transpose(-1, -2)
    if weight.dim() == 2:
        flat = torch._int_mm(
            without_overlap(x1.reshape(-1, x1.shape[-1])), without_overlap(weight).t()
        )
        return flat.view(*x1.shape[:-1], weight.shape[0])
    batch = torch.broadcast_shapes(x1.shape[:-2], weight.shape[:-2])
    left = x1.expand(*batch, *x1.shape[-2:]).reshape(-1, *x1.shape[-2:])
    right = weight.expand(*batch, *weight.shape[-2:]).reshape(-1, *weight.shape[-2:])
    out = torch.empty(
        left.shape[0], x1.shape[-2], weight.shape[-2], dtype=torch.int32, device=x1.device
    )
    for i in range(left.shape[0]):
        torch._int_mm(without_overlap(left[i]), without_overlap(right[i]).t(), out=out[i])
    return out.view(*batch, *out.shape[-2:])


def quant_matmul(
    x1: Tensor,
    weight: Tensor | NzWeight,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    output_dtype: torch.dtype,
    folds: bool = False,
    offset: Tensor | None = None,
) -> Tensor:
    """Quantized matmul with LinearQuant's epilogue.

    Every case ends in one rounding to the output dtype, half to even. The compiled kernel of
    `native` computes the cases that it has; torch computes the others here, to the same numbers.

    Args:
        x1: int8 (..., m, k), or int32 (..., m, k/8) carrying int4.
        weight: its dtype, (..., n, k) or (n, k/8), or an NzWeight of (n, k) or (n, k/8).
        scale: (1,) or (n,). The packed int64 form for int8 output and for float16 output
            without pertoken_scale, and possibly for bfloat16 output; else float32 or bfloat16.
            int32 output reads no scale.
        bias: int32 (added to the accumulator) or a float dtype (added last); (n,) or
            (batch, 1, n).
        pertoken_scale: float32, (m,).
        output_dtype: torch.int8, float16, bfloat16 or int32.
        folds: a float32 scale is folded, with the offset, as `pack_scale` does.
        offset: float32, (1,) or (n,), or None; read only if the scale is folded.

    Returns:
        output_dtype, (..., m, n).

    Raises:
        NotFiniteError: a packed or folded scale that is read, or its offset, holds infinity or
            NaN.
        ShortStorageError: a tensor's storage is shorter than its shape.
    """
    if isinstance(weight, NzWeight):
        stored, nz_shape = weight.blocks, (weight.n, weight.columns)
    else:
        stored, nz_shape = weight, None
    out = native.matmul(
        x1,
        stored,
        scale,
        bias,
        pertoken_scale,
        output_dtype,
        nz_shape,
        folds=folds,
        offset=offset,
    )
    if out is not None:
        return out
    operands = {"x1": x1, "weight": stored, "scale": scale, "bias": bias, "offset": offset}
    for name, tensor in {**operands, "pertoken_scale": pertoken_scale}.items():
        if tensor is not None:
            check_held(name, tensor)
    if isinstance(weight, NzWeight):
        weight = weight.nd()
    if x1.dtype == torch.int32:
        x1, weight = unpack_int4(x1), unpack_int4(weight)
    acc = matmul_int32(x1, weight)
    if folds and output_dtype != torch.int32:
        if offset is not None and not bool(offset.isfinite().all()):
            raise NotFiniteError
        scale = pack_scale(scale, offset)
    offset = None
    folded = scale.dtype in (torch.int64, torch.uint64)
    if folded and output_dtype != torch.int32:
        scale, offset = unpack_finite_scale(scale)
    return epilogue(
        acc,
        scale,
        folded=folded,
        offset=offset,
        bias=bias,
        pertoken_scale=pertoken_scale,
        output_dtype=output_dtype,
    )


def epilogue(
    acc: Tensor,
    scale: Tensor,
    *,
    folded: bool,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    output_dtype: torch.dtype,
) -> Tensor:
    """The steps after the matmul: bias, scales, clamp, offset and one rounding to the output dtype.

    Args:
        acc: int32, (..., m, n), the accumulators; may be overwritten.
        scale: (1,) or (n,), float32 of 19 bits if `folded`, else float32 or bfloat16.
        folded: whether scale and offset come from the packed 64-bit scale.
        offset: integers from -256 to 255, only if `folded`; None for 0.
        bias, pertoken_scale, output_dtype: as `quant_matmul` takes them.

    Returns:
        output_dtype, (..., m, n).
    """
    if bias is not None and bias.dtype == torch.int32:
        acc = acc.add_(bias) if acc.dim() >= bias.dim() else acc + bias
        bias = None
    if output_dtype == torch.int32:
        return acc

    value = acc.to(torch.float32)
    if folded:
        value.mul_(scale)
        if output_dtype == torch.int8:
            # 9-bit clip first, the offset after it: 400 with offset -200 gives 55, not 127
            value.round_().clamp_(-256, 255)
            if offset is not None:
                value.add_(offset)
            value.clamp_(-128, 127)
        elif output_dtype == torch.float16:
            value.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
        return value.to(output_dtype)

    value.mul_(scale.to(torch.float32))
    if pertoken_scale is not None:
        value.mul_(pertoken_scale.unsqueeze(-1))
    if bias is not None:
        value.add_(bias.to(torch.float32))
    return value.to(output_dtype)
