"""Everything plan() refuses: one sentence, the same on CPU, on meta, under fake tensors and
while torch.compile traces."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode
from torchair.ge._ge_graph import GeGraph

import lq_graph
from lq_graph import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
from lq_graph.converters import _torchair
from lq_graph.converters.linear_quant import linear_quant as linear_quant_converter
from support import cases
from support.cases import BF16, F16, F32, I8, I32, I64, Case

Change = Callable[[cases.Inputs], None]


def put(name: str, value: object) -> Change:
    def change(inputs: cases.Inputs) -> None:
        inputs[name] = value  # type: ignore[assignment]

    return change


def cast(name: str, dtype: torch.dtype) -> Change:
    def change(inputs: cases.Inputs) -> None:
        inputs[name] = inputs[name].to(dtype)  # type: ignore[union-attr]

    return change


def cut(name: str, *index: object) -> Change:
    def change(inputs: cases.Inputs) -> None:
        inputs[name] = inputs[name][index]  # type: ignore[index]

    return change


def stored_transposed(name: str) -> Change:
    """The same values, in memory column by column."""

    def change(inputs: cases.Inputs) -> None:
        inputs[name] = inputs[name].t().contiguous().t()  # type: ignore[union-attr]

    return change


TYPE, VALUE = LinearQuantTypeError, LinearQuantValueError
ones = torch.ones
A4W4 = Case(x=I32, output=F16)
A4W4_64 = replace(A4W4, scale=I64)
PERTOKEN = Case(output=BF16, pertoken=True)
BIAS_16 = Case(output=F16, bias=F16, pertoken=True)
ONE_DTYPE = "one dtype for both, int8 or int32 (int4)"
ONE_K = "one k for both, the last dim of each"
ONE_OR_N = "1 (per-tensor) or n = 24 (per-channel, one for each row of weight)"
CONTIGUOUS = "contiguous memory for int32 (int4)"
K_LIMIT = "at most 65535 as the last dim of x1 and weight"

# (case that is legal, one change, error, what the record says: what is given, what is allowed)
REFUSED = [
    # dtypes
    (Case(), cast("x1", F32), TYPE, "x1 is float32", "int8 or int32 (int4)"),
    (Case(), cast("weight", I32), TYPE, "weight is int32 and x1 is int8", ONE_DTYPE),
    (Case(), cast("weight", F16), TYPE, "weight is float16 and x1 is int8", ONE_DTYPE),
    (Case(), put("output_dtype", F32), TYPE, "output_dtype is float32", (BF16, F16, I32, I8)),
    (A4W4, put("output_dtype", None), TYPE, "output_dtype is int8", (F16,)),
    (A4W4, put("output_dtype", I32), TYPE, "output_dtype is int32", (F16,)),
    (Case(), cast("scale", BF16), TYPE, "scale is bfloat16", (F32, I64)),
    (Case(), cast("scale", F16), TYPE, "scale is float16", (F32, I64)),
    (Case(output=BF16), cast("scale", I64), TYPE, "scale is int64", (BF16, F32)),
    (Case(output=I32), cast("scale", I64), TYPE, "scale is int64", (BF16, F32)),
    (A4W4, cast("scale", BF16), TYPE, "scale is bfloat16", (F32, I64)),
    (Case(output=F16), put("offset", ones(24)), TYPE, "offset is float32", (None,)),
    (Case(output=BF16), put("offset", ones(24)), TYPE, "offset is float32", (None,)),
    (Case(offset=True), cast("offset", F16), TYPE, "offset is float16", (F32, None)),
    (Case(), put("pertoken_scale", ones(3)), TYPE, "output_dtype is int8", (BF16, F16)),
    (A4W4_64, put("pertoken_scale", ones(3)), TYPE, "pertoken_scale is float32", (None,)),
    (PERTOKEN, cast("pertoken_scale", F16), TYPE, "pertoken_scale is float16", (F32, None)),
    (Case(bias=I32), cast("bias", F32), TYPE, "bias is float32", (I32, None)),
    (Case(output=F16, bias=I32), cast("bias", F32), TYPE, "bias is float32", (I32, None)),
    (
        Case(output=BF16, bias=F32),
        cast("bias", F16),
        TYPE,
        "bias is float16",
        (BF16, F32, I32, None),
    ),
    (BIAS_16, cast("bias", BF16), TYPE, "bias is bfloat16", (F16, F32, I32, None)),
    # shapes
    (
        Case(),
        cut("x1", ..., slice(8)),
        VALUE,
        "x1 (3, 8) and weight (24, 40) differ in k: 8 and 40",
        ONE_K,
    ),
    (
        Case(),
        lambda i: i.update(weight=i["weight"].t()),
        VALUE,
        "x1 (3, 40) and weight (40, 24) differ in k: 40 and 24",
        ONE_K,
    ),
    (
        A4W4,
        cut("x1", ..., slice(2)),
        VALUE,
        "x1 (3, 2) and weight (24, 5) differ in k: 2 and 5 (16 and 40 int4 values)",
        ONE_K,
    ),
    (Case(), cut("x1", 0), VALUE, "x1 has 1 dims, shape (40,)", "2 to 6 dims"),
    (
        Case(),
        cut("x1", *(None,) * 5),
        VALUE,
        "x1 has 7 dims, shape (1, 1, 1, 1, 1, 3, 40)",
        "2 to 6 dims",
    ),
    (Case(), cut("weight", 0), VALUE, "weight has 1 dims, shape (40,)", "2 to 6 dims"),
    (
        A4W4,
        cut("weight", None),
        VALUE,
        "weight has shape (1, 24, 5)",
        "(n, k/8): an int4 weight has exactly 2 dims",
    ),
    (A4W4, cut("weight", slice(7)), VALUE, "weight has n = 7 rows", "a multiple of 8 for int4"),
    (
        Case(batch=(2,), weight_batch=(2,)),
        cut("x1", [0, 1, 0]),
        VALUE,
        "the batch dims of x1 (3, 3, 40) and weight (2, 24, 40) do not broadcast: 3 against 2",
        "equal batch dims, or 1 in one of the two",
    ),
    (Case(), cut("scale", slice(5)), VALUE, "scale has 5 values", ONE_OR_N),
    (Case(), cut("scale", None), VALUE, "scale has shape (1, 24)", "(1,) or (n,) = (24,)"),
    (Case(), put("scale", torch.empty(0)), VALUE, "scale has 0 values", ONE_OR_N),
    (Case(offset=True), cut("offset", slice(2)), VALUE, "offset has 2 values", ONE_OR_N),
    (
        PERTOKEN,
        cut("pertoken_scale", slice(1)),
        VALUE,
        "pertoken_scale has shape (1,)",
        "(m,) = (3,), one value for each row of x1",
    ),
    (
        Case(bias=I32),
        cut("bias", slice(1)),
        VALUE,
        "bias has 1 values",
        "n = 24, one for each row of weight",
    ),
    (
        Case(bias=I32),
        cut("bias", None),
        VALUE,
        "bias has shape (1, 24) and the output (3, 24)",
        "(n,) = (24,) or, with a 3-dim output, (batch, 1, n)",
    ),
    (
        replace(A4W4, bias=I32),
        cut("bias", None, None),
        VALUE,
        "bias has shape (1, 1, 24) and the output (3, 24)",
        "(n,) = (24,)",
    ),
    (
        Case(batch=(2,), weight_batch=(2,), bias=I32, batch_bias=True),
        cut("bias", slice(1)),
        VALUE,
        "bias has shape (1, 1, 24) and the output (2, 3, 24)",
        "(n,) = (24,) or, with a 3-dim output, (batch, 1, n) = (2, 1, 24)",
    ),
    (
        Case(),
        lambda i: i.update(x1=i["x1"][:, :0], weight=i["weight"][:, :0]),
        VALUE,
        "x1 has shape (3, 0), k is 0",
        "no empty x1",
    ),
    (Case(), cut("weight", slice(0)), VALUE, "weight has shape (0, 40), n is 0", "no empty weight"),
    (Case(), cut("x1", slice(0)), VALUE, "x1 has shape (0, 40), m is 0", "no empty x1"),
    (
        Case(batch=(2,)),
        cut("x1", slice(0)),
        VALUE,
        "x1 has shape (0, 3, 40), a batch is 0",
        "no empty x1",
    ),
    (A4W4, stored_transposed("x1"), VALUE, "x1 has shape (3, 5) with strides (1, 3)", CONTIGUOUS),
    (
        A4W4,
        stored_transposed("weight"),
        VALUE,
        "weight has shape (24, 5) with strides (1, 24)",
        CONTIGUOUS,
    ),
    (Case(k=65536, m=1, n=1), lambda i: None, VALUE, "k is 65536", K_LIMIT),
    (Case(x=I32, k=65536, m=1, n=8, output=F16), lambda i: None, VALUE, "k is 65536", K_LIMIT),
]
IDS = [f"{i}-{case}" for i, (case, *_) in enumerate(REFUSED)]


def in_converter(inputs: cases.Inputs) -> LinearQuantError:
    """The converter's error for GE tensors with these dtypes and shapes."""
    ge = _torchair.ge

    def data(index: int, tensor: torch.Tensor) -> object:
        dtype = _torchair.torch_type_to_ge_type(tensor.dtype)
        shape = list(tensor.shape)
        found = ge.Data(index=index, dtype=dtype, shape=shape, placement="NPU")
        found.set_meta(tensor.to("meta"))
        return found

    with GeGraph():
        given = {
            name: data(index, value) if torch.is_tensor(value) else value
            for index, (name, value) in enumerate(inputs.items())
        }
        with pytest.raises(LinearQuantError) as caught:
            linear_quant_converter(**given)
    return caught.value


def refused(inputs: cases.Inputs, product: str | None = None) -> LinearQuantError:
    if product is not None:
        lq_graph.set_product(product)
    try:
        with pytest.raises(LinearQuantError) as caught:
            lq_graph.linear_quant(**inputs)
    finally:
        if product is not None:
            lq_graph.set_product(None)
    return caught.value


@pytest.mark.parametrize(("case", "change", "error", "given", "allowed"), REFUSED, ids=IDS)
def test_refused_with_one_sentence_everywhere(case, change, error, given, allowed) -> None:
    inputs = cases.make(case)
    change(inputs)
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    on_cpu = refused(inputs)
    assert type(on_cpu) is error
    refusal = on_cpu.refusal
    assert refusal.operator == "linear_quant" and refusal.given == given
    if isinstance(allowed, tuple):
        (choice,) = refusal.choices
        assert choice == (refusal.arguments[0], choice[1]) and set(choice[1]) == set(allowed)
    else:
        assert refusal.allowed == allowed
    assert any(name in given or name == "x1" for name in refusal.arguments)
    assert refusal.fixes and refusal.code == (561002 if "k is 65536" in given else 161002)
    text = str(on_cpu)
    assert text == str(refusal) and "\n" not in text and text.startswith("linear_quant: ")
    assert "What to do: " in text and "aclnn" in text

    assert refused(cases.on("meta", inputs)).refusal == refusal
    assert str(refused(cases.on("npu", inputs))) == text
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in inputs.items()}
        assert refused(fake).refusal == refusal
    assert in_converter(inputs).refusal == refusal
    for name, value in inputs.items():
        assert value is before[name] or torch.equal(value, before[name])


# the sentence itself, for one of each form
SENTENCES = [
    (
        Case(output=F16, bias=I32),
        put("offset", ones(24)),
        "linear_quant: offset is float32; with int8 x1 and weight, float16 output and scale "
        "float32, bias int32, Atlas A2 takes no offset (only int8 output takes one). What to "
        "do: drop offset and add it to the result (changes the numbers: the result is rounded "
        "to float16 before the sum), or ask for output_dtype int8 (changes the numbers: the "
        "result is rounded to an integer and clamped to [-128, 127]). (aclnn would report "
        "161002)",
    ),
    (
        Case(output=F16, bias=I32),
        cast("bias", F32),
        "linear_quant: bias is float32; with int8 x1 and weight, float16 output and scale "
        "float32, Atlas A2 allows int32 or absent (float16 output takes float32 with "
        "pertoken_scale float32; an int32 bias is added before the scale, a float bias after "
        "it). What to do: pass a pertoken_scale of ones, torch.ones(m), or drop bias and add "
        "it to the result (changes the numbers: the result is rounded to float16 before the "
        "sum), or ask for output_dtype bfloat16 (changes the numbers: the result has the range "
        "and precision of bfloat16). (aclnn would report 161002)",
    ),
    (
        A4W4,
        lambda i: i.update(scale=i["scale"].bfloat16(), output_dtype=I32),
        "linear_quant: scale is bfloat16 and output_dtype is int32; with int32 (int4) x1 and "
        "weight, Atlas A2 allows scale float32 or int64 and output_dtype float16. What to do: "
        "unpack x1 and weight with lq_graph.unpack_int4, or pass scale.float(), and ask for "
        "output_dtype float16 (changes the numbers: the result is float16, with the scale in "
        "it). (aclnn would report 161002)",
    ),
    (
        Case(),
        cut("x1", slice(0)),
        "linear_quant: x1 has shape (0, 40), m is 0; Atlas A2 takes no empty x1. What to do: "
        "skip the layer when there is nothing to compute. (aclnn would report 161002)",
    ),
    (
        Case(),
        cut("scale", None),
        "linear_quant: scale has shape (1, 24); allowed is (1,) or (n,) = (24,). What to do: "
        "pass scale.reshape(-1) if it holds 1 or n values. (aclnn would report 161002)",
    ),
    (
        Case(k=65536, m=1, n=1, output=F16),
        lambda i: None,
        "linear_quant: k is 65536; Atlas A2 allows at most 65535 as the last dim of x1 and "
        "weight (more where a float scale comes with pertoken_scale). What to do: pass a "
        "pertoken_scale of ones, torch.ones(m), or split k over two layers and add their "
        "results (changes the numbers: each result is rounded to float16). (aclnn would report "
        "561002, with a FRACTAL_NZ weight 161002)",
    ),
]


@pytest.mark.parametrize(("case", "change", "sentence"), SENTENCES)
def test_the_sentence(case, change, sentence: str) -> None:
    inputs = cases.make(case)
    change(inputs)
    assert str(refused(inputs)) == sentence


def test_takers_are_named() -> None:
    error = refused(cases.on("meta", cases.make(Case(output=BF16))), product="310P")
    assert [product.key for product in error.refusal.takers] == ["A2", "A3", "950"]
    assert "Atlas A2, Atlas A3 and Ascend 950 would take it as it is." in str(error)


def test_an_error_says_the_layer_and_is_pickled() -> None:
    for error in (refused({**cases.make(Case()), "output_dtype": F32}), TYPE("only a text")):
        named = error.in_layer("quantize", "layers.0.up")
        assert str(named) == f"quantize: layers.0.up: {error}" and type(named) is TYPE
        copy = pickle.loads(pickle.dumps(named))
        assert type(copy) is TYPE and str(copy) == str(named)
    assert named.refusal is None
    refusal = refused({**cases.make(Case()), "output_dtype": F32}).in_layer("a", "b").refusal
    assert (refusal.caller, refusal.layer, refusal.operator) == ("a", "b", "linear_quant")


COMPILED = [REFUSED[i] for i in (1, 11, 21, 28, 29)]


@pytest.mark.parametrize(("case", "change", "error", "given", "allowed"), COMPILED)
def test_compile_gives_the_same_text(case, change, error, given, allowed, capfd) -> None:
    torch._dynamo.reset()
    inputs = cases.make(case)
    change(inputs)
    text = str(refused(inputs))
    with pytest.raises(RuntimeError, match=re.escape(text)):  # dynamo wraps it in its own
        torch.compile(lq_graph.linear_quant, fullgraph=True, backend="eager")(**inputs)
    assert "Traceback" not in capfd.readouterr().err


def test_legal_cases_of_the_table_are_legal() -> None:
    # guards the table above: each case must be accepted before its change
    for case, *_ in REFUSED:
        if case.k <= 65535:
            lq_graph.linear_quant(**cases.make(case))


def test_k_beyond_the_limit_is_legal_with_pertoken() -> None:
    inputs = cases.make(Case(k=65536, m=2, n=2, output=BF16, pertoken=True))
    cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((ones(4).half(),), TYPE, "scale is float16; allowed is float32"),
        ((ones(4), ones(4).double()), TYPE, "offset is float64"),
        ((ones(2, 4),), VALUE, r"scale has shape \(2, 4\); allowed is \(1,\), \(n,\) or \(1, n"),
        ((torch.tensor(1.0),), VALUE, r"scale has shape \(\)"),
        ((ones(0),), VALUE, "scale is empty"),
        ((ones(4), ones(3)), VALUE, r"scale \(4,\) and offset \(3,\) do not fit"),
        ((ones(1, 4), ones(4)), VALUE, "do not fit"),
        ((ones(4), None, 2), VALUE, "round_mode is 2; allowed is 0"),
    ],
)
def test_trans_quant_param_refuses(args, error, match) -> None:
    for device in ("cpu", "meta", "npu"):
        moved = [a.to(device) if torch.is_tensor(a) else a for a in args]
        with pytest.raises(error, match=match):
            lq_graph.trans_quant_param(*moved)


def test_errors_are_the_builtin_kinds_too() -> None:
    assert issubclass(LinearQuantTypeError, (LinearQuantError, TypeError))
    assert issubclass(LinearQuantValueError, (LinearQuantError, ValueError))


@pytest.mark.parametrize(
    ("product", "case", "legal"),
    [
        ("310P", Case(), True),
        ("310P", Case(output=F16, bias=I32), True),
        ("310P", Case(output=BF16), False),
        ("310P", Case(output=I32), False),
        ("310P", A4W4, False),
        ("A3", A4W4, True),
        ("Ascend910_9392", Case(output=BF16), True),
        ("A2", Case(output=BF16, scale=I64), False),
        ("950", Case(output=BF16, scale=I64), True),
        ("Ascend950PR_9579", Case(x=I32, output=BF16, pertoken=True), True),
        ("A2", Case(m=0), False),
        ("950", Case(m=0), True),
        ("950", Case(k=65536, m=1, n=1), True),
    ],
)
def test_product_decides(product: str, case: Case, legal: bool) -> None:
    lq_graph.set_product(product)
    try:
        inputs = cases.on("meta", cases.make(case))
        if legal:
            lq_graph.linear_quant(**inputs)
        else:
            assert str(lq_graph.get_product()) in str(refused(inputs))
    finally:
        lq_graph.set_product(None)


def test_product_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQ_GRAPH_PRODUCT", "310p")
    lq_graph.set_product(None)
    assert lq_graph.get_product().key == "310P"
    monkeypatch.setenv("LQ_GRAPH_PRODUCT", "H100")
    lq_graph.set_product(None)
    with pytest.raises(
        LinearQuantValueError, match=r"LQ_GRAPH_PRODUCT: 'H100' .* 310P, A2, A3, 950"
    ):
        lq_graph.get_product()
    monkeypatch.undo()
    lq_graph.set_product(None)
    assert lq_graph.get_product().key == cases.PRODUCT


def test_int8_dtype_is_what_the_default_means() -> None:
    inputs = cases.make(Case())
    inputs["output_dtype"] = None
    assert lq_graph.linear_quant(**inputs).dtype == I8


@pytest.mark.parametrize(
    "case",
    [
        Case(output=BF16, pertoken=True, offset=True),
        Case(output=I32, offset=True),
        Case(x=I32, output=F16, offset=True),
    ],
    ids=str,
)
def test_an_offset_that_aclnn_does_not_read_is_not_said_to_be_refused(case) -> None:
    inputs = cases.make(case)
    assert str(refused(inputs)).endswith("(aclnn would take the offset and not read it)")
    on_npu = cases.on("npu", inputs)
    x1, weight, scale = (on_npu.pop(name) for name in ("x1", "weight", "scale"))
    with_it = torch_npu.npu_quant_matmul(x1, weight.t(), scale, **on_npu)
    without = torch_npu.npu_quant_matmul(x1, weight.t(), scale, **{**on_npu, "offset": None})
    assert torch.equal(with_it.cpu(), without.cpu())


def test_the_code_of_a_last_dim_is_that_of_the_newest_aclnn() -> None:
    x1, weight = ones(1, 65536, dtype=I8), ones(16, 65536, dtype=I8)
    with pytest.raises(LinearQuantValueError, match="aclnn would report 561002"):
        lq_graph.linear_quant(x1, weight, ones(16), output_dtype=F16)
    with pytest.raises(RuntimeError, match="561002"):
        torch_npu.npu_quant_matmul(x1.npu(), weight.npu().t(), ones(16).npu(), output_dtype=F16)
