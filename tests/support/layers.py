"""Layers that hold the tensors of a case, ours and the vendor's, and what they hold."""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import nn

from lq_graph import LinearQuant
from lq_graph.backends.npu import format_of
from support import cases
from support.cases import I32

VendorLinearQuant = torch_npu.contrib.module.LinearQuant
LinearA8W8Quant = torch_npu.contrib.module.LinearA8W8Quant
PARAMETERS = ("weight", "scale", "offset", "pertoken_scale", "bias")


def module_for(inputs: cases.Inputs, **kwargs: Any) -> LinearQuant:
    """A LinearQuant holding a case's tensors, filled the way the vendor's examples do."""
    weight = inputs["weight"]
    k = weight.shape[-1] * (8 if weight.dtype == I32 else 1)
    layer = LinearQuant(
        k,
        weight.shape[-2],
        bias=inputs["bias"] is not None,
        offset=inputs["offset"] is not None,
        pertoken_scale=inputs["pertoken_scale"] is not None,
        output_dtype=inputs["output_dtype"],
        **kwargs,
    )
    for name in ("weight", "scale", "offset", "pertoken_scale", "bias"):
        if inputs[name] is not None:
            getattr(layer, name).data = inputs[name]
    return layer


def vendor_for(inputs: cases.Inputs, kind: type = VendorLinearQuant) -> nn.Module:
    """The vendor's module holding the tensors of a case."""
    out_features, in_features = inputs["weight"].shape[-2:]
    given = {n: inputs.get(n) is not None for n in ("bias", "offset", "pertoken_scale")}
    layer = kind(in_features, out_features, output_dtype=inputs["output_dtype"], **given)
    for name in PARAMETERS:
        if inputs.get(name) is not None:
            getattr(layer, name).data = inputs[name].clone()
    return layer


def snapshot(model: nn.Module) -> dict[str, tuple]:
    """Values, dtypes and formats of every parameter."""
    return {
        name: (p.dtype, format_of(p), p.detach().cpu().clone())
        for name, p in model.named_parameters()
    }


def assert_same(model: nn.Module, before: dict[str, tuple]) -> None:
    now = snapshot(model)
    assert now.keys() == before.keys()
    for name, (dtype, acl_format, values) in before.items():
        assert now[name][:2] == (dtype, acl_format), name
        assert torch.equal(now[name][2], values), name
