"""The graph engine's Python half: compiles serialized graphs and runs them.

`libcann_host.so` (csrc/ge.cpp) calls these functions: once to compile a graph, then once per run
with the addresses of inputs and outputs. The operators are in `ops`.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cann_host import watched
from cann_host.bindings import give
from cann_host.graph import compiler, executor
from cann_host.graph.compiled import CompiledGraph, TensorInfo
from cann_host.graph.device_memory import Input
from cann_host.graph.executor import GraphError, Op

__all__ = ["GraphEngine"]


@contextmanager
def _plain_torch() -> Iterator[None]:
    """The caller may be inside `with torch.device("npu")` or a mode of its own; and tensors that
    are kept from run to run must not be inference tensors, which cannot be written to later."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


class GraphEngine:
    """The three functions that csrc/ge.cpp calls, and the compiled graphs they share.

    Making one connects the library with it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._graphs: dict[int, CompiledGraph] = {}
        self._numbers = itertools.count(1)
        for op in executor.OPS.values():
            self.announce(op)
        give(library.cann_host_set_ge_executor, self._compile, self._run, self._release)
        # After this the interpreter is gone, but torchair's statics still remove their graphs.
        atexit.register(give, library.cann_host_set_ge_executor, None, None, None)

    @property
    def compiled(self) -> list[CompiledGraph]:
        """The compiled graphs that exist, in the order in which they were made."""
        return list(self._graphs.values())

    @property
    def live_graphs(self) -> int:
        """The number of compiled graphs that exist."""
        return len(self._graphs)

    def announce(self, op: Op) -> None:
        """Pass an operator to the library, which tells torchair its inputs and attributes."""
        names = (op.type, ",".join(op.inputs), ",".join(sorted(op.attrs)))
        self._library.cann_host_ge_register_op(*(name.encode() for name in names))

    def _fail(self, error: BaseException) -> int:
        if isinstance(error, GraphError):
            text = f"cann_host: {error}"
        elif isinstance(error, watched.ReplacedError):
            text = str(error)
        else:
            text = "cann_host: " + "".join(traceback.format_exception(error))
        self._library.cann_host_ge_fail(text.encode(errors="replace"))
        return 1

    def _compile(self, model: int, size: int, summary: int, number: int) -> int:
        try:
            from torchair.core._backend import TorchNpuGraph

            watched.watch_torchair(TorchNpuGraph)
            with _plain_torch():
                graph = compiler.compile_graph(ctypes.string_at(model, size))
            self._library.cann_host_ge_set_static(summary, graph.is_static)
            for info in graph.output_infos:
                self._library.cann_host_ge_add_output(
                    summary, info.dtype, _int64s(info.shape), len(info.shape)
                )
            place = ctypes.c_uint64.from_address(number)
            place.value = next(self._numbers)
            self._graphs[place.value] = graph
        except Exception as error:
            return self._fail(error)
        return 0

    def _run(
        self, number: int, inputs: int, count: int, dims: int, dim_count: int, outputs: int
    ) -> int:
        try:
            graph = self._graphs[number]
            with _plain_torch():
                given = graph.memory.read(inputs, count, dims, dim_count)
                if (tensors := watched.given_inputs()) is not None:
                    graph.check_unchanged(tensors, given)
                results = graph.run([one.value for one in given])
                if not self._write(outputs, results, graph.output_infos, given):
                    return 1
        except Exception as error:
            return self._fail(error)
        return 0

    def _write(
        self,
        outputs: int,
        results: Sequence[Tensor],
        infos: Sequence[TensorInfo],
        inputs: Sequence[Input],
    ) -> bool:
        """Copy the results to the outputs, which may be the memory of inputs."""
        addresses = {one.address for one in inputs}
        copies = []
        for index, (result, info) in enumerate(zip(results, infos, strict=True)):
            result = result.contiguous()
            size = result.numel() * result.element_size()
            dtype = compiler.ge_dtype(result, info.dtype, index)
            if dtype != info.dtype:
                raise GraphError(
                    f"output {index} has GE dtype {dtype}; the graph says {info.dtype}"
                )
            target = self._library.cann_host_ge_output(
                outputs, index, dtype, _int64s(result.shape), result.dim(), size
            )
            if target is None:
                return False
            if target == result.data_ptr():  # it was written in place
                continue
            if result.untyped_storage().data_ptr() in addresses:
                result = result.clone()  # another output may be the memory that it views
            copies.append((target, result, size))
        for target, result, size in copies:
            ctypes.memmove(target, result.data_ptr(), size)
        return True

    def _release(self, number: int) -> int:
        self._graphs.pop(number, None)
        return 0


def _int64s(dims: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(dims))(*dims)
