"""Copies, casts of dtype and format, padding."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cann_host.graph.ops.maths import cast
from cann_host.memory import FRACTAL_NZ
from lq_graph import kernels

from .checks import compute_base_format_only, need
from .operator import Operator
from .refusal import RefusedError
from .tensors import BASE_FORMATS, AclTensor

__all__ = ["OPERATORS"]


class CopyArguments(NamedTuple):
    self: AclTensor  # CANN's name for what is written
    source: AclTensor


def _expands(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    try:
        return bool(torch.broadcast_shapes(shape, wanted) == wanted)
    except RuntimeError:
        return False


def _check_copy(call: CopyArguments, _soc: str) -> None:
    target, source = call
    compute_base_format_only(self=target, source=source)
    _ = target.dtype, source.dtype
    if source.shape != target.shape and not _expands(source.shape, target.shape):
        raise RefusedError(
            f"source has shape {source.shape}, which does not expand to {target.shape}"
        )


def _copy(call: CopyArguments, _soc: str) -> None:
    target, source = call
    target.write(cast(source.view(), target.dtype))


class CastArguments(NamedTuple):
    self: AclTensor
    dtype: int
    out: AclTensor


def _check_cast(call: CastArguments, soc: str) -> None:
    source, dtype, out = call
    _check_copy(CopyArguments(out, source), soc)
    if dtype != out.dtype_code:
        raise RefusedError(f"out has aclDataType {out.dtype_code}, not {dtype}")


def _cast(call: CastArguments, _soc: str) -> None:
    source, _, out = call
    out.write(cast(source.view(), out.dtype))


class PadArguments(NamedTuple):
    self: AclTensor
    pad: tuple[int, ...]
    value: int | float
    out: AclTensor


def _check_pad(call: PadArguments, _soc: str) -> None:
    source, pad, value, out = call
    need(self=source, pad=pad, value=value, out=out)
    compute_base_format_only(self=source, out=out)
    dims = len(source.shape)
    if len(pad) % 2 or len(pad) > 2 * dims or min(pad, default=0) < 0:
        raise RefusedError(f"pad is {list(pad)} for {dims} dims; cann_host only adds", None)
    # the last dim comes first in pad
    added = [pad[i] + pad[i + 1] for i in range(0, len(pad), 2)][::-1]
    added = [0] * (dims - len(added)) + added
    shape = tuple(size + more for size, more in zip(source.shape, added, strict=True))
    if source.dtype != out.dtype or out.shape != shape:
        raise RefusedError(
            f"out is {out.dtype_name}{list(out.shape)}; it must be {source.dtype_name}{list(shape)}"
        )


def _pad(call: PadArguments, _soc: str) -> None:
    source, pad, value, out = call
    out.write(torch.nn.functional.pad(source.view(), pad, value=value))


class ZeroArguments(NamedTuple):
    self: AclTensor


def _check_zero(call: ZeroArguments, _soc: str) -> None:
    (target,) = call
    compute_base_format_only(self=target)


def _zero(call: ZeroArguments, _soc: str) -> None:
    (target,) = call
    target.write(torch.zeros((), dtype=target.dtype))


class FormatCastArguments(NamedTuple):
    source: AclTensor
    out: AclTensor


def _check_format_cast(call: FormatCastArguments, _soc: str) -> None:
    source, out = call
    for name, tensor in (("source", source), ("out", out)):
        if tensor.format != FRACTAL_NZ and tensor.format not in BASE_FORMATS:
            raise RefusedError(
                f"{name} has format {tensor.format}; cann_host knows ND and FRACTAL_NZ", None
            )
    if source.dtype != out.dtype:
        raise RefusedError(f"source is {source.dtype_name} and out {out.dtype_name}")


def _format_cast(call: FormatCastArguments, _soc: str) -> None:
    source, out = call
    if (source.format == FRACTAL_NZ) == (out.format == FRACTAL_NZ):
        # torch_npu asks for ND to ND when internal formats are not allowed: see
        # torch.npu.config.allow_internal_format.
        source_view, out_view = (
            (source.nz_view(), out.nz_view())
            if out.format == FRACTAL_NZ
            else (source.view(), out.view())
        )
        out_view.copy_(source_view)
    elif out.format == FRACTAL_NZ:
        blocks = kernels.nd_to_nz(source.view(), out.storage[-1])
        out.nz_view().copy_(blocks.reshape(out.storage))
    else:
        rows, columns = source.shape[-2:]
        out.write(kernels.nz_to_nd(source.nz_view(), rows, columns).reshape(out.shape))


OPERATORS = (
    Operator("aclnnInplaceCopy", CopyArguments, _check_copy, _copy, True),
    Operator("aclnnCast", CastArguments, _check_cast, _cast, True),
    Operator("aclnnConstantPadNd", PadArguments, _check_pad, _pad),
    Operator("aclnnInplaceZero", ZeroArguments, _check_zero, _zero),
    Operator("aclnnNpuFormatCast", FormatCastArguments, _check_format_cast, _format_cast),
)
