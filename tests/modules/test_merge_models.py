"""merge in unmodified models of transformers: what it finds, and the same logits."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torchair
from torch import Tensor, nn
from torch._functorch.compile_utils import fx_graph_cse

import cann_host
import lq_graph
from lq_graph import converters
from lq_graph.modules.fusion_options import FusionOptions, fusion
from support import has
from support.lowering import MATMUL

pytestmark = pytest.mark.skipif(not has.HAS_PASSES, reason="torchair has no register_replacement")

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
BERT = ("attention.self.query", "attention.self.key", "attention.self.value")
BERT_SIZES = {"num_key_value_heads": None, "type_vocab_size": 2}

# family, its own options, the groups of a layer, the names before a layer's number
FAMILIES: list[tuple[str, dict[str, Any], list[tuple[str, ...]], str]] = [
    ("Llama", {}, [ATTENTION, GATED], "model.layers"),
    ("Qwen3", {"head_dim": 16}, [ATTENTION, GATED], "model.layers"),
    ("Qwen2", {}, [ATTENTION, GATED], "model.layers"),  # q, k and v have biases
    ("Gemma2", {"head_dim": 16}, [ATTENTION, GATED], "model.layers"),
    ("Phi3", {}, [], "model.layers"),  # one projection for q, k and v, one for gate and up
    ("GPTNeoX", {}, [], "gpt_neox.layers"),  # one query_key_value
    ("Bert", BERT_SIZES, [BERT], "bert.encoder.layer"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.npu.config.allow_internal_format = True
    yield
    torch._dynamo.reset()


def ids(n: int = 7) -> Tensor:
    return torch.arange(5, 5 + n)[None]


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril()
        mask = torch.where(seen, 0.0, torch.finfo(torch.float16).min).half()[None, None]
        logits: Tensor = self.model(tokens, attention_mask=mask).logits
        return logits


def quantized(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {key: value for key, value in {**SIZES, **options}.items() if value is not None}
    configuration = getattr(transformers, f"{family}Config")(**settings)
    kind = "AutoModelForMaskedLM" if family == "Bert" else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_config(configuration).half().eval()
    model.config.use_cache = False
    linears = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    lq_graph.quantize(model, dict.fromkeys(linears, lq_graph.A8W8Dynamic()))  # the head too
    return Logits(model)


@pytest.mark.parametrize(("family", "options", "groups", "prefix"), FAMILIES)
def test_groups_and_logits(
    family: str, options: dict[str, Any], groups: list[tuple[str, ...]], prefix: str
) -> None:
    plain = quantized(family, **options)
    model = copy.deepcopy(plain)
    report = lq_graph.merge(model, ids())
    assert [group.names for group in report] == [
        tuple(f"model.{prefix}.{layer}.{name}" for name in names)
        for layer in range(2)
        for names in groups
    ]
    assert not report.left_alone
    with torch.no_grad():
        for n in (7, 1):
            assert torch.equal(model(ids(n)), plain(ids(n)))
    state, want = model.state_dict(), plain.state_dict()
    assert list(state) == list(want) and all(torch.equal(state[n], want[n]) for n in want)


def test_generated_text_with_a_cache() -> None:
    plain = quantized("Llama").model
    model = copy.deepcopy(plain)
    lq_graph.merge(model, ids())
    texts = [
        each.generate(ids(), max_new_tokens=6, do_sample=False, use_cache=True)
        for each in (plain, model)
    ]
    assert torch.equal(*texts)


@pytest.mark.slow
@pytest.mark.skipif(not cann_host.is_active(), reason="needs cann_host in place of CANN")
@pytest.mark.parametrize(
    ("family", "mode"),
    [("Llama", "ge"), ("Qwen3", "ge"), ("Llama", "captured")],
)
def test_products_of_a_decoder_layer(family: str, mode: str) -> None:
    """quantize, merge, prepare, torch.compile."""
    plain = quantized(family, num_hidden_layers=1, head_dim=16)
    model = copy.deepcopy(plain)
    lq_graph.merge(model, ids())
    lq_graph.use_internal_format_weight(model.npu())
    config = torchair.CompilerConfig()
    seen: list[Counter[str]] = []

    def one_of_equals(module: Any, *_: Any) -> None:
        module.graph = fx_graph_cse(module.graph)
        module.recompile()
        seen.append(Counter(str(node.target) for node in module.graph.nodes))

    config.post_grad_custom_pre_pass = one_of_equals
    if mode == "captured":
        config.mode = "reduce-overhead"
    backend = torchair.get_npu_backend(compiler_config=config)
    step = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    capture = nullcontext([]) if mode == "captured" else converters.graph.capture(config)
    with torch.no_grad(), capture as graphs, fusion(FusionOptions(exact=True)):
        got = step(ids().npu()).cpu()
    assert torch.equal(got, plain.npu()(ids().npu()).cpu())
    (nodes,) = seen
    # q, k and v; o; gate and up; down; the head
    assert nodes["lq_graph.linear_quant.default"] == 5
    assert nodes["lq_graph.dynamic_quant.default"] == 5
    assert nodes["aten.split_with_sizes.default"] == 2
    for graph in graphs:
        assert Counter(graph.ops())[MATMUL] == 5
