"""The advice of quantize() and smooth(): it names what the model and the product take, and whoever
follows it comes through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuantError,
    LinearQuantValueError,
    quantize,
    smooth,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PRODUCTS = ("Ascend310P3", "Ascend910B2", "Ascend950")
SCHEMES = {"A8W8 dynamic": A8W8Dynamic, "A8W8 static": A8W8Static, "A4W4 dynamic": A4W4Dynamic}
CALLS = {"model.half()": nn.Module.half, "model.bfloat16()": nn.Module.bfloat16}
DTYPES = {"float16": nn.Module.half, "bfloat16": nn.Module.bfloat16}
BATCHES = [torch.randn(8, 64, generator=torch.Generator().manual_seed(0))]  # float32, always


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    product = lq_graph.get_product()
    yield
    lq_graph.set_product(str(product))


def quantized(model: nn.Module, scheme: Any) -> str:
    """Empty, or what quantize says."""
    try:
        (result,) = quantize(model, scheme, BATCHES if type(scheme) is A8W8Static else None)
    except LinearQuantValueError as error:
        return str(error)
    return result.note


def follow(advice: str, model: nn.Module, scheme: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Each way that an advice names: the model and the scheme."""
    output = None if "leave output_dtype out" in advice else scheme.output_dtype
    calls = re.findall(r"model\.\w+\(\)", advice)
    for call in calls or ["as it is"] * ("output_dtype" in advice):
        yield CALLS.get(call, lambda m: m)(model), type(scheme)(output_dtype=output)
    if "runs" in advice:
        for name, dtypes in re.findall(r"(A\dW\d \w+) in ([\w ]+)", advice):
            for dtype in dtypes.split(" or "):
                yield DTYPES[dtype](model), SCHEMES[name]()


@pytest.mark.parametrize("output", [None, F16, BF16, F32])
@pytest.mark.parametrize("scheme", SCHEMES.values())
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("product", PRODUCTS)
def test_what_quantize_advises_works(
    product: str, dtype: torch.dtype, scheme: Any, output: torch.dtype | None
) -> None:
    lq_graph.set_product(product)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64)).to(dtype)

    said = quantized(make(), scheme(output_dtype=output))
    runs = product != PRODUCTS[0] or (scheme is A8W8Static and dtype == F16 and output != BF16)
    assert bool(said) == (dtype == F32 or output == F32 or not runs)
    if not said:
        return
    advice = said.rpartition("What to do: ")[2]
    ways = list(follow(advice, make(), scheme(output_dtype=output)))
    assert ways and ("bfloat16" not in advice or product != PRODUCTS[0])
    for model, other in ways:
        model = make().to(next(model.parameters()).dtype)
        assert quantized(model, other) == "", advice


class Overflows(nn.Module):
    """Values that float16 does not hold, in the input of `last`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.last(x * 6e4 * x.abs().amax())


@pytest.mark.parametrize(
    ("dtype", "product", "advice"),
    [
        (F16, "Ascend910B2", "check the inputs, call model.bfloat16() first, or leave the layer "),
        (F16, "Ascend310P3", "check the inputs, or leave the layer float: ignore=['last']."),
    ],
)
def test_infinity_during_calibration(dtype: torch.dtype, product: str, advice: str) -> None:
    lq_graph.set_product(product)
    with pytest.raises(LinearQuantValueError, match=re.escape(advice)):
        quantize(Overflows().to(dtype), A8W8Static(), BATCHES)
    if "bfloat16" in advice:
        quantize(Overflows().bfloat16(), A8W8Static(), BATCHES)
    report = quantize(Overflows().to(dtype), A8W8Static(), BATCHES, ignore=["last"])
    assert [r.name for r in report if r.changed] == ["first"]


def test_infinity_in_a_bfloat16_model_is_not_float16s() -> None:
    bad = [torch.full((8, 64), torch.inf)]
    for function in (lambda m: quantize(m, A8W8Static(), bad), lambda m: smooth(m, bad)):
        with pytest.raises(LinearQuantError, match="check the inputs") as found:
            function(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)).bfloat16())
        assert "bfloat16" not in str(found.value)


def test_infinity_in_smooth() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.LayerNorm(64), nn.Linear(64, 64)
            nn.init.constant_(self.norm.weight, 6e4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(x))

    with pytest.raises(LinearQuantValueError, match=r"or call model\.bfloat16\(\) first"):
        smooth(Large().half(), BATCHES)
    assert smooth(Large().bfloat16(), BATCHES)[0].changed


@pytest.mark.parametrize("batches", [[torch.full((8, 64), 1e-6)], [torch.zeros(8, 64)]])
def test_activations_without_a_static_scale(batches: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    report = quantize(model, A8W8Static(), batches)
    assert report[0].note.endswith("What to do: use A8W8Dynamic for it.") and report[1].changed
    again = quantize(model, {"0": A8W8Dynamic(), "*": A8W8Static()})
    assert [r.scheme for r in again] == ["A8W8 dynamic"]


def test_a_scale_that_output_dtype_does_not_hold() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    nn.init.constant_(model[0].bias, 1e5)
    with pytest.raises(LinearQuantValueError, match=r"leave output_dtype out.*ignore=\['0'\]"):
        quantize(model, A8W8Dynamic(output_dtype=F16))
    assert quantize(model, A8W8Dynamic())[0].changed


# ---- inputs ----


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("given", [F16, BF16, F32, F64])
def test_inputs_are_cast_to_the_models_dtype(given: torch.dtype, dtype: torch.dtype) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(8, 64), nn.LayerNorm(64)
            self.out = nn.Linear(64, 64)

        def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            assert x.dtype == dtype and ids.dtype == torch.int64 and mask.dtype == torch.bool
            return self.out(self.norm(x + self.embed(ids) * mask[:, None]))

    inputs = {
        "x": torch.ones(8, 64, dtype=given),
        "ids": torch.arange(8),
        "mask": torch.ones(8, dtype=torch.bool),
    }
    model = Takes().to(dtype)
    assert smooth(model, [inputs])[0].changed
    assert quantize(model, A8W8Static(), [inputs], example_inputs=[tuple(inputs.values())])[
        0
    ].changed
    assert inputs["x"].dtype == given


def test_inputs_are_moved_to_the_models_device() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).half().npu()
    assert quantize(model, A8W8Static(), BATCHES)[0].changed


def test_a_half_input_of_a_model_that_begins_in_float32() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.linear = nn.Linear(64, 64).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    assert quantize(Scaled(), A8W8Static(), [x.half() for x in BATCHES])[0].changed
