"""Casts: of a constant, which the compiler computes, of a graph's input, and eagerly. The golden is
numpy's, with the rounding of bfloat16 in bits and 0 for the integer of NaN, as CANN documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
from cann_host.graph.compiler import compile_graph

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
pytest.importorskip("torch_npu")
pytest.importorskip("torchair")

# GE's number of each dtype, and its name in a graph
DTYPES = {
    torch.float32: (0, "DT_FLOAT"),
    torch.float16: (1, "DT_FLOAT16"),
    torch.bfloat16: (27, "DT_BF16"),
    torch.int8: (2, "DT_INT8"),
    torch.uint8: (4, "DT_UINT8"),
    torch.int32: (3, "DT_INT32"),
    torch.int64: (9, "DT_INT64"),
    torch.bool: (12, "DT_BOOL"),
}
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]
# ties between two float16 or bfloat16 values, subnormal numbers, what overflows float16
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.1, 2.5, 3.5, -0.5, 127.9, -127.9, 2049.0, 2051.0, 1 + 2**-8]
NUMBERS += [1 + 3 * 2**-8, 257.0, 259.0, 2**-24, 2**-25, 3 * 2**-25, 65519.0, 65520.0, 1e-40, 3e38]
BEYOND = [float("inf"), -float("inf"), float("nan")]


def graph_of(source: Tensor, to: torch.dtype, *, constant: bool) -> Any:
    """A graph that casts a constant, or its input."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType, ModelDef

    model = ModelDef()
    graph = model.graph.add()
    number = DataType.Value(DTYPES[source.dtype][1])
    if constant:
        x = graph.op.add(name="x", type="Const")
        value = x.attr["value"].t
        value.desc.dtype = number
        value.desc.shape.dim.extend(source.shape)
        value.data = source.view(torch.uint8).numpy().tobytes()
    else:
        x = graph.op.add(name="x", type="Data")
        x.attr["index"].i = 0
        x.output_desc.add(dtype=number).shape.dim.extend(source.shape)
    cast = graph.op.add(name="cast", type="Cast")
    cast.attr["dst_type"].i = DTYPES[to][0]
    cast.input.append("x:0")
    cast.input_desc.add(name="x")
    out = graph.op.add(name="out", type="NetOutput")
    out.input.append("cast:0")
    out.input_desc.add(dtype=DataType.Value(DTYPES[to][1]))
    return compile_graph(model.SerializeToString())


def golden(source: Tensor, to: torch.dtype) -> np.ndarray:
    """The bits of the result."""
    values = source.double().numpy()
    with np.errstate(all="ignore"):
        if to is not torch.bfloat16:
            if not to.is_floating_point and to is not torch.bool:
                values = np.where(np.isnan(values), 0, np.trunc(values))
            kind = "bool" if to is torch.bool else str(to).removeprefix("torch.")
            return values.astype(kind).view(np.uint8)
        word = values.astype(np.float32).view(np.uint32).astype(np.uint64)  # exact: no float64s
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        return rounded.astype(np.uint16).view(np.uint8)


def bits(x: Tensor) -> np.ndarray:
    return x.contiguous().flatten().view(torch.uint8).numpy()


def sources(source: torch.dtype, to: torch.dtype) -> Tensor:
    """Numbers, as many as more than one kernel of PyTorch needs; integers within their range."""
    numbers = torch.tensor(NUMBERS + (BEYOND if to.is_floating_point else BEYOND[2:]))
    numbers = numbers.to(source)
    if not (to.is_floating_point or to is torch.bool):
        info = torch.iinfo(to)
        fits = (numbers.isnan()) | ((numbers >= info.min) & (numbers <= min(info.max, 2**30)))
        numbers = numbers[fits]
    return numbers.repeat(5)


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_a_folded_cast_has_the_bits_of_one_at_run_time(
    source: torch.dtype, to: torch.dtype
) -> None:
    x = sources(source, to)
    if to is torch.bool:
        x = x[~x.isnan()]  # not documented
    (folded,) = graph_of(x, to, constant=True).run([])
    (computed,) = graph_of(x, to, constant=False).run([x])
    assert folded.dtype == computed.dtype == to
    wanted, is_nan = golden(x, to), x.isnan()
    for result in (folded, computed, x.npu().to(to).cpu()):
        got = bits(result)
        if to.is_floating_point:  # any NaN will do
            assert result.isnan().equal(is_nan)
            numbers = np.repeat(~is_nan.numpy(), to.itemsize)
            got, expected = got[numbers], wanted[numbers]
        else:
            expected = wanted
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("to", [torch.int8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_an_integer_of_nan_is_0(to: torch.dtype, strided: bool) -> None:
    x = torch.tensor([float("nan"), 1.5, -2.5]).npu()
    target = torch.full((6,), 9, dtype=to, device="npu")
    target = target[::2] if strided else target[:3]
    target.copy_(x)
    assert target.cpu().tolist() == x.to(to).cpu().tolist() == [0, 1, -2]
