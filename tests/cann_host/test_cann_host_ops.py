"""Every GE operator of cann_host alone: its values compared with plain numpy, the same shapes and
dtypes on meta tensors, its refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from cann_host import runtime
from cann_host.graph import executor, ops  # noqa: F401 - ops registers the operators
from cann_host.graph.executor import GraphError, Int4, find_op, run_op
from cann_host.graph.ops import quant
from cann_host.options import Options
from lq_graph import kernels
from support import golden

I8, I32, I64, F16, BF16, F32 = (
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)
GE_F32, GE_F16, GE_I8, GE_I32, GE_I64, GE_INT4 = 0, 1, 2, 3, 9, 29

rng = np.random.default_rng(0)
A = rng.normal(size=(3, 4)).astype(np.float32)
B = rng.normal(size=(3, 4)).astype(np.float32)
P = np.abs(A) + 0.1  # positive
C = rng.normal(size=(2, 3, 4)).astype(np.float32)
N = np.array([-7, -2, 0, 2, 7])
D = np.array([2, -3, 5, -2, 3])
H = A.astype(np.float16)
YES = np.array([True, True, False, False])
NO = np.array([True, False, True, False])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray, gamma: Any = 1, beta: Any = 0) -> tuple[np.ndarray, ...]:
    mean = x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - mean) * rstd * gamma + beta, mean, rstd


def conv2d(x: np.ndarray, w: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Strides (2, 1), dilations (1, 2), pads top 1, bottom 0, left 2, right 1; one group."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 0), (2, 1)))
    rows = (x.shape[2] - w.shape[2]) // 2 + 1
    columns = x.shape[3] - 2 * (w.shape[3] - 1)
    out = np.zeros((x.shape[0], w.shape[0], rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            patch = x[:, :, 2 * i : 2 * i + w.shape[2], j : j + 2 * w.shape[3] - 1 : 2]
            out[:, :, i, j] = np.einsum("bcij,ocij->bo", patch, w) + bias
    return out


def dynamic_quant(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """To int8, in the dtypes the operator gives."""
    values, scale = golden.dynamic_quant(x, 127)
    return values.astype(np.int8), scale.astype(np.float32)


def dynamic_quant_with_offset(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """To int8, in the dtypes the operator gives."""
    values, *steps = golden.dynamic_quant_with_offset(x, 127)
    return (values.astype(np.int8), *steps)


class Case(NamedTuple):
    """One call. `inputs` in the order of the operator's definition, None for an absent one; a list
    is the input that stands for many."""

    type: str
    inputs: tuple[Any, ...]
    attrs: dict[str, Any]
    expected: Any


K = np.array([[0, 2], [1, 1]])
IMAGE = rng.normal(size=(2, 3, 5, 6)).astype(np.float32)
FILTER = rng.normal(size=(4, 3, 2, 3)).astype(np.float32)
FOUR = np.arange(4, dtype=np.float32)
W = rng.normal(size=(5, 4)).astype(np.float32)
QX = rng.integers(-128, 128, (3, 64)).astype(np.int8)
QW = rng.integers(-128, 128, (48, 64)).astype(np.int8)
QS = (rng.random(48) * 0.01).astype(np.float32)
QT = rng.random(3).astype(np.float32)
LOWEST = np.array([-(2**31), -(2**31) + 1, 7], np.int32)
SMOOTH = rng.random((2, 4)).astype(np.float16)
LONG = (rng.normal(size=48) * 40).astype(np.float32)  # offsets
WORDS = np.array(golden.trans_quant_param(QS, LONG))
BELOW_2 = np.array([-1.5, 0, 0.25, 1.75])
HUGE, TINY = np.float16([8192]), np.float16([1 / 8192])
SPECIAL = np.array([1.0, np.inf, -np.inf, np.nan], np.float32)

CASES = [
    # ---- maths ----
    Case("Add", (A, B), {}, A + B),
    Case("AddV2", (A, B[0]), {}, A + B[0]),
    Case("Sub", (A, B), {}, A - B),
    Case("Mul", (A, B), {}, A * B),
    Case("Axpy", (N, D), {"alpha": 3.0}, N + 3 * D),
    Case("AxpyV2", (H, H, np.array([2.5], np.float32)), {}, (3.5 * A).astype(np.float16)),
    Case("Sxpy", (A, B, np.float32(2)), {}, A - 2 * B),
    Case("Sxpy", (A, B, None), {}, A - B),
    Case("Muls", (H,), {"value": 0.1}, (H * 0.1).astype(np.float16)),
    Case("Adds", (H,), {"value": 0.5}, (H + 0.5).astype(np.float16)),
    Case("RealDiv", (A, P), {}, A / P),
    Case("Div", (N, D), {}, np.array([-3, 0, 0, -1, 2])),
    Case("Div", (A, P), {}, A / P),
    # the smallest int32 by -1: torch's own division ends the process
    Case("Div", (LOWEST, np.int32(-1)), {}, np.array([-(2**31), 2**31 - 1, -7], np.int32)),
    Case("TruncateDiv", (N, D), {}, np.array([-3, 0, 0, -1, 2])),
    Case("TruncateDiv", (LOWEST, np.int32(-1)), {}, np.array([-(2**31), 2**31 - 1, -7], np.int32)),
    Case("TruncateDiv", (A, P), {}, np.trunc(A / P)),
    Case("FloorDiv", (N, D), {}, np.array([-4, 0, 0, -1, 2])),
    Case("Mod", (N, D), {}, np.array([-1, -2, 0, 0, 1])),
    Case("FloorMod", (N, D), {}, np.array([1, -2, 0, 0, 1])),
    Case("Pow", (P, np.float32(1.5)), {}, P**1.5),
    Case("Pow", (P, 2 * P), {}, P ** (2 * P)),
    Case("Pow", (N, np.int64(2)), {}, N * N),
    Case("Maximum", (A, B), {}, np.where(A > B, A, B)),
    Case("Minimum", (A, B), {}, np.where(A < B, A, B)),
    Case("ClipByValue", (A, np.float32(-1), np.float32(0.5)), {}, np.clip(A, -1, 0.5)),
    Case("ClipByValueV2", (N, np.int64(-2), np.int64(3)), {}, np.array([-2, -2, 0, 2, 3])),
    Case("Greater", (N, -N), {}, np.array([False, False, False, True, True])),
    Case("GreaterEqual", (N, -N), {}, np.array([False, False, True, True, True])),
    Case("Less", (N, -N), {}, np.array([True, True, False, False, False])),
    Case("LessEqual", (N, -N), {}, np.array([True, True, True, False, False])),
    Case("Equal", (N, -N), {}, np.array([False, False, True, False, False])),
    Case("NotEqual", (N, -N), {}, np.array([True, True, False, True, True])),
    Case("LogicalAnd", (YES, NO), {}, np.array([True, False, False, False])),
    Case("LogicalOr", (YES, NO), {}, np.array([True, True, True, False])),
    Case("LogicalNot", (YES,), {}, np.array([False, False, True, True])),
    Case("BitwiseAnd", (np.array([12, -1]), np.array([10, 7])), {}, np.array([8, 7])),
    Case("BitwiseOr", (np.array([12, -8]), np.array([10, 7])), {}, np.array([14, -1])),
    Case("Invert", (np.array([12, -1]),), {}, np.array([-13, 0])),
    Case("RightShift", (np.array([12, -9]), np.array([2, 1])), {}, np.array([3, -5])),
    Case("Addcmul", (A, B, P, np.float32(0.5)), {}, A + 0.5 * B * P),
    Case("Addcmul", (N, D, N, np.int64(2)), {}, N + 2 * D * N),
    # halves are rounded once: the product alone would be infinite
    Case("Addcmul", (HUGE, HUGE, HUGE, np.float16(-1 / 8192)), {}, np.float16([0])),
    Case("Addcdiv", (A, B, P, np.float32(-2)), {}, A - 2 * (B / P)),
    Case("Addcdiv", (HUGE, HUGE, TINY, np.float16(-1 / 8192)), {}, np.float16([0])),
    Case("Lerp", (A, B, P), {}, A + P * (B - A)),
    Case("Lerp", (-2 * HUGE, 6 * HUGE, np.float16([0.25])), {}, np.float16([0])),
    Case("MaskedFill", (H, NO, np.float32(-2)), {}, np.where(NO, np.float16(-2), H)),
    Case("SelectV2", (NO, A, B), {}, np.where(NO, A, B)),
    Case("Cast", (np.float32([1.5, -2.5, 3]),), {"dst_type": GE_I32}, np.int32([1, -2, 3])),
    Case("Cast", (A,), {"dst_type": GE_F16}, H),
    Case("Neg", (A,), {}, 0 - A),
    Case("Abs", (A,), {}, np.where(A < 0, 0 - A, A)),
    Case("Sign", (N,), {}, np.array([-1, -1, 0, 1, 1])),
    Case("Floor", (np.float32([1.5, -1.5]),), {}, np.float32([1, -2])),
    Case("Ceil", (np.float32([1.5, -1.5]),), {}, np.float32([2, -1])),
    Case("Square", (A,), {}, A * A),
    Case("Sin", (A,), {}, np.sin(A)),
    Case("Cos", (A,), {}, np.cos(A)),
    Case("Erf", (A,), {}, erf(A).astype(np.float32)),
    Case("Sqrt", (P,), {}, P**0.5),
    Case("Reciprocal", (P,), {}, 1 / P),
    Case("Rsqrt", (P,), {}, P**-0.5),
    Case("Round", (np.float32([0.5, 1.5, -2.5, 2.6]),), {}, np.float32([0, 2, -2, 3])),
    Case("Round", (np.float32([1.26, -1.24]),), {"decimals": 1}, np.float32([1.3, -1.2])),
    Case("Exp", (A,), {}, np.exp(A)),
    Case("Exp", (A,), {"base": 2.0, "scale": 3.0, "shift": 1.0}, 2 ** (3 * A + 1)),
    Case("Log", (P,), {}, np.log(P)),
    Case("Log", (P,), {"base": 2.0, "scale": 3.0, "shift": 1.0}, np.log2(3 * P + 1)),
    Case("Expm1", (np.float32([1e-6, 1, -2]),), {}, np.expm1([1e-6, 1, -2])),
    Case("Log1p", (np.float32([1e-6, 1, 7]),), {}, np.log1p([1e-6, 1, 7])),
    Case("Erfinv", (erf(BELOW_2).astype(np.float32),), {}, BELOW_2),
    Case("IsInf", (SPECIAL,), {}, np.array([False, True, True, False])),
    Case("IsNan", (SPECIAL,), {}, np.array([False, False, False, True])),
    Case(
        "NanToNum",
        (np.float32([np.nan, np.inf, -np.inf, 2]),),
        {"nan": 1.0, "posinf": 9.0, "neginf": -9.0},
        np.float32([1, 9, -9, 2]),
    ),
    Case("IsFinite", (SPECIAL,), {}, np.array([True, False, False, False])),
    Case("ReduceSum", (C, np.array([0, -1])), {}, C.sum((0, 2))),
    Case("ReduceSum", (N.astype(np.int32), np.array([0])), {}, np.int32(0)),
    Case("ReduceMean", (C, np.array([1])), {"keep_dims": True}, C.mean(1, keepdims=True)),
    Case("ReduceMeanWithCast", (C, np.array([1, 2])), {}, C.mean((1, 2))),
    Case("ReduceProdD", (np.int32([[2, 3], [4, -5]]),), {"axes": [0, -1]}, np.int32(-120)),
    Case("ReduceProdD", (C,), {"axes": [1], "keep_dims": True}, C.prod(1, keepdims=True)),
    Case("ReduceLogSumExp", (C, np.array([-1])), {}, np.log(np.exp(C).sum(-1))),
    Case("ReduceLogSumExp", (HUGE + 1000 * H[0], np.array([0])), {"keep_dims": True},
         np.float16([(HUGE + 1000 * H[0]).max()])),
    Case("ReduceStdV2", (C,), {"dim": [0, 2], "correction": 1},
         (C.std((0, 2), ddof=1), C.mean((0, 2)))),
    Case("ReduceStdV2", (C,), {"correction": 0}, (C.std(), C.mean())),
    Case("LpNormV2", (C,), {"axes": [1], "keepdim": True}, np.sqrt((C * C).sum(1, keepdims=True))),
    Case("LpNormV2", (C,), {"p": 1.0}, np.abs(C).sum()),
    Case("LpNormV2", (C,), {"p": math.inf, "axes": [-1]}, np.abs(C).max(-1)),
    Case("LpNormV2", (A * 0,), {"epsilon": 0.25}, np.float32(0.25)),
    Case("ReduceMax", (C, np.array([1, 2])), {}, C.max((1, 2))),
    Case("ReduceMin", (C, np.array([-1])), {"keep_dims": True}, C.min(-1, keepdims=True)),
    Case("ReduceAny", (np.stack([YES, YES & NO]), np.array([1])), {}, np.array([True, True])),
    Case("ReduceAll", (np.stack([YES, YES | NO]), np.array([0])), {}, YES),
    Case("Cumsum", (C, np.array(1)), {}, C.cumsum(1)),
    Case("Cumsum", (N.astype(np.int32), np.array(0)), {}, np.int32([-7, -9, -9, -7, 0])),
    Case("TopKV2", (np.float32([[3, 1, 2]]), np.array(2)), {}, ([[3.0, 2.0]], np.int32([[0, 2]]))),
    Case(
        "TopKV2",
        (np.float32([[3], [1], [2]]), np.array(1)),
        {"dim": 0, "largest": False, "indices_dtype": GE_I64},
        (np.float32([[1]]), np.int64([[1]])),
    ),
    Case("ArgMaxWithValue", (C,), {"dimension": 1}, (C.argmax(1).astype(np.int32), C.max(1))),
    Case("ArgMinWithValue", (C,), {"dimension": -1, "keep_dims": True},
         (C.argmin(-1)[..., None].astype(np.int32), C.min(-1, keepdims=True))),
    Case("ArgMaxV2", (C, np.array(1)), {}, C.argmax(1)),
    Case("ArgMaxV2", (C, np.array([-1])), {"dtype": GE_I32}, C.argmax(-1).astype(np.int32)),
    Case("ArgMin", (C, np.array(0)), {}, C.argmin(0)),
    Case("Sort", (C,), {}, (np.sort(C), np.argsort(C).astype(np.int32))),
    Case("Sort", (C,), {"axis": 1, "descending": True, "y2_dtype": GE_I64},
         (-np.sort(-C, 1), np.argsort(-C, 1))),
    Case("Sort", (np.array([1, 0, 1, 0]),), {"stable": True},
         (np.array([0, 0, 1, 1]), np.int32([1, 3, 0, 2]))),
    Case("SearchSorted", (np.array([1, 3, 3, 9]), np.array([0, 3, 9, 10]), None), {},
         np.array([0, 1, 3, 4])),
    Case("SearchSorted", (np.array([9, 3, 1, 3]), np.array([3, 9]), np.array([2, 1, 3, 0])),
         {"right": True, "dtype": GE_I32}, np.int32([3, 4])),
    # ---- layout ----
    Case("Identity", (A,), {}, A),
    Case("TensorMove", (A,), {}, A),
    Case("Transpose", (C, np.array([2, 0, 1])), {}, C.transpose(2, 0, 1)),
    Case("Permute", (C,), {"order": [1, 2, 0]}, C.transpose(1, 2, 0)),
    Case("Reshape", (C, np.array([4, -1])), {}, C.reshape(4, 6)),
    Case("Reshape", (C, np.array([0, 12])), {}, C.reshape(2, 12)),
    Case("Shape", (C,), {}, np.int32([2, 3, 4])),
    Case("Shape", (C,), {"dtype": GE_I64}, np.int64([2, 3, 4])),
    Case("Unsqueeze", (A,), {"axes": [2, 0]}, A.reshape(1, 3, 1, 4)),
    Case("Unsqueeze", (A,), {"axes": [-1, -2]}, A.reshape(3, 4, 1, 1)),
    Case("Unsqueeze", (A,), {"axes": [0, -1]}, A.reshape(1, 3, 4, 1)),
    Case("Squeeze", (A.reshape(1, 3, 1, 4),), {"axis": [0]}, A.reshape(3, 1, 4)),
    Case("Squeeze", (A.reshape(1, 3, 1, 4),), {}, A),
    Case("ExpandDims", (A, np.array(-1)), {}, A.reshape(3, 4, 1)),
    Case("BroadcastTo", (A, np.array([2, 3, 4])), {}, np.stack([A, A])),
    Case("Expand", (A[:1], np.array([3, 1])), {}, np.concatenate([A[:1]] * 3)),
    Case("Tile", (A, np.array([2, 1])), {}, np.concatenate([A, A])),
    Case("Range", (np.int32(1), np.int32(9), np.int32(3)), {}, np.int32([1, 4, 7])),
    Case("Range", (np.float32(0), np.float32(1), np.float32(0.5)), {}, np.float32([0, 0.5])),
    Case("LinSpace", (np.float32(1), np.float32(2), np.int32(5)), {},
         np.float32([1, 1.25, 1.5, 1.75, 2])),
    Case("LinSpace", (np.float32([3]), np.float32([9]), np.int64([1])), {}, np.float32([3])),
    Case("ReverseV2", (C, np.array([0, -1])), {}, C[::-1, :, ::-1]),
    Case("AsStrided", (C, np.array([2, 3]), np.array([1, 4]), np.array([2])), {},
         C.reshape(-1)[[[2, 6, 10], [3, 7, 11]]]),
    Case("AsStrided", (C[:, :1], np.array([2, 2]), np.array([4, 0]), np.array([3])), {},
         np.stack([C[:, 0, 3]] * 2, 1)),
    Case("Slice", (C, np.array([0, 1, 2]), np.array([2, 1, -1])), {}, C[:, 1:2, 2:]),
    Case("StridedSliceV2", (C, [0, 1], [2, 99], [0, 2], [1, 2]), {}, C[0:2, :, 1::2]),
    Case("StridedSliceV2", (C, [1, -2], [2, 3], None, None), {}, C[1:2, -2:3]),
    Case("StridedSliceV2", (C, [1], [-1], [-1], None), {}, C[..., 1:-1]),
    Case("Triu", (A,), {"diagonal": 1}, np.triu(A, 1)),
    Case("Tril", (A,), {}, np.tril(A)),
    Case("GatherElements", (A, K), {"dim": 1}, np.array([A[0, [0, 2]], A[1, [1, 1]]])),
    Case("PadV3", (A, np.array([1, 0, 2, 3]), np.float32(7)), {},
         np.pad(A, ((1, 0), (2, 3)), constant_values=7)),
    Case("PadV3", (A, np.array([0, 0, 0, 1]), None), {}, np.pad(A, ((0, 0), (0, 1)))),
    Case("Fill", (np.array([2, 3]), np.float16(1.5)), {}, np.full((2, 3), 1.5, np.float16)),
    Case("Empty", (np.array([2, 3]),), {"dtype": GE_F16}, np.full((2, 3), np.nan, np.float16)),
    Case("Empty", (np.array([2]),), {"dtype": GE_I8}, np.full(2, 127, np.int8)),
    Case("Empty", (np.array([2, 3]),), {"init": True}, np.zeros((2, 3), np.int32)),
    Case("ZerosLike", (H,), {}, H * 0),
    Case("OnesLike", (H,), {}, H * 0 + 1),
    Case("Pack", ([A, B],), {"axis": 1, "N": 2}, np.stack([A, B], 1)),
    Case("Unpack", (C,), {"num": 3, "axis": -2}, (C[:, 0], C[:, 1], C[:, 2])),
    Case("ConcatV2", ([A, B], np.array(-1)), {"N": 2}, np.concatenate([A, B], -1)),
    Case("Concat", (np.array(0), [A, B]), {"N": 2}, np.concatenate([A, B], 0)),
    Case("ConcatD", ([A, B],), {"concat_dim": 1, "N": 2}, np.concatenate([A, B], 1)),
    Case("SplitV", (A, np.array([1, -1]), np.array(1)), {"num_split": 2}, (A[:, :1], A[:, 1:])),
    Case("Gather", (A, K), {}, A[K]),
    Case("GatherV2", (C, np.array([3, -1, 0]), np.array(2)), {}, C[..., [3, 3, 0]]),
    Case("GatherV2", (C, np.array(1), np.array(1)), {}, C[:, 1]),
    Case("IndexByTensor", (C, [np.array([0, 1]), np.array([3, 2])]), {"indices_mask": [1, 0, 1]},
         np.stack([C[0, :, 3], C[1, :, 2]])),
    # ---- networks ----
    Case("Relu", (A,), {}, np.where(A > 0, A, np.float32(0))),
    Case("Sigmoid", (A,), {}, sigmoid(A)),
    Case("Tanh", (A,), {}, 2 * sigmoid(2 * A) - 1),
    Case("Gelu", (A,), {}, gelu_tanh(A)),
    Case("GeluV2", (A,), {"approximate": "tanh"}, gelu_tanh(A)),
    Case("GeluV2", (A,), {}, (0.5 * A * (1 + erf(A / math.sqrt(2)))).astype(np.float32)),
    Case("Softplus", (A,), {}, np.log(1 + np.exp(A))),
    Case("Swish", (A,), {}, A * sigmoid(A)),
    Case("Swish", (A,), {"scale": 1.7}, A * sigmoid(1.7 * A)),
    Case("Elu", (A,), {}, np.where(A > 0, A, np.expm1(A))),
    Case("Elu", (A,), {"alpha": 0.5, "scale": 3.0, "input_scale": 2.0},
         3 * np.where(A > 0, A, 0.5 * np.expm1(2 * A))),
    Case("GLU", (C,), {}, C[..., :2] * sigmoid(C[..., 2:])),
    Case("GLU", (C,), {"dim": 0}, C[:1] * sigmoid(C[1:])),
    Case("HardSigmoid", (4 * A,), {}, np.clip(4 * A / 6 + 0.5, 0, 1)),
    Case("HardSigmoid", (A,), {"alpha": 0.2, "beta": 0.4}, np.clip(0.2 * A + 0.4, 0, 1)),
    Case("HardSwish", (4 * A,), {}, 4 * A * np.clip(4 * A + 3, 0, 6) / 6),
    Case("LeakyRelu", (A,), {"negative_slope": 0.1}, np.where(A > 0, A, np.float32(0.1) * A)),
    Case("LogSigmoid", (A,), {}, np.log(sigmoid(A))),
    Case("Mish", (A,), {}, A * np.tanh(np.log1p(np.exp(A)))),
    Case("ThresholdV2", (A, np.float32(0.25), np.float32(-7)), {},
         np.where(A > 0.25, A, np.float32(-7))),
    Case("ThresholdV2", (N, np.int64(2), None), {}, np.array([0, 0, 0, 0, 7])),
    Case("SwiGlu", (C,), {}, C[..., :2] * sigmoid(C[..., :2]) * C[..., 2:]),
    Case("SwiGlu", (C,), {"dim": 0}, C[:1] * sigmoid(C[:1]) * C[1:]),
    Case("SoftmaxV2", (C,), {"axes": [1]}, softmax(C, 1)),
    Case("SoftmaxV2", (H,), {"half_to_float": True}, softmax(H.astype(np.float32), -1)),
    Case("LogSoftmaxV2", (C,), {}, np.log(softmax(C, -1))),
    Case("LayerNormV4", (C, np.array([4]), None, None), {}, layer_norm(C)),
    Case("LayerNormV4", (C, np.array([4]), FOUR, B[0]), {}, layer_norm(C, FOUR, B[0])),
    Case("RmsNorm", (C, FOUR), {"epsilon": 0.5},
         (C * FOUR / np.sqrt((C * C).mean(-1, keepdims=True) + 0.5),
          1 / np.sqrt((C * C).mean(-1, keepdims=True) + 0.5))),
    Case("AddRmsNorm", (C, C, FOUR), {"epsilon": 0.5},
         (2 * C * FOUR / np.sqrt((4 * C * C).mean(-1, keepdims=True) + 0.5),
          1 / np.sqrt((4 * C * C).mean(-1, keepdims=True) + 0.5), 2 * C)),
    Case("MatMul", (A, W), {"transpose_x2": True}, A @ W.T),
    Case("MatMulV2", (A.T.copy(), W.T.copy(), W[:, 0], None), {"transpose_x1": True},
         A @ W.T + W[:, 0]),
    Case("BatchMatMul", (C, C), {"adj_x2": True}, np.einsum("bik,bjk->bij", C, C)),
    Case("BatchMatMulV2", (C, C, None, None), {"adj_x1": True}, np.einsum("bki,bkj->bij", C, C)),
    Case("Conv2D", (IMAGE, FILTER, FOUR, None),
         {"strides": [1, 1, 2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 1, 1, 2],
          "data_format": "NCHW"},
         conv2d(IMAGE, FILTER, FOUR)),
    # ---- quantization ----
    Case("TransQuantParamV2", (QS, None), {}, golden.trans_quant_param(QS, None)),
    Case("TransQuantParamV2", (QS, LONG), {"round_mode": 1}, golden.trans_quant_param(QS, LONG, 1)),
    Case("TransQuantParamV2", (QS[None], LONG[:1]), {},
         golden.trans_quant_param(QS[None], LONG[:1])),
    Case("TransQuantParamV2", (QS[:1], LONG[None]), {},
         golden.trans_quant_param(QS[:1], LONG[None])),
    Case("QuantBatchMatmulV3", (QX, QW, QS, None, None, QT),
         {"dtype": GE_F16, "transpose_x2": True},
         golden.linear_quant(QX, QW, QS, pertoken_scale=QT, output_dtype="float16")),
    Case("QuantBatchMatmulV3", (QX, QW, np.array(golden.trans_quant_param(QS, None))),
         {"dtype": GE_I8, "transpose_x2": True},
         golden.linear_quant(QX, QW, QS, output_dtype="int8")),
    # before 950 no tiling reads the offset beside the words, whatever its length
    Case("QuantBatchMatmulV3", (QX, QW, WORDS, LONG[:5]), {"dtype": GE_I8, "transpose_x2": True},
         golden.linear_quant(QX, QW, QS, LONG, output_dtype="int8")),
    Case("QuantBatchMatmulV3", (QX, QW, WORDS, LONG), {"dtype": GE_F16, "transpose_x2": True},
         golden.linear_quant(QX, QW, QS, output_dtype="float16")),
    Case("QuantBatchMatmulV3", (QX, QW, WORDS[None]), {"dtype": GE_I8, "transpose_x2": True},
         golden.linear_quant(QX, QW, QS, LONG, output_dtype="int8")),
    Case("QuantBatchMatmulV3", (QX, QW, QS[:, None], None, None, QT),
         {"dtype": GE_F16, "transpose_x2": True},
         golden.linear_quant(QX, QW, QS, pertoken_scale=QT, output_dtype="float16")),
    Case("AscendQuantV2", (A, np.float32([20]), np.float32([3])), {},
         np.clip(np.round(A * 20 + 3), -128, 127).astype(np.int8)),
    Case("AscendQuantV2", (A, np.float32([20, 30, 400]), None), {"axis": -2},
         np.clip(np.round(A * np.float32([[20], [30], [400]])), -128, 127).astype(np.int8)),
    Case("AscendQuantV2", (np.float32(2.5), np.float32(20), np.float32(3)), {}, np.int8(53)),
    Case("DynamicQuant", (H, None, None), {}, dynamic_quant(H)),
    Case("DynamicQuantV2", (H, None, None), {}, dynamic_quant_with_offset(H)),
    Case("DynamicQuantV2", (H, SMOOTH[0], None), {},
         dynamic_quant_with_offset(H * SMOOTH[0].astype("f"))),
    Case("DynamicQuant", (H, SMOOTH[0], None), {}, dynamic_quant(H * SMOOTH[0].astype("f"))),
    Case("DynamicQuant", (H, SMOOTH, np.int32([0, len(H)])), {},
         dynamic_quant(H * SMOOTH[1].astype("f"))),
    Case("Quantize", (A, np.float32([[0.02, 0.03, 0.001, 0.04]]), None), {"dtype": "torch.qint8"},
         np.clip(np.round(A / np.float32([0.02, 0.03, 0.001, 0.04])), -128, 127).astype(np.int8)),
    Case("Quantize", (A, np.float32([[0.02]]), np.int32([[100]])), {"dtype": "torch.quint8"},
         np.clip(np.round(A / np.float32(0.02)) + 100, 0, 255).astype(np.uint8)),
    Case("Quantize", (A, np.float32([[2], [3], [1e-3]]), np.int32([[1], [2], [3]])),
         {"dtype": "torch.qint32", "axis": 0},
         np.round(A / np.float32([[2], [3], [1e-3]]) + np.float32([[1], [2], [3]])).astype("i")),
    Case("Bitcast", (np.int32([[1, -1]]),), {"type": GE_I8}, np.int8([[[1, 0, 0, 0], [-1] * 4]])),
    Case("Bitcast", (np.int8([[1, 0, 0, 0]]),), {"type": GE_I32}, np.int32([1])),
    Case("Bitcast", (np.float32([1.0]),), {"type": GE_I32}, np.int32([0x3F800000])),
]  # fmt: skip

# Checked elsewhere, because they are made of several or depend on the product.
ELSEWHERE = {
    "ApplyRotaryPosEmb",  # test_rope
    "InterleaveRope",
    "RotaryMul",
    "RotaryMulGrad",  # test_gradients.py
    "RotaryPositionEmbedding",
    "Assign",  # test_cache, test_cache_paged
    "KvRmsNormRopeCache",
    "Scatter",
    "ScatterElements",
    "ScatterElementsV2",
    "ScatterNdUpdate",
    "FlashAttentionScore",  # test_attention_flash
    "FusedInferAttentionScore",  # test_attention
    "IncreFlashAttention",
    "PromptFlashAttention",
    "ScatterPaKvCache",
    "AddRmsNormCast",  # test_fused_norms
    "AddRmsNormDynamicQuant",
    "AddRmsNormQuant",
    "Cmo",  # test_fused_graphs
    "DequantSwigluQuant",  # test_fused_swiglu
    "HcomAllGather",  # test_cann_host_hccl
    "HcomAllReduce",
    "HcomBroadcast",
    "HcomReduceScatter",
    "QuantBatchMatmulV4",  # test_cann_host_rules, test_products
    "RmsNormQuant",  # test_fused_norms
    "SwiGluQuant",  # test_fused_swiglu
    "SwiGluGrad",  # test_gradients.py
}


def as_tensor(value: Any) -> Any:
    if value is None:
        return None
    if type(value) is list and value and isinstance(value[0], np.ndarray):
        return [as_tensor(v) for v in value]
    array = np.asarray(value)
    return torch.from_numpy(array.copy()) if array.ndim else torch.tensor(array[()])


def named(case: Case) -> dict[str, Any]:
    names = find_op(case.type).inputs
    given = {n: as_tensor(v) for n, v in zip(names, case.inputs, strict=False)}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.type)
def test_computes(case: Case) -> None:
    got = run_op(find_op(case.type), named(case), case.attrs)
    expected = case.expected if isinstance(case.expected, tuple) else (case.expected,)
    assert len(got) == len(expected)
    for one, want in zip(got, expected, strict=True):
        # numpy computes in float64 here and there; the operator's dtype is its own
        want = np.asarray(want)
        assert one.dtype.is_floating_point == np.issubdtype(want.dtype, np.floating)
        if not one.dtype.is_floating_point:
            assert str(one.dtype).removeprefix("torch.") == str(want.dtype)
        torch.testing.assert_close(
            one.double(),
            torch.from_numpy(want.astype(np.float64)),
            rtol=2e-3 if one.dtype == F16 else 1e-5,
            atol=1e-3 if one.dtype == F16 else 1e-6,
            equal_nan=True,
        )


@pytest.mark.parametrize("exponent", [0.5, 2.0, 3.0, -0.5])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_the_power_of_one_exponent_is_that_of_eager_mode(dtype: torch.dtype, exponent) -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.1
    inputs = {"x1": x, "x2": torch.tensor(exponent, dtype=dtype)}
    assert torch.equal(run_op(find_op("Pow"), inputs, {})[0], torch.pow(x, exponent))


@pytest.mark.parametrize("through_transpose", [False, True])
@pytest.mark.parametrize("form", ["ND", "FRACTAL_NZ"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_reaches_the_matmul_without_a_copy(
    bits: int, form: str, through_transpose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of it in ND, nor unpacked, whether the matmul transposes it or the graph does."""
    m, k, n = 3, 128, 48
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    x = np.random.default_rng(1).integers(low, high, (m, k)).astype(np.int8)
    w = np.random.default_rng(2).integers(low, high, (n, k)).astype(np.int8)
    scale, pertoken = torch.rand(n) * 1e-3, torch.rand(m)
    want = golden.linear_quant(
        x, w, scale.numpy(), pertoken_scale=pertoken.numpy(), output_dtype="float16"
    )
    x1, x2 = torch.from_numpy(x), torch.from_numpy(w)
    if bits == 4:
        x1, x2 = kernels.pack_int4(x1), kernels.pack_int4(x2)
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(executor, "unpack_int4", asked.append)
    seen: list[Any] = []
    matmul = quant.quant_matmul
    monkeypatch.setattr(quant, "quant_matmul", lambda *a, **k: seen.append(a) or matmul(*a, **k))
    like = torch.empty(x2.shape, dtype=x2.dtype, device="meta")

    def run(type_: str, *inputs: Any, **attrs: Any) -> Any:
        names = find_op(type_).inputs
        given = {name: v for name, v in zip(names, inputs, strict=False) if v is not None}
        return run_op(find_op(type_), given, attrs)[0]

    weight: Any = x2
    if form == "FRACTAL_NZ":
        blocks = kernels.nd_to_nz(x2, 32 // x2.element_size())
        weight = executor.FractalNZ(
            like,
            tuple(blocks.shape),
            lambda: pytest.fail("brought to ND"),
            kernels.NzWeight(blocks, *x2.shape),
        )
    if bits == 4:
        x1, weight = run("Bitcast", x1, type=GE_INT4), run("Bitcast", weight, type=GE_INT4)
        x1 = run("Reshape", x1, torch.tensor([m, k]))
        weight = run("Reshape", weight, torch.tensor([n, k]))
    if through_transpose:
        weight = run("Transpose", weight, torch.tensor([1, 0]))
    assert tuple(weight.shape) == ((k, n) if through_transpose else (n, k))
    inputs = (x1, weight, scale, None, None, pertoken)
    out = run("QuantBatchMatmulV3", *inputs, dtype=GE_F16, transpose_x2=not through_transpose)
    np.testing.assert_array_equal(out.numpy(), want)
    stored = seen[0][1]
    stored = stored.blocks if form == "FRACTAL_NZ" else stored
    address = (blocks if form == "FRACTAL_NZ" else x2).data_ptr()
    assert not asked and stored.data_ptr() == address


@pytest.mark.parametrize("perm", [[0, 1], [1, 0]])
def test_int4_values_through_transpose_and_back(perm: list[int]) -> None:
    values = torch.randint(-8, 8, (16, 24), dtype=I8)
    packed = Int4(kernels.pack_int4(values))
    turned = run_op(find_op("Transpose"), {"x": packed, "perm": torch.tensor(perm)}, {})[0]
    assert turned.shape == values.permute(perm).shape
    assert torch.equal(turned.values, values.permute(perm))
    flat = run_op(find_op("Reshape"), {"x": turned, "shape": torch.tensor([-1])}, {})[0]
    assert torch.equal(flat.values, values.permute(perm).reshape(-1))
    assert torch.equal(turned.packed, kernels.pack_int4(values.permute(perm).contiguous()))


# types whose float results have a dtype of their own, by an attribute or the definition
OWN_DTYPE = {"Cast", "Empty", "SoftmaxV2", "DynamicQuant", "DynamicQuantV2", "QuantBatchMatmulV3"}


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.type not in OWN_DTYPE], ids=lambda case: case.type
)
def test_float_results_have_the_dtype_of_the_first_float_input(case: Case) -> None:
    inputs = named(case)
    flat = [t for v in inputs.values() for t in (v if type(v) is list else [v])]
    first = next((t.dtype for t in flat if t.dtype.is_floating_point), None)
    results = run_op(find_op(case.type), inputs, case.attrs)
    assert {t.dtype for t in results if t.dtype.is_floating_point} <= {first}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.type)
def test_infers_on_meta_tensors_what_it_computes(case: Case) -> None:
    op = find_op(case.type)
    inputs = named(case)
    values = run_op(op, inputs, case.attrs)
    meta = {
        name: value
        if name in op.host
        else [v.to("meta") for v in value]
        if type(value) is list
        else value.to("meta")
        for name, value in inputs.items()
    }
    inferred = run_op(op, meta, case.attrs)
    assert [(v.shape, v.dtype) for v in inferred] == [(v.shape, v.dtype) for v in values]


def test_every_operator_has_a_case() -> None:
    assert {case.type for case in CASES} | ELSEWHERE == set(executor.OPS)


# ---- int4 ----


def test_int4_between_int32_and_its_values() -> None:
    values = torch.randint(-8, 8, (3, 16), dtype=I8, generator=torch.Generator().manual_seed(0))
    packed = torch.from_numpy(golden.pack_int4(values.numpy()))
    (int4,) = run_op(find_op("Bitcast"), {"x": packed}, {"type": GE_INT4})
    assert isinstance(int4, Int4)
    assert torch.equal(int4.values, values.view(3, 2, 8))
    (back,) = run_op(find_op("Bitcast"), {"x": int4}, {"type": GE_I32})
    assert torch.equal(back, packed)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 6), (1, 2)], ids=str)
def test_dynamic_quant_to_int4(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2).to(dtype)
    x[..., 0] = 4  # a peak whose 7 / peak is exact: what the arithmetic is, test_quant_ops tests
    int4, scale = run_op(find_op("DynamicQuant"), {"x": x}, {"dst_type": GE_INT4})
    want, want_scale = golden.dynamic_quant(x.float().numpy(), 7)
    assert isinstance(int4, Int4)
    np.testing.assert_array_equal(int4.values.numpy(), want)
    np.testing.assert_array_equal(scale.numpy(), want_scale)


# ---- refusals ----

HALF = torch.ones(2, 4, dtype=F16)
ONE = torch.ones(1, dtype=F16)
MATRIX = torch.ones(3, 4)
IMAGES = {"x": torch.ones(1, 2, 3, 3), "filter": torch.ones(1, 2, 1, 1)}
INDEX = {"x": MATRIX, "indices": torch.tensor([3]), "axis": torch.tensor(0)}
LAYER = {"x": MATRIX, "normalized_shape": torch.tensor([4])}
SLICE = {"x": MATRIX, "begin": ONE, "end": ONE}
NONE = torch.tensor([], dtype=I64)
FLOAT32_X = r"x is float32; Ascend910B2 allows float16 or bfloat16 \(CANN error 561002"
DTYPES_DIFFER = "scale is float16 and x float32; they must be of one dtype"

FALLING = torch.tensor([2, 1], dtype=torch.int32)

REFUSED = [
    ("GatherV2", INDEX, {}, "index out of range"),
    ("GatherV2", INDEX, {"batch_dims": 1}, "batch_dims 1"),
    ("PadV3", {"x": MATRIX, "paddings": NONE}, {"mode": "reflect"}, "mode reflect"),
    ("StridedSliceV2", SLICE, {"begin_mask": 1}, "masks"),
    ("Cumsum", {"x": MATRIX, "axis": torch.tensor(0)}, {"reverse": True}, "exclusive or reverse"),
    (
        "AsStrided",
        {
            "x": MATRIX,
            "size": torch.tensor([2, 2]),
            "stride": torch.tensor([8, 1]),
            "storage_offset": torch.tensor([3]),
        },
        {},
        r"AsStrided of 12 values .* offset 3 reads outside",
    ),
    (
        "LinSpace",
        {"start": ONE, "stop": ONE, "num": torch.tensor([2**40])},
        {},
        "num is 1099511627776; cann_host makes 0 to",
    ),
    (
        "SearchSorted",
        {"sorted_sequence": MATRIX, "values": HALF},
        {},
        "values is float16 and sorted_sequence float32",
    ),
    ("ReduceSum", {"x": MATRIX, "axes": NONE}, {}, "no axes"),
    ("SoftmaxV2", {"x": MATRIX}, {"axes": [0, 1]}, r"axes \[0, 1\]"),
    ("LogSoftmaxV2", {"logits": MATRIX}, {"axes": [0, 1]}, r"axes \[0, 1\]"),
    ("MatMulV2", {"x1": MATRIX, "x2": MATRIX, "offset_w": ONE}, {}, "offset"),
    ("Conv2D", IMAGES, {"strides": [1] * 4, "pads": [0] * 4}, "data_format NHWC"),
    ("Reshape", {"x": MATRIX, "shape": torch.tensor([12])}, {"axis": 1}, "axis 1"),
    ("Cast", {"x": MATRIX}, {"dst_type": 36}, "GE dtype 36"),
    ("Bitcast", {"x": MATRIX}, {"type": GE_INT4}, "Bitcast of float32 to int4"),
    ("Bitcast", {"x": Int4(torch.zeros(2, 4, dtype=I8))}, {"type": GE_I32}, r"int4 \(2, 4\)"),
    ("DynamicQuant", {"x": MATRIX}, {}, FLOAT32_X),
    ("DynamicQuant", {"x": HALF}, {"dst_type": GE_I32}, "y is GE dtype 3; .* int8 or int4 "),
    ("DynamicQuant", {"x": HALF[:, :0]}, {}, "last dim cannot be 0"),
    ("DynamicQuant", {"x": HALF[:, :3]}, {"dst_type": GE_INT4}, "multiple of 2"),
    ("DynamicQuant", {"x": HALF, "smooth_scales": ONE}, {}, r"it must be \(4,\)"),
    ("DynamicQuantV2", {"x": MATRIX}, {}, FLOAT32_X),
    (
        "DynamicQuantV2",
        {"x": HALF},
        {"quant_mode": "pertensor"},
        r"scale the shape \(1,\); .* \(2,\)",
    ),
    ("DynamicQuantV2", {"x": HALF}, {"quant_mode": "each"}, "quant_mode is 'each'; it must be one"),
    ("DynamicQuantV2", {"x": HALF}, {"dst_type": 35}, "y is float8_e5m2; Ascend910B2 allows"),
    ("TransQuantParamV2", {"scale": HALF}, {}, "scale is float16; .* 561003"),
    ("TransQuantParamV2", {"scale": MATRIX}, {}, r"scale has shape \(3, 4\); .* 561002"),
    (
        "TransQuantParamV2",
        {"scale": MATRIX[0], "offset": MATRIX[0, :2]},
        {},
        "offset has 2 values and 4 are read; .*cann_host has no values",
    ),
    ("Quantize", {"x": HALF, "scales": HALF[:1]}, {"dtype": "torch.qint8"}, "float16; .*561003"),
    ("Quantize", {"x": MATRIX, "scales": MATRIX}, {"dtype": "torch.qint8"}, "has shape.*561002"),
    ("Quantize", {"x": MATRIX, "scales": MATRIX[0]}, {"dtype": "torch.hifloat8"}, "hifloat8"),
    ("RmsNorm", {"x": MATRIX.double(), "gamma": MATRIX[0].double()}, {}, "x is float64.*561003"),
    ("RmsNorm", {"x": MATRIX, "gamma": MATRIX[0, :3]}, {}, r"gamma has shape \(3,\).*561002"),
    ("RmsNorm", {"x": MATRIX, "gamma": MATRIX[0]}, {"epsilon": -1.0}, "epsilon is -1.0.*561002"),
    ("RmsNorm", {"x": MATRIX[:0], "gamma": MATRIX[0]}, {}, "they cannot be empty.*561002"),
    ("AddRmsNorm", {"x1": HALF, "x2": HALF, "gamma": MATRIX[0]}, {}, "gamma is float32 .*561003"),
    (
        "AddRmsNorm",
        {"x1": HALF, "x2": HALF[:1], "gamma": HALF[0]},
        {},
        r"x2 float16 \(1, 4\).*561002",
    ),
    ("LayerNormV4", {**LAYER, "gamma": HALF[0]}, {}, "gamma and beta are float16 and x float32"),
    ("SwiGlu", {"x": MATRIX[:, :3]}, {}, "SwiGlu halves that dim"),
    ("SwiGlu", {"x": MATRIX}, {"dim": 2}, "dim is 2; SwiGlu halves that dim"),
    ("SwiGlu", {"x": MATRIX.double()}, {}, "x is float64; .* 561003"),
    (
        "GatherElements",
        {"x": MATRIX, "index": MATRIX},
        {},
        "index is torch.float32; it must be int32",
    ),
    ("GatherV2", {**INDEX, "indices": ONE}, {}, "indices is torch.float16; it must be int32"),
    (
        "DynamicQuant",
        {"x": HALF, "smooth_scales": HALF, "group_index": FALLING},
        {},
        "group_index ends with 1 and must rise to 2",
    ),
    ("AscendQuantV2", {"x": MATRIX, "scale": ONE}, {}, DTYPES_DIFFER),
    ("AscendQuantV2", {"x": HALF, "scale": ONE}, {"round_mode": "floor"}, "round_mode floor"),
    ("AscendQuantV2", {"x": HALF[:, :3], "scale": ONE}, {"dst_type": GE_INT4}, "multiple of 2"),
]


@pytest.mark.parametrize(
    ("type_", "inputs", "attrs", "message"), REFUSED, ids=[f"{row[0]}: {row[3]}" for row in REFUSED]
)
def test_refuses(
    type_: str,
    inputs: dict[str, Any],
    attrs: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor, "soc_name", lambda: "Ascend910B2")
    with pytest.raises((GraphError, IndexError), match=message):
        run_op(find_op(type_), inputs, attrs)


def test_a_shape_that_hangs_on_unknown_values_is_not_guessed() -> None:
    size = torch.empty(2, dtype=I64, device="meta")
    with pytest.raises(executor.ShapeUnknownError):
        run_op(find_op("Reshape"), {"x": torch.ones(4), "shape": size}, {})


def test_type_of_a_missing_operator_is_named() -> None:
    with pytest.raises(GraphError, match="op type Sinh is not implemented by cann_host"):
        find_op("Sinh")


# ---- what chips do otherwise ----


def on(soc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "soc_name", lambda: soc)


OLDER = ["Ascend910B2", "Ascend910_9391", "Ascend310P3"]


def trans_quant_param(scale: np.ndarray, offset: np.ndarray) -> torch.Tensor:
    inputs = {"scale": torch.from_numpy(scale.copy()), "offset": torch.from_numpy(offset.copy())}
    op = find_op("TransQuantParamV2")
    declared = run_op(op, {name: t.to("meta") for name, t in inputs.items()}, {})[0]
    words = run_op(op, inputs, {})[0]
    assert declared.shape == words.shape
    return words


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(QS[:1], LONG), (QS, LONG[:1].reshape(1, 1)), (QS[:1].reshape(1, 1), LONG)],
    ids=["one scale", "offset of two dims", "both"],
)
@pytest.mark.parametrize("soc", OLDER)
def test_words_past_the_declared_shape(soc: str, scale, offset, monkeypatch) -> None:
    """InferShape declares one word, the kernel writes 48, a matmul reads the first."""
    on(soc, monkeypatch)
    with pytest.warns(
        RuntimeWarning, match="writes 48 words: 47 overwrite other memory, and a matmul"
    ):
        words = trans_quant_param(scale, offset)
    first = golden.trans_quant_param(scale.reshape(-1)[:1], offset.reshape(-1)[:1])
    np.testing.assert_array_equal(words.reshape(-1).numpy(), first)
    monkeypatch.setattr(runtime.current(), "options", Options.of(overruns="refuse"))
    with pytest.raises(GraphError, match="refused by cann_host's option overruns") as refusal:
        trans_quant_param(scale, offset)
    assert "CANN error" not in str(refusal.value)


def test_950_declares_the_longer_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    on("Ascend950PR_9579", monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = trans_quant_param(QS[:1], LONG)
    np.testing.assert_array_equal(words.numpy(), golden.trans_quant_param(QS[:1], LONG))


def test_310p_quantizes_along_the_last_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    on("Ascend310P3", monkeypatch)
    inputs = {"x": torch.from_numpy(A), "scale": torch.tensor([20.0])}
    with pytest.warns(RuntimeWarning, match="AscendQuantV2 with axis -2 on Ascend310P3"):
        (got,) = run_op(find_op("AscendQuantV2"), inputs, {"axis": -2})
    np.testing.assert_array_equal(got.numpy(), np.clip(np.rint(A * 20), -128, 127))


def test_symmetric_dynamic_quant_v2_of_950_leaves_the_offset(monkeypatch) -> None:
    on("Ascend950PR_9579", monkeypatch)
    got = run_op(find_op("DynamicQuantV2"), {"x": torch.from_numpy(H)}, {"is_symmetrical": True})
    want, scale = golden.dynamic_quant(H, 127, "divide")
    np.testing.assert_array_equal(got[0].numpy(), want)
    np.testing.assert_array_equal(got[1].numpy(), scale)
    assert got[2].shape == scale.shape


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_950_quantizes_nothing(shape: tuple[int, ...], monkeypatch) -> None:
    on("Ascend950PR_9579", monkeypatch)
    x = torch.empty(shape, dtype=F16)
    values, scale = run_op(find_op("DynamicQuant"), {"x": x}, {})
    assert (values.shape, scale.shape) == (shape, shape[:1])


@pytest.mark.parametrize("gamma", [F16, F32])
def test_layer_norm_of_halves_has_float32_statistics(gamma: torch.dtype) -> None:
    x, factors = torch.from_numpy(C).to(F16), torch.from_numpy(FOUR).to(gamma)
    shape = torch.tensor([4])
    got = run_op(find_op("LayerNormV4"), {"x": x, "normalized_shape": shape, "gamma": factors}, {})
    assert [t.dtype for t in got] == [F16, F32, F32]
    for one, want in zip(got, layer_norm(x.float().numpy(), FOUR), strict=True):
        np.testing.assert_allclose(one.float().numpy(), want, rtol=2e-3, atol=1e-3)
