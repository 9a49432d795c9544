"""Scales of static layers that are written after the layers were made: graphs read the new ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

import cann_host
import lq_graph
from support.eager import F16
from support.fusing import run
from support.has import need_converter, need_operator
from support.static_models import Mlp, inputs_of, model_of

pytestmark = [
    pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
    pytest.mark.filterwarnings("ignore"),
]
SWIGLU, QUANT = "npu.npu_dequant_swiglu_quant.default", "lq_graph.static_quant.default"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    need_operator("npu_dequant_swiglu_quant")
    need_converter("npu_dequant_swiglu_quant")
    torch.npu.config.allow_internal_format = True


def packed(model: Any, factor: float) -> Tensor:
    return lq_graph.trans_quant_param(model.gate.linear.merged._unpacked_scale * factor)


# how a scale is written, so that the module does not hear of it
WRITES = {
    "scale.copy_": lambda m: m.gate.linear.merged.scale.copy_(packed(m, 1.5)),
    "scale.data.copy_": lambda m: m.gate.linear.merged.scale.data.copy_(packed(m, 1.5)),
    "scale.data =": lambda m: setattr(m.gate.linear.merged.scale, "data", packed(m, 1.5)),
    "input_scale.mul_": lambda m: m.down.input_scale.mul_(1.5),
    "input_scale.data.mul_": lambda m: m.down.input_scale.data.mul_(1.5),
    "all input_scale": lambda m: [
        each.input_scale.data.mul_(1.5) for each in (m.gate, m.up, m.down)
    ],
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_a_graph_reads_what_was_written_before_it(write: Any) -> None:
    _, model = model_of(Mlp, F16)
    x, _ = inputs_of(F16)
    with torch.no_grad():
        before = model(x.npu()).cpu()
        write(model)
        fused = run(model, "GE", x)
        for layer in (model.gate, model.up, model.down):
            layer.input_scale = layer.input_scale.clone()
        want = model(x.npu()).cpu()  # by the packed scale itself
    assert fused.report.done("swiglu") == 1
    scale = float(want.abs().max())
    assert (fused.results - want).abs().max() < 0.05 * scale < (want - before).abs().max()


@pytest.mark.parametrize(("name", "change"), [("input_scale", 1.5), ("input_offset", 5.0)])
def test_one_quantizer_changes_after_the_merge(name: str, change: float) -> None:
    """It quantizes for itself; and the other layers' numbers, which were the same tensors, stay."""
    plain, model = model_of(Mlp, F16)
    x, _ = inputs_of(F16)
    held = model.gate._scale, model.gate._zero_point
    kept = [tensor.clone() for tensor in held]
    with torch.no_grad():
        for each in (plain, model):
            tensor = getattr(each.up, name)
            tensor.copy_(tensor * change if name == "input_scale" else tensor + change)
    fused = run(model, "GE", x)
    assert fused.names.count(QUANT) == 3 and SWIGLU not in fused.kernels
    assert torch.equal(fused.results, plain(x))
    assert all(torch.equal(one, other) for one, other in zip(held, kept, strict=True))


def test_a_scale_that_is_computed_is_read() -> None:
    """By torch's parametrizations: the layer has no packed scale of its own."""
    _, model = model_of(Mlp, F16)
    merged = model.gate.linear.merged
    larger = packed(model, 1.5)

    class Larger(nn.Module):
        def forward(self, scale: Tensor) -> Tensor:
            return torch.where(scale != 0, larger, scale)

    nn.utils.parametrize.register_parametrization(merged, "scale", Larger(), unsafe=True)
    x, _ = inputs_of(F16)
    with torch.no_grad():
        want = model(x.npu()).cpu()
    fused = run(model, "GE", x)
    assert SWIGLU not in fused.kernels
    assert (fused.results - want).abs().max() < 0.02 * want.abs().max()


def test_a_copy_made_in_inference_mode_is_replaced() -> None:
    _, model = model_of(Mlp, F16)
    larger = packed(model, 1.5)
    with torch.inference_mode():
        model = model.cpu().npu()
    merged = model.gate.linear.merged
    merged.scale = nn.Parameter(larger, False)
    assert torch.equal(lq_graph.trans_quant_param(merged._unpacked_scale), larger)
