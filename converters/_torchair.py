"""Every private name of torchair this package uses, in one place, and what its versions lack.

Read in the torchairs inside torch_npu 2.7.1 to 2.14.0: docs/versions.md. `ge_apis` and the
converter decorator have kept these names since torchair 6.0.rc3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch_npu  # noqa: F401  (makes the name `torchair` importable)
from torchair import register_fx_node_ge_converter
from torchair._ge_concrete_graph import ge_apis as ge
from torchair._ge_concrete_graph.compat_ir import ge_op
from torchair.ge import Const, DataType, Tensor, TensorSpec
from torchair.ge import attr as ge_attr
from torchair.ge._ge_graph import GraphDef, ProtoDataType, torch_type_to_ge_type

__all__ = [
    "HAS_QUANT_BATCH_MATMUL_V4",
    "Const",
    "DataType",
    "GraphDef",
    "LoweredError",
    "ProtoDataType",
    "Tensor",
    "TensorSpec",
    "dump_to",
    "ge",
    "ge_attr",
    "ge_dtype_to_proto",
    "ge_op",
    "register_fx_node_ge_converter",
    "torch_type_to_ge_type",
    "without_runs",
]

# no raw operator in the torchairs that know no Ascend 950 (torch_npu 2.7.1, 2.8.0, 2.9.0)
HAS_QUANT_BATCH_MATMUL_V4 = hasattr(ge, "QuantBatchMatmulV4")

# GE's dtypes have the same names in both enumerations. torchair's own table of the pairs has no
# int4 before torchair 26.1 ("Unsupported ge dtype 29").
_PROTO = {
    value: ProtoDataType.Value(name)
    for name, value in vars(DataType).items()
    if name in ProtoDataType.keys()  # noqa: SIM118  (an enum of protobuf is no dict)
}


def ge_dtype_to_proto(dtype: int) -> int:
    """The protobuf number of a GE dtype (a number of DataType)."""
    number: int = _PROTO[dtype]
    return number


@contextmanager
def dump_to(config: Any, folder: str) -> Iterator[None]:
    """Let torchair write every graph that it lowers as text into a folder. The setters of the
    options do not accept None to reset them, so this writes the private fields."""
    dump = config.debug.graph_dump
    before = dump.type._value, dump._path._value
    dump.type, dump.path = "txt", folder
    try:
        yield
    finally:
        dump.type._value, dump._path._value = before


class LoweredError(Exception):
    """A graph is lowered and written, and does not run."""


@contextmanager
def without_runs() -> Iterator[None]:
    """A block in which a graph that is called writes its dump, and then raises LoweredError: GE
    neither compiles nor runs it."""
    from torchair._ge_concrete_graph.fx2ge_converter import GeConcreteGraph

    update = GeConcreteGraph.update_graph_with_runtime

    def stop(graph: Any, *args: Any) -> None:
        update(graph, *args)
        raise LoweredError

    GeConcreteGraph.update_graph_with_runtime = stop
    try:
        yield
    finally:
        GeConcreteGraph.update_graph_with_runtime = update
