"""The operators of libopapi, computed by torch on CPU tensors over the same memory.

`csrc/aclnn.cpp` calls `_run` twice for each operator: to check, on the thread that asked, and to
compute, on torch_npu's queue thread. What is not in `OPERATORS` is not in libopapi either.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from cann_host import chips, rules, watched
from cann_host.bindings import give, int64s
from cann_host.graph import executor
from cann_host.graph.executor import GraphError
from cann_host.graph.ops.nn import add_rms_norm, rms_norm
from cann_host.graph.ops.quant import pack_parameters, quantize_dynamically
from cann_host.memory import FRACTAL_NZ, over_memory
from lq_graph.kernels import numerics

__all__ = ["ACL_DTYPES", "OPERATORS", "AclTensor", "Refused", "install", "uninstall"]

NULL_POINTER = 161001  # ACLNN_ERR_PARAM_NULLPTR
INVALID = 161002  # ACLNN_ERR_PARAM_INVALID
INNER = 561000  # ACLNN_ERR_INNER

BASE_FORMATS = {0: "NCHW", 1: "NHWC", 2: "ND", 27: "NDHWC", 30: "NCDHW", 47: "NCL"}

# aclDataType of the public header acl_base_rt.h
ACL_DTYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    7: torch.uint16,
    8: torch.uint32,
    9: torch.int64,
    10: torch.uint64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
    33: torch.complex32,
    35: torch.float8_e5m2,
    36: torch.float8_e4m3fn,
}


class Refused(Exception):  # noqa: N818 - the answer of the operator, not a fault of this program
    """A call CANN would refuse, with CANN's code."""

    def __init__(self, text: str, code: int = INVALID) -> None:
        coded = re.search(r"CANN error (\d+)", text)
        ours = "cann_host" in text  # not CANN's refusal
        super().__init__(text if coded or ours else f"{text} (CANN error {code})")
        self.code = int(coded[1]) if coded else code


class AclTensor(NamedTuple):
    """A copy of an aclTensor: a strided view of device memory, or of a FRACTAL_NZ storage."""

    address: int
    dtype_code: int
    format: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        try:
            return ACL_DTYPES[self.dtype_code]
        except KeyError:
            raise Refused(f"cann_host does not know aclDataType {self.dtype_code}") from None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_transposed(self) -> bool:
        """Whether the last two dims are a transposed view of contiguous memory, by CANN's rule."""
        if len(self.shape) < 2:
            return False
        rows, columns = self.shape[-2:]
        return self.strides[-2] == 1 and self.strides[-1] == rows and (rows, columns) != (1, 1)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape with the last two dims in the order the memory has."""
        if self.is_transposed:
            return (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return self.shape

    def view(self) -> Tensor:
        """A tensor over the memory, no copy."""
        return over_memory(self.address, self.dtype, self.shape, self.strides, self.offset)

    def nz_view(self) -> Tensor:
        """A tensor over the FRACTAL_NZ storage, no copy."""
        return over_memory(self.address, self.dtype, self.storage)


# An argument of an operator: a tensor, None for an absent one, a number, or integers.
Argument = AclTensor | int | float | tuple[int, ...] | None


def _unpack(words: list[int]) -> list[Argument]:
    """Read the words that csrc/aclnn.cpp describes."""
    arguments: list[Argument] = []
    at = 0
    while at < len(words):
        kind = words[at]
        if kind == 0:
            arguments.append(None)
            at += 1
        elif kind == 2:
            arguments.append(words[at + 1])
            at += 2
        elif kind == 3:
            arguments.append(struct.unpack("<d", struct.pack("<q", words[at + 1]))[0])
            at += 2
        elif kind == 4:
            arguments.append(tuple(words[at + 2 : at + 2 + words[at + 1]]))
            at += 2 + words[at + 1]
        else:
            address, dtype, format_, offset, rank = words[at + 1 : at + 6]
            at += 6
            shape = tuple(words[at : at + rank])
            strides = tuple(words[at + rank : at + 2 * rank])
            at += 2 * rank
            storage = tuple(words[at + 1 : at + 1 + words[at]])
            at += 1 + len(storage)
            arguments.append(AclTensor(address, dtype, format_, offset, shape, strides, storage))
    return arguments


def _need(name: str, tensor: AclTensor | None) -> AclTensor:
    if tensor is None:
        raise Refused(f"{name} is null", NULL_POINTER)
    return tensor


def _need_base_format(**tensors: AclTensor | None) -> None:
    """For an operator of CANN's whose checks refuse an internal format."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.format not in BASE_FORMATS:
            raise Refused(f"{name} has the internal format {tensor.format}; it must be ND")


def _compute_base_format(**tensors: AclTensor | None) -> None:
    """For one of CANN's that does not look: what it does then is not modelled."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.format not in BASE_FORMATS:
            raise Refused(
                f"{name} has the internal format {tensor.format}; cann_host takes ND here"
            )


# ---- quantized matmul ----


def _check_trans_quant_param(
    scale: AclTensor, offset: AclTensor | None, round_mode: int, out: AclTensor
) -> None:
    """By quant/trans_quant_param_v2/op_host/op_api of hicann/ops-nn."""
    _need("scale", scale)
    _need("out", out)
    _need_base_format(scale=scale, offset=offset, out=out)
    if out.dtype not in (torch.int64, torch.uint64):
        raise Refused(f"out is {out.dtype_name}; it must be int64 or uint64")
    refusal = rules.check_trans_quant_param(
        _soc, _described(scale), _described(offset), round_mode, graph=False
    )
    if refusal is None:
        shape = None if offset is None else offset.shape
        found = rules.packed_words(scale.shape, shape, out.shape)
        refusal = found.refusal
        if found.overrun and executor.refuses_overruns():
            executor.overrun(found.overrun)
    if refusal is not None:
        raise Refused(refusal)


def _trans_quant_param(
    scale: AclTensor, offset: AclTensor | None, round_mode: int, out: AclTensor
) -> None:
    added = None if offset is None else offset.view()
    packed = pack_parameters(scale.view(), added, round_mode, out.shape)
    out.view().view(torch.int64).copy_(packed)


def _logical(tensor: AclTensor) -> tuple[str, tuple[int, ...]]:
    """Dtype name and stored shape, with int32 counted as the eight int4 it carries."""
    shape = tensor.stored_shape
    if tensor.dtype == torch.int32:
        return "int4", (*shape[:-1], shape[-1] * numerics.INT4_PER_INT32)
    return tensor.dtype_name, shape


def _optional(tensor: AclTensor | None) -> tuple[str | None, tuple[int, ...] | None]:
    return (None, None) if tensor is None else (tensor.dtype_name, tensor.shape)


@overload
def _described(tensor: AclTensor) -> tuple[str, tuple[int, ...]]: ...
@overload
def _described(tensor: None) -> None: ...
@overload
def _described(tensor: AclTensor | None) -> tuple[str, tuple[int, ...]] | None: ...


def _described(tensor: AclTensor | None) -> tuple[str, tuple[int, ...]] | None:
    """dtype and shape, as the rules ask for them."""
    return None if tensor is None else (tensor.dtype_name, tensor.shape)


def _present(tensor: AclTensor | None) -> AclTensor | None:
    """torch_npu passes an empty tensor for some absent arguments."""
    return None if tensor is None or 0 in tensor.shape else tensor


def _check_quant_matmul(
    x1: AclTensor,
    x2: AclTensor,
    x1_scale: AclTensor | None,
    x2_scale: AclTensor,
    y_scale: AclTensor | None,
    x1_offset: AclTensor | None,
    x2_offset: AclTensor | None,
    y_offset: AclTensor | None,
    bias: AclTensor | None,
    transpose_x1: int,
    transpose_x2: int,
    group_size: int,
    out: AclTensor,
    *,
    entry: str = "v5",
) -> None:
    for name, needed in (("x1", x1), ("x2", x2), ("x2_scale", x2_scale), ("out", out)):
        _need(name, needed)
    x1_dtype, x1_shape = _logical(x1)
    x2_dtype, x2_shape = _logical(x2)
    a8w4 = (x1_dtype, x2_dtype) == ("int8", "int4")
    for name, tensor in {"y_scale": y_scale, "x1_offset": x1_offset, "y_offset": y_offset}.items():
        if _present(tensor) is None:
            continue
        if entry == "v5" and x1_dtype in ("int8", "int4") and not a8w4:
            # CheckInputExistence of aclnn_quant_matmul_v5.cpp, with this code
            raise Refused(f"{name} is given; {x1_dtype} x1 takes none", NULL_POINTER)
        raise Refused(f"cann_host does not implement {name}")
    if group_size:
        raise Refused(f"cann_host does not implement group_size {group_size}")
    if transpose_x1 or transpose_x2:
        raise Refused("cann_host takes transposition from the strides, as torch_npu passes it")
    _need_base_format(
        x1=x1, x1_scale=x1_scale, x2_scale=x2_scale, x2_offset=x2_offset, bias=bias, out=out
    )
    is_nz = x2.format == FRACTAL_NZ
    if not is_nz:
        _need_base_format(x2=x2)
    storage: tuple[int, ...] | None = None
    if is_nz:
        packed = numerics.INT4_PER_INT32 if x2_dtype == "int4" else 1
        storage = (*x2.storage[:-1], x2.storage[-1] * packed)
    offset_dtype, offset_shape = _optional(x2_offset)
    bias_dtype, bias_shape = _optional(bias)
    pertoken_dtype, pertoken_shape = _optional(x1_scale)
    refusal = rules.check_quant_matmul(
        soc=_soc,
        x1_dtype=x1_dtype,
        x1_shape=x1_shape,
        x2_dtype=x2_dtype,
        x2_shape=x2_shape,
        scale_dtype=x2_scale.dtype_name,
        scale_shape=x2_scale.shape,
        out_dtype=out.dtype_name,
        offset_dtype=offset_dtype,
        offset_shape=offset_shape,
        bias_dtype=bias_dtype,
        bias_shape=bias_shape,
        pertoken_dtype=pertoken_dtype,
        pertoken_shape=pertoken_shape,
        transpose_x1=x1.is_transposed,
        transpose_x2=x2.is_transposed,
        x2_format="FRACTAL_NZ" if is_nz else "ND",
        x2_storage_shape=storage,
        out_shape=out.shape,
        entry=entry,
    )
    if refusal is not None:
        raise Refused(refusal)


def _untransposed_weight(x2: AclTensor) -> Tensor | numerics.NzWeight:
    """x2 as (..., n, k) or (n, k/8) in the dtype it has; int4 packed along n as int8."""
    rows, columns = x2.stored_shape[-2:]
    if x2.is_transposed and x2.format == FRACTAL_NZ and len(x2.shape) == 2:
        return numerics.NzWeight(x2.nz_view(), rows, columns)
    stored = (
        numerics.nz_to_nd(x2.nz_view(), rows, columns)
        if x2.format == FRACTAL_NZ
        else x2.view().mT
        if x2.is_transposed
        else x2.view()
    )
    if x2.is_transposed:
        return stored
    if x2.dtype == torch.int32:
        stored = numerics.unpack_int4(stored)
    return stored.mT.contiguous()


def _quant_matmul(
    x1: AclTensor,
    x2: AclTensor,
    x1_scale: AclTensor | None,
    x2_scale: AclTensor,
    y_scale: AclTensor | None,
    x1_offset: AclTensor | None,
    x2_offset: AclTensor | None,
    y_offset: AclTensor | None,
    bias: AclTensor | None,
    transpose_x1: int,
    transpose_x2: int,
    group_size: int,
    out: AclTensor,
) -> None:
    del y_scale, x1_offset, y_offset, transpose_x1, transpose_x2, group_size  # refused above
    del x2_offset  # the chip reads only the offset bits packed in the scale
    if 0 in out.shape:
        return  # Ascend 950 gives an empty output for an empty input
    x, weight = x1.view(), _untransposed_weight(x2)
    if x1.dtype == torch.int32 and isinstance(weight, Tensor) and weight.dtype == torch.int8:
        x = numerics.unpack_int4(x)
    pertoken, added = (None if t is None else t.view() for t in (x1_scale, bias))
    out.view().copy_(
        numerics.quant_matmul(
            x,
            weight,
            chips.scale_as_read(_soc, x2_scale.view().reshape(-1), pertoken, added, out.dtype),
            bias=added,
            pertoken_scale=pertoken,
            output_dtype=out.dtype,
        )
    )


# ---- quantized activations ----


def _need_quantized_shape(x: AclTensor, y: AclTensor) -> None:
    """y has x's shape; int32 ones hold eight int4 of the last dim each."""
    packed = numerics.INT4_PER_INT32 if y.dtype == torch.int32 else 1
    if (*y.shape[:-1], y.shape[-1] * packed) != x.shape:
        raise Refused(f"y has shape {y.shape} and x {x.shape}")


def _check_dynamic_quant_v4(
    x: AclTensor,
    smooth_scales: AclTensor | None,
    group_index: AclTensor | None,
    dst_type: int,
    symmetric: int,
    mode: int,
    dst_type_max: float,
    y: AclTensor,
    scale: AclTensor,
    offset: AclTensor | None,
    *,
    version: int = 4,
) -> None:
    """By quant/dynamic_quant/op_host/op_api of hicann/ops-nn, for aclnnDynamicQuantV2 to V4."""
    if version > 2 and rules.soc_family(_soc) != "Ascend 950":
        raise Refused(f"it is for Ascend 950, and this is {_soc}", INNER)
    for name, needed in (("x", x), ("y", y), ("scale", scale)):
        _need(name, needed)
    if symmetric == (offset is not None):
        raise Refused(
            f"is_symmetrical is {bool(symmetric)} and offset is "
            f"{'absent' if offset is None else 'given'}"
        )
    del dst_type  # CANN goes by y's dtype
    name = rules.QUANT_MODES[mode] if 0 <= mode < len(rules.QUANT_MODES) else "another"
    refusal = rules.check_dynamic_quant(
        _soc,
        x.dtype_name,
        x.shape,
        y.dtype_name,
        _described(smooth_scales),
        _described(group_index),
        mode=name,
        dst_type_max=dst_type_max,
        symmetric=bool(symmetric),
    )
    later = None if refusal is None else Refused(refusal)
    if later is not None and later.code == INVALID:
        raise later
    _compute_base_format(
        x=x, smooth_scales=smooth_scales, group_index=group_index, y=y, scale=scale
    )
    _compute_base_format(offset=offset)
    _need_quantized_shape(x, y)
    declared = rules.dynamic_quant_scale_shape(x.shape, name)
    for what, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != declared):
            raise Refused(
                f"{what} is {tensor.dtype_name} {tensor.shape}; it must be float32 {declared}"
            )
    if later is not None:  # of the tiling, which comes after
        raise later


def _dynamic_quant_v4(
    x: AclTensor,
    smooth_scales: AclTensor | None,
    group_index: AclTensor | None,
    dst_type: int,
    symmetric: int,
    mode: int,
    dst_type_max: float,
    y: AclTensor,
    scale: AclTensor,
    offset: AclTensor | None,
) -> None:
    del dst_type, dst_type_max  # see above; of HiFloat8 only
    if 0 in x.shape:
        return
    int4 = y.dtype == torch.int32
    values, scales, offsets = quantize_dynamically(
        _soc,
        x.view(),
        None if smooth_scales is None else smooth_scales.view(),
        None if group_index is None else group_index.view(),
        bits=4 if int4 else 8,
        symmetric=bool(symmetric),
        mode=rules.QUANT_MODES[mode],
    )
    y.view().copy_(numerics.pack_int4(values) if int4 else values)
    scale.view().copy_(scales)
    if offset is not None and offsets is not None:
        offset.view().copy_(offsets)


def _as_v4(v4: Callable[..., None], **version: int) -> Callable[..., None]:
    """aclnnDynamicQuantV2: per token, with an offset if there is a place for one."""

    def v2(
        x: AclTensor,
        smooth_scales: AclTensor | None,
        group_index: AclTensor | None,
        dst_type: int,
        y: AclTensor,
        scale: AclTensor,
        offset: AclTensor | None,
    ) -> None:
        first = (x, smooth_scales, group_index, dst_type)
        v4(*first, int(offset is None), 0, 0.0, y, scale, offset, **version)

    return v2


ROUND_MODES = ("round", "floor", "ceil", "trunc")  # of integers, as csrc/aclnn.cpp numbers them


def _check_ascend_quant(
    x: AclTensor,
    scale: AclTensor,
    offset: AclTensor | None,
    sqrt_mode: int,
    round_mode: int,
    dst_type: int,
    axis: int,
    y: AclTensor,
) -> None:
    """By quant/ascend_quant_v2/op_host/op_api of hicann/ops-nn."""
    for name, needed in (("x", x), ("scale", scale), ("y", y)):
        _need(name, needed)
    _compute_base_format(x=x, scale=scale, offset=offset, y=y)
    if dst_type != y.dtype_code:
        raise Refused(f"dst_type is {dst_type} and y has aclDataType {y.dtype_code}")
    offset_dtype, offset_shape = _optional(offset)
    refusal = rules.check_ascend_quant(
        _soc,
        x.dtype_name,
        x.shape,
        scale.dtype_name,
        scale.shape,
        offset_dtype,
        offset_shape,
        y.dtype_name,
        axis,
    )
    if refusal is not None:
        raise Refused(refusal)
    _need_quantized_shape(x, y)
    if not 0 <= round_mode < len(ROUND_MODES):
        raise Refused(f"round_mode is none of {', '.join(ROUND_MODES)}")
    if sqrt_mode or ROUND_MODES[round_mode] != "round":
        raise Refused("cann_host implements AscendQuantV3 with round_mode round and no sqrt_mode")


def _ascend_quant(
    x: AclTensor,
    scale: AclTensor,
    offset: AclTensor | None,
    sqrt_mode: int,
    round_mode: int,
    dst_type: int,
    axis: int,
    y: AclTensor,
) -> None:
    del sqrt_mode, round_mode, dst_type  # refused above
    # CANN casts both to x's dtype first
    factor = scale.view().to(x.dtype)
    addend = None if offset is None else offset.view().to(x.dtype)
    int4 = y.dtype == torch.int32
    values = numerics.static_quant(x.view(), factor, addend, axis, bits=4 if int4 else 8)
    y.view().copy_(numerics.pack_int4(values) if int4 else values)


# dtype of the result: the least and largest value
_QUANTIZE_LIMITS = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int32: (-(2**31), 2**31 - 1),
}


def _check_quantize(
    x: AclTensor,
    scales: AclTensor,
    zero_points: AclTensor | None,
    dtype: int,
    axis: int,
    out: AclTensor,
) -> None:
    """By quant/quantize/op_api of hicann/ops-nn."""
    for name, needed in (("x", x), ("scales", scales), ("out", out)):
        _need(name, needed)
    refusal = rules.check_quantize(
        _soc, _described(x), _described(scales), _described(zero_points), _described(out), axis
    )
    if refusal is not None:
        raise Refused(refusal)
    if dtype != out.dtype_code:
        raise Refused(f"dtype is {dtype} and out has aclDataType {out.dtype_code}")
    _need_base_format(x=x, scales=scales, zero_points=zero_points, out=out)
    if out.dtype not in _QUANTIZE_LIMITS and 0 not in out.shape:
        raise Refused(f"cann_host does not compute {out.dtype_name}")


def _quantize(
    x: AclTensor,
    scales: AclTensor,
    zero_points: AclTensor | None,
    dtype: int,
    axis: int,
    out: AclTensor,
) -> None:
    del dtype  # it is out's
    if 0 in x.shape or 0 in scales.shape:
        return  # CANN returns at once
    along = [1] * len(x.shape)
    if scales.shape != (1,):  # one value goes with any axis
        along[axis] = -1
    value = x.view().to(torch.float32) / scales.view().to(torch.float32).reshape(along)
    if zero_points is not None:
        value += zero_points.view().to(torch.float32).reshape(along)
    low, high = _QUANTIZE_LIMITS[out.dtype]
    out.view().copy_(value.to(torch.float64).round_().clamp_(low, high))


# ---- what models have around their quantized layers ----


def _check_rms_norm(
    x: AclTensor,
    gamma: AclTensor,
    epsilon: float,
    y: AclTensor,
    rstd: AclTensor,
    *,
    x2: AclTensor | None = None,
) -> None:
    """By norm/rms_norm and, with x2, norm/add_rms_norm of hicann/ops-nn."""
    for name, tensor in (("x", x), ("gamma", gamma), ("y", y), ("rstd", rstd)):
        _need(name, tensor)
    refusal = rules.check_rms_norm(
        _soc, _described(x), _described(gamma), epsilon, x2=None if x2 is None else _described(x2)
    )
    if refusal is not None:
        raise Refused(refusal)
    if y.dtype != x.dtype or rstd.dtype != torch.float32:
        raise Refused(f"y is {y.dtype_name} and rstd {rstd.dtype_name}; x is {x.dtype_name}")
    _compute_base_format(x=x, gamma=gamma, y=y, rstd=rstd)
    if y.shape != x.shape:
        code = rules.TILING if x2 is None else INVALID
        raise Refused(f"x has shape {x.shape} and y {y.shape}", code)
    kept = x.shape[: len(x.shape) - len(gamma.shape)]
    if rstd.shape != (*kept, *(1 for _ in gamma.shape)):
        raise Refused(f"rstd has shape {rstd.shape}", rules.TILING)


def _rms_norm(
    x: AclTensor, gamma: AclTensor, epsilon: float, y: AclTensor, rstd: AclTensor
) -> None:
    if 0 in x.shape:
        return
    values, factors = rms_norm(x.view(), gamma.view(), epsilon=epsilon)
    y.view().copy_(values)
    rstd.view().copy_(factors)


def _check_add_rms_norm(
    x1: AclTensor,
    x2: AclTensor,
    gamma: AclTensor,
    epsilon: float,
    y: AclTensor,
    rstd: AclTensor,
    x: AclTensor,
) -> None:
    for name, tensor in (("x1", x1), ("x2", x2), ("gamma", gamma), ("y", y)):
        _need(name, tensor)
    if rstd is None:
        raise Refused("cann_host implements aclnnAddRmsNorm with rstd and x")
    _need("x", x)
    _check_rms_norm(x1, gamma, epsilon, y, rstd, x2=x2)
    _compute_base_format(x2=x2, x=x)
    if (x.shape, x.dtype) != (x1.shape, x1.dtype):
        raise Refused(f"x1 is {x1.dtype_name} {x1.shape} and x {x.dtype_name} {x.shape}")


def _add_rms_norm(
    x1: AclTensor,
    x2: AclTensor,
    gamma: AclTensor,
    epsilon: float,
    y: AclTensor,
    rstd: AclTensor,
    x: AclTensor,
) -> None:
    if 0 in x1.shape or 0 in gamma.shape:
        return
    results = add_rms_norm(x1.view(), x2.view(), gamma.view(), epsilon=epsilon)
    for place, value in zip((y, rstd, x), results, strict=True):
        place.view().copy_(value)


# ---- copies, casts, formats ----


def _check_copy(self: AclTensor, source: AclTensor) -> None:
    _compute_base_format(self=self, source=source)
    _ = self.dtype, source.dtype
    try:
        fits = torch.broadcast_shapes(self.shape, source.shape) == self.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise Refused(f"source has shape {source.shape}, which does not expand to {self.shape}")


def _copy(self: AclTensor, source: AclTensor) -> None:
    self.view().copy_(source.view())


def _check_cast(self: AclTensor, dtype: int, out: AclTensor) -> None:
    _check_copy(out, self)
    if dtype != out.dtype_code:
        raise Refused(f"out has aclDataType {out.dtype_code}, not {dtype}")


def _cast(self: AclTensor, dtype: int, out: AclTensor) -> None:
    del dtype  # it is out's
    out.view().copy_(self.view())


def _check_pad(self: AclTensor, pad: tuple[int, ...], value: int | float, out: AclTensor) -> None:
    del value
    self, out = _need("self", self), _need("out", out)
    _compute_base_format(self=self, out=out)
    if len(pad) % 2 or len(pad) > 2 * len(self.shape) or min(pad, default=0) < 0:
        raise Refused(f"pad is {list(pad)} for {len(self.shape)} dims; cann_host only adds")
    # the last dim comes first in pad
    added = [pad[i] + pad[i + 1] for i in range(0, len(pad), 2)][::-1]
    added = [0] * (len(self.shape) - len(added)) + added
    shape = tuple(size + more for size, more in zip(self.shape, added, strict=True))
    if self.dtype != out.dtype or out.shape != shape:
        raise Refused(
            f"out is {out.dtype_name}{list(out.shape)}; it must be {self.dtype_name}{list(shape)}"
        )


def _pad(self: AclTensor, pad: tuple[int, ...], value: int | float, out: AclTensor) -> None:
    out.view().copy_(torch.nn.functional.pad(self.view(), pad, value=value))


def _check_zero(self: AclTensor) -> None:
    _compute_base_format(self=self)
    reach = 1 + sum(
        (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
    )
    if math.prod(self.shape) > reach and 0 not in self.shape:
        raise Refused(f"self has shape {self.shape} and strides {self.strides}: elements overlap")


def _zero(self: AclTensor) -> None:
    self.view().zero_()


def _check_format_cast(source: AclTensor, out: AclTensor) -> None:
    for name, tensor in (("source", source), ("out", out)):
        if tensor.format != FRACTAL_NZ and tensor.format not in BASE_FORMATS:
            raise Refused(f"{name} has format {tensor.format}; cann_host knows ND and FRACTAL_NZ")
    if source.dtype != out.dtype:
        raise Refused(f"source is {source.dtype_name} and out {out.dtype_name}")


def _format_cast(source: AclTensor, out: AclTensor) -> None:
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
        blocks = numerics.nd_to_nz(source.view(), out.storage[-1])
        out.nz_view().copy_(blocks.reshape(out.storage))
    else:
        rows, columns = source.shape[-2:]
        out.view().copy_(numerics.nz_to_nd(source.nz_view(), rows, columns).reshape(out.shape))


# name: (check, compute). Both get the arguments in the order of CANN's own header.
OPERATORS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "aclnnAddRmsNorm": (_check_add_rms_norm, _add_rms_norm),
    "aclnnAscendQuantV3": (_check_ascend_quant, _ascend_quant),
    "aclnnCast": (_check_cast, _cast),
    "aclnnConstantPadNd": (_check_pad, _pad),
    "aclnnDynamicQuantV2": (
        _as_v4(_check_dynamic_quant_v4, version=2),
        _as_v4(_dynamic_quant_v4),
    ),
    # csrc/aclnn.cpp gives V3 the 0.0 of a dst_type_max
    "aclnnDynamicQuantV3": (partial(_check_dynamic_quant_v4, version=3), _dynamic_quant_v4),
    "aclnnDynamicQuantV4": (_check_dynamic_quant_v4, _dynamic_quant_v4),
    "aclnnInplaceCopy": (_check_copy, _copy),
    "aclnnInplaceZero": (_check_zero, _zero),
    "aclnnNpuFormatCast": (_check_format_cast, _format_cast),
    "aclnnQuantMatmulV5": (_check_quant_matmul, _quant_matmul),
    "aclnnQuantMatmulWeightNz": (partial(_check_quant_matmul, entry="nz"), _quant_matmul),
    "aclnnQuantize": (_check_quantize, _quantize),
    "aclnnRmsNorm": (_check_rms_norm, _rms_norm),
    "aclnnTransQuantParamV2": (_check_trans_quant_param, _trans_quant_param),
    "aclnnTransQuantParamV3": (_check_trans_quant_param, _trans_quant_param),
}

_library: Any = None  # once installed
_soc: str


def _run(name: str, phase: int, words: int, count: int) -> int:
    """Phase 0 checks, phase 1 computes. Returns CANN's code; the text goes to the library."""
    try:
        # A default device or a function mode of the caller must not reach these tensors.
        with torch._C.DisableTorchFunction():
            arguments = _unpack(int64s(words, count))
            OPERATORS[name][phase](*arguments)
            if phase == 0:
                watched.note(a.address for a in arguments if isinstance(a, AclTensor))
    except GraphError as refusal:  # what the GE operator of the same meaning refuses
        _library.cann_host_set_error(f"{name}: {refusal}".encode())
        return INVALID
    except Refused as refusal:
        _library.cann_host_set_error(f"{name}: {refusal}".encode(errors="replace"))
        return refusal.code
    except Exception as error:
        text = f"{name}: cann_host failed: {type(error).__name__}: {error}"
        _library.cann_host_set_error(text.encode(errors="replace"))
        return INNER
    return 0


def install(library: ctypes.CDLL, soc: str) -> None:
    """Give the library its operators."""
    global _library, _soc
    _library, _soc = library, soc
    give(library.cann_host_set_aclnn_executor, _run)


def uninstall() -> None:
    """Take them away: a late launch then fails by name instead of entering a dying interpreter."""
    if _library is not None:
        give(_library.cann_host_set_aclnn_executor, None)
        _library.cann_host_leave()
