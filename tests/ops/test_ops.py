"""The operators on CPU, meta and under torch.compile: values, shapes, registration, devices,
derivatives, autocast."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

import lq_graph
from lq_graph import LinearQuantTypeError, LinearQuantValueError
from support import cases, golden, has
from support.cases import ALL_CASES, BF16, F16, F32, I8, I32, ROW_CASES, Case

LINEAR_QUANT = torch.ops.lq_graph.linear_quant.default
TRANS_QUANT_PARAM = torch.ops.lq_graph.trans_quant_param.default


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_cpu_equals_golden(case: Case) -> None:
    inputs = cases.make(case)
    cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_meta_gives_shape_and_dtype_of_cpu(case: Case) -> None:
    inputs = cases.make(case)
    real = lq_graph.linear_quant(**inputs)
    meta = lq_graph.linear_quant(**cases.on("meta", inputs))
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")
    assert meta.stride() == real.stride()


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_opcheck(case: Case) -> None:
    inputs = cases.make(case)
    output_dtype = inputs.pop("output_dtype")
    results = opcheck(LINEAR_QUANT, (), {**inputs, "output_dtype": output_dtype})
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ROW_CASES[::3], ids=str)
def test_inductor_fullgraph(case: Case, dynamic: bool) -> None:
    has.need_inductor()
    torch._dynamo.reset()
    inputs = cases.make(case)
    compiled = torch.compile(lq_graph.linear_quant, fullgraph=True, dynamic=dynamic)
    cases.assert_equal(compiled(**inputs), inputs)


def test_dynamic_m_needs_one_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lq_graph.linear_quant, backend=counter, fullgraph=True, dynamic=True)
    for m in (2, 5, 64):
        inputs = cases.make(Case(m=m, output=BF16, pertoken=True))
        cases.assert_equal(compiled(**inputs), inputs)
    assert counter.frame_count == 1


def test_nine_bit_clip_comes_before_the_offset() -> None:
    # 400 clips to 255, then -200: 55; one clip at the end would give 127
    x1 = torch.full((1, 4), 10, dtype=I8)
    weight = torch.full((1, 4), 10, dtype=I8)
    out = lq_graph.linear_quant(x1, weight, torch.ones(1), torch.tensor([-200.0]))
    assert out.item() == 55


@pytest.mark.parametrize("m", [1, 2, 5, 17, 33])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 31, 63, 65])
@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 65])
def test_accumulator_is_exact_at_odd_sizes(m: int, k: int, n: int) -> None:
    inputs = cases.make(Case(m=m, k=k, n=n, output=I32), seed=m * k * n)
    cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


def test_accumulator_is_exact_at_the_largest_k() -> None:
    k = 65535
    x1 = torch.full((1, k), -128, dtype=I8)
    out = lq_graph.linear_quant(x1, x1, torch.ones(1), output_dtype=I32)
    assert out.item() == k * 128 * 128


def test_float16_saturates_without_pertoken_and_overflows_with() -> None:
    x1 = torch.full((1, 64), 127, dtype=I8)
    scale = torch.ones(1)
    saturated = lq_graph.linear_quant(x1, x1, scale, output_dtype=F16)
    overflowed = lq_graph.linear_quant(x1, x1, scale, None, scale, output_dtype=F16)
    assert saturated.item() == 65504 and overflowed.item() == float("inf")


def test_packed_scale_ignores_a_separate_offset() -> None:
    inputs = cases.make(Case(offset=True))
    packed = lq_graph.trans_quant_param(inputs["scale"], inputs["offset"])
    twice = lq_graph.linear_quant(inputs["x1"], inputs["weight"], packed, inputs["offset"] * 0.5)
    cases.assert_equal(twice, inputs)


@pytest.mark.parametrize("output", [I8, F16, BF16, I32])
def test_empty_m_gives_empty_output_on_950(output: torch.dtype) -> None:
    lq_graph.set_product("950")
    try:
        out = lq_graph.linear_quant(
            torch.empty(2, 0, 16, dtype=I8), torch.zeros(4, 16, dtype=I8), torch.ones(4),
            output_dtype=output,
        )  # fmt: skip
    finally:
        lq_graph.set_product(None)
    assert (tuple(out.shape), out.dtype) == ((2, 0, 4), output)


def test_non_contiguous_inputs() -> None:
    inputs = cases.make(Case(m=8, k=16, n=16))
    inputs["x1"] = inputs["x1"].t().contiguous().t()
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


@pytest.mark.parametrize("round_mode", [0, 1])
@pytest.mark.parametrize(
    ("scale_shape", "offset_shape", "shape"),
    [
        ((1,), None, (1,)),
        ((7,), None, (7,)),
        ((1, 7), None, (1, 7)),
        ((7,), (7,), (7,)),
        ((1,), (7,), (7,)),
        ((7,), (1,), (7,)),
        ((1, 7), (1, 7), (1, 7)),
    ],
)
def test_trans_quant_param(scale_shape, offset_shape, shape, round_mode: int) -> None:
    g = torch.Generator().manual_seed(1)
    scale = torch.randn(scale_shape, generator=g)
    offset = None if offset_shape is None else torch.randn(offset_shape, generator=g) * 200
    out = lq_graph.trans_quant_param(scale, offset, round_mode)
    want = golden.trans_quant_param(
        scale.numpy(), None if offset is None else offset.numpy(), round_mode
    )
    assert out.dtype == torch.int64 and tuple(out.shape) == shape
    np.testing.assert_array_equal(out.numpy(), want)
    assert set(opcheck(TRANS_QUANT_PARAM, (scale, offset, round_mode)).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("scale", "offset", "word"),
    [
        # by hand: float32 1.0 is 0x3F800000, valid bit 46
        (1.0, None, 0x3F800000 | 1 << 46),
        (1.0, 1.0, 0x3F800000 | 1 << 46 | 1 << 37),
        (1.0, -1.0, 0x3F800000 | 1 << 46 | 0x1FF << 37),
        (1.0, 0.5, 0x3F800000 | 1 << 46),  # half to even
        (1.0, 1e9, 0x3F800000 | 1 << 46 | 255 << 37),
        (1.0, -1e9, 0x3F800000 | 1 << 46 | 256 << 37),
        (-1.0, None, 0xBF800000 | 1 << 46),
        (1.00048828125, None, 0x3F800000 | 1 << 46),  # 2**-11 above 1 is truncated
    ],
)
def test_trans_quant_param_words(scale: float, offset: float | None, word: int) -> None:
    o = None if offset is None else torch.tensor([offset])
    assert lq_graph.trans_quant_param(torch.tensor([scale]), o).item() == word


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_trans_quant_param_refuses_what_cannot_be_packed(bad: float) -> None:
    with pytest.raises(lq_graph.LinearQuantValueError, match="scale holds NaN or infinity"):
        lq_graph.trans_quant_param(torch.tensor([1.0, bad]))


def test_round_mode_differs_where_it_should() -> None:
    above_half = torch.tensor([1 + 2.0**-11 + 2.0**-20], dtype=F32)
    truncated, rounded = (lq_graph.trans_quant_param(above_half, None, r).item() for r in (0, 1))
    assert rounded - truncated == 1 << 13


def test_runs_under_inference_mode_and_autocast() -> None:
    inputs = cases.make(Case(output=F16))
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


def test_torch_export_keeps_the_op_and_the_value() -> None:
    inputs = cases.make(Case(offset=True, bias=I32))
    layer = lq_graph.LinearQuant(40, 24, offset=True)
    for name in ("weight", "scale", "offset", "bias"):
        getattr(layer, name).data = inputs[name]
    m = torch.export.Dim("m", min=2, max=64)
    program = torch.export.export(layer, (inputs["x1"],), dynamic_shapes=({0: m},))
    assert LINEAR_QUANT in [node.target for node in program.graph.nodes]
    longer = cases.make(Case(m=9))["x1"]
    assert torch.equal(program.module()(longer), layer(longer))
    cases.assert_equal(program.module()(inputs["x1"]), inputs)


# ---- devices ----

STATIC_QUANT = torch.ops.lq_graph.static_quant.default
DYNAMIC_QUANT = torch.ops.lq_graph.dynamic_quant.default
# every tensor argument of every operator that has several; the first decides
TENSORS = {
    operator.overload: [
        a.name for a in operator.overload._schema.arguments if "Tensor" in str(a.type)
    ]
    for operator in lq_graph.ops.OPERATORS
    if operator.public
}
ARGUMENTS = {op: names for op, names in TENSORS.items() if len(names) > 1}
MIXED = [(op, name) for op, names in ARGUMENTS.items() for name in names[1:]]
DEVICES = ("cpu", "npu", "meta")


def call_of(op, named: str) -> dict[str, object]:
    """Arguments of a legal call that has this tensor."""
    if op is LINEAR_QUANT:
        pertoken = named == "pertoken_scale"
        given = cases.make(
            Case(output=BF16 if pertoken else I8, offset=not pertoken, bias=I32, pertoken=pertoken)
        )
        given |= {"float_scale": torch.ones(24)} if named == "float_scale" else {}
        return {name: value for name, value in given.items() if value is not None}
    if op is TRANS_QUANT_PARAM:
        return {"scale": torch.ones(8), "offset": torch.ones(8)}
    return {name: torch.ones(2, 8) if name == "x" else torch.ones(8) for name in ARGUMENTS[op]}


@pytest.mark.parametrize("fake", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize(("op", "named"), MIXED, ids=str)
def test_tensors_on_several_devices_are_refused(op, named: str, fake: bool) -> None:
    first = ARGUMENTS[op][0]
    for device in DEVICES:
        for other in DEVICES:
            given = {
                name: value.to(other if name == named else device)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in call_of(op, named).items()
            }
            with contextlib.ExitStack() as stack:
                if fake:
                    mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                    given = {
                        n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                        for n, v in given.items()
                    }
                if other == device:
                    assert op(**given).device.type == device
                    continue
                at = {"npu": "npu:0"}
                where = f"{named} is on {at.get(other, other)} and {first} on "
                with pytest.raises(LinearQuantValueError, match=where + at.get(device, device)):
                    op(**given)


def test_a_forgotten_npu_is_refused_while_the_graph_is_traced() -> None:
    torch._dynamo.reset()
    inputs = cases.make(Case())
    layer = lq_graph.LinearQuant(40, 24, bias=False)
    layer.weight.data = inputs["weight"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"weight is on cpu and x1 on npu:0; .*model\.to"):
        compiled(inputs["x1"].npu())


# ---- derivatives ----

QUANTIZERS = {
    "dynamic": lambda x: DYNAMIC_QUANT(x)[1],
    "dynamic, values": lambda x: DYNAMIC_QUANT(x)[0].float(),
    "static": lambda x: STATIC_QUANT(x, x.new_ones(1)).float(),
}
NONE = "no gradient passes through a quantized layer"
ASKED = {
    "grad": lambda f, x: torch.func.grad(lambda a: f(a).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda a: f(a).sum()))(x[None]),
    "grad of vmap": lambda f, x: torch.func.grad(lambda a: torch.vmap(f)(a).sum())(x[None]),
}


@pytest.fixture(params=["cpu", "npu"])
def x(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(3)).to(F16).to(request.param)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_input_that_requires_grad_gives_a_warning(name: str, x: torch.Tensor) -> None:
    quantize, wanted = QUANTIZERS[name], QUANTIZERS[name](x)
    with pytest.warns(UserWarning, match=f"quant: x requires grad, and {NONE}.*torch.no_grad"):
        out = quantize(x.clone().requires_grad_())
    assert not out.requires_grad  # a part of it, through the scale, would be another gradient
    assert torch.equal(out, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quiet in (torch.no_grad, torch.inference_mode):
            with quiet():
                assert torch.equal(quantize(x.clone().requires_grad_()), wanted)
        quantize(x)


@pytest.mark.parametrize("named", ["scale", "bias", "pertoken_scale"])
def test_a_parameter_that_requires_grad_gives_a_warning(named: str) -> None:
    inputs = cases.make(Case(output=BF16, bias=BF16, pertoken=True))
    inputs[named].requires_grad_()
    with pytest.warns(UserWarning, match=f"linear_quant: {named} requires grad, and {NONE}"):
        out = lq_graph.linear_quant(**inputs)
    assert not out.requires_grad
    cases.assert_equal(out, {**inputs, named: inputs[named].detach()})


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_torch_func_is_refused_where_it_differentiates(
    name: str, asked: str, x: torch.Tensor
) -> None:
    with pytest.raises(LinearQuantTypeError, match="quantization has no derivative, and 0 would"):
        ASKED[asked](QUANTIZERS[name], x)


def test_a_scale_is_no_more_differentiable_than_the_input() -> None:
    inputs = cases.make(Case(output=BF16))
    with pytest.raises(LinearQuantTypeError, match=r"linear_quant: torch\.func asks for its grad"):
        torch.func.grad(
            lambda s: lq_graph.linear_quant(
                inputs["x1"], inputs["weight"], s, output_dtype=BF16
            ).sum()
        )(inputs["scale"])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_forward_mode_is_refused(name: str, x: torch.Tensor) -> None:
    with forward_ad.dual_level():
        with pytest.raises(LinearQuantTypeError, match="an input carries a tangent"):
            QUANTIZERS[name](forward_ad.make_dual(x, x))
        assert torch.equal(QUANTIZERS[name](x), QUANTIZERS[name](x.clone()))


def test_torch_func_without_a_derivative_computes(x: torch.Tensor) -> None:
    for quantize in QUANTIZERS.values():
        wanted = quantize(x)
        assert torch.equal(torch.vmap(quantize)(x[:, None])[:, 0], wanted)
        assert torch.equal(torch.vmap(torch.vmap(quantize))(x[None, :, None])[0, :, 0], wanted)
        assert torch.equal(torch.vmap(quantize, 1, 1)(x[:, None, :])[:, 0], wanted)
        assert torch.equal(torch.vmap(lambda _, q=quantize: q(x))(x)[0], wanted)
        other = torch.func.grad(lambda a, q=quantize: (a * q(x).float()).sum())
        one = torch.ones((), dtype=F32, device=x.device)
        assert other(one) == wanted.float().sum()
        values, _ = torch.func.jvp(lambda a, q=quantize: a * q(x).float(), (one,), (one,))
        assert torch.equal(values, wanted.float())
    if x.device.type == "cpu":  # torch_npu has no kernels for functionalize
        assert torch.equal(torch.func.functionalize(QUANTIZERS["static"])(x), wanted)


def test_vmap_of_the_product() -> None:
    inputs = cases.make(Case(batch=(5,), output=BF16, pertoken=True))
    x1, pertoken = inputs["x1"], torch.rand(5, 3)
    own = torch.vmap(
        lambda a, p: lq_graph.linear_quant(
            a, inputs["weight"], inputs["scale"], None, p, output_dtype=BF16
        )
    )(x1, pertoken)
    for index in range(5):
        one = {**inputs, "x1": x1[index], "pertoken_scale": pertoken[index]}
        assert torch.equal(own[index], lq_graph.linear_quant(**one))


def test_a_product_of_outputs_compiles_without_no_grad() -> None:
    """torch's own fallback gave the outputs an undefined gradient, of which the backward of a
    batched product dies while torch.compile traces it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)
    ).to(BF16)
    x = torch.randn(2, 3, 16).to(BF16)
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())

    def attention(a: torch.Tensor) -> torch.Tensor:
        out = model(a)
        return torch.softmax(torch.matmul(out, out.mT), -1) @ out

    with torch.no_grad():
        wanted = attention(x)
    with pytest.warns(UserWarning, match=NONE):
        out = torch.compile(attention, backend="aot_eager")(x)
    assert torch.equal(out.detach(), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_inputs_that_require_grad(backend: str) -> None:
    has.need_inductor(backend)
    torch._dynamo.reset()
    x = torch.randn(3, 16).to(F16)
    norm = torch.nn.LayerNorm(16, dtype=F16)
    with pytest.warns(UserWarning, match=NONE):
        out = torch.compile(
            lambda a: norm(a) + DYNAMIC_QUANT(norm(a))[1][:, None], backend=backend
        )(x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(out.detach(), norm(x) + DYNAMIC_QUANT(norm(x))[1][:, None])


# ---- autocast ----


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_autocast_casts_activations_as_it_does_for_a_linear(
    device: str, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(device)
    scale = torch.full((1,), 40.0, dtype=F16, device=device)
    values, scales = DYNAMIC_QUANT(x.to(dtype))
    wanted = STATIC_QUANT(x.to(F16), scale)
    compiled = torch.compile(
        lambda a: (DYNAMIC_QUANT(a), STATIC_QUANT(a, scale)), backend="aot_eager"
    )
    with torch.autocast(device, dtype=dtype):
        for call in (lambda a: (DYNAMIC_QUANT(a), STATIC_QUANT(a, scale)), compiled):
            (own, own_scales), static = call(x)
            assert torch.equal(own, values) and torch.equal(own_scales, scales)
            assert torch.equal(static, wanted)
    with pytest.raises(LinearQuantTypeError, match="x is float32"):
        DYNAMIC_QUANT(x)
    with (
        torch.autocast(device, dtype=dtype, enabled=False),
        pytest.raises(LinearQuantTypeError, match="scale_reciprocal is float16 and x float32"),
    ):
        STATIC_QUANT(x, scale)


def test_a_dynamic_layer_under_autocast() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 8, dtype=BF16))
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    x = torch.randn(3, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        assert torch.equal(model(x), model(x.to(BF16)))
    with pytest.raises(LinearQuantTypeError, match="x is float32"):
        model(x)
