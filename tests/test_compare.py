"""compare(): its measures against plain numpy, and that it finds the layer that hurts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_own_and_accumulated_are_told_apart() -> None:
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
    assert "2 makes most of the output's error" in str(found)


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


def test_nan_is_the_worst_and_does_not_crash() -> None:
    model = make()
    other = with_noise(model, {0: 5.0, 1: float("nan")})
    found = compare(model, other, batches())
    assert found.worst.name == "1" and np.isnan(found.output.sqnr) and "nan" in str(found)


@pytest.mark.parametrize("layers", [["1"], lambda name, module: name == "1"])
def test_layers_can_be_chosen(layers: Any) -> None:
    model = make()
    found = compare(model, with_noise(model, {0: 0.1}), batches(), layers=layers)
    assert [layer.name for layer in found] == ["1"]


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


def test_picture(tmp_path: Path) -> None:
    model = make(100)
    noise = {i: 0.001 * (i % 7) for i in range(100)}
    found = compare(model, with_noise(model, noise), batches(1), sensitivity=True)
    for name, head in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        found.plot(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert data.startswith(head) and len(data) > 20_000


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, o: compare(m, m, batches()), LinearQuantValueError, "are one object"),
        (lambda m, o: compare(m, o, []), LinearQuantValueError, "inputs is empty"),
        (
            lambda m, o: compare(m, copy.deepcopy(m), batches()),
            LinearQuantValueError,
            "no layers to compare",
        ),
        (
            lambda m, o: compare(m, o, batches(), layers=["7"]),
            LinearQuantValueError,
            "layers has '7', which is not in both models",
        ),
        (lambda m, o: compare(m, o, ["text"]), LinearQuantTypeError, "inputs hold a str"),
        (
            lambda m, o: compare(m, nn.Sequential(Noisy(nn.Linear(16, 8), 0.0)), batches()),
            LinearQuantValueError,
            r"0 gives \(4, 16\) in model_a and \(4, 8\) in model_b",
        ),
    ],
)
def test_refusals(call: Callable[..., Any], error: type[Exception], text: str) -> None:
    model = make()
    with pytest.raises(error, match=text):
        call(model, with_noise(model, {0: 0.1}))
