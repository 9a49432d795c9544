"""A quantized, merged and prepared model: prompt and steps as graphs, beside the model eagerly.

The head size is that of a fused rotary embedding. The head is tied to the embedding, as in small
models: the one weight has to stay ND.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from support.hf_models import PADDED, PROMPT, ROOM, cached, model_of, prompt

transformers = pytest.importorskip("transformers")
torch_npu = pytest.importorskip("torch_npu")
import torchair  # noqa: E402

import lq_graph  # noqa: E402
from lq_graph.integrations.transformers import NAME, StaticCache  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LATER = 3
SIZES: dict[str, Any] = dict(
    hidden_size=128,
    head_dim=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.npu.config.allow_internal_format = True
    functorch: Any = torch._functorch.config
    allowed = {}
    if hasattr(functorch, "error_on_custom_op_aliasing"):
        allowed["error_on_custom_op_aliasing"] = False  # npu_apply_rotary_pos_emb
    with functorch.patch(allowed):
        yield
    torch.npu.config.allow_internal_format = False


def quantized(name: str, dtype: torch.dtype) -> Any:
    model = model_of(name, **SIZES).to(dtype)
    model.set_attn_implementation(NAME)
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    model = model.npu()
    lq_graph.merge(model, torch.arange(3, 8)[None].npu())
    report = lq_graph.use_internal_format_weight(model)
    (head,) = (one for one in report if one.name == "lm_head")
    assert "model.embed_tokens, no Linear, reads the weight too" in head.note
    assert torch_npu.get_npu_format(model.lm_head.weight) == 2
    return model


@torch.no_grad()
def logits(model: Any, batch: int, whole: Any, step: Any) -> tuple[Tensor, StaticCache]:
    """Of the last token of a prompt, and of later ones; the first row of two is padded."""
    made = StaticCache(model.config, ROOM)
    config = model.config
    made.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device
    )
    ids, mask = (t[2 - batch :].npu() for t in prompt())
    room = torch.ones(batch, ROOM, dtype=torch.int64).npu()
    room[:, :PROMPT] = mask
    given = {} if batch == 1 else {"attention_mask": room}
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for i in range(1 + LATER):
        queries = ids.shape[1]
        run = whole if queries > 1 else step
        first = 0 if i == 0 else PROMPT + i - 1
        out = run(
            input_ids=ids, position_ids=position, **given, **cached(model, made, first, queries)
        )
        found.append(out.logits[:, -1].float().cpu())
        position = position[:, -1:] + 1
        ids = torch.full((batch, 1), 9 + i).npu()
    return torch.stack(found), made


@cache
def _ge_first() -> None:
    """A process that ran npugraph_ex has no GE graphs afterwards: torchair registers twice."""
    torch.compile(torch.neg, backend=torchair.get_npu_backend())(torch.ones(2).npu())
    torch._dynamo.reset()


def compiled(model: Any, mode: str, names: list[str] | None = None) -> Any:
    """`names` gets the operators of the graph."""
    _ge_first()

    def note(module: Any, *_: Any) -> None:
        if names is not None:
            names.extend(str(node.target) for node in module.graph.nodes)

    options: dict[str, Any] = {}
    if mode == "npugraph_ex":
        if mode not in torch._dynamo.list_backends():
            pytest.skip("torch_npu has no npugraph_ex")
        options = {"options": {"post_grad_custom_post_pass": note}}
        backend: Any = mode
    else:
        config = torchair.CompilerConfig()
        if not hasattr(config, "post_grad_custom_post_pass"):
            pytest.skip("torchair runs no passes of others")
        config.post_grad_custom_post_pass = note
        backend = torchair.get_npu_backend(compiler_config=config)
    return torch.compile(model, backend=backend, dynamic=False, fullgraph=True, **options)


@pytest.mark.parametrize("mode", ["ge", "npugraph_ex"])
@pytest.mark.parametrize(
    ("name", "batch", "dtype"),
    [
        ("llama", 1, torch.float16),
        ("llama", 2, torch.bfloat16),
        ("qwen3", 2, torch.float16),
    ],
)
def test_prompt_and_steps(name: str, batch: int, dtype: torch.dtype, mode: str) -> None:
    model = quantized(name, dtype)
    want, eager = logits(model, batch, model, model)
    names: list[str] = []
    got, made = logits(model, batch, compiled(model, mode), compiled(model, mode, names))
    assert torch.cosine_similarity(got, want, dim=-1).min() >= 0.999
    real = slice(PADDED if batch == 2 else 0, PROMPT + LATER)  # of the first row
    for one, other in zip(made.layers, eager.layers, strict=True):
        for ours, theirs in ((one.keys, other.keys), (one.values, other.values)):
            ours, theirs = (t[:, :, real].float().flatten() for t in (ours, theirs))
            assert torch.cosine_similarity(ours, theirs, dim=0) >= 0.999
    calls = Counter(name.removesuffix(".default") for name in names)
    layers = model.config.num_hidden_layers
    assert calls["npu.npu_fused_infer_attention_score"] == layers
    if made.layers[0].is_paged:
        assert calls["npu.npu_scatter_pa_kv_cache_functional"] == layers
        assert calls["npu.scatter_update"] == 0
    assert calls["npu.npu_rms_norm"] == (2 * layers if name == "qwen3" else 0) + 1
    assert not calls["aten.rsqrt"] and not calls["aten.neg"]
