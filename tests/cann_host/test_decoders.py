"""Decoders of transformers, tiny, random and quantized: prefill and decode with a static cache give
in every mode what they give on the CPU, bit for bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchair
from torch import Tensor, nn

import cann_host
import lq_graph
from lq_graph.fusion.options import set_fusion
from lq_graph.fusion.passes import reports

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cann_host.is_active(), reason="needs cann_host in place of CANN"),
]

LENGTH, PROMPT, STEPS = 24, 7, 3  # positions of the cache, tokens of the prompt, calls
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "query_pre_attn_scalar": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},  # norms of queries and keys
    "Gemma2": SLIDING,  # soft caps, and two masks
    "Phi3": {},  # one projection for queries, keys and values
}


class Cache:
    """What attention calls: keys and values of every position, written in place."""

    def __init__(self, whole: list[tuple[Tensor, Tensor]], positions: Tensor) -> None:
        self.whole, self.positions = whole, positions

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        at = self.positions[:, None].expand_as(key)
        for whole, new in zip(self.whole[layer], (key, value), strict=True):
            whole.scatter_(2, at, new)
        return self.whole[layer]


class Decoder(nn.Module):
    """One step: (1, n) tokens and the position of the first -> (1, vocabulary) logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config
        parameters = inspect.signature(model.forward).parameters
        self.cache = "cache" if "cache" in parameters else "past_key_values"  # older transformers
        shape = (1, config.num_key_value_heads, LENGTH, config.head_dim)
        for layer in range(config.num_hidden_layers):
            for name in (f"keys_{layer}", f"values_{layer}"):
                self.register_buffer(name, torch.zeros(shape, dtype=model.dtype))

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        config = self.model.config
        whole = [
            (getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}"))
            for layer in range(config.num_hidden_layers)
        ]
        every = torch.arange(LENGTH, device=ids.device)
        at = position + torch.arange(ids.shape[1], device=ids.device)
        seen = every <= at[:, None]
        masks = {"full_attention": self._mask(seen)}
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            near = seen & (every > at[:, None] - config.sliding_window)
            masks["sliding_attention"] = self._mask(near)
        output = self.model(
            ids,
            attention_mask=masks if len(masks) > 1 else masks["full_attention"],
            position_ids=at[None],
            use_cache=True,
            **{self.cache: Cache(whole, at)},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _mask(self, seen: Tensor) -> Tensor:
        dtype = self.model.dtype
        return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


@torch.no_grad()
def generate(step: Callable[..., Tensor], device: str) -> Tensor:
    """Logits of the prompt's last token and of those that follow, (STEPS, vocabulary)."""
    ids, position, logits = torch.arange(5, 5 + PROMPT)[None], 0, []
    for _ in range(STEPS):
        logits.append(step(ids.to(device), torch.tensor([position], device=device)).cpu())
        position += ids.shape[1]
        ids = logits[-1].argmax(-1)[None]
    return torch.cat(logits)


def compiled(decoder: Decoder, mode: str) -> Callable[..., Tensor]:
    if mode == "eager":
        return decoder
    config = torchair.CompilerConfig()
    if mode == "captured":
        config.mode = "reduce-overhead"
    backend = torchair.get_npu_backend(compiler_config=config)
    return torch.compile(decoder, backend=backend, dynamic=mode == "dynamic", fullgraph=True)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    set_fusion()


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float16, attn_implementation="eager"
    ).eval()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    return model


@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, mode) for family in FAMILIES for mode in ("eager", "static", "captured")]
    + [("Llama", "dynamic")],
)
def test_generates_what_the_cpu_generates(family: str, mode: str) -> None:
    """Bit by bit, by the fusions that change no bit."""
    set_fusion(exact=True)
    decoder = Decoder(model_of(family))
    want = generate(copy.deepcopy(decoder), "cpu")
    assert want.isfinite().all() and not torch.equal(want[0], want[1])
    got = generate(compiled(decoder.npu(), mode), "npu")
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["static", "captured"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_step_is_close_to_the_cpu(family: str, mode: str) -> None:
    decoder = Decoder(model_of(family))
    ids, position = torch.arange(5, 5 + PROMPT)[None], torch.tensor([0])
    with torch.no_grad(), reports() as found:
        want = copy.deepcopy(decoder)(ids, position)
        got = compiled(decoder.npu(), mode)(ids.npu(), position.npu()).cpu()
    assert found[0].done("rms_norm") >= 2
    assert torch.cosine_similarity(got.float(), want.float(), -1).min() > 0.999


def test_the_cache_is_the_context() -> None:
    """The logits of a step are those of all tokens at once."""
    decoder = Decoder(model_of("Llama"))
    ids = torch.arange(5, 5 + PROMPT + 1)[None]
    with torch.no_grad():
        decoder(ids[:, :-1], torch.tensor([0]))
        got = decoder(ids[:, -1:], torch.tensor([PROMPT]))
        want = decoder.model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
