"""convert(): the vendor's modules to ours and back."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch import nn

import lq_graph
from lq_graph import LinearQuant, LinearQuantTypeError, LinearQuantValueError, convert
from support import cases
from support.cases import I8, I32, ROW_CASES, Case
from support.layers import PARAMETERS, LinearA8W8Quant, VendorLinearQuant, vendor_for


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_there_and_back_shares_every_tensor(case: Case) -> None:
    inputs = cases.make(case)
    vendor = vendor_for(inputs)
    model = nn.ModuleDict({"up": nn.Sequential(vendor), "norm": nn.LayerNorm(4)}).eval()
    assert convert(model) is model
    ours = model["up"][0]
    assert type(ours) is LinearQuant and not ours.training
    for name in PARAMETERS:
        assert getattr(ours, name) is getattr(vendor, name)
    assert ours.output_dtype == vendor.output_dtype
    cases.assert_equal(ours(inputs["x1"]), inputs)

    convert(model, to="torch_npu")
    back = model["up"][0]
    assert type(back) is VendorLinearQuant
    for name in PARAMETERS:
        assert getattr(back, name) is getattr(vendor, name)
    cases.assert_equal(back.npu()(inputs["x1"].npu()), inputs)


def test_a_model_that_is_a_layer_comes_back_new() -> None:
    inputs = cases.make(Case(bias=I32))
    ours = convert(vendor_for(inputs))
    assert type(ours) is LinearQuant
    assert type(convert(ours, to="torch_npu")) is VendorLinearQuant
    assert convert(ours) is ours


def test_the_deprecated_module_too_and_subclasses_not() -> None:
    class Mine(VendorLinearQuant):
        pass

    with pytest.warns(FutureWarning):
        old = vendor_for(cases.make(Case()), LinearA8W8Quant)
    model = nn.Sequential(old, vendor_for(cases.make(Case()), Mine))
    convert(model)
    assert [type(layer) for layer in model] == [LinearQuant, Mine]


def test_a_module_held_twice_stays_one() -> None:
    layer = vendor_for(cases.make(Case(k=24)))
    model = nn.ModuleList([layer, layer, nn.Sequential(layer)])
    convert(model)
    assert model[0] is model[1] is model[2][0] and type(model[0]) is LinearQuant


def test_an_int8_state_dict_that_became_float_is_int8_again() -> None:
    inputs = cases.make(Case(bias=I32))
    vendor = VendorLinearQuant(40, 24)
    vendor.load_state_dict({name: inputs[name] for name in ("weight", "scale", "bias")})
    assert vendor.weight.dtype == torch.float32  # the trap: the copy casts
    layer = convert(vendor)
    assert layer.weight.dtype == I8
    cases.assert_equal(layer(inputs["x1"]), inputs)


def test_an_unfilled_module_is_refused_and_nothing_is_changed() -> None:
    good, bad = vendor_for(cases.make(Case())), VendorLinearQuant(40, 24)
    bad.weight.data.fill_(0.5)
    model = nn.Sequential(good, bad)
    with pytest.raises(
        LinearQuantTypeError, match="convert: 1: weight is float32 and holds values"
    ):
        convert(model)
    assert list(model) == [good, bad]


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(LinearQuantValueError, match="to is 'onnx'; allowed are 'lq_graph' and"):
        convert(nn.Linear(2, 2), to="onnx")


def test_prepared_modules_convert_as_they_are() -> None:
    torch.npu.config.allow_internal_format = True
    inputs = cases.make(Case(offset=True, bias=I32))
    model = nn.Sequential(vendor_for(inputs)).npu()
    lq_graph.use_internal_format_weight(model)
    convert(model)
    assert torch_npu.get_npu_format(model[0].weight) == 29
    cases.assert_equal(model(inputs["x1"].npu()), inputs)
