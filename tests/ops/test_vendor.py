"""The vendor's module and ours side by side, on the real torch_npu and torchair: the three
documented examples with only the import changed, eager kernels, and the vendor's meta kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch_npu
import torchair as tng
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_npu.contrib.module import LinearQuant as VendorLinearQuant

import lq_graph
from support import cases
from support.cases import ALL_CASES, F16, F32, I8, I32, I64, ROW_CASES, Case

BOTH = pytest.mark.parametrize(
    "LinearQuant", [VendorLinearQuant, lq_graph.LinearQuant], ids=["vendor", "lq_graph"]
)


def golden_of(layer: torch.nn.Module, x1: torch.Tensor, output: torch.dtype) -> np.ndarray:
    inputs = {name: getattr(layer, name) for name in ("weight", "scale", "offset", "bias")}
    return cases.expected(
        {"x1": x1, **inputs, "pertoken_scale": layer.pertoken_scale, "output_dtype": output}
    )


@BOTH
def test_example_eager_int8(LinearQuant) -> None:
    torch.manual_seed(0)
    x1 = torch.randint(-1, 1, (1, 512), dtype=I8).npu()
    x2 = torch.randint(-1, 1, (128, 512), dtype=I8).npu()
    scale = torch.randn(1, dtype=F32).npu()
    offset = torch.randn(128, dtype=F32).npu()
    bias = torch.randint(-1, 1, (128,), dtype=I32).npu()
    model = LinearQuant(512, 128, bias=True, offset=True)
    model = model.npu()
    model.weight.data = x2
    model.scale.data = scale
    model.offset.data = offset
    model.bias.data = bias
    output = model(x1)
    assert output.shape == (1, 128)
    np.testing.assert_array_equal(output.cpu().numpy(), golden_of(model, x1, I8))


@BOTH
def test_example_eager_int4(LinearQuant) -> None:
    torch.manual_seed(0)
    x1 = torch.randint(-1, 1, (1, 64), dtype=I32).npu()
    x2 = torch.randint(-1, 1, (128, 64), dtype=I32).npu()
    scale = torch.randn(1, dtype=F32).npu()
    bias = torch.randint(-1, 1, (128,), dtype=I32).npu()
    model = LinearQuant(512, 128, bias=True, offset=False, output_dtype=F16)
    model = model.npu()
    model.weight.data = x2
    model.scale.data = scale
    model.bias.data = bias
    output = model(x1)
    assert output.shape == (1, 128)
    np.testing.assert_array_equal(output.cpu().numpy(), golden_of(model, x1, F16))


@BOTH
def test_example_graph_mode(LinearQuant) -> None:
    torch._dynamo.reset()
    torch.npu.config.allow_internal_format = True
    config = tng.CompilerConfig()
    npu_backend = tng.get_npu_backend(compiler_config=config)
    torch.manual_seed(0)
    x1 = torch.randint(-1, 1, (1, 512), dtype=I8).npu()
    x2 = torch.randint(-1, 1, (128, 512), dtype=I8).npu()
    model = LinearQuant(512, 128, bias=True, offset=True)
    model = model.npu()
    model.weight.data = x2
    model.scale.data = torch.randn(1, dtype=F32).npu()
    model.offset.data = torch.randn(1, dtype=F32).npu()
    model.bias.data = torch.randint(-1, 1, (128,), dtype=I32).npu()
    expected = golden_of(model, x1, I8)
    tng.experimental.inference.use_internal_format_weight(model)
    model = torch.compile(model, backend=npu_backend, dynamic=False)
    output = model(x1)
    np.testing.assert_array_equal(output.cpu().numpy(), expected)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_npu_kernel_equals_golden(case: Case) -> None:
    inputs = cases.make(case)
    out = lq_graph.linear_quant(**cases.on("npu", inputs))
    assert out.device.type == "npu"
    cases.assert_equal(out, inputs)


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_meta_agrees_with_the_vendors_meta_kernel(case: Case) -> None:
    inputs = cases.make(case)
    ours = lq_graph.linear_quant(**cases.on("meta", inputs))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            k: mode.from_tensor(v.npu()) if torch.is_tensor(v) else v for k, v in inputs.items()
        }
        x1, weight, scale = (fake.pop(name) for name in ("x1", "weight", "scale"))
        try:
            theirs = torch_npu.npu_quant_matmul(x1, weight.transpose(-1, -2), scale, **fake)
        except RuntimeError as error:
            if "output_dtype must be float16" not in str(error):
                raise
            pytest.skip("the meta kernel of this torch_npu takes no bfloat16 output of int4")
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("round_mode", [0, 1])
@pytest.mark.parametrize("with_offset", [False, True])
def test_trans_quant_param_on_npu_equals_cpu(with_offset: bool, round_mode: int) -> None:
    scale = torch.randn(64)
    offset = torch.randn(64) * 200 if with_offset else None
    want = lq_graph.trans_quant_param(scale, offset, round_mode)
    moved = None if offset is None else offset.npu()
    assert torch.equal(lq_graph.trans_quant_param(scale.npu(), moved, round_mode).cpu(), want)
    assert torch.equal(torch_npu.npu_trans_quant_param(scale.npu(), moved, round_mode).cpu(), want)
    assert want.dtype == I64
