"""The table of cases for all tests of values, and the conversion to the numpy golden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lq_graph
from support import golden
from support.table import BF16, F16, F32, I8, I32, I64, TABLE

# Inputs of one call, by the op's argument names; output_dtype among them.
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One LinearQuant call. None: absent. scale int64 means packed, with the offset inside."""

    x: torch.dtype = I8
    scale: torch.dtype = F32
    offset: bool = False
    bias: torch.dtype | None = None
    pertoken: bool = False
    output: torch.dtype = I8
    batch: tuple[int, ...] = ()
    weight_batch: tuple[int, ...] = ()
    m: int = 3
    k: int = 40
    n: int = 24
    scalar_scale: bool = False
    scalar_offset: bool = False
    batch_bias: bool = False

    def __str__(self) -> str:
        short = {
            I8: "int8", I32: "int32", I64: "int64", F16: "fp16", BF16: "bf16", F32: "fp32",
        }  # fmt: skip
        parts = [
            "a4w4" if self.x == I32 else "a8w8",
            f"{'x'.join(map(str, (*self.batch, self.m)))}x{self.k}x"
            f"{'x'.join(map(str, (*self.weight_batch, self.n)))}",
            f"scale_{short[self.scale]}{'1' if self.scalar_scale else ''}",
        ]
        if self.offset:
            parts.append("offset1" if self.scalar_offset else "offset")
        if self.bias:
            parts.append(f"{'batch_' if self.batch_bias else ''}bias_{short[self.bias]}")
        if self.pertoken:
            parts.append("pertoken")
        return "-".join([*parts, f"to_{short[self.output]}"])


def make(case: Case, seed: int = 0) -> Inputs:
    """Random inputs for a case, on CPU. Scales put most int8 results inside -128..127 and some
    outside, so that saturation is met too."""
    g = torch.Generator().manual_seed(seed)
    if case.x == I32:
        low, high = -8, 8
        pack = golden.pack_int4
    else:
        low, high = -128, 128
        pack = None

    def matrix(*shape: int) -> Tensor:
        values = torch.randint(low, high, shape, dtype=I8, generator=g)
        return torch.from_numpy(pack(values.numpy())) if pack else values

    spread = 60.0 / (high * high / 3 * case.k**0.5)  # about 60 steps of standard deviation
    scale_size = 1 if case.scalar_scale else case.n
    scale = torch.rand(scale_size, generator=g) * spread + spread / 2
    scale[::3] *= -1
    offset = None
    if case.offset:
        offset = torch.randn(1 if case.scalar_offset else case.n, generator=g) * 90
    inputs: Inputs = {
        "x1": matrix(*case.batch, case.m, case.k),
        "weight": matrix(*case.weight_batch, case.n, case.k),
        "offset": offset,
    }
    if case.scale == I64:
        word = golden.trans_quant_param(scale.numpy(), None if offset is None else offset.numpy())
        inputs["scale"] = torch.from_numpy(np.asarray(word))
    else:
        inputs["scale"] = scale.to(case.scale)
    bias = None
    if case.bias:
        shape = (case.n,)
        if case.batch_bias:
            batch = torch.broadcast_shapes(case.batch, case.weight_batch)
            shape = (*batch, 1, case.n)
        if case.bias == I32:
            bias = torch.randint(-3000, 3000, shape, dtype=I32, generator=g)
        else:
            bias = (torch.randn(shape, generator=g) * 20).to(case.bias)
    inputs["bias"] = bias
    inputs["pertoken_scale"] = torch.rand(case.m, generator=g) * 3 if case.pertoken else None
    inputs["output_dtype"] = case.output
    return inputs


def as_numpy(t: Tensor | None) -> np.ndarray | None:
    """numpy of a tensor on any device; bfloat16 as float32 holding the same values."""
    if t is None:
        return None
    t = t.detach().cpu()
    return (t.float() if t.dtype == BF16 else t).numpy()


def expected(inputs: Inputs) -> np.ndarray:
    """The golden's answer."""
    scale = inputs["scale"]
    assert isinstance(scale, Tensor)
    arrays = {
        name: as_numpy(inputs[name])
        for name in ("x1", "weight", "scale", "offset", "pertoken_scale", "bias")
    }
    return golden.linear_quant(
        **arrays,  # type: ignore[arg-type]
        output_dtype=str(inputs["output_dtype"]).removeprefix("torch."),
        packed=scale.dtype == I64,
        product=lq_graph.get_product().key,
    )


def on(device: str, inputs: Inputs) -> Inputs:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def assert_equal(actual: Tensor, inputs: Inputs) -> None:
    """Element for element, dtype and shape too."""
    want = expected(inputs)
    assert actual.dtype == inputs["output_dtype"]
    assert tuple(actual.shape) == want.shape
    np.testing.assert_array_equal(as_numpy(actual), want)


def rows_of(product: str) -> list[Case]:
    """Every combination of dtypes of every row a product has."""
    return [
        Case(
            x=c.x,
            scale=c.scale,
            offset=c.offset is not None,
            bias=c.bias,
            pertoken=c.pertoken_scale is not None,
            output=c.output_dtype,
        )
        for row in TABLE
        if product in row.products.split()
        for c in row.combinations()
    ]


# The product the tests run on: cann_host's, or the card's.
PRODUCT = lq_graph.get_product().key
ROW_CASES = rows_of(PRODUCT)

# Shapes, on a few rows.
SHAPE_CASES: list[Case] = [
    Case(scalar_scale=True, offset=True, bias=I32),
    Case(scalar_scale=True, scalar_offset=True, offset=True),
    Case(output=F16, bias=I32, scalar_scale=True),
    Case(output=BF16, scale=BF16, scalar_scale=True, pertoken=True),
    Case(x=I32, output=F16, bias=I32, scalar_scale=True),
    Case(m=1, k=1, n=1),
    Case(k=1, n=7, bias=I32),
    Case(batch=(2,), weight_batch=(2,), k=1, n=7, output=I32),
    Case(m=1, k=512, n=128, offset=True, bias=I32),
    Case(m=17, k=33, n=65, output=F16),
    Case(batch=(2,), output=F16, bias=I32),
    Case(batch=(2, 3), weight_batch=(3,), offset=True),
    Case(batch=(2,), weight_batch=(2,), bias=I32, batch_bias=True),
    Case(weight_batch=(4,), output=BF16, pertoken=True, bias=F32),
    Case(batch=(1, 2), weight_batch=(3, 1), output=I32),
    Case(batch=(2, 1, 2, 1), weight_batch=(3, 1, 2), output=BF16),
    Case(batch=(2,), x=I32, output=F16),
    Case(x=I32, output=F16, m=1, k=8, n=8),
    Case(m=2, k=65535, n=3, output=I32),
]

ALL_CASES = ROW_CASES + SHAPE_CASES
