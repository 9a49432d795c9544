"""One compiled graph, called by several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import cann_host
from cann_host import callers

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torchair = pytest.importorskip("torchair")

THREADS, TURNS = 4, 30


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def function(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = torch.sin(x) + 1
    return x


def compiled(mode: str) -> Callable[..., Any]:
    if mode == "npugraph_ex":
        if mode not in torch._dynamo.list_backends(exclude_tags=()):
            pytest.skip("no npugraph_ex in this torch_npu")
        options = {"clone_output": True}
        return torch.compile(function, backend=mode, dynamic=False, options=options)
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    return torch.compile(function, backend=backend, dynamic=mode == "dynamic")


def call_on_threads(mode: str, lock: Any) -> tuple[list[object], int]:
    """What was wrong, and how many calls were refused.

    Gradients are on in a new thread, so torch compiles again: each thread's first call is the first
    of a GE graph too. Not of a captured graph, because a capture refuses the work of other threads.
    """
    run = compiled(mode)
    inputs = [torch.full((64, 64), float(first)) for first in range(THREADS)]
    on_npu = [x.npu() for x in inputs]
    with torch.set_grad_enabled(mode == "npugraph_ex"):
        run(on_npu[0])
    wrong: list[object] = []
    refused: list[int] = []

    def work(index: int) -> None:
        want = function(inputs[index])
        for turn in range(TURNS):
            try:
                with lock:
                    result = run(on_npu[index]).cpu()
            except callers.ConcurrentCallError:
                refused.append(turn)
            except Exception as error:
                wrong.append(error)
            else:
                if not torch.allclose(result, want):
                    wrong.append(turn)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong, len(refused)


MODES = ["static", "dynamic", "npugraph_ex"]


@pytest.mark.parametrize("mode", MODES)
def test_no_call_computes_with_the_inputs_of_another_thread(mode: str) -> None:
    wrong, refused = call_on_threads(mode, nullcontext())
    assert wrong == []
    assert refused < THREADS * TURNS


@pytest.mark.parametrize("mode", MODES)
def test_with_a_lock_no_call_is_refused(mode: str) -> None:
    assert call_on_threads(mode, threading.Lock()) == ([], 0)


def test_the_second_thread_is_refused_and_the_first_goes_on() -> None:
    class Graph:
        """Runs until it is told to end."""

        def __init__(self) -> None:
            self.entered, self.end = threading.Event(), threading.Event()

        def run(self) -> str:
            self.entered.set()
            assert self.end.wait(20)
            return "ran"

    callers.one_caller(Graph, "run", "__call__")
    assert "__call__" not in vars(Graph)
    graph, other = Graph(), Graph()
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(graph.run()))
    thread.start()
    assert graph.entered.wait(20)
    with pytest.raises(callers.ConcurrentCallError, match="two threads call one compiled graph"):
        graph.run()
    other.end.set()
    assert other.run() == "ran"
    graph.end.set()
    thread.join()
    assert results == ["ran"]
    assert graph.run() == "ran"
