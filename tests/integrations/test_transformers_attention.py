"""The attention function by itself, beside float64 numpy; what goes to transformers' functions."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
torch_npu = pytest.importorskip("torch_npu")
from lq_graph.integrations import attention as module  # noqa: E402
from lq_graph.integrations.transformers import NAME  # noqa: E402
from support.hf_models import model_of  # noqa: E402

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BATCH, KEYS = 2, 12


@pytest.fixture(autouse=True)
def _fresh() -> None:
    module._said.clear()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of the operator."""
    calls: list[int] = []
    original = module._fused

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(module, "_fused", counted)
    return calls


def layer(heads: int = 4, kv_heads: int = 2, model: str = "llama") -> Any:
    sizes = dict(hidden_size=16 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)
    return model_of(model, **sizes).model.layers[0].self_attn


def inputs(
    heads: int = 4, kv_heads: int = 2, size: int = 16, queries: int = 1, dtype: Any = F16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads + size + queries)

    def normal(count: int, rows: int) -> Tensor:
        # as a model has them: (batch, rows, heads, size), transposed
        shape = BATCH, rows, count, size
        return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2)

    return normal(heads, queries), normal(kv_heads, KEYS), normal(kv_heads, KEYS)


def sees(queries: int, *, padded: int = 0) -> Tensor:
    """bool (batch, 1, queries, keys): causal to the last key; the first row is padded."""
    seen = torch.ones(queries, KEYS).tril(KEYS - queries).bool().expand(BATCH, 1, -1, -1).clone()
    seen[0, :, :, :padded] = False
    return seen


def golden(
    query: Tensor, key: Tensor, value: Tensor, added: Any, scale: float, softcap: float = 0
) -> Any:
    """(batch, queries, heads, size), float64."""
    q, k, v = (t.double().numpy() for t in (query, key, value))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(t, group, axis=1) for t in (k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    scores = scores + added
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bhkd->bqhd", weights, v)


def added_of(seen: Tensor | None) -> Any:
    return 0.0 if seen is None else np.where(seen.numpy(), 0.0, -1e30)


def call(device: str, qkv: Any, mask: Tensor | None, owner: nn.Module, **kwargs: Any) -> Any:
    owner.is_causal = False  # type: ignore[assignment]
    moved = [t.to(device) for t in qkv]
    mask = mask if mask is None else mask.to(device)
    given = {"scaling": 0.3, "dropout": 0.0, **kwargs}
    return module.attention(owner, *moved, mask, **given)


def assert_close(got: Tensor, want: Any, dtype: Any = F16) -> None:
    limit = {F16: 2e-3, BF16: 1.6e-2, F32: 1e-5}[dtype]
    np.testing.assert_allclose(got.double().cpu().numpy(), want, atol=limit, rtol=limit)


MASKS = ("none", "causal", "padded")


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 2, 5, 12])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"),
    [(4, 2, 16, F16), (4, 4, 64, F16), (9, 3, 64, BF16), (8, 1, 128, F16), (2, 1, 256, BF16)],
)
def test_numbers(
    heads: int,
    kv_heads: int,
    size: int,
    dtype: Any,
    queries: int,
    mask: str,
    device: str,
    fused: list[int],
) -> None:
    qkv = inputs(heads, kv_heads, size, queries, dtype)
    seen = None if mask == "none" else sees(queries, padded=4 if mask == "padded" else 0)
    got, weights = call(device, qkv, seen, layer(heads, kv_heads), scaling=size**-0.5)
    want = golden(*qkv, added_of(seen), size**-0.5)
    real = slice(None) if seen is None else seen.any(-1)[:, 0].numpy()  # padding sees nothing
    got, want = (got.cpu(), want) if seen is None else (got.cpu()[real], want[real])
    assert weights is None and bool(got.isfinite().all())
    assert_close(got, want, dtype)
    assert len(fused) == (device == "npu")


def test_a_query_that_sees_nothing_is_finite() -> None:
    """Padding: its keys and values of the next layer are multiplied by 0."""
    seen = sees(5)
    seen[0, 0, :3] = False
    got, _ = call("npu", inputs(queries=5), seen, layer())
    assert bool(got.isfinite().all())


# What is not the operator's: the reason, and what is changed in a call that is.
BIAS = torch.linspace(-2, 2, BATCH * 3 * KEYS).reshape(BATCH, 1, 3, KEYS).to(F16)
LEFT: dict[str, dict[str, Any]] = {
    "head sizes": dict(says="head sizes are 24, 24 and 24", inputs=dict(size=24)),
    "float32": dict(says="query is torch.float32", inputs=dict(dtype=F32)),
    "weights": dict(says="weights are wanted", output_attentions=True),
    "added mask": dict(says="may hold more than 0 and -inf", mask=BIAS, added=BIAS.double()),
    "a mask for each head": dict(says=r"shape \(2, 4, 3, 12\)", mask=sees(3).expand(-1, 4, -1, -1)),
    "softcap": dict(says="softcap is given", model="gemma2", softcap=0.5, cap=0.5),
    "dropout": dict(says="dropout is", dropout=1e-12),
    "no mask": dict(says="no mask for several", mask=None, is_causal=True, aligned=True),
    "gradients": dict(says="gradients are wanted", grad=True),
    "product": dict(says="only Atlas A2 and A3", product="310P"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_to_transformers(name: str, fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = dict(LEFT[name])
    says, cap, product = case.pop("says"), case.pop("cap", 0), case.pop("product", None)
    aligned, grad = case.pop("aligned", False), case.pop("grad", False)
    qkv = inputs(**case.pop("inputs", {}), queries=KEYS if aligned else 3)
    seen = sees(KEYS if aligned else 3)
    added = case.pop("added", None)
    mask = case.pop("mask", seen)
    owner = layer(model=case.pop("model", "llama"))
    if product:
        monkeypatch.setattr(module, "_PRODUCTS", ())
    if grad:
        qkv[0].requires_grad_()
    with pytest.warns(RuntimeWarning, match=f'attn_implementation="lq_graph": .*{says}'):
        got, weights = call("npu", qkv, mask, owner, **case)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error", RuntimeWarning)
        call("npu", qkv, mask, owner, **case)
    want = golden(
        *(t.detach() for t in qkv), added_of(seen) if added is None else added.numpy(), 0.3, cap
    )
    assert_close(got.detach(), want, qkv[0].dtype)
    assert (weights is not None) == (name in ("weights", "added mask", "softcap"))
    assert not fused


def test_a_model_without_an_eager_function_is_refused() -> None:
    class Stranger(nn.Module):
        pass

    with (
        pytest.warns(RuntimeWarning, match="Stranger: the attention weights are wanted"),
        pytest.raises(NotImplementedError, match="has no eager_attention_forward, which Stranger"),
    ):
        call("npu", inputs(), None, Stranger(), output_attentions=True)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_weights_that_a_caller_wants(name: str) -> None:
    model = model_of(name).half()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        want = model(input_ids=ids, output_attentions=True).attentions
        model.set_attn_implementation(NAME)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = model.npu()(input_ids=ids.npu(), output_attentions=True).attentions
    assert len(got) == len(want) == 2
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=5e-3, rtol=0)


def test_masks_of_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"attention_mask is torch\.int64"):
        call("npu", inputs(), torch.ones(BATCH, 1, 1, KEYS, dtype=torch.int64), layer())


def mask_of(queries: int) -> Any:
    """The mask of the last queries, as a model asks for it."""
    older = (
        "cache_position"
        in inspect.signature(transformers.AttentionMaskInterface()["sdpa"]).parameters
    )
    first = KEYS - queries
    given: dict[str, Any] = (
        dict(cache_position=torch.arange(first, KEYS).npu())
        if older
        else dict(q_length=queries, q_offset=first, device="npu")
    )
    return module.attention_mask(batch_size=BATCH, kv_length=KEYS, **given)


def test_the_mask_of_a_step() -> None:
    """Inverted once for all layers; of a changed mask, the inverse is not used."""
    made = mask_of(3)
    assert torch.equal(made.cpu(), sees(3))
    assert module._inverse(made) is module._inverse(made)
    made[0, 0, :, 1] = False
    assert torch.equal(module._inverse(made), made.logical_not())
    with torch.inference_mode():
        made = mask_of(3)
        assert torch.equal(module._inverse(made).cpu(), ~sees(3))
    assert mask_of(1) is None
