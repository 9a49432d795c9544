"""lq_graph.LinearQuant: both signatures, parameters, state dicts, repr."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from lq_graph import LinearQuant, LinearQuantTypeError, LinearQuantValueError
from support import cases, has
from support.cases import BF16, F16, F32, I8, I32, I64, Case
from support.layers import module_for


@pytest.mark.parametrize("case", cases.ROW_CASES, ids=str)
def test_module_equals_golden(case: Case) -> None:
    inputs = cases.make(case)
    cases.assert_equal(module_for(inputs)(inputs["x1"]), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.ROW_CASES[::4], ids=str)
def test_inductor_compiles_the_module_without_a_break(case: Case) -> None:
    has.need_inductor()
    torch._dynamo.reset()
    inputs = cases.make(case)
    compiled = torch.compile(module_for(inputs), fullgraph=True)
    cases.assert_equal(compiled(inputs["x1"]), inputs)


def test_pertoken_scale_may_come_with_the_input() -> None:
    inputs = cases.make(Case(output=BF16, pertoken=True))
    pertoken = inputs["pertoken_scale"]
    layer = module_for({**inputs, "pertoken_scale": None})
    cases.assert_equal(layer(inputs["x1"], pertoken), inputs)


def test_defaults_are_the_vendors() -> None:
    layer = LinearQuant(16, 8)
    assert (layer.weight.dtype, tuple(layer.weight.shape)) == (I8, (8, 16))
    assert (layer.scale.dtype, tuple(layer.scale.shape)) == (F32, (8,))
    assert (layer.bias.dtype, tuple(layer.bias.shape)) == (I32, (8,))
    assert layer.offset is None and layer.pertoken_scale is None and layer.output_dtype is None
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer(torch.ones(2, 16, dtype=I8)).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("kwargs", "dtype", "shape"),
    [
        (dict(device="meta", dtype=None), I8, (8, 16)),
        (dict(device="cpu", dtype=I32), I32, (8, 2)),
        (dict(x1_dtype=None, x2_dtype=None, group_size=None), I8, (8, 16)),
        (dict(x1_dtype=I8, x2_dtype=I8, group_size=0), I8, (8, 16)),
        (dict(x1_dtype=I32, x2_dtype=I32), I32, (8, 2)),
        (dict(x2_dtype=I32), I32, (8, 2)),
    ],
)
def test_both_signatures(kwargs, dtype, shape) -> None:
    layer = LinearQuant(16, 8, bias=False, offset=True, output_dtype=F16, **kwargs)
    assert (layer.weight.dtype, tuple(layer.weight.shape)) == (dtype, shape)
    assert layer.weight.device.type == (kwargs.get("device") or "cpu")
    assert layer.offset is not None and layer.bias is None


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((16, 8), dict(dtype=F16), LinearQuantTypeError, "dtype is torch.float16; allowed are"),
        ((16, 8), dict(x1_dtype=I8, x2_dtype=I32), LinearQuantTypeError, "x1_dtype=int8, x2_dtype"),
        ((16, 8), dict(x1_dtype=1), LinearQuantTypeError, "x1_dtype is 1; allowed are torch.int8"),
        ((16, 8), dict(x2_dtype=F16), LinearQuantTypeError, "x2_dtype is torch.float16; allowed"),
        ((16, 8), dict(group_size=128), LinearQuantValueError, "group_size is 128; per-group"),
        ((12, 8), dict(dtype=I32), LinearQuantValueError, "in_features is 12; .* multiple of 8"),
        ((16, 9), dict(dtype=I32), LinearQuantValueError, "out_features is 9; .* multiple of 8"),
        ((0, 8), dict(), LinearQuantValueError, "in_features is 0"),
    ],
)
def test_constructor_refuses(args, kwargs, error, match) -> None:
    with pytest.raises(error, match=match):
        LinearQuant(*args, **kwargs)


@pytest.mark.parametrize(
    ("stated", "x1", "weight", "match"),
    [
        (dict(x1_dtype=I8), I32, I32, r"x1 is int32, .* x1_dtype=int8; allowed is int8. What to"),
        (dict(x2_dtype=I32), I8, I8, r"weight is int8, .* x2_dtype=int32; allowed is int32\."),
        (dict(x1_dtype=I8, x2_dtype=I8), I8, I32, "weight is int32"),
    ],
)
def test_tensors_are_held_against_the_stated_dtypes(stated, x1, weight, match) -> None:
    layer = LinearQuant(16, 8, bias=False, output_dtype=F16, **stated)
    layer.weight.data = torch.zeros(8, 16 if weight == I8 else 2, dtype=weight)
    with pytest.raises(LinearQuantTypeError, match=match):
        layer(torch.zeros(3, 16 if x1 == I8 else 2, dtype=x1))


@pytest.mark.parametrize("case", cases.ROW_CASES, ids=str)
def test_state_dict_keeps_every_dtype(case: Case) -> None:
    inputs = cases.make(case)
    layer = module_for(inputs)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = module_for({**cases.make(Case(k=case.k, n=case.n)), **{
        name: inputs[name] and torch.zeros_like(inputs[name]) if inputs[name] is None
        else torch.zeros(1) for name in ("offset", "bias", "pertoken_scale")
    }, "output_dtype": case.output})  # fmt: skip
    fresh.load_state_dict(torch.load(file))
    for name, tensor in layer.state_dict().items():
        loaded = fresh.state_dict()[name]
        assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name
    cases.assert_equal(fresh(inputs["x1"]), inputs)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", torch.zeros(8, 15, dtype=I8)),
        ("weight", torch.zeros(8, 16, dtype=I32)),
        ("weight", torch.zeros(8, 16)),
        ("weight", torch.zeros(8, 16, dtype=I64)),
        ("scale", torch.zeros(5)),
        ("scale", torch.zeros(8, dtype=F16)),
        ("bias", torch.zeros(5, dtype=I32)),
        ("bias", torch.zeros(8, dtype=I64)),
    ],
)
def test_state_dict_with_another_dtype_or_size_is_refused_unchanged(name, tensor) -> None:
    layer = LinearQuant(16, 8)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=rf"{name} is .* in the state dict; allowed is"):
        layer.load_state_dict({**before, name: tensor})
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]) and value.dtype == before[key].dtype


@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
def test_model_wide_casts_leave_the_quantization_alone(move: str) -> None:
    inputs = cases.make(Case(offset=True, bias=I32))
    model = nn.Sequential(module_for(inputs), nn.LayerNorm(4))
    getattr(model, move)()
    assert model[1].weight.dtype != F32
    cases.assert_equal(model[0](inputs["x1"]), inputs)


def test_to_meta_and_copies() -> None:
    layer = module_for(cases.make(Case(scale=I64, bias=I32)))
    assert {p.device.type for p in copy.deepcopy(layer).to("meta").parameters()} == {"meta"}
    assert copy.deepcopy(layer).scale.dtype == I64


def test_repr_differs_for_every_setting() -> None:
    base = cases.make(Case(n=8, k=16))
    variants = [
        base,
        {**base, "output_dtype": F16},
        {**base, "scale": base["scale"].to(I64)},
        {**base, "scale": base["scale"][:1]},
        {**base, "bias": torch.zeros(8, dtype=I32)},
        {**base, "bias": torch.zeros(8)},
        {**base, "offset": torch.zeros(8)},
        {**base, "offset": torch.zeros(1)},
        {**base, "pertoken_scale": torch.zeros(3)},
        {**base, "weight": torch.zeros(8, 2, dtype=I32)},
    ]
    texts = [str(module_for(v)) for v in variants]
    assert len(set(texts)) == len(texts)
    assert texts[0] == (
        "LinearQuant(in_features=16, out_features=8, weight=int8[8, 16], scale=float32[8], "
        "offset=None, pertoken_scale=None, bias=None, output_dtype=int8)"
    )


def test_packed_scale_state_dict_loads_into_a_float_one() -> None:
    inputs = cases.make(Case(scale=I64, offset=True))
    layer = LinearQuant(40, 24, bias=False, offset=True)
    layer.load_state_dict(module_for(inputs).state_dict())
    cases.assert_equal(layer(inputs["x1"]), inputs)


def test_a_parametrized_layer_runs() -> None:
    class Negative(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return -weight

    inputs = cases.make(Case(output=I32))
    inputs["weight"] = inputs["weight"].clamp(-127)
    layer = module_for(inputs)
    nn.utils.parametrize.register_parametrization(layer, "weight", Negative(), unsafe=True)
    inputs["weight"] = -inputs["weight"]
    cases.assert_equal(layer(inputs["x1"]), inputs)
