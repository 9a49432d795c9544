"""Models of transformers with attn_implementation="lq_graph" and our cache, beside transformers'
own eager attention in float32 on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from support.hf_models import MODELS, PROMPT, ROOM, cached, greedy, model_of, prompt

transformers = pytest.importorskip("transformers")
torch_npu = pytest.importorskip("torch_npu")
import torchair  # noqa: E402

from lq_graph.converters import graph  # noqa: E402
from lq_graph.integrations import attention as attention_module  # noqa: E402
from lq_graph.integrations import cache as cache_module  # noqa: E402
from lq_graph.integrations.transformers import NAME, StaticCache  # noqa: E402

FP16 = torch.float16


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    attention_module._said.clear()
    functorch: Any = torch._functorch.config
    allowed = {}
    if hasattr(functorch, "error_on_custom_op_aliasing"):
        # npugraph_ex: the operator returns what it writes into. torch refuses that where CI is set
        allowed["error_on_custom_op_aliasing"] = False
    with functorch.patch(allowed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # names of older transformers
        yield


@cache
def wanted(name: str) -> tuple[Tensor, Tensor]:
    """Tokens and logits of transformers, with its own cache."""
    model = model_of(name).half().float()
    return greedy(model, transformers.DynamicCache(config=model.config))


def ours(name: str, device: str = "npu", dtype: torch.dtype = FP16) -> Any:
    model = model_of(name).to(dtype)
    model.set_attn_implementation(NAME)
    return model.to(device)


def early(model: Any, positions: int = ROOM, batch: int = 2) -> StaticCache:
    config = model.config
    made = StaticCache(config, positions)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made.early_initialization(
        batch, config.num_key_value_heads, size, model.dtype, next(model.parameters()).device
    )
    return made


def assert_close(got: tuple[Tensor, Tensor], name: str) -> None:
    tokens, logits = wanted(name)
    assert torch.equal(got[0], tokens)
    assert torch.cosine_similarity(got[1], logits, dim=-1).min() >= 0.9999
    assert (got[1] - logits).abs().max() <= 0.01 * logits.abs().max()


@cache
def _ge_first() -> None:
    """A process that ran npugraph_ex has no GE graphs afterwards: torchair registers twice."""
    torch.compile(torch.neg, backend=torchair.get_npu_backend())(torch.ones(2).npu())
    torch._dynamo.reset()


def compiled(model: Any, mode: str, config: Any = None) -> Any:
    _ge_first()
    backend: Any = mode
    if mode == "ge" or mode not in torch._dynamo.list_backends():
        config = config or torchair.CompilerConfig()
        if mode != "ge":
            config.mode = "reduce-overhead"  # its name in older versions
        backend = torchair.get_npu_backend(compiler_config=config)
    return torch.compile(model, backend=backend, dynamic=False, fullgraph=True)


# ---- numbers ----


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("name", MODELS)
def test_eager_writes_the_same_text(name: str, device: str) -> None:
    model = ours(name, device)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        assert_close(greedy(model, StaticCache(model.config, ROOM)), name)
    said = [str(one.message) for one in told if "attn_implementation" in str(one.message)]
    assert len(said) == (name == "gemma2" and device == "npu"), said


@pytest.mark.filterwarnings("ignore:attn_implementation")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_with_the_cache_of_transformers(name: str) -> None:
    model = ours(name)
    assert_close(greedy(model, transformers.DynamicCache(config=model.config)), name)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_our_cache_with_eager_attention(name: str) -> None:
    model = model_of(name).half().npu()
    assert_close(greedy(model, StaticCache(model.config, ROOM)), name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["ge", "npugraph_ex"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_write_the_same_text(name: str, mode: str) -> None:
    model = ours(name)
    later = compiled(model, mode)
    assert_close(greedy(model, StaticCache(model.config, ROOM), later=later), name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("mode", ["ge", "npugraph_ex"])
def test_prompt_as_a_graph(mode: str, is_early: bool) -> None:
    model = ours("qwen3")
    step = compiled(model, mode)
    made = early(model) if is_early else StaticCache(model.config, ROOM)
    ids, mask = prompt()
    room = torch.zeros(2, ROOM, dtype=torch.int64)
    room[:, :PROMPT] = mask
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = step(
            input_ids=ids.npu(), attention_mask=room.npu(), position_ids=position.npu(),
            **cached(model, made, 0, PROMPT),
        ).logits[:, -1]  # fmt: skip
    want = wanted("qwen3")[1][0]
    assert torch.cosine_similarity(logits.float().cpu(), want, dim=-1).min() >= 0.9999
    assert made.get_seq_length() == PROMPT


# ---- the graph ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_step_of_a_layer_is_three_operators_and_one_graph(name: str) -> None:
    model, config = ours(name), torchair.CompilerConfig()
    later = compiled(model, "ge", config)
    with graph.capture(config) as graphs:
        greedy(model, early(model), later=later)
    assert len(graphs) == 1  # no position compiles again
    (step,) = graphs
    ops = step.ops()
    layers = model.config.num_hidden_layers
    assert ops.count("FusedInferAttentionScore") == layers
    is_one = has_cache_mode()
    assert ops.count("ScatterPaKvCache") == is_one * layers
    assert ops.count("Scatter") == (not is_one) * 2 * layers
    assert ops.count("LogicalNot") == 1  # of the mask
    assert not {"TensorMove", "SoftmaxV2"} & {*ops}
    by_name = {node.name: node for node in step.nodes}
    slots: set[str] = set()
    for node in step.compute:
        if node.op != "FusedInferAttentionScore":
            continue
        query, key, value, mask = node.inputs
        assert _reached(by_name, query.source) == "Add"  # the rotary embedding
        assert mask.dtype == "bool"
        keys, values = (by_name[edge.source] for edge in (key, value))
        if is_one:
            assert keys == values and keys.op == "ScatterPaKvCache"
            written = keys.inputs[0], keys.inputs[3]
            slots.add(keys.inputs[2].source)
        else:
            assert keys.op == values.op == "Scatter"
            written = keys.inputs[2], values.inputs[2]
            slots.add(keys.inputs[1].source)
        assert _reached(by_name, written[0].source) in ("Add", "SelectV2")
        assert _reached(by_name, written[1].source) in ("BatchMatMul", "MatMulV2")
        after = {
            _first_kernel(step, other)
            for other in step.compute
            if any(edge.source == node.name for edge in other.inputs)
        }
        assert after <= {"BatchMatMul", "MatMulV2"}, after
    assert len(slots) == 1  # computed once for all layers
    masks = {
        node.inputs[3].source for node in step.compute if node.op == "FusedInferAttentionScore"
    }
    assert len(masks) == 1


def has_cache_mode() -> bool:
    """Whether torch_npu's npu_scatter_pa_kv_cache writes pages that are not NZ blocks."""
    operator = getattr(torch.ops.npu, "npu_scatter_pa_kv_cache_functional", None)
    return operator is not None and "cache_mode" in str(operator.default._schema)


def _reached(nodes: dict[str, Any], name: str) -> str:
    """The op that computes a tensor: a Reshape of contiguous memory is no kernel."""
    while nodes[name].op in ("Reshape", "Unsqueeze", "Squeeze"):
        name = nodes[name].inputs[0].source
    return str(nodes[name].op)


def _first_kernel(step: Any, node: Any) -> str:
    while node.op in ("Reshape", "Unsqueeze", "Squeeze"):
        node = next(n for n in step.compute if any(e.source == node.name for e in n.inputs))
    return str(node.op)


# ---- generate ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_with_a_graph(name: str) -> None:
    """transformers makes the masks before the graph, which they enter."""
    model, config = ours(name), torchair.CompilerConfig()
    eager = model.forward
    later = compiled(model.forward, "ge", config)
    model.forward = lambda input_ids=None, **kwargs: (later if input_ids.shape[1] == 1 else eager)(
        input_ids=input_ids, **kwargs
    )
    model._validate_model_kwargs = lambda _: None  # it reads forward's signature
    ids, mask = prompt()
    made = StaticCache(model.config, ROOM)
    with graph.capture(config) as graphs:
        text = model.generate(
            input_ids=ids.npu(), attention_mask=mask.npu(), past_key_values=made,
            max_new_tokens=4, do_sample=False, eos_token_id=-1,
        )  # fmt: skip
    assert torch.equal(text[:, PROMPT:].cpu().T, wanted(name)[0])
    assert len(graphs) == 1
    layers = model.config.num_hidden_layers
    assert graphs[0].ops().count("FusedInferAttentionScore") == layers


@pytest.mark.filterwarnings("ignore")
def test_generate() -> None:
    model = ours("llama")
    ids, mask = prompt()
    made = StaticCache(model.config, ROOM)
    text = model.generate(
        input_ids=ids.npu(), attention_mask=mask.npu(), past_key_values=made, max_new_tokens=4,
        do_sample=False, eos_token_id=-1,
    )  # fmt: skip
    assert torch.equal(text[:, PROMPT:].cpu().T, wanted("llama")[0])


@pytest.mark.filterwarnings("ignore")
def test_generate_stops_at_the_end_of_the_cache() -> None:
    model = ours("llama")
    ids, mask = prompt()
    made = StaticCache(model.config, PROMPT + 2)
    with pytest.raises(ValueError, match=r"has 9 positions; 9 are written and 1 more do not fit"):
        model.generate(
            input_ids=ids.npu(), attention_mask=mask.npu(), past_key_values=made,
            max_new_tokens=9, do_sample=False, eos_token_id=-1,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["ge", "npugraph_ex"])
def test_a_graph_beyond_the_end_gives_nan_and_writes_nothing_outside(mode: str) -> None:
    model = ours("gemma3")  # its first layer sees 4 positions only
    later = compiled(model, mode)
    made = StaticCache(model.config, PROMPT + 1)
    position = torch.full((2, 1), PROMPT).npu()
    mask = torch.ones(2, PROMPT + 1, dtype=torch.int64).npu()
    whole, last = cached(model, made, 0, PROMPT), cached(model, made, PROMPT, 1)
    ids, _ = prompt()
    with torch.no_grad():
        model(input_ids=ids.npu(), attention_mask=mask, **whole)
        one = torch.full((2, 1), 5).npu()
        finite = [
            later(input_ids=one, attention_mask=mask, position_ids=position, **last)
            .logits.isfinite()
            .any()
            .item()
            for _ in range(8)
        ]
    assert finite == [True] + [False] * 7
    with pytest.raises(ValueError, match="do not fit"):
        model(input_ids=one, attention_mask=mask, **last)
    made.reset()
    with torch.no_grad():
        logits = model(input_ids=ids.npu(), attention_mask=mask, **whole).logits
    assert bool(logits.isfinite().all())


# ---- the cache ----


def small() -> tuple[Any, StaticCache]:
    model = ours("llama")
    return model, StaticCache(model.config, ROOM)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, made: Any) -> Tensor:
    queries = ids.shape[1]
    given = cached(model, made, int(made.get_seq_length()), queries)
    out: Tensor = model(input_ids=ids.npu(), use_cache=True, **given).logits[:, -1]
    return out.cpu()


def test_chunks_and_crop_and_reset() -> None:
    model, made = small()
    ids = prompt()[0]
    whole = logits_of(model, ids, made)
    made.crop(-3)
    assert made.get_seq_length() == PROMPT - 3
    torch.testing.assert_close(logits_of(model, ids[:, -3:], made), whole, atol=2e-3, rtol=0)
    keys = made.layers[0].keys
    made.reset()
    assert made.get_seq_length() == 0
    assert torch.equal(logits_of(model, ids, made), whole)
    assert made.layers[0].keys.data_ptr() == keys.data_ptr()  # graphs have its address


def test_rows_are_reordered_in_place() -> None:
    model, made = small()
    ids = prompt()[0]
    logits_of(model, ids, made)
    keys = made.layers[1].keys
    before = keys.clone()
    made.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(keys.cpu(), before[[1, 1]].cpu())
    other = StaticCache(model.config, ROOM)
    logits_of(model, ids[[1, 1]], other)
    one = torch.full((2, 1), 9)
    assert torch.equal(logits_of(model, one, made), logits_of(model, one, other))


def test_copies_are_independent() -> None:
    model, made = small()
    ids = prompt()[0]
    logits_of(model, ids, made)
    twin = copy.deepcopy(made)
    logits_of(model, torch.full((2, 1), 9), twin)
    assert (int(made.get_seq_length()), int(twin.get_seq_length())) == (PROMPT, PROMPT + 1)


def test_a_prompt_that_does_not_fit() -> None:
    model, _ = small()
    with pytest.raises(ValueError, match="has 5 positions; 0 are written and 7 more do not fit"):
        logits_of(model, prompt()[0], StaticCache(model.config, 5))


def test_another_batch() -> None:
    model, made = small()
    logits_of(model, prompt()[0], made)
    with pytest.raises(ValueError, match="cache has a batch of 2, and the step of 1"):
        logits_of(model, prompt()[0][:1], made)


def test_a_step_that_did_not_reach_the_last_layer() -> None:
    model, made = small()
    last = model.model.layers[1]
    hook = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of(model, prompt()[0], made)
    hook.remove()
    with pytest.raises(RuntimeError, match="did not reach the last layer"):
        logits_of(model, prompt()[0], made)
    made.reset()
    want = logits_of(model, prompt()[0], StaticCache(model.config, ROOM))
    assert torch.equal(logits_of(model, prompt()[0], made), want)


def test_a_layer_before_the_first() -> None:
    _, made = small()
    rows = torch.zeros(2, 2, 1, 16, dtype=FP16).npu()
    with pytest.raises(RuntimeError, match="before the first one"):
        made.update(rows, rows, 1)


@pytest.mark.parametrize(
    ("device", "dtype", "is_paged"),
    [
        ("npu", FP16, True),
        ("npu", torch.bfloat16, True),
        ("npu", torch.float32, False),  # ScatterPaKvCache has no such dtype
        ("cpu", FP16, False),
    ],
)
@pytest.mark.parametrize(("heads", "size"), [(2, 16), (1, 16), (3, 24)])  # 24: no FRACTAL_NZ row
@pytest.mark.parametrize("steps", [[3, 1, 1], [1, 2, 1]], ids=str)
def test_what_is_written(
    steps: list[int], heads: int, size: int, device: str, dtype: torch.dtype, is_paged: bool
) -> None:
    """(batch, heads, positions, size), whatever the order in memory."""
    _, made = small()
    generator = torch.Generator().manual_seed(5)
    news = [torch.randn(2, 2, 2, heads, n, size, generator=generator).to(dtype) for n in steps]
    want = torch.cat(news, -2)
    for new in news:
        for layer, (keys, values) in enumerate(new):
            seen = made.update(keys.to(device), values.to(device), layer)
    last = made.layers[-1]
    assert last.is_paged == (is_paged and has_cache_mode())
    assert made.get_seq_length() == sum(steps)
    for i, layer in enumerate(made.layers):
        for whole, rows in zip((layer.keys, layer.values), want[i], strict=True):
            assert whole.shape == (2, heads, ROOM, size)
            assert torch.equal(whole[:, :, : sum(steps)].cpu(), rows)
            assert not whole[:, :, sum(steps) :].any()
    assert [one.data_ptr() for one in seen] == [last.keys.data_ptr(), last.values.data_ptr()]


@pytest.mark.filterwarnings("ignore:attn_implementation")
@pytest.mark.parametrize("is_paged", [True, False])
def test_both_orders_of_memory_compute_the_same(
    is_paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_paged:
        monkeypatch.setattr(cache_module, "_PRODUCTS", ())
    model, made = small()
    assert_close(greedy(model, made), "llama")
    assert made.layers[0].is_paged == (is_paged and has_cache_mode())


@pytest.mark.parametrize("kind", ["linear_attention", "conv"])
def test_layers_without_keys_are_refused(kind: str) -> None:
    config = model_of("llama").config
    config.layer_types = ["full_attention", kind]
    with pytest.raises(NotImplementedError, match=f"layer 1 is '{kind}'"):
        StaticCache(config, ROOM)
