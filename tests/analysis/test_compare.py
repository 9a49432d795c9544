"""compare(): its measures against plain numpy, and that it finds the layer that hurts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph import A8W8Dynamic, A8W8Static, LinearQuantTypeError, LinearQuantValueError, compare

F16 = torch.float16


class Noisy(nn.Module):
    """Adds a known constant to a layer's output."""

    def __init__(self, layer: nn.Module, noise: float) -> None:
        super().__init__()
        self.layer, self.noise = layer, noise

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.noise


def make(depth: int = 3, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def batches(count: int = 3, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, width, generator=generator) for _ in range(count)]


def with_noise(model: nn.Sequential, noise: dict[int, float]) -> nn.Sequential:
    other = copy.deepcopy(model)
    for i, layer in enumerate(other):
        other[i] = Noisy(layer, noise.get(i, 0.0))
    return other


def golden(a: list[Tensor], b: list[Tensor]) -> tuple[float, float, float]:
    """SQNR in dB, largest difference, cosine."""
    x = np.concatenate([t.numpy().ravel().astype(np.float64) for t in a])
    y = np.concatenate([t.numpy().ravel().astype(np.float64) for t in b])
    sqnr = 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum())
    return sqnr, np.abs(x - y).max(), (x @ y) / np.sqrt((x @ x) * (y @ y))


def outputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    out = []
    for layer in model:
        x = layer(x)
        out.append(x)
    return out


def test_own_and_accumulated_errors_differ() -> None:
    model = make()
    other = with_noise(model, {0: 0.05})
    found = compare(model, other, batches())
    assert [layer.name for layer in found] == ["0", "1", "2"]
    with torch.no_grad():
        a = [outputs(model, x) for x in batches()]
        b = [outputs(other, x) for x in batches()]
    for i, layer in enumerate(found):
        assert layer.calls == 3 and layer.accumulated is not None and layer.own is not None
        want = golden([run[i] for run in a], [run[i] for run in b])
        got = layer.accumulated
        assert (got.sqnr, got.max_abs, got.cosine) == pytest.approx(want, rel=1e-9)
        if i == 0:
            assert layer.own == got
        else:
            assert (layer.own.sqnr, layer.own.max_abs, layer.own.cosine) == (np.inf, 0, 1)
    assert found.worst is found[0]
    last = found[2].accumulated
    assert found.output == last


def test_sensitivity_is_the_outputs_error_with_one_layer_replaced() -> None:
    model = make()
    # the second layer adds less noise, but the third forgets most of what the first does
    model[2].weight.data *= 0.01
    other = with_noise(model, {0: 0.2, 2: 0.1})
    found = compare(model, other, batches(), sensitivity=True)
    for i, layer in enumerate(found):
        with torch.no_grad():
            a = [model(x) for x in batches()]
            one = copy.deepcopy(model)
            one[i] = other[i]
            b = [one(x) for x in batches()]
        assert layer.sensitivity is not None
        if i == 1:
            assert layer.sensitivity.sqnr == np.inf
            continue
        got = layer.sensitivity
        assert (got.sqnr, got.max_abs, got.cosine) == pytest.approx(golden(a, b), rel=1e-9)
    assert found.worst.name == "2"
    assert "2 changes the output most when only it is quantized" in str(found)


@pytest.mark.parametrize("config", [A8W8Dynamic(), A8W8Static()], ids=["dynamic", "static"])
@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("dtype", [torch.float32, F16, torch.bfloat16])
def test_across_devices_and_dtypes(dtype: torch.dtype, device: str, config: Any) -> None:
    reference = make(width=32).to(dtype)
    other = copy.deepcopy(reference).to(F16 if dtype == torch.float32 else dtype)
    data = batches(width=32)
    calibration = [x.to(other[0].weight.dtype) for x in data]
    lq_graph.quantize(other, config, calibration if isinstance(config, A8W8Static) else None)
    other.to(device)
    found = compare(reference, other, iter(data))
    assert len(found) == 3
    for layer in found:
        assert layer.own is not None and 25 < layer.own.sqnr < 60
    # static layers in a row hand int8 on; it is compared as the numbers it stands for
    assert found.output.cosine > 0.999


class Shared(nn.Module):
    """One layer called twice, one never, the result in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"ids": torch.arange(3), "out": self.twice(self.twice(x)) + shift}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"x": x, "shift": torch.ones(8)},
        lambda x: (x, torch.ones(8)),
        lambda x: [x, torch.ones(8)],
    ],
)
def test_layers_called_twice_and_never(wrap: Callable[[Tensor], Any]) -> None:
    model = Shared()
    other = copy.deepcopy(model)
    other.twice, other.never = Noisy(other.twice, 0.1), Noisy(other.never, 0.1)
    found = compare(model, other, (wrap(x) for x in batches(2, 8)))
    twice, never = found
    assert (twice.name, twice.calls) == ("twice", 4) and twice.own is not None
    assert twice.own.max_abs == pytest.approx(0.1, rel=1e-4)
    assert never.calls == 0 and never.own is None and "never called" in str(found)
    assert found.worst is twice


class InPlace(nn.Module):
    """Changes its input, and what its layer gives, in place; returns a buffer it uses again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("out", torch.zeros(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.out.copy_(self.last(self.first(x).relu_()))


def test_changes_in_place_are_not_taken_for_errors() -> None:
    torch.manual_seed(0)
    model = InPlace()
    other = copy.deepcopy(model)
    other.first, other.last = Noisy(other.first, 0.0), Noisy(other.last, 0.1)
    data, before = batches(), batches()
    first, last = compare(model, other, data, sensitivity=True)
    for error in (first.own, first.accumulated, first.sensitivity):
        assert error is not None and (error.sqnr, error.max_abs) == (np.inf, 0)
    for error in (last.own, last.accumulated, last.sensitivity):
        assert error is not None and error.max_abs == pytest.approx(0.1, rel=1e-5)
    assert last.own == last.accumulated == last.sensitivity
    for x, y in zip(data, before, strict=True):
        assert torch.equal(x, y)


def test_a_loader_may_fill_one_tensor_again() -> None:
    def loader() -> Any:
        one = torch.empty(4, 16)
        for x in batches():
            yield one.copy_(x)

    model = make()
    other = with_noise(model, {0: 0.2})
    found = compare(model, other, loader(), sensitivity=True)
    assert list(found) == list(compare(model, other, batches(), sensitivity=True))


class NotIdempotent(nn.Module):
    """Doubles its input, in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class SameAgain(NotIdempotent):
    """Of another class, with the same result."""


def test_a_layer_that_works_in_place_is_given_the_input_it_had() -> None:
    model = nn.Sequential(*make(1), NotIdempotent())
    other = nn.Sequential(copy.deepcopy(model[0]), SameAgain())
    (found,) = compare(model, other, batches(), sensitivity=True)
    assert found.own == found.accumulated == found.sensitivity
    assert found.own is not None and found.own.sqnr == np.inf


def test_a_layer_that_took_over_a_relu_is_compared_after_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).half()
    data = [x.half() for x in batches(width=32)]
    other = copy.deepcopy(model)
    report = lq_graph.quantize(other, A8W8Static(), data)
    assert "ReLU" in report[0].note and isinstance(other[1], nn.Identity)
    found = compare(model, other, data)
    assert [layer.name for layer in found] == ["0", "2"]

    with torch.no_grad():
        a = [torch.relu(model[0](x)).float() for x in data]
        b = [(other[0](x).float() - other[0].output_offset) * other[0].output_scale for x in data]
    own = found[0].own
    assert own is not None and own.sqnr > 35
    assert (own.sqnr, own.max_abs, own.cosine) == pytest.approx(golden(a, b), rel=1e-9)


class ByKeyword(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x=x)


def test_layers_called_by_keyword() -> None:
    model = ByKeyword(Noisy(make(1)[0], 0.0))
    other = ByKeyword(nn.Sequential())
    other.layer = type("Other", (Noisy,), {})(copy.deepcopy(model.layer.layer), 0.1)
    (found,) = compare(model, other, batches(), sensitivity=True)
    assert found.own == found.accumulated == found.sensitivity
    assert found.own is not None and found.own.max_abs == pytest.approx(0.1, rel=1e-5)


def test_model_b_may_hold_the_layers_of_model_a() -> None:
    model = make(2)
    found = compare(model, nn.Sequential(Noisy(model[0], 0.1), Noisy(model[1], 0.0)), batches())
    assert [layer.calls for layer in found] == [3, 3]
    assert found[0].own is not None and found[0].own.max_abs == pytest.approx(0.1, rel=1e-5)
    assert found[1].own is not None and found[1].own.sqnr == np.inf


class Pair(NamedTuple):
    hidden: Tensor
    other: int


class Several(nn.Module):
    """Gives a tuple, a list, a named tuple, a dict."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer, self.kind = make(1)[0], kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.layer(x))


class First(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.part = Several(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)[0]


@pytest.mark.parametrize("kind", [lambda h: (h, 1), lambda h: [h, 1], lambda h: Pair(h, 1)])
def test_layers_that_give_several_things(kind: Any) -> None:
    model = First(kind)
    other = copy.deepcopy(model)
    other.part.layer = Noisy(other.part.layer, 0.1)
    (found,) = compare(model, other, batches(), layers=["part"], sensitivity=True)
    assert found.own == found.sensitivity is not None
    assert found.own.max_abs == pytest.approx(0.1, rel=1e-5)


class Times(nn.Module):
    """Calls its layer so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = make(1)[0], times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


@pytest.mark.parametrize(("times", "word"), [(1, "fewer"), (3, "more")])
def test_other_numbers_of_calls_are_refused(times: int, word: str) -> None:
    model, other = Times(2), Times(times)
    other.layer = Noisy(other.layer, 0.1)
    with pytest.raises(LinearQuantValueError, match=f"model_b calls layer {word} times"):
        compare(model, other, batches())
    assert hooks(model) == hooks(other) == 0


def test_no_layer_is_blamed_for_nothing() -> None:
    model = make()
    exact = compare(model, with_noise(model, {}), batches())
    assert str(exact).endswith("no layer adds any error") and "worst" not in str(exact)
    shared = Shared()
    other = copy.deepcopy(shared)
    other.never = Noisy(other.never, 0.1)
    data = [(x, torch.zeros(8)) for x in batches(1, 8)]
    never = compare(shared, other, data, sensitivity=True)
    assert str(never).endswith("none of these layers was called")
    assert never.as_json()["worst"] is None and exact.as_json()["worst"] is None
    assert never[0].sensitivity is None


def test_nan_is_the_worst_and_does_not_crash() -> None:
    model = make()
    other = with_noise(model, {0: 5.0, 1: float("nan")})
    found = compare(model, other, batches())
    assert found.worst.name == "1" and np.isnan(found.output.sqnr) and "nan" in str(found)
    assert "1 gives NaN, infinity or nothing but noise" in str(found)


@pytest.mark.parametrize("layers", [["1"], lambda module, name: name == "1"])
def test_layers_can_be_chosen(layers: Any) -> None:
    model = make()
    found = compare(model, with_noise(model, {0: 0.1}), batches(), layers=layers)
    assert [layer.name for layer in found] == ["1"]


def test_named_layers_come_in_the_models_order_each_once() -> None:
    model = make()
    found = compare(model, with_noise(model, {}), batches(), layers=["2", "0", "2"])
    assert [layer.name for layer in found] == ["0", "2"]


def test_the_table() -> None:
    model = make()
    lines = str(compare(model, with_noise(model, {1: 0.05}), batches())).splitlines()
    assert lines[0].split() == ["layer", "own", "dB", "in", "model", "dB", "max", "cosine"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert [line.endswith("worst") for line in lines[1:4]] == [False, True, False]
    assert lines[1].split()[1:3] == ["exact", "exact"]
    assert lines[4].startswith("dB: signal to quantization noise") and lines[6].startswith("own: ")
    text = " ".join(" ".join(lines[8:]).split())
    assert text.startswith("max, cosine, worst: by the layer's own error, on the float model's")
    assert "output: " in text and text.endswith(
        "1 has the largest error of its own; to leave it float: "
        "lq_graph.quantize(..., ignore=['1'])"
    )


def test_output_can_be_picked() -> None:
    model = Shared()
    other = copy.deepcopy(model)
    other.twice = Noisy(other.twice, 0.1)
    data = [(x, torch.zeros(8)) for x in batches(1, 8)]
    found = compare(model, other, data, layers=["twice"], output=lambda out: out["out"][:1])
    whole = compare(model, other, data, layers=["twice"])
    assert found.output != whole.output


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_models_are_left_as_they_were() -> None:
    model = make().train()
    other = with_noise(model, {0: 0.1})
    other[1].eval()
    compare(model, other, batches(), sensitivity=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compare(model, other, [torch.ones(2, 5)])
    for one in (model, other):
        assert hooks(one) == 0 and one.training and one[0].training
    assert not other[1].training


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Nothing(Times):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> None:
        self.layer(x)


class Dict(dict[int, Tensor]):
    """No tuple, though it has a first element."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__({0: hidden})


def quantized(model: nn.Sequential) -> nn.Sequential:
    other = copy.deepcopy(model).half()
    lq_graph.quantize(other, A8W8Dynamic())
    return other


def narrower(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(model[0], model[1], Noisy(nn.Linear(16, 8), 0.0))


def test_a_partly_quantized_model_may_be_compared_with_a_quantized_one() -> None:
    """What it changes to leave one layer float."""
    model = make().half().requires_grad_(False)
    all_of_it, part = copy.deepcopy(model), copy.deepcopy(model)
    lq_graph.quantize(all_of_it, A8W8Dynamic())
    lq_graph.quantize(part, A8W8Dynamic(), ignore=["0"])
    found = compare(all_of_it, part, batches())
    assert [layer.name for layer in found] == ["0"]
    x = batches()[0].half()
    own = golden([all_of_it[0](x)], [model[0](x)])
    one = compare(all_of_it, part, [x])[0].own
    assert one is not None and one.sqnr == pytest.approx(own[0])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, o: compare(m, m, batches()), LinearQuantValueError, "are one object"),
        (lambda m, o: compare(m, o, []), LinearQuantValueError, "inputs is empty"),
        (
            lambda m, o: compare(m, copy.deepcopy(m), batches()),
            LinearQuantValueError,
            "no layers to compare: every module has the same class in both models; neither is",
        ),
        (
            lambda m, o: compare(m, o, batches(), layers=lambda module, name: False),
            LinearQuantValueError,
            "no layers to compare: `layers` chooses none",
        ),
        (
            lambda m, o: compare(quantized(m), m.half(), batches()),
            LinearQuantValueError,
            r"0 is quantized in model_a and float in model_b, .* compare\(float_model, quantized_",
        ),
        (
            lambda m, o: compare(quantized(m), quantized(m), batches()),
            LinearQuantValueError,
            "no layers to compare: every module has the same class in both models; both are",
        ),
        (
            lambda m, o: compare(m, o, batches(), layers=["7"]),
            LinearQuantValueError,
            "layers has '7', which is not in both models",
        ),
        (lambda m, o: compare(m, o, ["text"]), LinearQuantTypeError, "inputs hold a str"),
        (
            lambda m, o: compare(m, narrower(m), batches()),
            LinearQuantValueError,
            r"2 returns \(4, 16\) in model_a and \(4, 8\) in model_b",
        ),
        (
            lambda m, o: compare(m, Wrapped(o), batches()),
            LinearQuantValueError,
            "model_a has a module '0' and model_b has none of that name",
        ),
        (
            lambda m, o: compare(m, o[:2], batches()),
            LinearQuantValueError,
            "model_a has a module '2' and model_b has none of that name",
        ),
        (
            lambda m, o: compare(m, o, batches()[0]),
            LinearQuantTypeError,
            r"inputs is a Tensor; .*pass \[inputs\]",
        ),
        (
            lambda m, o: compare(m, o, {"x": batches()[0]}),
            LinearQuantTypeError,
            r"inputs is a dict; .*pass \[inputs\]",
        ),
        (lambda m, o: compare(m, o, None), LinearQuantTypeError, "inputs is a NoneType"),
        (
            lambda m, o: compare(m, o, batches(), layers="0"),
            LinearQuantTypeError,
            "layers is '0'; allowed are names",
        ),
        (
            lambda m, o: compare(m, o, batches(), output=lambda out: 3),
            LinearQuantTypeError,
            "output= returned int",
        ),
        (
            lambda m, o: compare(Times(1), Nothing(), batches(), layers=["layer"]),
            LinearQuantTypeError,
            "models return NoneType without a float tensor",
        ),
        (
            lambda m, o: compare(First(Dict), First(Dict), batches(), layers=["part"]),
            LinearQuantTypeError,
            "part returns Dict",
        ),
    ],
)
def test_refusals(call: Callable[..., Any], error: type[Exception], text: str) -> None:
    model = make()
    with pytest.raises(error, match=text):
        call(model, with_noise(model, {0: 0.1}))
