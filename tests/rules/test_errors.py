"""Everything plan() refuses: one sentence, the same on CPU, on meta, under fake tensors and
while torch.compile traces."""

from __future__ import annotations

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

# (case that is legal, one change, error, what the sentence must say)
REFUSED = [
    # dtypes
    (Case(), cast("x1", F32), TYPE, r"x1 is float32; Atlas A2 allows int8 or int32 \(int4\)\."),
    (Case(), cast("weight", I32), TYPE, r"weight is int32 and x1 is int8; both must be of one"),
    (Case(), cast("weight", F16), TYPE, r"weight is float16 and x1 is int8; .* as int8"),
    (Case(), put("output_dtype", F32), TYPE, r"output_dtype is float32; .* allows bfloat16, float"),
    (A4W4, put("output_dtype", None), TYPE, r"output_dtype is int8; .*int32 \(int4\).* float16"),
    (A4W4, put("output_dtype", I32), TYPE, r"output_dtype is int32; .*int32 \(int4\).* float16"),
    (Case(), cast("scale", BF16), TYPE, r"scale is bfloat16; .* allows float32 or int64"),
    (Case(), cast("scale", F16), TYPE, r"scale is float16; .* allows float32 or int64"),
    (Case(output=BF16), cast("scale", I64), TYPE, r"scale is int64; .* bfloat16 or float32.*pac"),
    (Case(output=I32), cast("scale", I64), TYPE, r"scale is int64; .* bfloat16 or float32"),
    (A4W4, cast("scale", BF16), TYPE, r"scale is bfloat16; .* allows float32 or int64"),
    (Case(output=F16), put("offset", ones(24)), TYPE, r"offset is float32; .* \(only int8 out"),
    (Case(output=BF16), put("offset", ones(24)), TYPE, r"offset is float32; .* \(only int8 out"),
    (Case(offset=True), cast("offset", F16), TYPE, r"offset is float16; .* allows float32 or abs"),
    (Case(), put("pertoken_scale", ones(3)), TYPE, r"pertoken_scale is float32; with int8 .* int8"),
    (replace(A4W4, scale=I64), put("pertoken_scale", ones(3)), TYPE, r"pertoken_scale is float3"),
    (Case(output=BF16, pertoken=True), cast("pertoken_scale", F16), TYPE, r"pertoken_scale is flo"),
    (Case(bias=I32), cast("bias", F32), TYPE, r"bias is float32; .* allows int32 or absent"),
    (Case(output=F16, bias=I32), cast("bias", F32), TYPE, r"bias is float32; .* int32 or absent"),
    (Case(output=BF16, bias=F32), cast("bias", F16), TYPE, r"bias is float16; .* bfloat16, float"),
    (Case(output=F16, bias=F16, pertoken=True), cast("bias", BF16), TYPE, r"bias is bfloat16; "),
    # shapes
    (Case(), cut("x1", ..., slice(8)), VALUE, r"differ in k: 8 and 40.*weight is \(n, k\)"),
    (Case(), lambda i: i.update(weight=i["weight"].t()), VALUE, r"weight looks transposed"),
    (A4W4, cut("x1", ..., slice(2)), VALUE, r"differ in k: 2 and 5 \(16 and 40 int4 values\)"),
    (Case(), cut("x1", 0), VALUE, r"x1 has 1 dims, shape \(40,\); allowed are 2 to 6"),
    (Case(), cut("x1", *(None,) * 5), VALUE, r"x1 has 7 dims"),
    (Case(), cut("weight", 0), VALUE, r"weight has 1 dims"),
    (A4W4, cut("weight", None), VALUE, r"an int4 weight has exactly 2 dims"),
    (A4W4, cut("weight", slice(7)), VALUE, r"n = 7 rows; int4 needs n and k to be multiples of 8"),
    (Case(batch=(2,), weight_batch=(2,)), cut("x1", [0, 1, 0]), VALUE, r"not broadcast: 3 against"),
    (Case(), cut("scale", slice(5)), VALUE, r"scale has 5 values; allowed is 1 .* or n = 24"),
    (Case(), cut("scale", None), VALUE, r"scale has shape \(1, 24\); .*scale.reshape"),
    (Case(), put("scale", torch.empty(0)), VALUE, r"scale has 0 values"),
    (Case(offset=True), cut("offset", slice(2)), VALUE, r"offset has 2 values; allowed is 1"),
    (Case(output=BF16, pertoken=True), cut("pertoken_scale", slice(1)), VALUE, r"\(m,\) = \(3,\)"),
    (Case(bias=I32), cut("bias", slice(1)), VALUE, r"bias has 1 values; allowed is n = 24"),
    (Case(bias=I32), cut("bias", None), VALUE, r"bias has shape \(1, 24\) .*allowed is \(n,\)"),
    (Case(bias=I32), cut("bias", None, None), VALUE, r"bias has shape \(1, 1, 24\) and the output"),
    (
        Case(batch=(2,), weight_batch=(2,), bias=I32, batch_bias=True),
        cut("bias", slice(1)),
        VALUE,
        r"bias has shape \(1, 1, 24\) .* \(2, 1, 24\)",
    ),
    (Case(), lambda i: i.update(x1=i["x1"][:, :0], weight=i["weight"][:, :0]), VALUE, r"k is 0"),
    (Case(), cut("weight", slice(0)), VALUE, r"weight has shape \(0, 40\), n is 0; Atlas A2 takes"),
    (Case(), cut("x1", slice(0)), VALUE, r"x1 has shape \(0, 40\), m is 0; Atlas A2 takes no"),
    (Case(batch=(2,)), cut("x1", slice(0)), VALUE, r"x1 has shape \(0, 3, 40\), a batch is 0"),
    (A4W4, stored_transposed("x1"), VALUE, r"x1 has .* strides \(1, 3\); int32 \(int4\) must"),
    (A4W4, stored_transposed("weight"), VALUE, r"weight has .* strides \(1, 24\); .*contiguous"),
    (Case(k=65536, m=1, n=1), lambda i: None, VALUE, r"k is 65536; .* at most 65535 on Atlas A2"),
    (Case(x=I32, k=65536, m=1, n=8, output=F16), lambda i: None, VALUE, r"k is 65536; .* at most"),
]  # fmt: skip
IDS = [f"{i}-{case}" for i, (case, *_) in enumerate(REFUSED)]


def in_converter(inputs: cases.Inputs) -> LinearQuantError:
    """What the converter says of GE tensors with these dtypes and shapes."""
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


def refused(inputs: cases.Inputs) -> LinearQuantError:
    with pytest.raises(LinearQuantError) as caught:
        lq_graph.linear_quant(**inputs)
    return caught.value


@pytest.mark.parametrize(("case", "change", "error", "match"), REFUSED, ids=IDS)
def test_refused_with_one_sentence_everywhere(case, change, error, match) -> None:
    inputs = cases.make(case)
    change(inputs)
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    on_cpu = refused(inputs)
    assert type(on_cpu) is error
    with pytest.raises(error, match=match):
        raise on_cpu
    text = str(on_cpu)
    assert "\n" not in text and text.startswith("linear_quant: ")
    assert "What to do: " in text and "aclnn" in text

    assert str(refused(cases.on("meta", inputs))) == text
    assert str(refused(cases.on("npu", inputs))) == text
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in inputs.items()}
        assert str(refused(fake)) == text
    assert str(in_converter(inputs)) == text
    for name, value in inputs.items():
        assert value is before[name] or torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("case", "change", "error", "match"),
    [REFUSED[i] for i in (1, 11, 21, 28, 29)],
    ids=[IDS[i] for i in (1, 11, 21, 28, 29)],
)
def test_compile_gives_the_same_text(case, change, error, match, capfd) -> None:
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
        ((ones(2, 4),), VALUE, r"scale has shape \(2, 4\); allowed are \(1,\), \(n,\) and \(1, n"),
        ((torch.tensor(1.0),), VALUE, r"scale has shape \(\)"),
        ((ones(0),), VALUE, "scale is empty"),
        ((ones(4), ones(3)), VALUE, r"scale \(4,\) and offset \(3,\) do not fit"),
        ((ones(1, 4), ones(4)), VALUE, "do not fit"),
        ((ones(4), None, 2), VALUE, "round_mode is 2; allowed are 0"),
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
