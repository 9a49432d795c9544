"""Properties that hold for every input: plan()'s manners, packing, layouts, bits of the packed
scale."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lq_graph
from lq_graph import LinearQuantError, LinearQuantValueError, kernels, plan
from lq_graph.rules.plan import Spec
from lq_graph.rules.tables import product_by_name
from support import golden
from support.table import LEGAL, PRODUCTS, WHAT_ACLNN_DOES

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=400)
settings.load_profile("tests")

DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str
)  # every dtype torch has
USED = [torch.int8, torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(USED) | st.sampled_from(DTYPES)
sizes = st.one_of(st.integers(0, 9), st.sampled_from([16, 64, 65535, 65536, 2**31 - 1, 2**31]))
shapes = st.lists(sizes, max_size=8).map(tuple)
specs = st.builds(Spec, dtypes, shapes)
products = st.sampled_from(PRODUCTS).map(product_by_name)


# ---- plan() ----


@pytest.mark.slow
@given(
    x1=specs,
    weight=specs,
    scale=specs,
    offset=st.none() | specs,
    pertoken_scale=st.none() | specs,
    bias=st.none() | specs,
    output_dtype=st.none() | dtypes,
    product=products,
)
def test_plan_takes_anything_and_raises_only_its_own(**call) -> None:
    text = refusal(plan, **call)
    if text:
        check_sentence(text)


def refusal(call: Callable[..., object], *args: object, **kwargs: object) -> str | None:
    """What we say of a call we refuse, or None."""
    try:
        call(*args, **kwargs)
    except LinearQuantError as error:
        return str(error)
    return None


def check_sentence(text: str) -> None:
    assert "\n" not in text and "What to do: " in text
    assert "{" not in text and "None" not in text  # a placeholder or a value without a format
    assert text.startswith("linear_quant: ") and text.endswith(WHAT_ACLNN_DOES)


@st.composite
def legal_calls(draw: st.DrawFn) -> dict:
    """A legal call by the table, of any size; m = 0 where the product gives an empty output."""
    key = draw(st.sampled_from(PRODUCTS))
    c = draw(st.sampled_from(sorted(LEGAL[key], key=str)))
    int4 = c.x == torch.int32
    m, n, k = (draw(st.integers(1, 300)) for _ in range(3))
    m = 0 if key == "950" and draw(st.integers(0, 9)) == 0 else m
    n = n * 8 if int4 else n
    batch = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    kept = draw(st.lists(st.booleans(), min_size=len(batch), max_size=len(batch)))
    weight_batch = tuple(b if keep else 1 for b, keep in zip(batch, kept, strict=True))
    weight_batch = () if int4 else weight_batch[draw(st.integers(0, len(batch))) :]
    optional = {"offset": c.offset, "bias": c.bias}
    call = {name: dtype and Spec(dtype, (n,)) for name, dtype in optional.items()}
    return {
        **call,
        "x1": Spec(c.x, (*batch, m, k)),
        "weight": Spec(c.x, (*weight_batch, n, k)),
        "scale": Spec(c.scale, (draw(st.sampled_from([1, n])),)),
        "pertoken_scale": c.pertoken_scale and Spec(c.pertoken_scale, (m,)),
        "output_dtype": c.output_dtype,
        "product": product_by_name(key),
    }


@given(legal_calls())
def test_legal_at_one_size_is_legal_at_any(call) -> None:
    p = plan(**call)
    m, n = call["x1"].shape[-2], call["weight"].shape[-2]
    batch = np.broadcast_shapes(call["x1"].shape[:-2], call["weight"].shape[:-2])
    assert p.output_shape == (*batch, m, n) and p.output_dtype == call["output_dtype"]
    assert (p.m, p.n) == (m, n) and p.k == call["x1"].shape[-1] * (8 if p.int4 else 1)
    assert plan(**call) == p
    tensors = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in call.items()
        if isinstance(value, Spec)
    }
    assert plan(**{**call, **tensors}) == p  # a record and a contiguous tensor are the same call


TENSORS = ["x1", "weight", "scale", "offset", "pertoken_scale", "bias"]
replacements = st.dictionaries(st.sampled_from(TENSORS), st.none() | specs, min_size=1, max_size=3)


@given(legal_calls(), replacements)
def test_a_legal_call_with_anything_put_in_raises_only_our_own(call, replaced) -> None:
    needed = {name: value for name, value in replaced.items() if value or name in TENSORS[3:]}
    text = refusal(plan, **{**call, **needed})
    if text:
        check_sentence(text)


@pytest.mark.slow
@given(legal_calls(), st.sampled_from(["scale", "offset", "pertoken_scale", "bias"]), shapes)
def test_a_wrong_shape_is_blamed_by_name(call, name: str, shape: tuple[int, ...]) -> None:
    if call[name] is None:
        return
    n, right = call["weight"].shape[-2], {call[name].shape}
    if name in ("scale", "offset"):
        right |= {(1,), (n,)}
    batch = plan(**call).output_shape[:-2]
    if name == "bias" and len(batch) == 1:
        right.add((*batch, 1, n))
    if shape in right:
        return
    with pytest.raises(LinearQuantValueError, match=rf"linear_quant: {name} has ") as caught:
        plan(**{**call, name: Spec(call[name].dtype, shape)})
    check_sentence(str(caught.value))


# ---- views ----

STEPS = {
    "transpose": lambda t: t.mT,
    "first row": lambda t: t[..., :1, :],
    "first column": lambda t: t[..., :1],
    "every other row": lambda t: t[..., ::2, :],
    "every other column": lambda t: t[..., ::2],
    "repeat the row": lambda t: t[..., :1, :].expand(*t.shape[:-2], 8, t.shape[-1]),
    "repeat the column": lambda t: t[..., :1].expand(*t.shape[:-1], 8),
    "repeat the batch": lambda t: t.expand(2, *t.shape[-2:]),
    "sliding window": lambda t: t.unfold(-1, min(2, t.shape[-1]), 1)[..., 0, :, :],
}
step_lists = st.lists(st.sampled_from(sorted(STEPS)), max_size=3)
sides = st.sampled_from([1, 2, 8, 16])


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.sampled_from([torch.int8, torch.int32]),
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    step_lists,
    step_lists,
)
@example(torch.int8, (2, 8), (8, 8), ["repeat the row"], [])  # overlapping rows
@example(torch.int8, (2, 8), (8, 8), [], ["repeat the row"])
@example(torch.int8, (1, 8), (8, 8), ["repeat the batch"], [])  # one row of each, one in memory
@example(torch.int8, (2, 8), (8, 2), ["sliding window"], [])
@example(torch.int32, (8, 1), (8, 8), ["transpose"], [])  # (1, 8) strides (1, 1)
@example(torch.int32, (2, 1), (2, 8), [], ["transpose", "first column"])  # (8, 1) strides (1, 8)
@example(torch.int32, (1, 2), (8, 1), ["every other column"], [])  # (1, 1) strides (2, 2)
@example(torch.int32, (8, 8), (8, 8), ["transpose"], [])
def test_a_view_is_refused_or_equals_its_copy(
    dtype: torch.dtype,
    left: tuple[int, int],
    right: tuple[int, int],
    on_x1: list[str],
    on_weight: list[str],
) -> None:
    g = torch.Generator().manual_seed(0)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1
    bases = [torch.randint(low, high, size, dtype=dtype, generator=g) for size in (left, right)]

    def views(device: str) -> list[torch.Tensor]:
        found = [base.to(device) for base in bases]
        for i, steps in enumerate((on_x1, on_weight)):
            for step in steps:
                found[i] = STEPS[step](found[i])
        k = min(t.shape[-1] for t in found)
        return [t[..., :k] for t in found]

    def call(x1: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor([2.0**-12], device=x1.device)
        return lq_graph.linear_quant(x1, weight, scale, output_dtype=torch.float16)

    copies = [t.clone(memory_format=torch.contiguous_format) for t in views("cpu")]
    if refusal(call, *(torch.empty(t.shape, dtype=dtype, device="meta") for t in copies)):
        return  # the shapes are refused, however they lie
    arrays = [t.numpy() for t in copies]
    want = golden.linear_quant(*arrays, np.array([2.0**-12], np.float32), output_dtype="float16")
    for device in ("cpu", "npu"):
        text = refusal(call, *views(device))
        if text:
            assert dtype == torch.int32 and "contiguous memory" in text
            assert any(t.stride() != c.stride() for t, c in zip(views("cpu"), copies, strict=True))
            check_sentence(text)
        else:
            np.testing.assert_array_equal(call(*views(device)).cpu().numpy(), want, err_msg=device)


# ---- layouts ----


@given(st.lists(st.lists(st.integers(-8, 7), min_size=8, max_size=8), min_size=1, max_size=20))
def test_int4_round_trip_and_bits(groups: list[list[int]]) -> None:
    values = torch.tensor(groups, dtype=torch.int8)
    packed = lq_graph.pack_int4(values)
    assert torch.equal(lq_graph.unpack_int4(packed), values)
    for group, word in zip(groups, packed.flatten().tolist(), strict=True):
        assert word & 0xFFFFFFFF == sum((v & 0xF) << 4 * i for i, v in enumerate(group))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40))
def test_unpack_then_pack_keeps_any_word(words: list[int]) -> None:
    packed = torch.tensor(words, dtype=torch.int32)
    assert torch.equal(lq_graph.pack_int4(lq_graph.unpack_int4(packed)), packed)


@given(
    st.lists(st.integers(-20, 20), min_size=8, max_size=8),
    st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]),
    st.integers(0, 7),
)
def test_pack_refuses_values_that_unpack_would_change(values, dtype, missing: int) -> None:
    group = torch.tensor(values, dtype=dtype)
    if min(values) < -8 or max(values) > 7:
        with pytest.raises(LinearQuantValueError, match=r"int4 holds -8\.\.7"):
            lq_graph.pack_int4(group)
    else:
        assert lq_graph.unpack_int4(lq_graph.pack_int4(group)).tolist() == values
    if missing:
        with pytest.raises(LinearQuantValueError, match="multiple of 8"):
            lq_graph.pack_int4(group[missing:])


@given(st.integers(1, 70), st.integers(1, 140), st.sampled_from([torch.int8, torch.int32]))
def test_fractal_nz_round_trip_and_index(n: int, words: int, dtype: torch.dtype) -> None:
    numbers = torch.arange(n * words, dtype=torch.int64) % 127 + 1  # none is the padding's zero
    weight = numbers.to(dtype).view(n, words)
    blocks = lq_graph.to_fractal_nz(weight)
    k = words * (8 if dtype == torch.int32 else 1)
    assert torch.equal(lq_graph.from_fractal_nz(blocks, n, k), weight)
    c0, n1 = 32 // dtype.itemsize, -(-n // 16)
    r, c = torch.arange(n)[:, None], torch.arange(words)
    index = ((c // c0 * n1 + r // 16) * 16 + r % 16) * c0 + c % c0
    assert torch.equal(blocks.flatten()[index], weight)
    assert int((blocks != 0).sum()) == n * words


# ---- the packed scale ----

finite_bits = st.integers(0, 2**32 - 1).filter(lambda b: (b >> 23) & 0xFF != 0xFF)


def float_of(bits: int) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.uint32).view(torch.float32)


def by_hand(bits: int, offset: float | None, round_mode: int) -> int:
    """The word from the specification, one bit field at a time, in exact arithmetic."""
    sign, exponent, mantissa = bits >> 31, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if round_mode == 0:
        kept = mantissa >> 13
    elif exponent == 0:
        kept = 0
    else:
        kept = round(Fraction(mantissa, 1 << 13))  # Fraction rounds half to even
        exponent, kept = exponent + (kept >> 10), kept & 0x3FF
    word = (sign << 31 | exponent << 23 | kept << 13) | 1 << 46
    if offset is not None:
        nine = max(-256, min(255, round(Fraction(offset))))
        word |= (nine & 0x1FF) << 37
    return word


@given(finite_bits, st.none() | st.floats(-1e6, 1e6, width=32), st.sampled_from([0, 1]))
@example(0x00000001, None, 1)  # the smallest subnormal
@example(0x807FFFFF, None, 0)  # the largest, negative
@example(0x80000000, -0.0, 1)  # minus zero
@example(0x3F801000, None, 1)  # half way, to even: down
@example(0x3F803000, None, 1)  # half way, to even: up
@example(0x3F7FF000, None, 1)  # carries into the exponent
@example(0x7F7FFFFF, None, 1)  # the largest float32 carries into infinity's exponent
@example(0x3F800000, 255.5, 0)
@example(0x3F800000, -256.5, 0)
@example(0x3F800000, 0.5, 0)
@example(0x3F800000, 1.5, 0)
def test_packed_word_bit_by_bit(bits: int, offset: float | None, round_mode: int) -> None:
    shift = None if offset is None else torch.tensor([offset])
    scale = float_of(bits)
    word = lq_graph.trans_quant_param(scale, shift, round_mode).item()
    assert word == by_hand(bits, offset, round_mode)
    numpy_shift = None if shift is None else shift.numpy()
    assert word == golden.trans_quant_param(scale.numpy(), numpy_shift, round_mode).item()
    back, nine = kernels.unpack_scale(torch.tensor([word]))
    assert back.view(torch.int32).item() & 0xFFFFFFFF == word & 0xFFFFE000
    assert nine.item() == (0 if offset is None else max(-256, min(255, round(Fraction(offset)))))
    if round_mode == 0:
        assert torch.equal(back.view(torch.int32), kernels.s19(scale).view(torch.int32))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
@example(0x7FFFFFFF, 1)  # a rounded carry would make minus zero of it
@example(0xFFFFFFFF, 1)
@example(0x7F800001, 1)  # NaN in the cut bits alone: infinity
@example(0x7F800000, 1)
def test_every_pattern_is_packed_as_the_kernel_does(bits: int, round_mode: int) -> None:
    """The operator refuses what is not finite; the stand-in packs it, as trans_quant_param_v2.h."""
    scale = float_of(bits)
    word = kernels.pack_scale(scale, None, round_mode).item()
    assert word == golden.trans_quant_param(scale.numpy(), None, round_mode).item()
    if bits >> 23 & 0xFF == 0xFF:
        assert word == (bits & 0xFFFFE000) | 1 << 46


def test_an_offset_that_is_no_number_is_packed_as_the_kernel_does() -> None:
    offset = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30])
    packed = kernels.pack_scale(torch.ones(4), offset)
    assert kernels.unpack_scale(packed)[1].tolist() == [0, 255, -256, 255]
    want = golden.trans_quant_param(np.ones(4, np.float32), offset.numpy())
    np.testing.assert_array_equal(packed.numpy(), want)


@given(st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.booleans())
def test_nan_and_infinity_are_refused(bad: float, in_offset: bool) -> None:
    one, other = torch.ones(3), torch.tensor([1.0, bad, 2.0])
    scale, offset = (one, other) if in_offset else (other, one)
    blamed = "offset" if in_offset else "scale"
    with pytest.raises(LinearQuantValueError, match=re.escape(f"{blamed} holds NaN or infinity")):
        lq_graph.trans_quant_param(scale, offset)


# ---- values ----


@settings(max_examples=150)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**31))
def test_accumulator_is_exact(m: int, k: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x1 = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    out = lq_graph.linear_quant(x1, weight, torch.ones(1), output_dtype=torch.int32)
    np.testing.assert_array_equal(out.numpy(), x1.long().numpy() @ weight.long().numpy().T)
