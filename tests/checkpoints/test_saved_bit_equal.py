"""What quantize() makes is saved in both formats and read back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, CheckpointError
from lq_graph.modules.static_values import static_scale, weight_scale_of

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
K, N = 64, 48

SCHEMES: dict[str, Any] = {
    "dynamic": A8W8Dynamic(),
    "static": A8W8Static(symmetric=True, int8_between=False),
    "static with a zero point": A8W8Static(int8_between=False),
    "int4": A4W4Dynamic(),
}
both = pytest.mark.parametrize("format", ["msmodelslim", "compressed-tensors"])
dtypes = pytest.mark.parametrize("dtype", [F16, BF16], ids=str)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(K, N, bias=bias, dtype=dtype)
        self.norm = nn.LayerNorm(N, dtype=dtype)
        self.down = nn.Linear(N, K, bias=bias, dtype=dtype)
        self.head = nn.Linear(K, 16, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.norm(self.up(x)).relu()))


def quantized(seed: int, dtype: torch.dtype, bias: bool, *schemes: Any) -> Model:
    """A model with one scheme for all layers but the last, or one for each."""
    torch.manual_seed(seed)
    model = Model(dtype, bias)
    with torch.no_grad():  # each channel has a range of its own
        for linear in (model.up, model.down):
            linear.weight.mul_(torch.logspace(-3, 1, linear.out_features).unsqueeze(1))
    data = [torch.randn(8, K).to(dtype) * 3 + 1 for _ in range(2)]
    for i, scheme in enumerate(schemes):
        names = ["up", "down"] if len(schemes) == 1 else [("up", "down", "head")[i]]
        batches = data if isinstance(scheme, A8W8Static) else None
        lq_graph.quantize(model, scheme, batches, filter_fn=lambda _, name, n=names: name in n)
    return model


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor to compare; a packed scale as the float that it packs."""
    if tensor.dtype == torch.int64:
        tensor = (tensor & 0xFFFFFFFF).to(torch.uint32).view(F32)
    return tensor.contiguous().view(torch.uint8)


def check_same(one: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    theirs = other.state_dict()
    for key, tensor in one.state_dict().items():
        assert torch.equal(bits(tensor), bits(theirs[key])), key
    for key in theirs.keys() - one.state_dict().keys():  # an int32 bias where there was none
        assert key.endswith("linear.bias") and not theirs[key].any(), key
    assert torch.equal(one(x), other(x))


@both
@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme(scheme, bias, dtype, format, tmp_path) -> None:
    for seed in range(3):
        model, again = quantized(seed, dtype, bias, scheme), Model(dtype, bias)
        lq_graph.save_checkpoint(model, tmp_path, format)
        lq_graph.load_checkpoint(again, tmp_path)
        check_same(model, again, torch.randn(5, K).to(dtype))
        assert type(again.head) is nn.Linear


@both
@dtypes
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_prepared_model_on_the_npu(scheme, dtype, format, tmp_path) -> None:
    torch.npu.config.allow_internal_format = True
    model, again = quantized(0, dtype, True, scheme), Model(dtype)
    x = torch.randn(5, K).to(dtype)
    want = model(x)
    model = model.npu()
    lq_graph.use_internal_format_weight(model)
    lq_graph.save_checkpoint(model, tmp_path, format)
    lq_graph.load_checkpoint(again, tmp_path)
    assert torch.equal(again(x), want)


@both
@dtypes
def test_several_schemes_in_one_model(dtype, format, tmp_path) -> None:
    schemes = SCHEMES["int4"], SCHEMES["static"], SCHEMES["dynamic"]
    model, again = quantized(0, dtype, True, *schemes), Model(dtype)
    lq_graph.save_checkpoint(model, tmp_path, format)
    report = lq_graph.load_checkpoint(again, tmp_path)
    assert {x.name: x.scheme for x in report} == {
        "up": "A4W4 dynamic",
        "down": "A8W8 static",
        "head": "A8W8 dynamic",
    }
    check_same(model, again, torch.randn(5, K).to(dtype))


@dtypes
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_from_one_format_to_the_other_and_back(scheme, dtype, tmp_path) -> None:
    model = quantized(0, dtype, True, scheme)
    last = model
    for i, format in enumerate(["msmodelslim", "compressed-tensors"] * 2):
        lq_graph.save_checkpoint(last, tmp_path / str(i), format)
        last = Model(dtype)
        lq_graph.load_checkpoint(last, tmp_path / str(i))
    x = torch.randn(5, K).to(dtype)
    assert torch.equal(last(x), model(x))


@pytest.mark.parametrize("output", [F16, BF16, torch.int8], ids=str)
def test_scales_that_two_scales_give(output) -> None:
    """Any input's scale, and any scale of 19 bits: a weight's scale gives it, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        input_scale = torch.rand(1, generator=generator) * 10 + 1e-4
        exponents = torch.randint(-24, 3, (4000,), generator=generator)
        scale = torch.ldexp(torch.randint(1024, 2048, (4000,), generator=generator), exponents)
        found = weight_scale_of(scale.float(), input_scale)
        assert torch.equal(static_scale(input_scale, found, output), scale.float())


def test_scales_that_are_not_of_quantize_are_not_cut_for_bfloat16() -> None:
    weight_scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    input_scale = torch.tensor([0.3])
    assert torch.equal(static_scale(input_scale, weight_scale, BF16), input_scale * weight_scale)


@both
def test_int8_between_layers_is_refused_with_the_way_out(format, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)).half()
    data = [torch.randn(4, K).half()]
    lq_graph.quantize(model, A8W8Static(), data)
    with pytest.raises(CheckpointError, match=r"0 gives int8, .* do: .*int8_between=False"):
        lq_graph.save_checkpoint(model, tmp_path / "a", format)
    assert not (tmp_path / "a").exists()
