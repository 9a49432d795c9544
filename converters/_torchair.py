"""Every private name of torchair this package uses, in one place.

Known to work with the torchair inside torch_npu 2.13.0. `ge_apis` and the converter decorator
have kept these names since torchair 6.0.rc3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch_npu  # noqa: F401  (makes the name `torchair` importable)
from torchair import register_fx_node_ge_converter
from torchair._ge_concrete_graph import ge_apis as ge
from torchair.ge import Const, DataType, Tensor, TensorSpec
from torchair.ge._ge_graph import GraphDef, ProtoDataType, torch_type_to_ge_type
from torchair.ge._ge_graph import _ge_dtype_to_ge_proto_dtype as ge_dtype_to_proto

__all__ = [
    "Const",
    "DataType",
    "GraphDef",
    "ProtoDataType",
    "Tensor",
    "TensorSpec",
    "dump_to",
    "ge",
    "ge_dtype_to_proto",
    "register_fx_node_ge_converter",
    "torch_type_to_ge_type",
]


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
