"""check_model(): its verdict on a call is that of the operator itself; and it loses no call."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch import nn

import lq_graph
from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuant,
    LinearQuantError,
    LinearQuantTypeError,
    LinearQuantValueError,
    check_model,
    command_line,
    quantize,
)
from lq_graph.rules.plan import Spec
from support import cases
from support.cases import ALL_CASES, BF16, F16, F32, I8, I32, I64, PRODUCT, ROW_CASES, Case
from support.hf_models import MODELS, model_of
from support.layers import LinearA8W8Quant, module_for, vendor_for
from support.processes import python

QINT8 = 12


class Call(nn.Module):
    """A model that makes one call, of tensors that it is given."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, **tensors: Any) -> Any:
        return self.call(**tensors)


def verdict_of(call: Callable[..., Any], tensors: dict[str, Any]) -> lq_graph.ModelCheck:
    found = check_model(Call(call), tensors, product=PRODUCT)
    assert not found.stopped
    return found


# ---- torch_npu's operators: the answer is the device's ----


def matmul(x1: Any, weight: Any, scale: Any, **others: Any) -> Any:
    return torch_npu.npu_quant_matmul(x1, weight.mT, scale, **others)


def row_major(x1: Any, weight: Any, scale: Any, **others: Any) -> Any:
    """As vLLM calls it: the weight was transposed, and made contiguous, when it was loaded."""
    return torch_npu.npu_quant_matmul(x1, weight.mT.contiguous(), scale, **others)


def changed(case: Case, **tensors: Any) -> dict[str, Any]:
    return {**cases.make(case), **tensors}


I8F16, PERTOKEN = Case(output=F16), Case(pertoken=True, output=BF16)
INT4 = Case(x=I32, output=F16)
MATMULS: dict[str, dict[str, Any]] = {
    "offset beside float16": changed(I8F16, offset=torch.ones(24)),
    "scale of another length": changed(I8F16, scale=torch.ones(5)),
    "scale of two dims": changed(I8F16, scale=torch.ones(1, 24)),
    "scale in float16": changed(I8F16, scale=torch.ones(24, dtype=F16)),
    "scale in bfloat16 for float16": changed(I8F16, scale=torch.ones(24, dtype=BF16)),
    "bias of another dtype": changed(I8F16, bias=torch.ones(24, dtype=F16)),
    "bias of another length": changed(I8F16, bias=torch.ones(23, dtype=I32)),
    "bias beside a token's scale": changed(PERTOKEN, bias=torch.ones(24, dtype=F16)),
    "a token's scale of another length": changed(PERTOKEN, pertoken_scale=torch.ones(2)),
    "a token's scale in bfloat16": changed(PERTOKEN, pertoken_scale=torch.ones(3, dtype=BF16)),
    "a token's scale for int8": changed(Case(), pertoken_scale=torch.ones(3)),
    "k differs": changed(I8F16, weight=torch.ones(24, 48, dtype=I8)),
    "x1 in uint8": changed(I8F16, x1=torch.ones(3, 40, dtype=torch.uint8)),
    "weight in float16": changed(I8F16, weight=torch.ones(24, 40, dtype=F16)),
    "int4 to int8": changed(INT4, output_dtype=I8),
    "int4 beside int8": changed(INT4, x1=torch.ones(3, 5, dtype=I8)),
    "packed scale for bfloat16": changed(I8F16, scale=torch.ones(24, dtype=I64), output_dtype=BF16),
    "x1 of one dim": changed(I8F16, x1=torch.ones(40, dtype=I8)),
    "k above 65535": changed(
        I8F16, x1=torch.ones(1, 65536, dtype=I8), weight=torch.ones(24, 65536, dtype=I8)
    ),
    "no bias beside a packed scale": changed(I8F16, scale=torch.ones(24, dtype=I64)),
}  # fmt: skip


def is_taken(call: Callable[..., Any], tensors: dict[str, Any]) -> bool:
    """Whether the device takes a call."""
    try:
        call(**cases.on("npu", tensors))
    except RuntimeError as error:
        # the last is torch_npu's own
        if any(code in str(error) for code in ("161002", "561002", "must be divded by 8")):
            return False
        raise
    return True


@pytest.mark.parametrize("name", MATMULS)
def test_a_matmul_is_refused_where_the_device_refuses_it(name: str) -> None:
    tensors = MATMULS[name]
    found = verdict_of(matmul, tensors)
    assert bool(found) == is_taken(matmul, tensors) == (name == "no bias beside a packed scale")
    if not found:
        (call,) = found.calls
        (verdict,) = call.verdicts
        assert str(verdict.error).startswith("check_model: npu_quant_matmul: ")
        assert "161002" in str(found) or "561002" in str(found)


@pytest.mark.parametrize("call", [matmul, row_major])
@pytest.mark.parametrize("case", ROW_CASES[::3], ids=str)
def test_a_matmul_is_taken_where_the_device_takes_it(case: Case, call: Callable[..., Any]) -> None:
    if case.x == I32 and call is row_major:
        pytest.skip("an int4 weight is packed along k")
    tensors = cases.make(case)
    found = verdict_of(call, tensors)
    assert found and is_taken(call, tensors)
    (one,) = found.calls
    assert one.operator == "npu.npu_quant_matmul"
    assert one.verdicts[0].row == lq_graph.plan(**tensors).row


def test_a_row_major_weight_has_n_as_its_last_dim() -> None:
    tensors = changed(I8F16, weight=torch.ones(65544, 40, dtype=I8), scale=torch.ones(1))
    assert not is_taken(row_major, tensors) and not (found := verdict_of(row_major, tensors))
    assert "n is 65544, and x2 is not transposed" in " ".join(str(found).split())
    assert is_taken(matmul, tensors) and verdict_of(matmul, tensors)


def ones(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


QUANTS: dict[str, tuple[Callable[..., Any], dict[str, Any], bool]] = {
    "dynamic": (torch_npu.npu_dynamic_quant, dict(input=ones(2, 16)), True),
    "dynamic, bfloat16": (torch_npu.npu_dynamic_quant, dict(input=ones(2, 16, dtype=BF16)), True),
    "dynamic, int4": (
        torch_npu.npu_dynamic_quant, dict(input=ones(2, 16), dst_type=torch.quint4x2), True
    ),
    "dynamic, int4 of 12": (
        torch_npu.npu_dynamic_quant, dict(input=ones(2, 12), dst_type=torch.quint4x2), False
    ),
    "dynamic, float32": (torch_npu.npu_dynamic_quant, dict(input=ones(2, 16, dtype=F32)), False),
    "static": (
        torch_npu.npu_quantize,
        dict(input=ones(2, 16), scales=ones(1), zero_points=None, dtype=QINT8, axis=-1,
             div_mode=False),
        True,
    ),
    "static, scale in float32": (
        torch_npu.npu_quantize,
        dict(input=ones(2, 16), scales=ones(1, dtype=F32), zero_points=None, dtype=QINT8, axis=-1,
             div_mode=False),
        False,
    ),
    "static, 7 scales": (
        torch_npu.npu_quantize,
        dict(input=ones(2, 16), scales=ones(7), zero_points=None, dtype=QINT8, axis=-1,
             div_mode=False),
        False,
    ),
    "pack": (torch_npu.npu_trans_quant_param, dict(scale=ones(4, dtype=F32)), True),
    "pack float16": (torch_npu.npu_trans_quant_param, dict(scale=ones(4)), False),
    "pack with another offset": (
        torch_npu.npu_trans_quant_param,
        dict(scale=ones(4, dtype=F32), offset=ones(3, dtype=F32)),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTS)
def test_other_operators(name: str) -> None:
    call, tensors, taken = QUANTS[name]
    assert bool(verdict_of(call, tensors)) == is_taken(call, tensors) == taken


NOT_COVERED: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "smooth_scales": (
        torch_npu.npu_dynamic_quant,
        dict(input=ones(2, 16), smooth_scales=ones(16)),
        "its argument smooth_scales",
    ),
    "a division": (
        torch_npu.npu_quantize,
        dict(input=ones(2, 16), scales=ones(1), zero_points=None, dtype=QINT8, axis=-1),
        "div_mode is True",
    ),
    "int4 along n": (
        row_major, {**cases.make(INT4), "weight": ones(3, 40, dtype=I32)}, "eight int4 of n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_has_no_rules_is_said(name: str) -> None:
    call, tensors, why = NOT_COVERED[name]
    found = verdict_of(call, tensors)
    assert why in found.calls[0].why_not and not found.calls[0].verdicts
    assert "not covered" in str(found)
    assert str(found).startswith("1 calls; no rules are about any of them")
    assert not found and not found.legal_on


# ---- our operators: the answer is the fake kernel's ----


@pytest.mark.parametrize("product", ["310P", "A2", "A3", "950"])
@pytest.mark.parametrize("case", ALL_CASES[::9], ids=str)
def test_our_calls(case: Case, product: str) -> None:
    tensors = cases.make(case)
    for wrong in ({}, {"scale": torch.ones(5)}, {"output_dtype": F32}, {"bias": ones(3)}):
        given = {**tensors, **wrong}
        found = check_model(Call(lq_graph.linear_quant), given, product=product)
        try:
            lq_graph.set_product(product)
            lq_graph.linear_quant(**cases.on("meta", given))
            error = None
        except LinearQuantError as refused:
            error = refused
        finally:
            lq_graph.set_product(None)
        (call,) = found.calls
        (verdict,) = call.verdicts
        assert (verdict.error is None) == (error is None) == bool(found)
        if error is not None:
            assert verdict.error.refusal.sentence() == error.refusal.sentence()


# ---- models ----


class ByHand(nn.Module):
    """torch_npu's operators, as in a model that somebody wrote."""

    def __init__(self, output: torch.dtype = F16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 64, dtype=I8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(32), requires_grad=False)
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, scale = torch_npu.npu_dynamic_quant(x)
        return torch_npu.npu_quant_matmul(
            quantized, self.weight.t(), self.scale, pertoken_scale=scale, output_dtype=self.output
        )


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[Any]:
        return [layer(x) for layer in self.layers]


def told(found: lq_graph.ModelCheck) -> list[tuple[str, str, str]]:
    return [
        (call.layer, call.operator.split(".")[1], " ".join(p.key for p in call.legal_on))
        for call in found.calls
    ]


def test_a_refused_call_hides_no_other() -> None:
    model = Stack(ByHand(), ByHand(I8), ByHand(BF16))
    found = check_model(model, torch.ones(4, 64).half())
    assert told(found) == [
        ("layers.0", "npu_dynamic_quant", "310P A2 A3 950"),
        ("layers.0", "npu_quant_matmul", "A2 A3 950"),
        ("layers.1", "npu_dynamic_quant", "310P A2 A3 950"),
        ("layers.1", "npu_quant_matmul", ""),
        ("layers.2", "npu_dynamic_quant", "310P A2 A3 950"),
        ("layers.2", "npu_quant_matmul", "A2 A3 950"),
    ]
    assert not found and found.legal_on == ()
    error = str(found.calls[3].verdicts[1].error)
    assert error.startswith("check_model: layers.1: npu_quant_matmul: ")
    assert "What to do: " in error and "161002" in error


def test_text_fits_80_columns() -> None:
    model = Stack(*(ByHand() for _ in range(12)), ByHand(I8))
    text = str(check_model(model, torch.ones(4, 64).half(), product="A2"))
    assert max(map(len, text.splitlines())) <= 80
    assert "layers.* x12" in text and text.count("no   Atlas A2: ") == 1


@pytest.mark.parametrize("device", ["cpu", "meta", "npu"])
def test_the_vendors_modules(device: str) -> None:
    x = cases.make(Case(m=4, k=64))["x1"]
    model = Stack(
        vendor_for(cases.make(Case(k=64, n=32, offset=True))),
        vendor_for(cases.make(Case(k=64, n=32, output=F16)), LinearA8W8Quant),
        module_for(cases.make(Case(k=64, n=32, output=F16, bias=I32))),
    ).to(device)
    found = check_model(model, x)
    assert found and {layer for layer, *_ in told(found)} == {"layers.0", "layers.1", "layers.2"}
    packs = [layer for layer, op, _ in told(found) if op == "npu_trans_quant_param"]
    assert packs == ["layers.0", "layers.1"]


def test_a_float32_scale_that_no_graph_packs_is_noted() -> None:
    for scale, noted in ((torch.ones(24), True), (torch.ones(24, dtype=I64), False)):
        (call,) = verdict_of(matmul, changed(I8F16, scale=scale)).calls
        assert ("in a GE graph CANN refuses the float32 scale" in call.note) == noted
    (call,) = verdict_of(matmul, cases.make(PERTOKEN)).calls
    assert not call.note


@pytest.mark.parametrize("scheme", [A8W8Dynamic(), A8W8Static(), A4W4Dynamic()], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_models_of_transformers(name: str, scheme: Any) -> None:
    assert name in MODELS
    model = model_of(name).half()
    ids = torch.randint(3, 128, (1, 5))
    static = isinstance(scheme, A8W8Static)
    quantize(model, scheme, [{"input_ids": ids}] if static else None)
    found = check_model(model, {"input_ids": ids}, product="A2")
    assert found and not found.not_called
    layers = [n for n, m in model.named_modules() if isinstance(m, LinearQuant)]
    assert [layer for layer, op, _ in told(found) if op == "linear_quant"] == layers
    assert not check_model(model, {"input_ids": ids}, product="310P") or static


def test_the_model_is_left_as_it_was() -> None:
    model = Stack(ByHand())
    model.layers[0].register_buffer("count", torch.zeros(1))
    model.layers[0].register_forward_hook(lambda m, *_: m.count.add_(1) and None)
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    check_model(model, torch.ones(4, 64).half())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such thing")


class NeedsCann(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ImportError("libhccl.so: cannot open shared object file")


def test_what_to_do_without_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    found = check_model(nn.Sequential(ByHand(), NeedsCann()), torch.ones(4, 64).half())
    assert found.stopped == (
        "1: ImportError: libhccl.so: cannot open shared object file. What to do: if torch_npu "
        "lacks CANN here, run it under `python -m cann_host`"
    )


def test_a_run_that_ends_early_is_no_yes() -> None:
    found = check_model(nn.Sequential(ByHand(), Fails(), ByHand()), torch.ones(4, 64).half())
    assert not found and len(found.calls) == 2
    assert found.stopped == "1: ValueError: no such thing"
    assert "the run stopped, calls after it are missing: 1: ValueError" in str(found)
    at_once = check_model(nn.Sequential(Fails(), ByHand()), torch.ones(4, 64).half())
    assert not at_once and not at_once.calls
    assert str(at_once).split("\n\n")[1:] == [
        "the run stopped, calls after it are missing: 0: ValueError: no such thing"
    ]


def test_layers_that_are_not_reached_are_named() -> None:
    model = Stack(ByHand())
    model.other = LinearQuant(64, 32)
    assert check_model(model, torch.ones(4, 64).half()).not_called == ("other",)


# ---- graphs ----


@pytest.mark.parametrize("given", [None, torch.ones(5, 64).half()], ids=["by its values", "inputs"])
def test_an_exported_program(given: Any) -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(
        Stack(ByHand(), ByHand(F16)), (torch.ones(4, 64).half(),), dynamic_shapes=({0: rows},)
    )
    found = check_model(program.module(), given, product="A2")
    assert found and [call.layer for call in found.calls] == ["layers.0"] * 2 + ["layers.1"] * 2
    assert all(call.node for call in found.calls)
    assert [*found.assumed.values()] == ([4] if given is None else [])


def test_a_traced_graph_without_values_needs_inputs() -> None:
    graph = torch.fx.symbolic_trace(ByHand())
    with pytest.raises(LinearQuantValueError, match=r"placeholder x of the graph has no value"):
        check_model(graph)
    assert check_model(graph, Spec(F16, (4, 64)), product="A2")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (I8, None, LinearQuantTypeError, "model is a dtype; allowed is a module"),
        (nn.Linear(4, 4), torch.ones(1, 4), LinearQuantValueError, "no quantizing call was made"),
        (ByHand(), None, LinearQuantValueError, "inputs are absent; a module needs them"),
        (ByHand(), 3, LinearQuantTypeError, "check_model: inputs are a int"),
    ],
)
def test_mistakes(model: Any, inputs: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_model(model, inputs)


FILE = """
import torch
from torch import nn
{define}

class Model(nn.Module):
    def forward(self, x, w, s):
        q, p = torch.ops.npu.npu_dynamic_quant(x)
        return torch.ops.npu.npu_quant_matmul(q, w.t(), s, pertoken_scale=p, output_dtype={output})

def make():
    shapes = (4, 64), (32, 64), (32,)
    dtypes = torch.float16, torch.int8, torch.float32
    return Model(), tuple(torch.ones(s, dtype=d) for s, d in zip(shapes, dtypes))
"""
DEFINE = """
lib = torch.library.Library("npu", "DEF")
lib.define("npu_dynamic_quant(Tensor input, *, int? dst_type=None) -> (Tensor, Tensor)")
lib.define("npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? pertoken_scale=None, "
           "int? output_dtype=None) -> Tensor")
"""


@pytest.mark.parametrize(("output", "status"), [(5, 0), (1, 1)])
def test_command_line(output: int, status: int, tmp_path: Path, capsys) -> None:
    (tmp_path / "model.py").write_text(FILE.format(define="", output=output))
    model = f"{tmp_path / 'model.py'}:make"
    assert command_line.main(["check", model, "--product", "A2"]) == status
    assert "npu_quant_matmul" in capsys.readouterr().out
    assert command_line.main(["check", model, "--json"]) == status
    shown = json.loads(capsys.readouterr().out)
    assert shown["legal"] == (status == 0) and len(shown["calls"]) == 2
    assert shown["calls"][1]["tensors"]["weight"] == "int8[32, 64]"


def test_command_line_mistake(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["check", "model.py:make", "--bias", "int32"])
    assert stopped.value.code == 2
    assert "--bias is of one call, and model.py:make is a model" in capsys.readouterr().err


@pytest.mark.slow
def test_it_needs_no_torch_npu(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(FILE.format(define=DEFINE, output=1))
    done = python(
        "-m", "lq_graph", "check", "model.py:make", cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "pertoken_scale is float32" in " ".join(done.stdout.split())


# ---- runs that go wrong ----


def test_a_run_that_stops_before_any_call_prints() -> None:
    found = check_model(nn.Linear(4, 4), {})
    assert not found.calls and not found
    said = " ".join(str(found).split())
    assert "calls after it are missing: the model: TypeError: Linear.forward() missing 1" in said


class Catches(nn.Module):
    """Calls that fail in a module inside, and a call of its own afterwards."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.bad = nn.Sequential(Fails())
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            self.bad(x)
        except ValueError:
            lq_graph.ops.dynamic_quant(x)
        return self.bad(x) if self.again else x


def test_a_call_after_a_failure_is_of_the_module_that_makes_it() -> None:
    found = check_model(nn.Sequential(Catches(again=False)), torch.ones(2, 32).half())
    assert [call.layer for call in found.calls] == ["0"]
    assert not found.stopped
    found = check_model(nn.Sequential(Catches(again=True)), torch.ones(2, 32).half())
    assert [call.layer for call in found.calls] == ["0"]
    assert found.stopped == "0.bad.0: ValueError: no such thing"


def test_a_scripted_module_inside_does_not_stop_the_run() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.trace(nn.Linear(32, 32), torch.ones(1, 32))

        def forward(self, x: torch.Tensor) -> Any:
            return lq_graph.ops.dynamic_quant(self.scripted(x).half())

    found = check_model(Both(), torch.ones(2, 32))
    assert not found.stopped and len(found.calls) == 1
