"""quantize(): which layer gets which scheme, by patterns of names."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuantError,
    LinearQuantValueError,
    QuantizedLinear,
    compare,
    quantize,
)
from support.float_models import assert_unchanged, data, state

F16 = torch.float16
W8, STATIC, W4 = A8W8Dynamic(), A8W8Static(), A4W4Dynamic()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.q_proj, self.o_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(64, 64), "down_proj": nn.Linear(64, 64)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o_proj(self.q_proj(self.norm(x)))
        return x + self.mlp["down_proj"](self.mlp["up_proj"](x).relu())


class Model(nn.Module):
    """Names as decoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def make() -> Model:
    torch.manual_seed(0)
    return Model().half().eval()


def schemes_of(model: nn.Module, *args: Any, **options: Any) -> dict[str, str]:
    return {r.name: r.scheme or r.note for r in quantize(model, *args, **options)}


D8, D4, S8 = "A8W8 dynamic", "A4W4 dynamic", "A8W8 static"
BY_DEFAULT = "an output layer, float by default"
NO_PATTERN = "no pattern matches it"


@pytest.mark.parametrize(
    ("scheme", "ignore", "want"),
    [
        # the layers of block 0 and 1: q_proj, o_proj, up_proj, down_proj; lm_head
        (W8, (), [D8] * 8 + [BY_DEFAULT]),
        ({"*": W8}, (), [D8] * 8 + [BY_DEFAULT]),
        ({"*": W8, "lm_head": W8}, (), "which matches only layers that '*'"),
        ({"lm_head": W4, "*": W8}, (), [D8] * 8 + [D4]),
        ({"*lm_head": W8}, (), [NO_PATTERN] * 8 + [D8]),
        ({r"re:lm_head$": W8}, (), [NO_PATTERN] * 8 + [D8]),
        ({"*down_proj": W8, "layers.0.*": None, "*": W4}, (),
         [None, None, None, D8, D4, D4, D4, D8, BY_DEFAULT]),
        ({"*.mlp.*": W4}, (), [NO_PATTERN, NO_PATTERN, D4, D4] * 2 + [NO_PATTERN]),
        ({"layers.?.q_proj": W8}, (), [D8, *[NO_PATTERN] * 3] * 2 + [NO_PATTERN]),
        ({r"re:.*\.(q|o)_proj": W8, "*": W4}, (), [D8, D8, D4, D4] * 2 + [BY_DEFAULT]),
        (W8, ["*.mlp.*"], [D8, D8, None, None] * 2 + [BY_DEFAULT]),
        (W8, ["lm_head", r"re:.*\.1\."], [D8] * 4 + [None] * 5),
        ({"*.q_proj": W4, "*": W8}, ["layers.0.q_proj"],
         [None, D8, D8, D8, D4, D8, D8, D8, BY_DEFAULT]),
        (W8, ["*.norm"], [D8] * 8 + [BY_DEFAULT]),  # it holds no nn.Linear and is float anyhow
        # what decides about nothing
        ({"*.mlp.upproj": W8}, (), "the nearest names are layers.1.mlp.up_proj, layers.0.mlp"),
        ({"layers.0": W8, "*": W4}, (), "write 'layers.0.*', which matches the layers inside it"),
        ({"layers.0": None, "*": W4}, (), "write 'layers.0.*', which matches the layers inside it"),
        ({"*.norm": W8, "*": W4}, (), "which matches no nn.Linear layer"),
        (W8, ["lm_haed"], "ignore has 'lm_haed', which matches no nn.Linear layer. What to do: the "
         "nearest names are lm_head"),
        ({"*.o_proj": W8, "*.1.o_proj": None, "*": W4}, (), "put it first"),
        ({"lm_head": W8, "*": W4}, ["lm_head"], "scheme has 'lm_head', which matches only layers"),
        # what is no pattern or no scheme
        ({"re:(": W8}, (), "which is no regular expression"),
        ({3: W8}, (), "scheme has 3; allowed are patterns of names"),
        ({"*": "W8A8"}, (), "scheme['*'] is 'W8A8'; allowed are A8W8Dynamic()"),
        ({"*": A8W8Dynamic}, (), "allowed are A8W8Dynamic(), A8W8Static(), A4W4Dynamic() and None"),
        (A8W8Dynamic, (), "and a mapping of patterns of names to these or None"),
        (W8, "lm_head", "allowed is a list of patterns. What to do: pass ['lm_head']."),
        ({}, (), "none of the 9 nn.Linear layers can be quantized: 9 x no pattern"),
        ({"*": None}, (), "none of the 9 nn.Linear layers can be quantized: 9 x None is the"),
    ],
)  # fmt: skip
def test_which_layer_gets_which_scheme(scheme: Any, ignore: Any, want: Any) -> None:
    model = make()
    before = state(model)
    if isinstance(want, str):
        with pytest.raises(LinearQuantError, match=re.escape(want)):
            quantize(model, scheme, ignore=ignore)
        assert_unchanged(model, before)
        return
    got = schemes_of(model, scheme, ignore=ignore)
    for (name, one), wanted in zip(got.items(), want, strict=True):
        if wanted is None:
            assert one.startswith(("None is the scheme of '", "ignore has '")), name
        else:
            assert one.startswith(wanted), name
        layer = model.get_submodule(name)
        kind = str(layer.linear.weight.dtype) if isinstance(layer, QuantizedLinear) else None
        assert kind == {D8: "torch.int8", D4: "torch.int32"}.get(one), name


def test_the_report_says_which_pattern_leaves_a_layer_float() -> None:
    report = quantize(make(), {"layers.0.*": None, "*": W8}, ignore=["*.o_proj"])
    text = " ".join(str(report).split())
    assert "None is the scheme of 'layers.0.*'" in text and "ignore has '*.o_proj'" in text
    assert 'float by default; {"lm_head": A8W8Dynamic(), ...} quantizes it' in text
    assert "3 of 9 layers quantized" in text


def test_filter_fn_and_patterns_together() -> None:
    got = schemes_of(make(), {"*.mlp.*": W4, "*": W8}, filter_fn=lambda _, name: ".1." in name)
    assert list(got.values())[:-1] == ["filter_fn leaves it"] * 4 + [D8, D8, D4, D4]


def test_a_second_call_with_the_same_patterns_changes_nothing() -> None:
    model = make()
    quantize(model, {"*.mlp.*": W4, "*": W8}, ignore=["*.o_proj"])
    with pytest.raises(LinearQuantValueError, match=r"none of the 3 nn\.Linear layers"):
        quantize(model, {"*.mlp.*": W4, "*": W8}, ignore=["*.o_proj"])
    assert schemes_of(model, {"*.mlp.*": W4, "lm_head": W4})["lm_head"] == D4


def test_one_of_several_names_is_enough() -> None:
    model = nn.Module()
    model.a = nn.Linear(64, 64)
    model.same = model.a
    model.half()
    assert schemes_of(model, {"same": W8}) == {"a": D8}


# ---- mixed schemes ----


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_static_and_dynamic_in_one_call(device: str) -> None:
    """Each layer is what a call with its scheme alone makes of it."""
    batches = [x.to(device) for x in data()]
    mixed = {
        "*.q_proj": STATIC,
        "*.up_proj": W4,
        "*.down_proj": A8W8Static(symmetric=True),
        "*": W8,
    }
    model = make().to(device)
    report = quantize(model, mixed, batches)
    assert [r.scheme for r in report] == [S8, D8, D4, S8] * 2 + [""]
    for pattern, scheme in mixed.items():
        alone = make().to(device)
        quantize(alone, {pattern: scheme}, batches if isinstance(scheme, A8W8Static) else None)
        for r in report:
            other = alone.get_submodule(r.name)
            if isinstance(other, QuantizedLinear) and (pattern != "*" or r.scheme == D8):
                ours = model.get_submodule(r.name).state_dict()
                assert ours.keys() == other.state_dict().keys()
                for name, tensor in other.state_dict().items():
                    assert torch.equal(ours[name], tensor), (r.name, name)


@pytest.mark.parametrize(
    ("scheme", "calibration", "want"),
    [
        ({"*.q_proj": STATIC, "*": W8}, None, "calibration is absent; A8W8Static needs"),
        ({"*.q_proj": W4, "*": W8}, data(), "calibration is given; A4W4 dynamic and A8W8 dynamic"),
        ({"*.q_proj": STATIC, "*": W8}, data(), ""),
        ({"*.q_proj": STATIC, "*": W8}, [], "calibration has no inputs"),
    ],
)
def test_calibration_is_needed_if_a_layer_is_static(
    scheme: Any, calibration: Any, want: str
) -> None:
    model = make()
    if want:
        with pytest.raises(LinearQuantValueError, match=want):
            quantize(model, scheme, calibration)
    else:
        quantize(model, scheme, calibration)


def test_calibration_need_not_reach_a_dynamic_layer() -> None:
    model = make()
    model.expert, model.other = nn.Linear(64, 64).half(), nn.Linear(64, 64).half()
    got = schemes_of(model, {"expert": W8, "*": STATIC}, data())
    assert got["expert"] == D8 and got["other"] == "calibration never reached it"


@pytest.mark.parametrize(
    ("schemes", "connected"),
    [
        ([STATIC, STATIC], True),
        ([STATIC, A8W8Static(symmetric=True)], True),
        ([STATIC, W8], False),
        ([W8, STATIC], False),
        ([STATIC, A8W8Static(int8_between=False)], False),
        ([A8W8Static(int8_between=False), STATIC], False),
        ([STATIC, None], False),
    ],
)
def test_int8_stays_between_static_neighbours_only(schemes: list[Any], connected: bool) -> None:
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    model = copy.deepcopy(floats)
    quantize(model, {"0": schemes[0], "1": schemes[1]}, data())
    assert (getattr(model[0], "output_scale", None) is not None) == connected
    assert compare(floats, model, data()).output.cosine > 0.999


@pytest.mark.parametrize(
    "schemes", [{"a": W8, "b": W4}, {"a": W4, "b": STATIC}, {"a": STATIC, "b": W8}], ids=str
)
def test_layers_with_one_weight_and_two_schemes(schemes: Mapping[str, Any]) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    torch.manual_seed(0)
    floats = Shares().half()
    model = copy.deepcopy(floats)
    static = STATIC in schemes.values()
    quantize(model, schemes, data() if static else None)
    for layer in compare(floats, model, data()):
        assert layer.own is not None
        assert layer.own.sqnr > (15 if schemes[layer.name] == W4 else 35), layer.name


# ---- output layers ----


class Says(nn.Module):
    """A model with the method of transformers."""

    def __init__(self, tied: bool = False, fails: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.body, self.out = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.fails = fails
        if tied:
            self.out.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        if self.fails:
            raise NotImplementedError
        return self.out

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.body(self.embed(ids)))


IN_EMBEDDING = "it shares its weight with embed, which stays float"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("made", "scheme", "want"),
    [
        ({}, W8, BY_DEFAULT),
        ({}, {"*out": W8, "*": W8}, D8),
        ({}, {"*o*": W8}, BY_DEFAULT),
        ({"tied": True}, W8, IN_EMBEDDING),
        ({"tied": True}, {"*out": W8, "*": W8}, IN_EMBEDDING),
        ({"fails": True}, W8, D8),
    ],
)
def test_output_layers(made: Any, scheme: Any, want: str, wrapped: bool) -> None:
    model: nn.Module = Says(**made).half()
    if wrapped:  # as benchmarks and examples hold a model in a module
        model = nn.Sequential(model)
        want = want.replace("embed", "0.embed")
    got = schemes_of(model, scheme)
    assert [one for name, one in got.items() if name.endswith("body")] == [D8]
    (one,) = (one for name, one in got.items() if name.endswith("out"))
    assert one.startswith(want)


def test_an_adapter_around_an_output_layer() -> None:
    model = make()
    model.lm_head = nn.ModuleDict({"base_layer": model.lm_head})  # type: ignore[assignment]
    got = schemes_of(model, W8)
    assert got["lm_head.base_layer"].startswith(BY_DEFAULT)
    assert schemes_of(model, {"lm_head.*": W8}) == {"lm_head.base_layer": D8}


def test_the_last_layer_of_a_plain_model_is_no_output_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    assert set(schemes_of(model, W8).values()) == {D8}


def test_only_an_output_layer_is_left() -> None:
    model = make()
    quantize(model, W8)
    with pytest.raises(LinearQuantValueError, match="an output layer, float by default"):
        quantize(model, W8)
    assert schemes_of(model, {"lm_head": W8, "*": W8}) == {"lm_head": D8}
