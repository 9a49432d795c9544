"""What GE operators mean: `{op type: function}`, one short function per operator.

A function's signature is the operator's GE definition: positional parameters are its inputs,
keyword-only parameters its attributes with GE's defaults. `run_op` calls it by those names, and
`signatures` tells torchair's own checks what exists. Tensors are plain CPU tensors, except

    Int4        int4 values, unpacked
    FractalNZ   a tensor whose storage has the internal format FRACTAL_NZ

uint64 tensors (packed quantization parameters) are torch.int64 with the same bits. While a graph is
compiled the same functions run on meta tensors, so every shape and refusal of a static graph is
known before it runs.

Sources: the operator documents of CANN (hicann/ops-nn, hicann/ops-math) and the prototypes in
torchair's `_ge_concrete_graph/auto_generated_ge_raw_ops.py`.
"""

# A signature is the operator's GE definition, so it has names and arguments of GE's choosing.
# ruff: noqa: ARG001, N803

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lq_graph.numerics import (
    dynamic_quant,
    pack_int4,
    pack_scale,
    quant_matmul,
    static_quant,
    unpack_int4,
)

from .rules import (
    ND,
    NZ,
    check_ascend_quant,
    check_dynamic_quant,
    check_quant_matmul,
    check_trans_quant_param,
    soc_family,
)

__all__ = [
    "DTYPES",
    "OPS",
    "FractalNZ",
    "GraphError",
    "Int4",
    "Op",
    "ShapeUnknownError",
    "Value",
    "dtype_name",
    "find_op",
    "is_meta",
    "run_op",
]


class GraphError(Exception):
    """A graph that CANN, or this stand-in, refuses."""


class ShapeUnknownError(Exception):
    """A shape depends on values that are not known while a graph is compiled."""


@dataclass(frozen=True)
class Int4:
    """int4 values as int8, one per element."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


@dataclass(frozen=True)
class FractalNZ:
    """A tensor stored as FRACTAL_NZ, already brought to ND; int4 ones hold `Int4`.

    storage_shape is None where only the compiler knows it.
    """

    nd: Tensor | Int4
    storage_shape: tuple[int, ...] | None

    @property
    def shape(self) -> torch.Size:
        return self.nd.shape


Value: TypeAlias = "Tensor | Int4 | FractalNZ | None"

# An input whose values, not only its shape, decide the shape of the result.
Host: TypeAlias = Tensor
# An input that stands for any number of tensors, named x0, x1, ... in the graph.
Dynamic: TypeAlias = list[Tensor]

# GE dtype -> the torch dtype that represents it here
DTYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    10: torch.int64,  # uint64
    11: torch.float64,
    12: torch.bool,
    27: torch.bfloat16,
}
INT8, INT4 = 2, 29


def dtype_name(value: Tensor | Int4) -> str:
    """The dtype as CANN's rules spell it."""
    return "int4" if isinstance(value, Int4) else str(value.dtype).removeprefix("torch.")


def is_meta(value: Any) -> bool:
    """Whether only the shape and dtype of a value are known."""
    if isinstance(value, FractalNZ):
        value = value.nd
    if isinstance(value, Int4):
        value = value.values
    return isinstance(value, Tensor) and value.is_meta


@dataclass(frozen=True)
class Op:
    """An operator: its function and what the function's signature says.

    Attributes:
        type: GE op type.
        function: the implementation.
        inputs: names of the inputs, in order.
        host: those whose values decide the shape of the result.
        dynamic: the input that stands for many, if any.
        attrs: names of the attributes.
        special: whether the function takes Int4 and FractalNZ as they are.
    """

    type: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    host: frozenset[str]
    dynamic: str | None
    attrs: frozenset[str]
    special: bool


OPS: dict[str, Op] = {}

F = TypeVar("F", bound=Callable[..., Any])


def _op(*types: str, special: bool = False) -> Callable[[F], F]:
    """Register a function under its GE op types."""

    def register(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        inputs = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        for type_ in types:
            OPS[type_] = Op(
                type=type_,
                function=function,
                inputs=tuple(_ge_name(p.name) for p in inputs),
                host=frozenset(_ge_name(p.name) for p in inputs if "Host" in str(p.annotation)),
                dynamic=next((p.name for p in inputs if p.annotation == "Dynamic"), None),
                attrs=frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
                special=special,
            )
        return function

    return register


def _ge_name(name: str) -> str:
    return name.removesuffix("_")  # else_ is `else` in the graph


def find_op(type_: str) -> Op:
    """The operator of a type.

    Raises:
        GraphError: there is none; the text lists those that exist.
    """
    if type_ in OPS:
        return OPS[type_]
    raise GraphError(
        f"op type {type_} is not implemented by cann_host, the CPU stand-in for CANN; "
        f"it knows {', '.join(sorted(OPS))}"
    )


def run_op(op: Op, inputs: dict[str, Any], attrs: dict[str, Any]) -> list[Any]:
    """Compute one operator.

    Args:
        op: what to compute.
        inputs: values by input name; the dynamic input is a list. Absent ones are left out.
        attrs: attributes by name.

    Returns:
        The outputs, in order.

    Raises:
        ShapeUnknownError: a value that decides a shape is not known yet.
        GraphError: the operator refuses.
    """
    if any(is_meta(inputs.get(name)) for name in op.host):
        raise ShapeUnknownError
    values = [v for value in inputs.values() for v in (value if type(value) is list else [value])]
    if not op.special and any(isinstance(value, Int4 | FractalNZ) for value in values):
        inputs = {name: _plain(op, value) for name, value in inputs.items()}
    if any(is_meta(value) for value in values):
        inputs = {k: v if k in op.host else _to_meta(v) for k, v in inputs.items()}
    names = {"else": "else_"}
    result = op.function(**{names.get(name, name): v for name, v in inputs.items()}, **attrs)
    return list(result) if isinstance(result, list | tuple) else [result]


def _plain(op: Op, value: Any) -> Any:
    """GE inserts a conversion before operators that want ND; nobody converts int4 silently."""
    if type(value) is list:
        return [_plain(op, v) for v in value]
    if isinstance(value, FractalNZ):
        value = value.nd
    if isinstance(value, Int4):
        raise GraphError(f"{op.type} does not take int4 inputs")
    return value


def _to_meta(value: Any) -> Any:
    if type(value) is list:
        return [_to_meta(v) for v in value]
    if isinstance(value, FractalNZ):
        return FractalNZ(_to_meta(value.nd), value.storage_shape)
    if isinstance(value, Int4):
        return Int4(value.values.to("meta"))
    return value.to("meta") if isinstance(value, Tensor) else value


def _dtype(code: int) -> torch.dtype:
    if code not in DTYPES:
        raise GraphError(f"GE dtype {code} is not implemented by cann_host")
    return DTYPES[code]


def _ints(value: Host) -> list[int]:
    return [int(v) for v in value.reshape(-1).tolist()]


# ---- Quantization ----


@_op("TransQuantParamV2")
def _trans_quant_param(scale: Tensor, offset: Tensor | None = None, *, round_mode: int = 0) -> Any:
    refusal = check_trans_quant_param(
        scale.shape, None if offset is None else offset.shape, round_mode
    )
    if refusal:
        raise GraphError(refusal)
    return pack_scale(scale, offset, round_mode)


def soc_name() -> str:
    """The SoC the stand-in reports; `cann_host.ge.install` replaces this."""
    return "Ascend910B2"


@_op("QuantBatchMatmulV3", special=True)
def _quant_batch_matmul(
    x1: Any,
    x2: Any,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    *,
    dtype: int = 2,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    group_size: int = 0,
) -> Tensor:
    if group_size:
        raise GraphError(f"group_size {group_size} is not implemented by cann_host")
    out_dtype = _dtype(dtype)
    x1_format, x1 = (NZ, x1.nd) if isinstance(x1, FractalNZ) else (ND, x1)
    x2_format, storage = ND, None
    if isinstance(x2, FractalNZ):
        x2_format, storage, x2 = NZ, x2.storage_shape, x2.nd
    optional = {"offset": offset, "bias": bias, "pertoken": pertoken_scale}
    described: dict[str, Any] = {}
    for name, value in optional.items():
        described[f"{name}_dtype"] = None if value is None else dtype_name(value)
        described[f"{name}_shape"] = None if value is None else tuple(value.shape)
    refusal = check_quant_matmul(
        soc=soc_name(),
        x1_dtype=dtype_name(x1),
        x1_shape=tuple(x1.shape),
        x2_dtype=dtype_name(x2),
        x2_shape=tuple(x2.shape),
        scale_dtype=dtype_name(scale),
        scale_shape=tuple(scale.shape),
        out_dtype=str(out_dtype).removeprefix("torch."),
        transpose_x1=transpose_x1,
        transpose_x2=transpose_x2,
        x1_format=x1_format,
        x2_format=x2_format,
        x2_storage_shape=storage,
        graph=True,
        **described,
    )
    if refusal:
        raise GraphError(refusal)
    left = x1.values if isinstance(x1, Int4) else x1
    right = x2.values if isinstance(x2, Int4) else x2
    left = left.mT if transpose_x1 else left
    right = right if transpose_x2 else right.mT  # (..., n, k)
    if left.is_meta:
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        shape = (*batch, left.shape[-2], right.shape[-2])
        return torch.empty(shape, dtype=out_dtype, device="meta")
    return quant_matmul(
        left,
        right,
        scale.reshape(-1),
        bias=bias,
        pertoken_scale=pertoken_scale,
        output_dtype=out_dtype,
    )


@_op("QuantBatchMatmulV4", special=True)
def _quant_batch_matmul_v4(
    x1: Any,
    x2: Any,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
    x1_offset: Tensor | None = None,
    x2_offset: Tensor | None = None,
    y_offset: Tensor | None = None,
    x2_table: Tensor | None = None,
    *,
    dtype: int,
    compute_type: int = -1,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    group_size: int = -1,
) -> Tensor:
    """On Ascend 950 a fusion pass turns the int8 and int4 cases into V3
    (quant_batch_matmul_v4_to_v3_fusion_pass.cpp); the kernels of V4 itself are not here."""
    if soc_family(soc_name()) != "Ascend 950":
        raise GraphError(
            "QuantBatchMatmulV4 has no kernel for these inputs (CANN error 561003, kernel not "
            f"found; {soc_name()})"
        )
    others = {
        "y_scale": y_scale,
        "x1_offset": x1_offset,
        "y_offset": y_offset,
        "x2_table": x2_table,
    }
    for name, tensor in others.items():
        if tensor is not None:
            raise GraphError(f"QuantBatchMatmulV4's {name} is not implemented by cann_host")
    if x2_scale is None:
        raise GraphError("QuantBatchMatmulV4 needs x2_scale (CANN error 561002, tiling)")
    return _quant_batch_matmul(
        x1,
        x2,
        x2_scale,
        x2_offset,
        bias,
        x1_scale,
        dtype=dtype,
        transpose_x1=transpose_x1,
        transpose_x2=transpose_x2,
        group_size=max(group_size, 0),
    )


@_op("AscendQuantV2")
def _ascend_quant(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    sqrt_mode: bool = False,
    round_mode: str = "round",
    dst_type: int = 2,
    axis: int = -1,
) -> Tensor:
    refusal = check_ascend_quant(
        soc_name(),
        dtype_name(x),
        tuple(x.shape),
        dtype_name(scale),
        tuple(scale.shape),
        None if offset is None else dtype_name(offset),
        None if offset is None else tuple(offset.shape),
        "int8" if dst_type == INT8 else f"GE dtype {dst_type}",
        axis,
        graph=True,
    )
    if refusal:
        raise GraphError(refusal)
    if round_mode != "round" or sqrt_mode:
        raise GraphError(f"round_mode {round_mode} or sqrt_mode is not implemented by cann_host")
    shape = [1] * x.dim()
    shape[axis] = -1
    factors = [None if t is None else t.reshape(shape) for t in (scale, offset)]
    assert factors[0] is not None
    return static_quant(x, factors[0], factors[1])


@_op("DynamicQuant")
def _dynamic_quant(
    x: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    *,
    dst_type: int = 2,
) -> tuple[Tensor | Int4, Tensor]:
    if smooth_scales is not None or group_index is not None:
        raise GraphError("smooth_scales and group_index are not implemented by cann_host")
    y = {INT8: "int8", INT4: "int4"}.get(dst_type, f"GE dtype {dst_type}")
    if refusal := check_dynamic_quant(soc_name(), dtype_name(x), tuple(x.shape), y):
        raise GraphError(refusal)
    values, scale = dynamic_quant(x, bits=4 if dst_type == INT4 else 8)
    return Int4(values) if dst_type == INT4 else values, scale


@_op("Bitcast", special=True)
def _bitcast(x: Any, *, type: int) -> Any:
    if isinstance(x, FractalNZ) and isinstance(x.nd, Tensor):
        storage = x.storage_shape
        if type == INT4 and storage is not None:
            storage = (*storage[:-1], storage[-1] * 8)
        return FractalNZ(_bitcast(x.nd, type=type), storage)
    if isinstance(x, Int4):
        if DTYPES.get(type) != torch.int32 or x.shape[-1] != 8:
            raise GraphError(f"Bitcast of int4 {tuple(x.shape)} to GE dtype {type} is refused")
        if x.values.is_meta:
            return torch.empty(x.shape[:-1], dtype=torch.int32, device="meta")
        return pack_int4(x.values).squeeze(-1)
    assert isinstance(x, Tensor)
    if type == INT4:
        if x.dtype != torch.int32:
            raise GraphError(f"Bitcast of {dtype_name(x)} to int4 is not implemented by cann_host")
        # A wider type gains a last dim that holds the parts, as in TensorFlow's bitcast.
        if x.is_meta:
            return Int4(torch.empty((*x.shape, 8), dtype=torch.int8, device="meta"))
        return Int4(unpack_int4(x).unflatten(-1, (-1, 8)))
    target = _dtype(type)
    if target.itemsize < x.dtype.itemsize:
        return x.contiguous().unsqueeze(-1).view(target)
    view = x.contiguous().view(target)
    return view.squeeze(-1) if target.itemsize > x.dtype.itemsize else view


# ---- Shape and layout ----


@_op("Identity", "TensorMove", special=True)
def _identity(x: Any) -> Any:
    return x


@_op("Transpose", special=True)
def _transpose(x: Any, perm: Host) -> Any:
    order = _ints(perm)
    if isinstance(x, FractalNZ):
        # GE fuses this Transpose with the matmul that follows: the storage stays as it is.
        return FractalNZ(_transpose(x.nd, perm), None)
    if isinstance(x, Int4):
        return Int4(_transpose(x.values, perm))
    return x.permute(order)


@_op("Permute", special=True)
def _permute(x: Any, *, order: Sequence[int]) -> Any:
    return _transpose(x, torch.tensor(order))


@_op("Reshape", special=True)
def _reshape(x: Any, shape: Host, *, axis: int = 0, num_axes: int = -1) -> Any:
    if isinstance(x, FractalNZ):
        # int4 weights pass here after Bitcast, with the parts still in a dim of their own
        return FractalNZ(_reshape(x.nd, shape, axis=axis, num_axes=num_axes), x.storage_shape)
    if isinstance(x, Int4):
        return Int4(_reshape(x.values, shape, axis=axis, num_axes=num_axes))
    if axis or num_axes != -1:
        raise GraphError(f"Reshape with axis {axis}, num_axes {num_axes} is not implemented")
    dims = [x.shape[i] if dim == 0 and x.numel() else dim for i, dim in enumerate(_ints(shape))]
    return x.reshape(dims)


@_op("Shape", special=True)
def _shape(x: Any, *, dtype: int = 3) -> Tensor:
    return torch.tensor(x.shape, dtype=_dtype(dtype), device="cpu")


@_op("Unsqueeze")
def _unsqueeze(x: Tensor, *, axes: Sequence[int] = ()) -> Tensor:
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


@_op("Squeeze")
def _squeeze(x: Tensor, *, axis: Sequence[int] = ()) -> Tensor:
    return x.squeeze(tuple(axis)) if axis else x.squeeze()


@_op("ExpandDims")
def _expand_dims(x: Tensor, axis: Host) -> Tensor:
    return x.unsqueeze(_ints(axis)[0])


@_op("BroadcastTo")
def _broadcast_to(x: Tensor, shape: Host) -> Tensor:
    return x.expand(_ints(shape))


@_op("Expand")
def _expand(x: Tensor, shape: Host) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(shape))))


@_op("Fill")
def _fill(dims: Host, value: Tensor) -> Tensor:
    return value.reshape(()).expand(_ints(dims))


@_op("ZerosLike")
def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@_op("OnesLike")
def _ones_like(x: Tensor) -> Tensor:
    return torch.ones_like(x)


@_op("Pack")
def _pack(x: Dynamic, *, axis: int = 0, N: int = 1) -> Tensor:
    return torch.stack(_promoted(x), axis)


@_op("ConcatV2")
def _concat_v2(x: Dynamic, concat_dim: Host, *, N: int = 1) -> Tensor:
    return torch.cat(x, _ints(concat_dim)[0])


@_op("ConcatD")
def _concat_d(x: Dynamic, *, concat_dim: int, N: int = 1) -> Tensor:
    return torch.cat(x, concat_dim)


@_op("SplitV")
def _split_v(x: Tensor, size_splits: Host, split_dim: Host, *, num_split: int) -> Any:
    dim = _ints(split_dim)[0]
    sizes = _ints(size_splits)
    rest = x.shape[dim] - sum(size for size in sizes if size >= 0)
    return torch.split(x, [rest if size < 0 else size for size in sizes], dim)


@_op("Gather", "GatherV2")
def _gather(
    x: Tensor,
    indices: Tensor,
    axis: Host | None = None,
    *,
    batch_dims: int = 0,
    validate_indices: bool = True,
    is_preprocessed: bool = False,
    negative_index_support: bool = False,
) -> Tensor:
    if batch_dims:
        raise GraphError(f"Gather with batch_dims {batch_dims} is not implemented by cann_host")
    dim = _ints(axis)[0] if axis is not None else 0
    dim = dim % x.dim()
    flat = x.index_select(dim, indices.reshape(-1).to(torch.int64) % x.shape[dim])
    return flat.reshape(x.shape[:dim] + indices.shape + x.shape[dim + 1 :])


@_op("StridedSliceV2")
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
    starts, ends = _ints(begin), _ints(end)
    dims = range(len(starts)) if axes is None else [axis % x.dim() for axis in _ints(axes)]
    steps = [1] * len(starts) if strides is None else _ints(strides)
    index = [slice(None)] * x.dim()
    for dim, first, last, step in zip(dims, starts, ends, steps, strict=True):
        index[dim] = slice(first, last, step)
    return x[tuple(index)]


# ---- Elementwise; torch's own promotion is GE's for the dtypes torchair emits ----


def _promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


@_op("Add", "AddV2")
def _add(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 + x2


@_op("Sub")
def _sub(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 - x2


@_op("Mul")
def _mul(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 * x2


@_op("Axpy", "AxpyV2")
def _axpy(x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    return x1 + x2 * alpha


@_op("Sxpy")
def _sxpy(x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    return x1 - x2 * alpha


@_op("Muls")
def _muls(x: Tensor, *, value: float) -> Tensor:
    return (x * value).to(x.dtype)


@_op("Adds")
def _adds(x: Tensor, *, value: float) -> Tensor:
    return (x + value).to(x.dtype)


@_op("Div", "RealDiv")
def _real_div(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 / x2


@_op("FloorDiv")
def _floor_div(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.floor_divide(x1, x2)


@_op("Pow")
def _pow(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.pow(x1, x2)


@_op("Maximum")
def _maximum(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.maximum(*_promoted([x1, x2]))


@_op("Minimum")
def _minimum(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.minimum(*_promoted([x1, x2]))


@_op("ClipByValueV2", "ClipByValue")
def _clip(x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, clip_value_min), clip_value_max).to(x.dtype)


@_op("Greater")
def _greater(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 > x2


@_op("Less")
def _less(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 < x2


@_op("Equal")
def _equal(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 == x2


@_op("SelectV2")
def _select(condition: Tensor, then: Tensor, else_: Tensor) -> Tensor:
    return torch.where(condition, then, else_)


@_op("Cast")
def _cast(x: Tensor, *, dst_type: int) -> Tensor:
    return x.to(_dtype(dst_type))


@_op("Neg")
def _neg(x: Tensor) -> Tensor:
    return -x


@_op("Abs")
def _abs(x: Tensor) -> Tensor:
    return x.abs()


@_op("Sqrt")
def _sqrt(x: Tensor) -> Tensor:
    return x.sqrt()


@_op("Reciprocal")
def _reciprocal(x: Tensor) -> Tensor:
    return x.reciprocal()


@_op("Rsqrt")
def _rsqrt(x: Tensor) -> Tensor:
    return x.rsqrt()


@_op("Round")
def _round(x: Tensor, *, decimals: int = 0) -> Tensor:
    return torch.round(x, decimals=decimals)


@_op("Exp")
def _exp(x: Tensor, *, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    value = x if (scale, shift) == (1.0, 0.0) else x * scale + shift
    return torch.exp(value) if base == -1.0 else torch.pow(base, value)


# ---- Activations ----


@_op("Relu")
def _relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@_op("Sigmoid")
def _sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@_op("Tanh")
def _tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@_op("Gelu")
def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")  # GE's Gelu is the tanh form


@_op("Swish")
def _swish(x: Tensor, *, scale: float = 1.0) -> Tensor:
    return torch.nn.functional.silu(x) if scale == 1.0 else x * torch.sigmoid(x * scale)


@_op("SoftmaxV2")
def _softmax(x: Tensor, *, axes: Sequence[int] = (-1,), half_to_float: bool = False) -> Tensor:
    return torch.softmax(x, axes[0], dtype=torch.float32 if half_to_float else None)


# ---- Reductions, norms and float matmuls ----


@_op("ReduceSum")
def _reduce_sum(x: Tensor, axes: Host, *, keep_dims: bool = False) -> Tensor:
    return x.sum(_ints(axes), keep_dims, dtype=x.dtype)


@_op("ReduceMean")
def _reduce_mean(
    x: Tensor, axes: Host, *, keep_dims: bool = False, noop_with_empty_axes: bool = True
) -> Tensor:
    return x.mean(_ints(axes), keep_dims)


@_op("ReduceMax")
def _reduce_max(x: Tensor, axes: Host, *, keep_dims: bool = False) -> Tensor:
    return x.amax(_ints(axes), keep_dims)


@_op("ArgMaxWithValue")
def _arg_max_with_value(
    x: Tensor, *, dimension: int, keep_dims: bool = False
) -> tuple[Tensor, Tensor]:
    values, indices = x.max(dimension, keepdim=keep_dims)
    return indices.to(torch.int32), values


@_op("RmsNorm")
def _rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    value = x.to(torch.float32)
    dims = list(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(value.square().mean(dims, keepdim=True) + epsilon)
    return (value * rstd * gamma.to(torch.float32)).to(x.dtype), rstd


@_op("LayerNormV4")
def _layer_norm(
    x: Tensor,
    normalized_shape: Host,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = torch.native_layer_norm(x, _ints(normalized_shape), gamma, beta, epsilon)
    return y, mean, rstd


@_op("MatMul", "MatMulV2")
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
    # the accumulator takes the bias before it is rounded
    return (torch.matmul(left.float(), right.float()) + bias.float()).to(x1.dtype)


@_op("BatchMatMul", "BatchMatMulV2")
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
