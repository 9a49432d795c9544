"""Lowering of torch_npu's norms that torchair does not convert, for the fusions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._torchair import DataType, Tensor, TensorSpec, ge_attr, ge_op, register_fx_node_ge_converter

__all__ = ["register_missing"]


def add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None = None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
    meta_outputs: Sequence[TensorSpec] | None = None,
) -> Any:
    """NB: npu::npu_add_rms_norm_quant(Tensor x1, Tensor x2, Tensor gamma, Tensor scales1,
    Tensor? zero_points1, Tensor? beta=None, Tensor? scales2=None, Tensor? zero_points2=None, *,
    int axis=-1, float epsilon=1e-06, bool div_mode=True, int? dst_type=None) -> (Tensor, Tensor,
    Tensor)

    One AddRmsNormQuant to int8. Its definition is public (hicann/ops-nn, norm/add_rms_norm_quant,
    op_graph); torchair has no raw operator for it.
    """
    if dst_type not in (None, torch.int8, _INT8):
        raise NotImplementedError(f"npu_add_rms_norm_quant to dtype {dst_type} in a GE graph")
    return ge_op(
        op_type="AddRmsNormQuant",
        inputs={
            "x1": x1,
            "x2": x2,
            "gamma": gamma,
            "scales1": scales1,
            "scales2": scales2,
            "zero_points1": zero_points1,
            "zero_points2": zero_points2,
            "beta": beta,
        },
        outputs=["y1", "y2", "x"],
        attrs={
            "axis": ge_attr.Int(axis),
            "epsilon": ge_attr.Float(epsilon),
            "div_mode": ge_attr.Bool(div_mode),
            "dst_type": ge_attr.Int(DataType.DT_INT8),
        },
    )


_INT8 = 1  # c10::ScalarType
_CONVERTERS: dict[str, Callable[..., Any]] = {"npu_add_rms_norm_quant": add_rms_norm_quant}


def register_missing() -> None:
    """Register the converters of operators that this torch_npu has and its torchair does not
    convert. torchair's own, if it loads them later, take their place."""
    for name, converter in _CONVERTERS.items():
        packet = getattr(torch.ops.npu, name, None)
        if packet is not None and not hasattr(packet.default, "_ge_converter"):
            register_fx_node_ge_converter(packet.default)(converter)
