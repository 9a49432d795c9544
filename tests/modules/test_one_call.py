"""A QuantizedLinear on the CPU: one call of the compiled kernel gives the bits of the two
operators, and is made only if nothing looks between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, kernels
from lq_graph.kernels import library
from support.native import needs_kernel

pytestmark = [pytest.mark.native, needs_kernel]
F16, BF16 = torch.float16, torch.bfloat16
CONFIGS = {"dynamic": A8W8Dynamic(), "static": A8W8Static(), "int4": A4W4Dynamic()}


def quantized(
    config: str, dtype: torch.dtype, *, k: int = 72, n: int = 40, bias: bool = True
) -> lq_graph.QuantizedLinear:
    torch.manual_seed(k * n)
    model = nn.Sequential(nn.Linear(k, n, bias=bias).to(dtype))
    batches = [torch.randn(9, k).to(dtype)] if config == "static" else None
    lq_graph.quantize(model, CONFIGS[config], batches)
    layer = model[0]
    assert isinstance(layer, lq_graph.QuantizedLinear)
    return layer


def by_operators(layer: lq_graph.QuantizedLinear, x: Tensor) -> Tensor:
    """What the two operators compute."""
    linear, rows = layer.linear, x.reshape(-1, x.shape[-1])
    if layer.dynamic:
        values, pertoken = lq_graph.dynamic_quant(rows, dtype=linear.weight.dtype)
    else:
        assert layer._scale_reciprocal is not None
        values = lq_graph.static_quant(rows, layer._scale_reciprocal, layer._offset)
        pertoken = None
    out = lq_graph.linear_quant(
        values,
        linear.weight,
        linear.scale,
        linear.offset,
        pertoken,
        linear.bias,
        output_dtype=linear.output_dtype,
    )
    return out.view(*x.shape[:-1], -1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The outputs of single calls."""
    made: list[Tensor] = []
    layer = kernels.quant_layer

    def noted(*args: Any, **kwargs: Any) -> Tensor | None:
        out = layer(*args, **kwargs)
        if out is not None:
            made.append(out)
        return out

    monkeypatch.setattr(kernels, "quant_layer", noted)
    return made


@pytest.mark.parametrize("name", library.instruction_sets())
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "n"), [(72, 40), (576, 192), (1032, 64)])
def test_the_bits_of_the_two_operators(
    name: str, config: str, dtype: torch.dtype, bias: bool, k: int, n: int, calls: list[Tensor]
) -> None:
    layer = quantized(config, dtype, k=k, n=n, bias=bias)
    inputs = [torch.randn(m, k).to(dtype) for m in (1, 2, 15, 16, 40)]
    inputs += [
        torch.randn(2, 3, 5, k).to(dtype),
        torch.randn(k).to(dtype),
        torch.randn(40, 2 * k).to(dtype)[::2, :k],
        torch.randn(k, 6).to(dtype).t(),
        torch.zeros(3, k, dtype=dtype),
        torch.full((3, k), 60000.0).to(dtype),
        torch.tensor([float("inf"), float("nan"), 0.0]).repeat(k // 3).expand(2, k).to(dtype),
    ]
    with library.using(name), torch.no_grad():
        for number, x in enumerate(inputs, 1):
            out = layer(x)
            assert len(calls) == number
            want = by_operators(layer, x)
            assert out.shape == want.shape and out.dtype == want.dtype
            assert torch.equal(out.nan_to_num(7.0), want.nan_to_num(7.0)), x.shape


def test_the_product_decides(calls: list[Tensor]) -> None:
    layer, x = quantized("dynamic", F16, k=64), torch.randn(20, 64).half()
    before = lq_graph.get_product()
    outputs = {}
    try:
        for product in ("A2", "A3", "950"):
            lq_graph.set_product(product)
            outputs[product] = layer(x)
            assert torch.equal(outputs[product], by_operators(layer, x))
    finally:
        lq_graph.set_product(before)
    assert len(calls) == 3


# ---- what looks between the operators ----


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def hook_of_linear(layer: lq_graph.QuantizedLinear) -> Iterator[None]:
    handle = layer.linear.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def hook_of_all(layer: lq_graph.QuantizedLinear) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def own_forward(layer: lq_graph.QuantizedLinear) -> Iterator[None]:
    layer.linear.forward = layer.linear.forward  # type: ignore[method-assign]
    yield


def only(make: Callable[[], AbstractContextManager[Any]]) -> Callable[[Any], Any]:
    return lambda layer: make()


LOOKS: dict[str, tuple[Callable[[Any], AbstractContextManager[Any]], bool]] = {
    "nothing": (only(nullcontext), True),
    "inference_mode": (only(torch.inference_mode), True),
    "no_grad": (only(torch.no_grad), True),
    "a mode": (only(Seen), False),
    "torch.profiler": (only(profile), False),
    "autocast": (only(lambda: torch.autocast("cpu", dtype=BF16)), False),
    "a hook of the product": (hook_of_linear, False),
    "a hook of all modules": (hook_of_all, False),
    "a forward of its own": (own_forward, False),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("config", CONFIGS)
def test_only_if_nothing_looks(look: str, config: str, calls: list[Tensor]) -> None:
    layer, x = quantized(config, BF16), torch.randn(20, 72).bfloat16()
    want = by_operators(layer, x)
    within, one_call = LOOKS[look]
    with within(layer):
        out = layer(x)
    assert len(calls) == one_call
    assert torch.equal(out, want)


def test_an_input_that_requires_grad_gets_the_warning(calls: list[Tensor]) -> None:
    layer, x = quantized("dynamic", BF16), torch.randn(20, 72).bfloat16().requires_grad_()
    with pytest.warns(UserWarning, match="no gradient passes"):
        out = layer(x)
    assert not calls and not out.requires_grad
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(x), out)
    assert len(calls) == 1


def test_torch_func_and_compile(calls: list[Tensor]) -> None:
    layer, x = quantized("dynamic", BF16), torch.randn(4, 5, 72).bfloat16()
    want = by_operators(layer, x)
    assert torch.equal(torch.func.vmap(layer)(x), want)
    assert torch.equal(torch.compile(layer, backend="eager")(x), want)
    assert not calls


# ---- refusals ----


def refusal(function: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (whichever it is)
        function()
    return caught.type, str(caught.value)


def wrong_k(layer: lq_graph.QuantizedLinear) -> Tensor:
    return torch.randn(3, 64).to(layer.input_dtype)


def float32_rows(layer: lq_graph.QuantizedLinear) -> Tensor:
    return torch.randn(3, 72)


def not_finite(layer: lq_graph.QuantizedLinear) -> Tensor:
    layer.linear.scale.data[3] = float("nan")
    return torch.randn(3, 72).to(layer.input_dtype)


def freed(layer: lq_graph.QuantizedLinear) -> Tensor:
    x = torch.randn(3, 72).to(layer.input_dtype)
    x.untyped_storage().resize_(8)
    return x


def freed_scale(layer: lq_graph.QuantizedLinear) -> Tensor:
    layer.linear.scale.untyped_storage().resize_(8)
    return torch.randn(3, 72).to(layer.input_dtype)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("make", [wrong_k, float32_rows, freed, freed_scale, not_finite])
def test_refused_in_the_operators_words(
    make: Callable[[lq_graph.QuantizedLinear], Tensor], config: str, dtype: torch.dtype
) -> None:
    """A hook makes the layer call the operators."""
    layer = quantized(config, dtype)
    x = make(layer)
    with hook_of_linear(layer), torch.no_grad():
        if make is not_finite and (config, dtype) != ("static", F16):
            assert layer(x).isnan().any()  # a float scale that is not folded
            return
        want = refusal(lambda: layer(x))
    with torch.no_grad():
        assert refusal(lambda: layer(x)) == want
    assert (" bytes" in want[1]) is (make in (freed, freed_scale))
    assert issubclass(want[0], (lq_graph.LinearQuantError, ValueError))
