"""A real model end to end: all-MiniLM-L6-v2 through quantize, torchair and cann_host."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchair
from torch import Tensor, nn

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, QuantizedLinear, converters
from support.programs import module_of

pytestmark = pytest.mark.slow

LAYERS = 37  # 6 blocks of 6, and the pooler
BLOCKS = 6  # of attention


@pytest.fixture(scope="module")
def minilm() -> Any:
    """The example, as a module."""
    yield module_of("examples/minilm.py")
    torch.npu.config.allow_internal_format = False  # it has no getter


@pytest.fixture(scope="module")
def loaded(minilm: Any) -> Any:
    return minilm.load()


class Recorder(nn.Module):
    """Returns, beside the model's result, input and output of every quantized layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        self.seen: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            layer.register_forward_hook(lambda _, args, out: self.seen.append((args[0], out)))

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        self.seen = []
        hidden = self.model(**inputs).last_hidden_state
        return hidden, list(self.seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [A8W8Dynamic(), A8W8Static(), A4W4Dynamic()], ids=repr)
def test_every_layer_in_the_graph_is_the_eager_one(
    config: Any, dtype: torch.dtype, minilm: Any, loaded: Any
) -> None:
    float_model, tokenizer = loaded
    inputs = minilm.encode(tokenizer, [question for question, _ in minilm.PAIRS[:4]])
    model = copy.deepcopy(float_model).to(dtype)
    report = lq_graph.quantize(model, config, [inputs] if config == A8W8Static() else None)
    assert sum(layer.changed for layer in report) == len(report) == LAYERS
    on_cpu = copy.deepcopy(model)
    model.npu()
    lq_graph.use_internal_format_weight(model)

    torch._dynamo.reset()
    compiler = torchair.CompilerConfig()
    backend = torchair.get_npu_backend(compiler_config=compiler)
    recorder = Recorder(model)
    compiled = torch.compile(recorder, backend=backend, dynamic=False, fullgraph=True)
    on_npu = {name: tensor.npu() for name, tensor in inputs.items()}
    with converters.graph.capture(compiler) as graphs, torch.no_grad():
        _, seen = compiled(on_npu)
    assert len(seen) == LAYERS

    cpu_layers = [m for m in on_cpu.modules() if isinstance(m, QuantizedLinear)]
    with torch.no_grad():
        for npu_layer, cpu_layer, (x, out) in zip(recorder.layers, cpu_layers, seen, strict=True):
            assert torch.equal(npu_layer(x).cpu(), out.cpu())
            assert torch.equal(cpu_layer(x.cpu()), out.cpu())

    ops = graphs[0].ops()
    assert ops.count("QuantBatchMatmulV3") == LAYERS and "MatMulV2" not in ops
    static = config == A8W8Static()
    # query, key and value of a block share one quantization: their static scales are equal
    assert ops.count("AscendQuantV2" if static else "DynamicQuant") == LAYERS - 2 * BLOCKS
    int4 = config == A4W4Dynamic()
    assert ops.count("Bitcast") == (LAYERS if int4 else 0)  # the weights', none for activations


def test_the_example_prints_its_result(minilm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    minilm.main()  # leaves with an error where a figure is not good enough
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {" ".join(line[:2]): line for line in lines if len(line) > 12}
    for scheme, least in (("A8W8 dynamic", 0.99), ("A8W8 static", 0.98)):
        assert float(rows[scheme][2]) >= least
        top1, found, quantized = rows[scheme][4:7], rows[scheme][10], rows[scheme][12:15]
        assert (top1, found, quantized) == (["12", "of", "12"], "12/12", ["37", "of", "37"])
    assert 0.5 < float(rows["A4W4 dynamic"][2]) < 0.99


def test_compare_finds_the_layer_that_hurts_int4(minilm: Any, loaded: Any) -> None:
    float_model, tokenizer = loaded
    inputs = minilm.encode(tokenizer, [answer for _, answer in minilm.PAIRS])

    def error(left_float: list[str]) -> Any:
        model = copy.deepcopy(float_model)
        lq_graph.quantize(model, A4W4Dynamic(), filter_fn=lambda _, name: name not in left_float)
        return lq_graph.compare(float_model, model, [inputs], sensitivity=not left_float)

    every = sorted(error([]), key=lambda layer: layer.severity)
    best, worst = ([layer.name for layer in some] for some in (every[:3], every[-3:]))
    # three of 37 layers left float: the three it says hurt most give far more back
    assert error(worst).output.cosine > error(best).output.cosine + 0.05
