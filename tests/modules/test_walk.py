"""Which modules may be replaced: one answer for quantize, convert and load_checkpoint."""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lq_graph
from lq_graph import (
    A8W8Dynamic,
    A8W8Static,
    LinearQuantTypeError,
    LinearQuantValueError,
    QuantizedLinear,
    convert,
    quantize,
)
from lq_graph.modules.places import held_elsewhere, places_of
from lq_graph.modules.replaceable import why_not_replaceable
from support import cases
from support.cases import Case
from support.layers import VendorLinearQuant, vendor_for

F16 = torch.float16


def _does_nothing(*_: Any) -> None:
    return None


def _double(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)  # type: ignore[method-assign]


def _accelerate(module: nn.Module) -> None:
    """As accelerate's add_hook_to_module leaves it."""
    module._hf_hook, module._old_forward = object(), module.forward  # type: ignore[assignment]
    module.forward = partial(module._old_forward)  # type: ignore[method-assign]


def _add_parameter(module: nn.Module) -> None:
    module.lora_a = nn.Parameter(torch.ones(1))


def _add_module(module: nn.Module) -> None:
    module.adapter = nn.Identity()


def _other_class(module: nn.Module) -> None:
    module.__class__ = type("Mine", (type(module),), {})


def _weight_subclass(module: nn.Module) -> None:
    class Odd(Tensor):
        pass

    module.weight = nn.Parameter(module.weight.detach().as_subclass(Odd), requires_grad=False)


def _weight_no_parameter(module: nn.Module) -> None:
    weight = module.weight.detach()
    del module.weight
    module.weight = weight


def _method(module: nn.Module) -> None:
    module.half_of = MethodType(lambda self, x: self(x) / 2, module)  # type: ignore[assignment]


# what is done to a module, and what is said of it
UNUSUAL: dict[str, tuple[Callable[[Any], object], str]] = {
    "subclass": (_other_class, "a Mine, whose forward may differ"),
    "forward": (_double, "it has its own forward"),
    "accelerate": (_accelerate, "it has its own forward"),
    "call": (lambda m: setattr(m, "__call__", _does_nothing), "it has its own __call__"),
    "state_dict": (lambda m: setattr(m, "state_dict", dict), "it has its own state_dict"),
    "method": (_method, "it has its own method half_of"),
    "pre-hook": (lambda m: m.register_forward_pre_hook(_does_nothing), "it has forward hooks"),
    "hook": (lambda m: m.register_forward_hook(_does_nothing), "it has forward hooks"),
    "backward hook": (lambda m: m.register_full_backward_hook(_does_nothing), "backward hooks"),
    "backward pre-hook": (
        lambda m: m.register_full_backward_pre_hook(_does_nothing),
        "it has backward hooks",
    ),
    "state dict hook": (
        lambda m: m.register_state_dict_post_hook(_does_nothing),
        "it has state dict hooks",
    ),
    "load hook": (
        lambda m: m.register_load_state_dict_pre_hook(_does_nothing),
        "it has state dict hooks",
    ),
    "compiled": (lambda m: m.compile(backend="eager"), "was called on it, which would be lost"),
    "parameter": (_add_parameter, "it holds an additional tensor, lora_a"),
    "buffer": (lambda m: m.register_buffer("mask", torch.ones(1)), "an additional tensor, mask"),
    "module": (_add_module, "it holds an additional module, adapter"),
    "tensor subclass": (_weight_subclass, "its weight is a Odd"),
    "no parameter": (_weight_no_parameter, "its weight is not a parameter"),
}
# those that need a float weight
UNUSUAL_LINEAR: dict[str, tuple[Callable[[Any], object], str]] = {
    **UNUSUAL,
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()),
        "a ParametrizedLinear, whose forward may differ",
    ),
    "weight norm": (parametrizations.weight_norm, "a ParametrizedLinear"),
    "old weight norm": (nn.utils.weight_norm, "it has forward hooks"),
    "spectral norm": (parametrizations.spectral_norm, "a ParametrizedLinear"),
    "old spectral norm": (nn.utils.spectral_norm, "it has forward hooks"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "it has forward hooks"),
    "gradient hook": (
        lambda m: m.weight.register_hook(_does_nothing),
        "its weight has gradient hooks",
    ),
    "accumulated": (
        lambda m: m.weight.register_post_accumulate_grad_hook(_does_nothing),
        "its weight has gradient hooks",
    ),
    "bias of one": (
        lambda m: setattr(m, "bias", nn.Parameter(torch.ones(1, dtype=F16))),
        r"its bias has shape \(1,\)",
    ),
    "weight of one dim": (
        lambda m: setattr(m, "weight", nn.Parameter(torch.ones(16, dtype=F16))),
        r"its weight has shape \(16,\)",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", UNUSUAL_LINEAR)
def test_quantize_leaves_it_float(kind: str) -> None:
    change, text = UNUSUAL_LINEAR[kind]
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).half()
    change(model[1])
    unusual = model[1]
    report = quantize(model, A8W8Dynamic())
    assert [r.changed for r in report] == [True, False]
    assert model[1] is unusual
    assert re.search(text, report[1].note)


@pytest.mark.parametrize("kind", UNUSUAL)
def test_convert_refuses_it(kind: str) -> None:
    change, text = UNUSUAL[kind]
    good, bad = vendor_for(cases.make(Case())), vendor_for(cases.make(Case()))
    change(bad)
    model = nn.Sequential(good, nn.Sequential(bad))
    if kind == "subclass":
        with pytest.warns(UserWarning, match=f"convert: 1.0 is left alone: {text}"):
            convert(model)
        assert type(model[0]) is lq_graph.LinearQuant and model[1][0] is bad
        return
    with pytest.raises(
        LinearQuantTypeError, match=f"convert: 1.0: .*{text}.*the model is unchanged"
    ):
        convert(model)
    assert model[0] is good and model[1][0] is bad


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_quantized_linear_and_its_inner_layer(kind: str) -> None:
    change, text = UNUSUAL[kind]
    for inner in (False, True):
        model = nn.Sequential(nn.Linear(16, 16)).half()
        quantize(model, A8W8Dynamic())
        assert why_not_replaceable(model[0], QuantizedLinear) == ""
        if kind in ("tensor subclass", "no parameter") and not inner:
            continue  # its weight is not its own
        change(model[0].linear if inner else model[0])
        why = why_not_replaceable(model[0], QuantizedLinear)
        if not (inner and kind == "subclass"):
            assert text in why
        assert why


def test_the_way_back_leaves_dynamic_layers() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).half()
    quantize(model, A8W8Dynamic())
    with pytest.raises(
        LinearQuantTypeError, match=r"convert: 0\.linear: its QuantizedLinear gives"
    ):
        convert(model, to="torch_npu")
    model = nn.Sequential(nn.Linear(16, 16)).half()
    x = torch.randn(4, 16, dtype=F16)
    quantize(model, A8W8Static(), [x])
    want = model(x)
    convert(model, to="torch_npu")
    assert type(model[0].linear) is VendorLinearQuant
    assert torch.equal(model.npu()(x.npu()).cpu(), want)


@pytest.mark.parametrize("where", [nn.Linear, nn.Module])
def test_a_forward_replaced_for_all(
    where: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(16, 16)).half()
    if where is nn.Linear:
        forward = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
        with pytest.raises(
            LinearQuantValueError, match=r"the forward of class nn\.Linear was patched"
        ):
            quantize(model, A8W8Dynamic())
        return
    handle = nn.modules.module.register_module_forward_hook(_does_nothing)
    try:
        with pytest.raises(LinearQuantValueError, match="there are forward hooks for all modules"):
            quantize(model, A8W8Dynamic())
    finally:
        handle.remove()


class Slots:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer


class Holder(nn.Module):
    """A layer that is held in another way too."""

    def __init__(self, hold: Callable[[nn.Module, nn.Linear], object]) -> None:
        super().__init__()
        self.plain, self.layer, self.extra = (nn.Linear(16, 16, dtype=F16) for _ in range(3))
        hold(self, self.layer)


@pytest.mark.parametrize(
    ("hold", "text"),
    [
        (lambda m, layer: setattr(m, "taps", [layer]), "taps holds it too"),
        (lambda m, layer: setattr(m, "taps", {"a": (layer,)}), "taps holds it too"),
        (lambda m, layer: setattr(m, "call", partial(nn.Linear.forward, layer)), "call holds it"),
        (lambda m, layer: setattr(m, "call", layer.forward), "call holds it too"),
        (lambda m, layer: object.__setattr__(m, "again", layer), "again holds it too"),
        (
            lambda m, layer: setattr(m, "compiled", torch.compile(layer, backend="eager")),
            "torch.compile was called on this module alone: call it afterwards",
        ),
        (lambda m, layer: setattr(m, "taps", deque([layer])), "taps holds it too"),
        (lambda m, layer: setattr(m, "helper", SimpleNamespace(x=[layer])), "helper holds it too"),
        (lambda m, layer: setattr(m, "helper", Slots(layer)), "helper holds it too"),
        (lambda m, layer: setattr(m, "call", lambda x: layer(x)), "call holds it too"),
        (lambda m, layer: setattr(m, "call", lambda x, by=layer: by(x)), "call holds it too"),
        (
            lambda m, layer: m.plain.register_forward_hook(lambda *a: layer(a[2])),
            "plain._forward_hooks holds it too",
        ),
        (lambda m, layer: setattr(type(m), "shared", {"x": layer}), "Holder.shared holds it too"),
        (lambda m, layer: setattr(m, "by", weakref.ref(layer)), "by holds it too"),
        (lambda m, layer: setattr(m, "by", [nn.Sequential(layer)]), "by holds it too"),
        (lambda m, layer: setattr(m, "taps", [layer.weight]), "taps holds it too"),
        (lambda m, layer: object.__setattr__(m, "again", layer.bias), "again holds it too"),
        (lambda m, layer: setattr(m, "again", layer.weight.data), "again holds it too"),
        (
            lambda m, layer: setattr(m, "by", SimpleNamespace(f=lambda x: layer(x), by=m)),
            "by holds it too",
        ),
    ],
    ids=["list", "dict", "partial", "method", "attribute", "torch.compile"]
    + ["deque", "object", "slots", "closure", "default", "hook", "class", "weakref", "unregistered"]
    + ["weight in a list", "bias as an attribute", "data", "enclosed in an object"],
)
def test_held_elsewhere(hold: Callable[[nn.Module, nn.Linear], object], text: str) -> None:
    model = type("Holder", (Holder,), {})(hold)  # a class that may be given attributes
    layer = model.layer
    report = {r.name: r for r in quantize(model, A8W8Dynamic())}
    assert report["extra"].changed and not report["layer"].changed
    assert text in report["layer"].note and model.layer is layer


def test_iterators_are_not_consumed_when_holders_are_searched() -> None:
    model = Holder(lambda m, layer: setattr(m, "items", iter([1, 2])))
    model.generator = (i for i in (1, 2))
    model.array = np.zeros(1 << 24)  # looked into, it would take seconds
    quantize(model, A8W8Dynamic())
    assert list(model.items) == list(model.generator) == [1, 2]


class Strict(nn.Module):
    """A parent that takes nothing but nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 16)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "layer" and type(value) is not nn.Linear:
            raise TypeError("no nn.Linear")
        super().__setattr__(name, value)


@pytest.mark.parametrize("parent", [Strict, lambda: nn.ModuleList([nn.Linear(64, 16)]),
                                    lambda: nn.ModuleDict({"a": nn.Linear(64, 16)})])  # fmt: skip
def test_a_parent_has_no_say_when_layers_are_put_in_place(
    parent: Callable[[], nn.Module],
) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 64), parent()).half()
    quantize(model, A8W8Dynamic())
    layers = [model[0], model[1], next(iter(model[2].children()))]
    assert all(type(layer) is QuantizedLinear for layer in layers)
    if isinstance(model[2], Strict):
        assert model[2].layer is layers[2]
    else:
        assert (model[2]["a"] if isinstance(model[2], nn.ModuleDict) else model[2][0]) is layers[2]


def test_functional_linear_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: 2 * linear(*args))
    with pytest.raises(LinearQuantValueError, match=r"torch.nn.functional.linear was patched"):
        quantize(nn.Sequential(nn.Linear(16, 16)).half(), A8W8Dynamic())


def test_held_elsewhere_finds_nothing_in_usual_models() -> None:
    assert not held_elsewhere(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2))


@pytest.mark.parametrize(
    "parent", [nn.MultiheadAttention(16, 2), nn.TransformerEncoderLayer(16, 2, 32)]
)
def test_parents_that_read_the_weight(parent: nn.Module) -> None:
    name = "out_proj" if isinstance(parent, nn.MultiheadAttention) else "linear1"
    setattr(parent, name, nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(16, 16), parent).half()
    quantize(model, A8W8Dynamic())
    child = getattr(parent, name)
    assert type(child) is nn.Linear
    assert "reads the weight itself" in why_not_replaceable(
        child, nn.Linear, places_of(model)[child]
    )


def test_plain_attributes_are_carried_over() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).half().eval()
    vars(model[0]).update(_is_hf_initialized=True, layer_idx=3, table=torch.ones(2))
    model[0].weight.requires_grad_(False)
    table = model[0].table
    quantize(model, A8W8Dynamic())
    assert model[0]._is_hf_initialized is True and model[0].layer_idx == 3
    assert model[0].table is table and not model[0].training
    vendor = vendor_for(cases.make(Case()))
    vendor.layer_idx = 4
    assert convert(vendor).layer_idx == 4


def test_an_attribute_of_the_same_name_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).half()
    model[1].input_scale = 2.0
    before = list(model)
    with pytest.raises(
        LinearQuantTypeError, match=r"quantize: 1: .*attribute of its own, input_sc"
    ):
        quantize(model, A8W8Dynamic())
    assert list(model) == before
