"""The kernels that a forecast adds up are those that `explain` finds in GE graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import cann_host
import lq_graph
from lq_graph.forecast import kernel_cost
from lq_graph.forecast.decoders import read_decoder
from lq_graph.forecast.kernels import FUSIONS, Kernel, Shape, step_kernels
from lq_graph.forecast.model import step_of
from lq_graph.integrations.transformers import StaticCache
from lq_graph.rules.chips import chip_of

CACHE = 128
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 200,
    "num_hidden_layers": 2,
}
SCHEMES = {"w8a8": lq_graph.A8W8Dynamic, "w4a4": lq_graph.A4W4Dynamic}

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


class Step(nn.Module):
    """One decode step of a quantized model, its cache written in place."""

    def __init__(self, kind: str, quant: str) -> None:
        super().__init__()
        config = getattr(transformers, f"{kind}Config")(**SIZES, attn_implementation="lq_graph")
        self.model = getattr(transformers, f"{kind}ForCausalLM")(config).half().eval()
        lq_graph.quantize(self.model.requires_grad_(False), SCHEMES[quant]())
        self.cache = StaticCache(config, CACHE)

    def forward(self, token: Tensor) -> Tensor:
        logits: Tensor = self.model(token, past_key_values=self.cache, use_cache=True).logits
        return logits


def counted(kernels: list[Kernel]) -> Counter[str]:
    return Counter({op: n for op, n in _times(kernels).items() if n})


def _times(kernels: list[Kernel]) -> Counter[str]:
    found: Counter[str] = Counter()
    for kernel in kernels:
        found[kernel.op] += kernel.times
    return found


def launches(graphs: tuple[Any, ...]) -> Counter[str]:
    """Of the graphs of a whole model. The Transpose of the head's float weight is left out: the
    forecast takes the product to read a transposed weight."""
    found = Counter(node.op for graph in graphs for node in graph.launches)
    assert found.pop("Transpose") == 1
    return found


def seconds(graphs: tuple[Any, ...]) -> float:
    """The kernels of GE graphs by their own tensors, as explain's page has them."""
    found = 0.0
    for node in (node for graph in graphs for node in graph.launches):
        if node.op != "Transpose":
            inputs, outputs = (
                [(e.dtype, e.shape) for e in es] for es in (node.inputs, node.outputs)
            )
            cost = kernel_cost(node.op, inputs, outputs, "A2", attributes=node.attrs)
            found += cost.seconds
    return found


@pytest.mark.parametrize(
    ("kind", "quant"),
    [
        ("Llama", "w8a8"),
        ("Qwen3", "w8a8"),
        pytest.param("Qwen2", "w8a8", marks=pytest.mark.slow),
        pytest.param("Llama", "w4a4", marks=pytest.mark.slow),
    ],
)
def test_a_decode_step_has_the_kernels_that_explain_finds(kind: str, quant: str) -> None:
    model = Step(kind, quant)
    config = {**model.model.config.to_dict(), "sliding_window": None}
    told = lq_graph.explain(model, torch.tensor([[7]]))
    decoder, shape = read_decoder(config), Shape(1, 1, CACHE)
    assert counted(step_kernels(decoder, shape, quant, FUSIONS)) == launches(told.graphs)
    assert counted(step_kernels(decoder, shape, quant, ())) == launches(told.unfused)
    for graphs, fusions in ((told.graphs, FUSIONS), (told.unfused, ())):
        step = step_of(decoder, shape, quant, chip_of("A2"), fusions)
        assert seconds(graphs) == pytest.approx(step.seconds, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("off", [one for one in FUSIONS if one != "merge"])
def test_without_a_fusion_too(off: str) -> None:
    step = Step("Llama", "w8a8")
    lq_graph.set_fusion(off=[off])
    try:
        told = lq_graph.explain(step, torch.tensor([[7]]))
    finally:
        lq_graph.set_fusion()
    rest = [one for one in FUSIONS if one != off]
    decoder = read_decoder(step.model.config.to_dict())
    assert counted(step_kernels(decoder, Shape(1, 1, CACHE), "w8a8", rest)) == launches(told.graphs)


@pytest.mark.parametrize(
    ("model", "quant", "fused", "unfused"),
    [
        # docs/decoder.md; float layers are not merged, and not fused by themselves
        ("llama-3.1-8b", "w8a8", 12, 59),
        ("qwen3-8b", "w8a8", 14, 79),
        ("qwen2.5-7b", "w8a8", 12, 59),
        ("llama-3.1-8b", "w4a4", 15, 59),
        ("llama-3.1-8b", "bf16", 16, 52),
    ],
)
def test_kernels_of_a_layer(model: str, quant: str, fused: int, unfused: int) -> None:
    for fusions, expected in ((FUSIONS, fused), ((), unfused)):
        kernels = step_kernels(read_decoder(model), Shape(1, 1, 4096), quant, fusions)
        assert len([kernel for kernel in kernels if kernel.in_layer]) == expected


def test_devices_share_the_layer() -> None:
    """Qwen3-32B on 16 dies: the sizes that a published profile has."""
    kernels = step_kernels(read_decoder("qwen3-32b"), Shape(16, 1, 4096, tp=16), "w8a8")
    products = [one for one in kernels if one.op == "QuantBatchMatmulV3"]
    shapes = {one.role: (one.inputs[0][1], one.outputs[0][1]) for one in products}
    assert shapes == {
        "qkv_proj": ((16, 5120), (16, 768)),
        "o_proj": ((16, 512), (16, 5120)),
        "gate_up_proj": ((16, 5120), (16, 3200)),
        "down_proj": ((16, 1600), (16, 5120)),
    }
    (head,) = [one for one in kernels if one.role == "lm_head"]
    assert head.inputs[1] == ("bfloat16", (9496, 5120))
    sums = [one for one in kernels if one.op == "allReduce"]
    assert sum(one.times for one in sums) == 2 * 64
    assert {one.message for one in sums} == {163_840}
    (gather,) = [one for one in kernels if one.op == "allGather"]
    assert gather.message == 16 * 9496 * 2


def test_a_prompt_computes_the_head_of_its_last_token() -> None:
    kernels = step_kernels(read_decoder("qwen3-8b"), Shape(2, 100, 100), "w8a8")
    (head,) = [one for one in kernels if one.role == "lm_head"]
    assert head.inputs[0][1] == (2, 4096)
    (attention,) = {one.inputs for one in kernels if one.role == "attention"}
    assert attention[0] == ("bfloat16", (2, 100, 32, 128))
    assert attention[1] == ("bfloat16", (2, 100, 8, 128))
    assert [one.op for one in kernels if one.role == "cache"] == ["Scatter", "Scatter"]
