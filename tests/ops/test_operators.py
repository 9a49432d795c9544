"""The records of ops.py: each is complete, and the functions that it names run."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.library import opcheck

import lq_graph
from lq_graph import converters, ops
from lq_graph.ops import OPERATORS, NotNeeded, Operator, load

each = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
FUNCTIONS = ("plan", "fake", "cpu", "npu", "autocast", "converter", "sharding", "torch_func")

# a legal call of each
SAMPLES: dict[str, dict[str, Any]] = {
    "linear_quant": {
        "x1": torch.ones(3, 16, dtype=torch.int8),
        "weight": torch.ones(8, 16, dtype=torch.int8),
        "scale": torch.full((8,), 0.5),
        "bias": torch.ones(8, dtype=torch.int32),
        "output_dtype": torch.float16,
    },
    "trans_quant_param": {"scale": torch.full((8,), 0.5), "offset": torch.ones(8)},
    "dynamic_quant": {"x": torch.ones(3, 16, dtype=torch.float16)},
    "static_quant": {
        "x": torch.ones(3, 16, dtype=torch.float16),
        "scale_reciprocal": torch.ones(16, dtype=torch.float16),
    },
    "quantized_linear": {
        "x": torch.ones(3, 16, dtype=torch.float16),
        "weight": torch.ones(8, 16, dtype=torch.int8),
        "scale": torch.full((8,), 0.5),
        "bias": torch.ones(8),
        "output_dtype": torch.float16,
    },
}


def test_every_operator_of_the_namespace_has_a_record_and_a_sample() -> None:
    defined = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lq_graph::")
    }
    assert defined == {operator.name for operator in OPERATORS} == {*SAMPLES}
    public = {operator.name for operator in OPERATORS if operator.public}
    assert {*lq_graph.__all__} & defined == public == defined - {"quantized_linear"}


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, bool]]:
    """Name, default and whether keyword only, of each argument."""
    return [
        (p.name, None if p.default is p.empty else p.default, p.kind is p.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()
    ]


def missing(operator: Operator) -> list[str]:
    """The functions that a record names and that do not exist."""
    found = []
    for named in (getattr(operator, field) for field in FUNCTIONS):
        if not isinstance(named, NotNeeded):
            try:
                load(named)
            except (AttributeError, ModuleNotFoundError):
                found.append(named)
    return found


@each
def test_record_is_complete(operator: Operator) -> None:
    """All functions exist and take what the schema says."""
    arguments = operator.overload._schema.arguments
    want = [(a.name, a.default_value, a.kwarg_only) for a in arguments]
    assert str(operator.overload._schema) == f"lq_graph::{operator.name}{operator.schema}"
    assert not missing(operator)
    for field in FUNCTIONS:
        named = getattr(operator, field)
        if isinstance(named, NotNeeded):
            assert named.reason
            assert field == "autocast" or not operator.public
            continue
        function = load(named)
        if field in ("plan", "torch_func"):
            assert callable(function)
            continue
        got = parameters(function)
        if field == "autocast":
            assert [name for name, *_ in got[:2]] == ["key", "device"]
            got = got[2:]
        if field == "converter":
            got = [item for item in got if item[0] != "meta_outputs"]
            note = inspect.getdoc(function).partition("\n\n")[0]
            assert " ".join(note.split()) == f"NB: lq_graph::{operator.name}{operator.schema}"
        assert got == want, field
    public = [item for item in want if item[0] not in operator.for_fusions]
    assert len(public) == len(want) - len(operator.for_fusions)
    if operator.public:
        assert parameters(getattr(lq_graph, operator.name)) == public


@each
def test_record_is_registered(operator: Operator) -> None:
    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"lq_graph::{operator.name}", key)

    for key in ("CPU", "PrivateUse1", "Meta", "Autograd", "FuncTorchDynamicLayerFrontMode"):
        assert has(key), key
    for key in ("AutocastCPU", "AutocastPrivateUse1"):
        assert has(key) is not isinstance(operator.autocast, NotNeeded), key

    converters.register()
    converter = getattr(operator.overload, "_ge_converter", None)
    assert not isinstance(converter, ops._LazyConverter)
    assert (converter is None) is isinstance(operator.converter, NotNeeded)
    load("parallel.sharding:linear_quant")
    split = operator.overload in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    assert split is not isinstance(operator.sharding, NotNeeded)


class AskedError(Exception):
    """The plan of the operator was asked."""


@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.public], ids=lambda o: o.name)
@pytest.mark.parametrize("place", ["fake", "cpu", "npu", "converter"])
def test_every_backend_calls_plan(
    place: str, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: object, **kwargs: object) -> None:
        raise AskedError

    plan, function = load(operator.plan), load(getattr(operator, place))
    names = [name for name, value in function.__globals__.items() if value is plan]
    assert names, f"{function.__module__} does not know {operator.plan}"
    for name in names:
        monkeypatch.setitem(function.__globals__, name, asked)
    given = SAMPLES[operator.name]
    if place == "converter":  # of torchair's tensors, plan() looks at the fake tensor only
        given = {
            name: SimpleNamespace(meta=value) if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
    with pytest.raises(AskedError):
        function(**given)


@each
def test_opcheck(operator: Operator) -> None:
    results = opcheck(operator.overload, (), SAMPLES[operator.name])
    assert set(results.values()) == {"SUCCESS"}


# ---- the first call ----


def test_a_function_takes_its_own_place_at_the_first_call() -> None:
    kernel = ops._lazy("reports:table", [["a"], [1]])
    assert kernel(indent=" ") == kernel(indent=" ") == [" a", " 1"]
    assert kernel.func is load("reports:table")


@pytest.mark.slow
def test_first_calls() -> None:
    """In each situation a program's first call may be in; see the program."""
    program = Path(__file__).with_name("scripts") / "first_calls.py"
    if not program.exists():
        program = Path(__file__).parents[1] / "scripts" / "first_calls.py"
    result = subprocess.run(
        [sys.executable, program],
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["16", "situations"]
