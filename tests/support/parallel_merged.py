"""Layers that read one tensor, split on n and then merged, on every process of a mesh."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module

import lq_graph
from lq_graph.parallel import ColwiseLinearQuant
from support.parallel import CONFIGS, Check, compared
from support.shared_input import Attention, inputs, quantized

SIZES = {"q": 96, "k": 32, "v": 64}  # split into 2 and 4 parts, int4 included


def merged(mesh: DeviceMesh, folder: Path) -> Check:
    """The result of one device, and the state dicts of layers that are not merged."""
    del folder
    device = mesh.device_type
    for name, config in CONFIGS.items():
        plain, other = (
            quantized(Attention(bias=True, sizes=SIZES), config, seed=seed).to(device)
            for seed in (0, 1)
        )
        x = inputs().to(device)
        plan: dict[str, Any] = {
            each: ColwiseLinearQuant(output_layouts=Replicate()) for each in SIZES
        }
        model = parallelize_module(copy.deepcopy(plain), mesh, plan)
        before = model.state_dict()
        report: Any = lq_graph.merge(model, inputs())
        yield f"{name}: what is merged", "" if [g.names for g in report] == [(*"qkv",)] else report
        yield f"{name}: one device's result", compared(model(x), plain(x))
        yield f"{name}: state dict", _other_state(model.state_dict(), before)
        if device == "npu":
            yield f"{name}: prepared", _prepared(model, x, plain(x))
        model.load_state_dict(other.state_dict())
        yield f"{name}: another state dict", compared(model(x), other(x))
        split = parallelize_module(copy.deepcopy(plain), mesh, plan)
        model.load_state_dict(split.state_dict())
        yield f"{name}: a state dict of DTensors", compared(model(x), plain(x))


def _other_state(got: dict[str, Any], want: dict[str, Any]) -> str:
    if list(got) != list(want):
        return f"{list(got)}, not {list(want)}"
    for name, tensor in want.items():
        one = got[name]
        if type(one) is not type(tensor):
            return f"{name} is a {type(one).__name__}"
        if isinstance(tensor, DTensor):
            if tuple(one.placements) != tuple(tensor.placements):
                return f"{name} is placed {one.placements}"
            one, tensor = one.full_tensor(), tensor.full_tensor()
        if wrong := compared(one, tensor):
            return f"{name}: {wrong}"
    return ""


def _prepared(model: Any, x: Tensor, want: Tensor) -> str:
    """Prepared, and compiled: one product for three layers."""
    from support.lowering import MATMUL, lower

    torch.npu.config.allow_internal_format = True
    lq_graph.use_internal_format_weight(model, example=x)
    torch._dynamo.reset()
    if wrong := compared(model(x), want):
        return wrong
    got, graph = lower(model, x)
    products = Counter(graph.ops())[MATMUL]
    return compared(got, want) or ("" if products == 2 else f"{products} products")
