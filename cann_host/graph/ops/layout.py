"""Shapes and layouts: operators that move values and compute none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cann_host.graph.executor import (
    Dynamic,
    FractalNZ,
    GraphError,
    Host,
    Int4,
    ints,
    op,
    plain,
    promoted,
    torch_dtype,
)
from lq_graph.kernels import INT4_PER_INT32, storage_k

MOST_OUTPUTS = 1 << 16  # of one node; a tensor each
MOST_VALUES = 1 << 30  # of a result whose size is a value of the graph


@op("Identity", "TensorMove", accepts_internal_formats=True)
def _identity(x: Any) -> Any:
    return x


@op("Transpose", accepts_internal_formats=True)
def _transpose(x: Any, perm: Host) -> Any:
    order = ints(perm)
    if isinstance(x, FractalNZ):
        # GE fuses this Transpose with the matmul that follows: the storage stays as it is.
        if order != [1, 0]:
            nd = None if x.is_meta else lambda: _transpose(x.nd, perm)
            return FractalNZ(_transpose(x.like, perm), None, nd)
        return x.map(lambda nd: _transpose(nd, perm), None, swaps=True)
    if isinstance(x, Int4):
        if order == [1, 0]:
            return Int4(x.held, not x.swapped)
        return Int4(_transpose(x.values, perm))
    return x.permute(order)


@op("Permute", accepts_internal_formats=True)
def _permute(x: Any, *, order: Sequence[int]) -> Any:
    return _transpose(x, torch.tensor(order))


@op("Reshape", accepts_internal_formats=True)
def _reshape(x: Any, shape: Host, *, axis: int = 0, num_axes: int = -1) -> Any:
    if isinstance(x, FractalNZ):
        # int4 weights come here after Bitcast, which puts the eight values into a separate dim
        return x.map(lambda nd: _reshape(nd, shape, axis=axis, num_axes=num_axes), x.storage_shape)
    if isinstance(x, Int4):
        # it stays packed, unless the last dim is no longer a multiple of 8
        like = torch.empty(x.shape, device="meta")
        new = _reshape(like, shape, axis=axis, num_axes=num_axes).shape
        if x.is_packed and not x.swapped and len(new) and new[-1] % INT4_PER_INT32 == 0:
            return Int4(x.held.reshape(*new[:-1], storage_k(new[-1], torch.int32)))
        return Int4(x.values.reshape(new))
    if axis or num_axes != -1:
        raise GraphError(f"Reshape with axis {axis}, num_axes {num_axes} is not implemented")
    dims = [x.shape[i] if dim == 0 and x.numel() else dim for i, dim in enumerate(ints(shape))]
    return x.reshape(dims)


@op("Shape", accepts_internal_formats=True)
def _shape(x: Any, *, dtype: int = 3) -> Tensor:
    return torch.tensor(x.shape, dtype=torch_dtype(dtype), device="cpu")


@op("Unsqueeze")
def _unsqueeze(x: Tensor, *, axes: Sequence[int] = ()) -> Tensor:
    dims = x.dim() + len(axes)
    for axis in sorted(axis % dims for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("Squeeze")
def _squeeze(x: Tensor, *, axis: Sequence[int] = ()) -> Tensor:
    return x.squeeze(tuple(axis)) if axis else x.squeeze()


@op("ExpandDims")
def _expand_dims(x: Tensor, axis: Host) -> Tensor:
    return x.unsqueeze(ints(axis)[0])


@op("BroadcastTo")
def _broadcast_to(x: Tensor, shape: Host) -> Tensor:
    return x.expand(ints(shape))


@op("Expand")
def _expand(x: Tensor, shape: Host) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape))))


@op("Tile")
def _tile(x: Tensor, multiples: Host) -> Tensor:
    return x.tile(ints(multiples))


@op("Range")
def _range(start: Host, limit: Host, delta: Host) -> Tensor:
    dtype = promoted([start, limit, delta])[0].dtype
    first, last, step = (t.reshape(()).item() for t in (start, limit, delta))
    return torch.arange(first, last, step, dtype=dtype, device="cpu")


@op("LinSpace")
def _lin_space(start: Host, stop: Host, num: Host) -> Tensor:
    first, last = (t.reshape(()).item() for t in (start, stop))
    count = ints(num)[0]
    if not 0 <= count <= MOST_VALUES:
        raise GraphError(f"num is {count}; cann_host makes 0 to {MOST_VALUES} values")
    return torch.linspace(first, last, count, dtype=start.dtype, device="cpu")


@op("ReverseV2")
def _reverse(x: Tensor, axis: Host) -> Tensor:
    return x.flip(ints(axis))


@op("AsStrided")
def _as_strided(x: Tensor, size: Host, stride: Host, storage_offset: Host) -> Tensor:
    sizes, strides, offset = ints(size), ints(stride), ints(storage_offset)[0]
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if min([offset, *sizes, *strides]) < 0 or (0 not in sizes and last >= x.numel()):
        raise GraphError(
            f"AsStrided of {x.numel()} values with size {sizes}, stride {strides} and offset "
            f"{offset} reads outside of them"
        )
    return x.contiguous().reshape(-1).as_strided(sizes, strides, offset)


@op("Slice")
def _slice(x: Tensor, offsets: Host, size: Host) -> Tensor:
    for dim, (first, length) in enumerate(zip(ints(offsets), ints(size), strict=True)):
        x = x.narrow(dim, first, x.shape[dim] - first if length < 0 else length)
    return x


@op("Triu")
def _triu(x: Tensor, *, diagonal: int = 0) -> Tensor:
    return x.triu(diagonal)


@op("Tril")
def _tril(x: Tensor, *, diagonal: int = 0) -> Tensor:
    return x.tril(diagonal)


def _whole(name: str, index: Tensor) -> Tensor:
    if index.dtype not in (torch.int32, torch.int64):
        raise GraphError(
            f"{name} is {index.dtype}; it must be int32 or int64 (CANN error 561003, kernel not "
            "found)"
        )
    return index.to(torch.int64)


@op("GatherElements")
def _gather_elements(x: Tensor, index: Tensor, *, dim: int = 0) -> Tensor:
    return x.gather(dim, _whole("index", index))


@op("PadV3")
def _pad(
    x: Tensor,
    paddings: Host,
    constant_values: Host | None = None,
    *,
    mode: str = "constant",
    paddings_contiguous: bool = True,
) -> Tensor:
    if mode != "constant" or not paddings_contiguous:
        raise GraphError(f"PadV3 with mode {mode} or scattered paddings is not implemented")
    pairs = paddings.reshape(-1, 2).flip(0)  # torch counts from the last dim
    value = 0 if constant_values is None else constant_values.item()
    return torch.nn.functional.pad(x, ints(pairs), value=value)


@op("Fill")
def _fill(dims: Host, value: Tensor) -> Tensor:
    return value.reshape(()).expand(ints(dims))


@op("Empty")
def _empty(shape: Host, *, dtype: int = 3, init: bool = False) -> Tensor:
    """Memory whose values are nobody's: not a number, so that a graph that reads them shows it."""
    kind = torch_dtype(dtype)
    unset = torch.nan if kind.is_floating_point else False
    if not kind.is_floating_point and kind != torch.bool:
        unset = torch.iinfo(kind).max
    return torch.full((), 0 if init else unset, dtype=kind).expand(ints(shape))


@op("ZerosLike")
def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@op("OnesLike")
def _ones_like(x: Tensor) -> Tensor:
    return torch.ones_like(x)


@op("Pack")
def _pack(x: Dynamic, *, axis: int = 0, N: int = 1) -> Tensor:
    return torch.stack(promoted(x), axis)


@op("ConcatV2")
def _concat_v2(x: Dynamic, concat_dim: Host, *, N: int = 1) -> Tensor:
    return torch.cat(x, ints(concat_dim)[0])


@op("Concat")
def _concat(concat_dim: Host, x: Dynamic, *, N: int = 1) -> Tensor:
    return torch.cat(x, ints(concat_dim)[0])


@op("ConcatD")
def _concat_d(x: Dynamic, *, concat_dim: int, N: int = 1) -> Tensor:
    return torch.cat(x, concat_dim)


@op("Unpack")
def _unpack(x: Tensor, *, num: int, axis: int = 0) -> tuple[Tensor, ...]:
    if x.shape[axis] != num or num > MOST_OUTPUTS:
        raise GraphError(
            f"Unpack of {tuple(x.shape)} along {axis} into {num}: they must agree, up to "
            f"{MOST_OUTPUTS}"
        )
    return x.unbind(axis)


@op("SplitV")
def _split_v(x: Tensor, size_splits: Host, split_dim: Host, *, num_split: int) -> Any:
    dim = ints(split_dim)[0]
    sizes = ints(size_splits)
    rest = x.shape[dim] - sum(size for size in sizes if size >= 0)
    return torch.split(x, [rest if size < 0 else size for size in sizes], dim)


@op("Gather", "GatherV2", accepts_internal_formats=True)
def _gather(
    x: Any,
    indices: Any,
    axis: Host | None = None,
    *,
    batch_dims: int = 0,
    validate_indices: bool = True,
    is_preprocessed: bool = False,
    negative_index_support: bool = False,
) -> Tensor:
    if batch_dims:
        raise GraphError(f"Gather with batch_dims {batch_dims} is not implemented by cann_host")
    indices = plain("Gather", indices)
    shape = x.shape
    dim = ints(axis)[0] % len(shape) if axis is not None else 0
    index = _whole("indices", indices).reshape(-1)
    # an index outside is undefined on the chip; torch refuses it
    index = torch.where(index < 0, index + shape[dim], index)
    weight = x.weight if isinstance(x, FractalNZ) and dim == 0 else None
    if weight is not None and shape == (weight.n, weight.columns) and not x.swapped:
        flat = weight.rows(index)  # an embedding needs few of them
    else:
        flat = plain("Gather", x).index_select(dim, index)
    return flat.reshape(shape[:dim] + indices.shape + shape[dim + 1 :])


@op("IndexByTensor")
def _index_by_tensor(x: Tensor, indices: Dynamic, *, indices_mask: Sequence[int]) -> Tensor:
    """x[:, i, :, j]: the mask has the dims that are indexed."""
    given = iter(indices)
    return x[tuple(next(given) if wanted else slice(None) for wanted in indices_mask)]


@op("StridedSliceV2")
def _strided_slice(
    x: Tensor,
    begin: Host,
    end: Host,
    axes: Host | None = None,
    strides: Host | None = None,
    *,
    begin_mask: int = 0,
    end_mask: int = 0,
    ellipsis_mask: int = 0,
    new_axis_mask: int = 0,
    shrink_axis_mask: int = 0,
) -> Tensor:
    if begin_mask or end_mask or ellipsis_mask or new_axis_mask or shrink_axis_mask:
        raise GraphError("StridedSliceV2 with masks is not implemented by cann_host")
    starts, ends = ints(begin), ints(end)
    dims = range(len(starts)) if axes is None else [axis % x.dim() for axis in ints(axes)]
    steps = [1] * len(starts) if strides is None else ints(strides)
    index = [slice(None)] * x.dim()
    for dim, first, last, step in zip(dims, starts, ends, steps, strict=True):
        index[dim] = slice(first, last, step)
    return x[tuple(index)]
