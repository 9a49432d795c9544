"""The lowering: which GE nodes, with which dtypes and attributes, and that they compute the
right values. Read from torchair's own dump of the real graph."""

from __future__ import annotations

import pytest
import torch
import torch_npu
import torchair

import lq_graph
from lq_graph import converters
from lq_graph.rules.tables import dtype_name
from support import cases
from support.cases import BF16, F16, F32, I8, I32, I64, ROW_CASES, SHAPE_CASES, Case
from support.layers import module_for
from support.lowering import MATMUL, lower

TRANS = "TransQuantParamV2"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ROW_CASES + SHAPE_CASES, ids=str)
def test_graph_equals_golden(case: Case, dynamic: bool) -> None:
    inputs = cases.make(case)
    layer = module_for(inputs).npu()
    out, _ = lower(layer, inputs["x1"].npu(), dynamic=dynamic)
    cases.assert_equal(out, inputs)


@pytest.mark.parametrize(
    ("case", "ops"),
    [
        # the scale is packed, or the row reads it as it is: one node
        (Case(scale=I64), [MATMUL]),
        (Case(scale=I64, offset=True, bias=I32), [MATMUL]),
        (Case(scale=I64, output=F16), [MATMUL]),
        (Case(output=BF16, bias=BF16, pertoken=True), [MATMUL]),
        (Case(output=F16, bias=F16, pertoken=True), [MATMUL]),
        (Case(output=I32), [MATMUL]),
        # a float32 scale that has to be packed
        (Case(), [TRANS, MATMUL]),
        (Case(offset=True), [TRANS, MATMUL]),
        (Case(output=F16), [TRANS, MATMUL]),
        # InferShape of TransQuantParamV2 follows the scale: expand it first
        (Case(offset=True, scalar_scale=True), ["BroadcastTo", TRANS, MATMUL]),
        (Case(offset=True, scalar_offset=True, scalar_scale=True), [TRANS, MATMUL]),
        # int4
        (Case(x=I32, scale=I64, output=F16), ["Bitcast", "Reshape"] * 2 + [MATMUL]),
        (Case(x=I32, output=F16), ["Bitcast", "Reshape"] * 2 + [TRANS, MATMUL]),
    ],
    ids=lambda v: str(v) if isinstance(v, Case) else "",
)
def test_nodes(case: Case, ops: list[str]) -> None:
    inputs = cases.make(case)
    _, graph = lower(module_for(inputs).npu(), inputs["x1"].npu())
    assert graph.ops() == ops


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_matmul_node_fields(case: Case) -> None:
    inputs = cases.make(case)
    _, graph = lower(module_for(inputs).npu(), inputs["x1"].npu())
    node = graph.compute[-1]
    assert node.op == MATMUL
    assert node.attrs["transpose_x2"] is True
    assert not node.attrs["transpose_x1"]
    ge = converters._torchair.torch_type_to_ge_type
    assert node.attrs["dtype"] == ge(case.output)

    logical = "int4" if case.x == I32 else "int8"
    folded = case.output == I8 or (case.output == F16 and not case.pertoken)
    want = {"x1": logical, "x2": logical, "scale": "int64" if folded else dtype_name(case.scale)}
    if case.offset:
        want["offset"] = "float32"
    if case.bias:
        want["bias"] = dtype_name(case.bias)
    if case.pertoken:
        want["pertoken_scale"] = "float32"
    assert {edge.name: edge.dtype for edge in node.inputs} == want
    assert [edge.name for edge in node.inputs] == list(want)
    (out,) = node.outputs
    assert (out.dtype, out.shape) == (dtype_name(case.output), (case.m, case.n))


def test_vendor_module_needs_three_nodes_where_ours_needs_one() -> None:
    inputs = cases.make(Case(scale=F32, output=F16))
    theirs = torch_npu.contrib.module.LinearQuant(40, 24, bias=False, output_dtype=F16).npu()
    theirs.weight.data = inputs["weight"].npu()
    theirs.scale.data = inputs["scale"].npu()
    theirs_out, theirs_graph = lower(theirs, inputs["x1"].npu())
    assert theirs_graph.ops() == [TRANS, "Transpose", MATMUL]

    ours = module_for(inputs).npu()
    lq_graph.use_internal_format_weight(ours)
    ours_out, ours_graph = lower(ours, inputs["x1"].npu())
    assert ours_graph.ops() == [MATMUL]
    cases.assert_equal(ours_out, inputs)
    assert torch.equal(ours_out.cpu(), theirs_out.cpu())


def test_int8_chain_keeps_int8_between_layers() -> None:
    first = cases.make(Case(scale=I64, offset=True, n=40))
    second = cases.make(Case(scale=I64, output=F16), seed=1)
    chain = torch.nn.Sequential(module_for(first), module_for(second)).npu()
    out, graph = lower(chain, first["x1"].npu())
    assert graph.ops() == [MATMUL, MATMUL]
    assert graph.compute[1].inputs[0].dtype == "int8"
    second["x1"] = torch.from_numpy(cases.expected(first))
    cases.assert_equal(out, second)


def test_one_dynamic_graph_serves_every_m() -> None:
    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    inputs = cases.make(Case(x=I32, output=F16, scale=I64))
    layer = module_for(inputs).npu()
    backend = torchair.get_npu_backend(compiler_config=config)
    compiled = torch.compile(layer, backend=backend, dynamic=True, fullgraph=True)
    with converters.graph.capture(config) as graphs:
        for m in (3, 7, 64):
            more = cases.make(Case(x=I32, output=F16, scale=I64, m=m), seed=m)
            inputs["x1"] = more["x1"]
            cases.assert_equal(compiled(inputs["x1"].npu()), inputs)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["x1", "weight"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_int8_stored_column_by_column(name: str, dynamic: bool) -> None:
    inputs = cases.make(Case(m=8, k=16, n=24, offset=True))
    layer = module_for(inputs).npu()
    x1 = inputs["x1"].npu()
    if name == "x1":
        x1 = x1.t().contiguous().t()
    else:
        layer.weight.data = layer.weight.data.t().contiguous().t()
    cases.assert_equal(layer(x1), inputs)
    out, _ = lower(layer, x1, dynamic=dynamic)
    cases.assert_equal(out, inputs)


def test_trans_quant_param_in_a_graph() -> None:
    scale, offset = torch.rand(24), torch.randn(24) * 50
    out, graph = lower(lq_graph.trans_quant_param, scale.npu(), offset.npu())
    assert graph.ops() == [TRANS]
    assert torch.equal(out.cpu(), lq_graph.trans_quant_param(scale, offset))
