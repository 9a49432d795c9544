"""Operators of ATen that torchair has by name only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401
import torchair

import cann_host
from lq_graph import converters
from lq_graph.converters import missing

pytestmark = pytest.mark.skipif(
    not cann_host.is_active(), reason="needs cann_host in place of CANN"
)


def compiled(function: Any, dynamic: bool) -> Any:
    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    backend = torchair.get_npu_backend(compiler_config=config)
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)


REPEATED: dict[tuple[int, int], Any] = {  # of how often and which dim; numbers of a graph
    (2, -1): lambda x: x.repeat_interleave(2, -1) + 1,
    (3, 0): lambda x: x.repeat_interleave(3, 0) + 1,
    (1, 1): lambda x: x.repeat_interleave(1, 1) + 1,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_repeat_interleave(case: tuple[int, int], dynamic: bool) -> None:
    converters.register()
    x = torch.arange(24.0).view(2, 3, 4).half()
    there = x.npu()
    for dim in (1, 2):  # the first may be unknown
        torch._dynamo.mark_static(there, dim)
    got = compiled(REPEATED[case], dynamic)(there)
    want = x.numpy().repeat(case[0], axis=case[1]) + 1
    assert torch.equal(got.cpu(), torch.from_numpy(want))


def test_two_sizes_that_run_time_alone_knows_are_refused() -> None:
    """Older versions of torch trace it to views, which have no such limit."""
    converters.register()
    x = torch.arange(24.0).view(2, 3, 4)
    got, refusal = None, ""
    try:
        got = compiled(lambda x: x.repeat_interleave(2, -1) + 1, True)(x.npu()).cpu()
    except Exception as error:
        refusal = str(error)
    if got is None:
        assert "repeat_interleave in a GE graph with two unknown sizes" in refusal
    else:
        assert torch.equal(got, torch.from_numpy(x.numpy().repeat(2, axis=-1) + 1))


def test_torchairs_own_converter_comes_first() -> None:
    def theirs(*_: Any, **__: Any) -> str:
        return "theirs"

    def lacks(*_: Any, **__: Any) -> str:
        raise NotImplementedError

    def ours(*_: Any, **__: Any) -> str:
        return "ours"

    assert missing._after(theirs, ours)() == "theirs"
    assert missing._after(lacks, ours)() == "ours"


def test_registering_again_changes_nothing() -> None:
    converters.register()
    overload: Any = torch.ops.aten.repeat_interleave.self_int
    before = overload._ge_converter
    converters.register()
    assert overload._ge_converter is before
