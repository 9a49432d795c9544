"""LinearQuant's eager call on the NPU goes straight to the kernel, and nothing that follows the
operators misses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lq_graph import LinearQuantTypeError, LinearQuantValueError
from support import cases
from support.cases import BF16, Case
from support.layers import module_for

OPERATOR = "lq_graph.linear_quant.default"
CASE = Case(output=BF16, pertoken=True)


class Names(TorchDispatchMode):
    """The operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", cases.ROW_CASES[::3], ids=str)
def test_module_on_the_npu_equals_golden(case: Case) -> None:
    inputs = cases.make(case)
    cases.assert_equal(module_for(inputs).npu()(inputs["x1"].npu()).cpu(), inputs)


def _mode(layer: Callable[[Tensor], Tensor], x1: Tensor) -> tuple[str, Tensor]:
    with Names() as followed:
        out = layer(x1)
    return " ".join(followed.names), out


def _make_fx(layer: Callable[[Tensor], Tensor], x1: Tensor) -> tuple[str, Tensor]:
    traced = make_fx(layer)(x1)
    return " ".join(str(node.target) for node in traced.graph.nodes), traced(x1)


def _jit_trace(layer: Callable[[Tensor], Tensor], x1: Tensor) -> tuple[str, Tensor]:
    traced = torch.jit.trace(layer, x1, check_trace=False)
    return str(traced.inlined_graph).replace("lq_graph::linear_quant", OPERATOR), traced(x1)


@pytest.mark.parametrize("follow", [_mode, _make_fx, _jit_trace])
def test_what_follows_operators_sees_ours(follow) -> None:
    inputs = cases.make(CASE)
    layer, x1 = module_for(inputs).npu(), inputs["x1"].npu()
    seen, out = follow(layer, x1)
    assert OPERATOR in seen and "npu_quant_matmul" not in seen
    cases.assert_equal(out.cpu(), inputs)


def test_vmap_computes_one_call_for_each() -> None:
    inputs = cases.make(CASE)
    layer, x1 = module_for(inputs).npu(), inputs["x1"].npu()
    for own in torch.vmap(layer)(torch.stack([x1, x1])):
        cases.assert_equal(own.cpu(), inputs)


def test_derivatives_are_refused() -> None:
    inputs = cases.make(CASE)
    layer, x1 = module_for(inputs).npu(), inputs["x1"].npu()
    pertoken = inputs["pertoken_scale"].npu()
    with pytest.raises(LinearQuantTypeError, match=r"linear_quant: torch\.func asks for its jvp"):
        torch.func.jvp(lambda scale: layer(x1, scale), (pertoken,), (pertoken,))


def test_tensors_on_two_devices_are_refused() -> None:
    inputs = cases.make(CASE)
    layer = module_for(inputs)
    with pytest.raises(LinearQuantValueError, match="weight is on cpu and x1 on npu:0"):
        layer(inputs["x1"].npu())
