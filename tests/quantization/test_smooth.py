"""smooth(): the float model computes what it computed, and int8 activations cost less."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from lq_graph import A8W8Dynamic, LinearQuantTypeError, LinearQuantValueError, quantize, smooth
from support.float_models import assert_unchanged, state

K, HIDDEN = 32, 48


class PlusOne(nn.Module):
    """A norm as Gemma's: its weight is a difference from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(K))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (K,)) * (1 + self.weight)


class Block(nn.Module):
    """The linear layers of a decoder's layer, between which channels can be rescaled."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, bias: bool = False) -> None:
        super().__init__()
        self.norm = norm(K) if norm is not PlusOne else PlusOne()
        self.gate = nn.Linear(K, HIDDEN, bias=bias)
        self.up = nn.Linear(K, HIDDEN, bias=bias)
        self.down = nn.Linear(HIDDEN, K, bias=bias)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def made(block: Block, dtype: torch.dtype = torch.float32) -> Block:
    """A block with parameters of its own, and a norm that makes a few channels large."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for module in block.modules():
            if isinstance(module, nn.RMSNorm | nn.LayerNorm):
                assert module.weight is not None
                module.weight.add_(1.0)[::11] *= 30
    return block.to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float32, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 9, K, generator=generator).to(dtype) for _ in range(count)]


def golden_factors(x: Tensor, weights: list[Tensor], alpha: float) -> np.ndarray:
    """In numpy: peaks to the power alpha over the weights' peaks to the power 1 - alpha, their
    geometric mean 1, rounded to bfloat16."""
    peak = np.abs(x.numpy().reshape(-1, x.shape[-1])).max(0).astype(np.float64)
    columns = np.abs(np.concatenate([w.numpy() for w in weights])).max(0).astype(np.float64)
    factors = peak**alpha / columns ** (1 - alpha)
    factors = factors / np.exp(np.log(factors).mean())
    return torch.from_numpy(factors).bfloat16().double().numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@torch.no_grad()
def test_the_factors(alpha: float) -> None:
    block = made(Block(bias=True))
    old, x = copy.deepcopy(block), torch.cat(inputs())
    report = smooth(block, inputs(), alpha=alpha)
    assert [(r.name, r.source) for r in report] == [
        ("gate", "norm"),
        ("up", "norm"),
        ("down", "up"),
    ]
    y = old.norm(x)
    by_norm = golden_factors(y, [old.gate.weight, old.up.weight], alpha)
    by_up = golden_factors(silu(old.gate(y)) * old.up(y), [old.down.weight], alpha)
    want = {
        "norm.weight": old.norm.weight.numpy() / by_norm,
        "gate.weight": old.gate.weight.numpy() * by_norm,
        "gate.bias": old.gate.bias.numpy(),
        "up.weight": old.up.weight.numpy() * by_norm / by_up[:, None],
        "up.bias": old.up.bias.numpy() / by_up,
        "down.weight": old.down.weight.numpy() * by_up,
        "down.bias": old.down.bias.numpy(),
    }
    got = block.state_dict()
    assert list(got) == list(want)
    for name, tensor in got.items():
        np.testing.assert_allclose(tensor.numpy(), want[name], rtol=1e-2, err_msg=name)
    # a factor may be rounded to a neighbour in bfloat16, but most are these
    near = np.isclose(got["gate.weight"].numpy(), want["gate.weight"], rtol=1e-5)
    assert near.mean() > 0.9


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_float_model_computes_the_same(
    norm: Any, bias: bool, dtype: torch.dtype, off: float
) -> None:
    block = made(Block(norm, bias), dtype)
    (x,) = inputs(dtype, 1)
    before, weights = block(x), state(block)
    assert sum(r.changed for r in smooth(block, inputs(dtype))) == 3
    assert not torch.equal(block.gate.weight, weights["gate.weight"])
    assert (block(x) - before).abs().max() < off * before.abs().max()
    assert {p.dtype for p in block.parameters()} == {dtype}


@torch.no_grad()
def test_int8_costs_less() -> None:
    block = made(Block(), torch.float16)
    x, (more,) = inputs(torch.float16), inputs(torch.float16, 1)
    want = block(more).float()
    errors = []
    for smoothed in (False, True):
        model = copy.deepcopy(block)
        if smoothed:
            smooth(model, x)
        quantize(model, A8W8Dynamic())
        errors.append(float((model(more).float() - want).norm()))
    assert errors[1] < errors[0] * 0.7


# ---- what stays as it is, and why ----


class Residual(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return y + self.down(silu(self.gate(y)) * self.up(y))


class Returned(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.down(silu(self.gate(y)) * self.up(y)), y


class View(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.down(silu(self.gate(y)) * self.up(y.flatten(0, 1)).view(2, 9, HIDDEN))


class Slice(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.down(silu(self.gate(y)) * self.up(y)) + y[..., :1]


class TwoSources(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.down(silu(self.gate(y)) * self.up(y)) + self.up(x).sum()


class ReadsWeight(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.down(silu(linear(y, self.gate.weight)) * self.up(y))


class ReadsNorm(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.down(silu(self.gate(y)) * self.up(y)) + self.norm.weight


class Squared(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        up = self.up(y)
        return self.down(silu(self.gate(y)) * (up * up))


class InPlace(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.down(silu(self.gate(y)) * self.up(y).mul_(2).sigmoid_())


class Never(Block):
    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return silu(self.gate(y)) * self.up(y)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Hidden(nn.Linear):
    """Reads the output of a norm that it is not given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.kept[..., :1])


class HiddenRead(Block):
    def __init__(self) -> None:
        super().__init__()
        self.down = Hidden(HIDDEN, K)

    def forward(self, x: Tensor) -> Any:
        y = self.down.kept = self.norm(x)
        return self.down(silu(self.gate(y)) * self.up(y))


def subclass() -> Block:
    block = Block()
    block.up = Doubled(K, HIDDEN)
    return block


def shared() -> Block:
    block = Block()
    other = nn.Linear(K, HIDDEN, bias=False)
    other.weight = block.gate.weight
    block.add_module("other", other)
    return block


def hooked() -> Block:
    block = Block()
    block.up.register_forward_hook(lambda module, args, result: result.abs())
    return block


def hooked_norm() -> Block:
    block = Block()
    block.norm.register_forward_hook(lambda module, args, result: result + 1)
    return block


NOT_ONE = "its input is not the output of one norm, nor of one linear layer"
# what is smoothed, and why the first layer that is not stays as it is
CASES: dict[str, tuple[Any, set[str], str]] = {
    "an added 1": (lambda: Block(PlusOne), {"down"}, "not proportional to its parameters"),
    "a residual": (Residual, {"down"}, "the output of norm: aten.add.Tensor reads it"),
    "returned": (Returned, {"down"}, "the output of norm: the model returns it"),
    "a view": (View, set(), "the output of norm: aten."),
    "a slice": (Slice, {"down"}, "the output of norm: aten.slice.Tensor reads it"),
    "two sources": (TwoSources, set(), f"another layer takes the same input: {NOT_ONE}"),
    "read weight": (ReadsWeight, {"down"}, "inputs never reached it"),
    "read norm": (ReadsNorm, {"down"}, "norm are not its own: aten.add.Tensor reads it"),
    "a square": (Squared, {"gate", "up"}, NOT_ONE),
    "in place": (InPlace, {"gate", "up"}, "the output of up: aten.mul_.Tensor reads it"),
    "never called": (Never, {"gate", "up"}, "inputs never reached it"),
    "a subclass": (subclass, set(), "another layer takes the same input: up: a Doubled"),
    "shared": (shared, {"down"}, "gate shares a parameter with another module"),
    "a hook": (hooked, set(), "another layer takes the same input: up: it has forward hooks"),
    "a hook of the norm": (hooked_norm, {"down"}, NOT_ONE),
    "a hidden read": (HiddenRead, set(), "the output of norm: aten.slice.Tensor reads it"),
}


@pytest.mark.parametrize(("model", "smoothed", "why"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_what_cannot_be_rescaled_stays(model: Any, smoothed: set[str], why: str) -> None:
    block = made(model())
    (x,) = inputs(count=1)
    before, weights = block(x), state(block)
    if smoothed:
        report = smooth(block, [x])
        assert {r.name for r in report if r.changed} == smoothed
        said = next(r.note for r in report if not r.changed)
        assert why in " ".join(str(report).split())
    else:
        with pytest.raises(LinearQuantValueError, match="smooth: none of the") as raised:
            smooth(block, [x])
        said = str(raised.value)
        assert_same(state(block), weights)
    assert why in said
    for layer in {"gate", "up", "down"} - smoothed:
        own = state(block)[f"{layer}.weight"] / weights[f"{layer}.weight"]
        rescaled_rows = layer == "up" and "down" in smoothed
        assert torch.equal(own, torch.ones_like(own)) or rescaled_rows
    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-4)


def assert_same(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- refusals ----


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_a_part(alpha: float) -> None:
    with pytest.raises(LinearQuantValueError, match=r"smooth: alpha is .*; allowed is 0 to 1"):
        smooth(Block(), inputs(), alpha=alpha)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (inputs()[0], LinearQuantTypeError, "smooth: inputs is a Tensor"),
        ([3], LinearQuantTypeError, "inputs hold a int"),
        ([], LinearQuantValueError, "smooth: inputs is empty"),
        ([inputs()[0] * float("nan")], LinearQuantValueError, "norm holds NaN or infinity"),
        ([inputs()[0][:0]], LinearQuantValueError, "inputs never reached it"),
    ],
    ids=["a tensor", "an int", "nothing", "NaN", "empty"],
)
def test_other_inputs_are_refused(given: Any, error: type[Exception], message: str) -> None:
    block = made(Block())
    before = state(block)
    with pytest.raises(error, match=message):
        smooth(block, given)
    assert_unchanged(block, before)
    assert not any("forward" in vars(module) for module in block.modules())


def test_what_float16_may_not_hold_stays() -> None:
    block = made(Block(), torch.float16)
    with torch.no_grad():
        block.down.weight.mul_(2000)
    report = smooth(block, inputs(torch.float16))
    assert [r.name for r in report if r.changed] == ["gate", "up"]
    assert report[2].note == "float16 may not hold the values that it would get"


# ---- whole decoders ----


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma"])
@torch.no_grad()
def test_decoders_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{kind}ForCausalLM"):
        pytest.skip(f"this transformers has no {kind}")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    ids = torch.arange(1, 30)[None]
    before = model(ids).logits
    report = smooth(model, [{"input_ids": ids, "use_cache": False}])
    kinds = {r.name.rpartition(".")[2] for r in report if r.changed}
    ends = {"down_proj"} if kind == "Gemma" else {"q_proj", "k_proj", "v_proj", "gate_proj"}
    assert kinds == ends | {"down_proj"} | (set() if kind == "Gemma" else {"up_proj"})
    assert "model.layers.*.mlp.down_proj" in str(report)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.npu.is_available(), reason="needs an NPU, or cann_host")
@torch.no_grad()
def test_on_the_npu() -> None:
    block = made(Block(bias=True), torch.float16)
    on_npu = copy.deepcopy(block).npu()
    smooth(block, inputs(torch.float16))
    smooth(on_npu, [x.npu() for x in inputs(torch.float16)])
    for name, tensor in on_npu.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), block.state_dict()[name], rtol=2e-2, atol=1e-3)
