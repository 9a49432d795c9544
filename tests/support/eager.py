"""Values, and results of torch_npu beside the golden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cann_host import runtime
from cann_host.graph import executor
from support import golden

torch_npu = pytest.importorskip("torch_npu")
ND, FRACTAL_NZ = 2, 29


def pretend(monkeypatch: pytest.MonkeyPatch, soc: str) -> None:
    """Let the operators, not torch_npu, be those of another chip."""
    monkeypatch.setattr(runtime.current().operators, "soc", soc)
    monkeypatch.setattr(executor, "soc_name", lambda: soc)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one static GE graph of torchair's."""
    import torchair

    torch._dynamo.reset()
    backend = torchair.get_npu_backend()
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)


# ---- the aclnn operators ----


def pack(x: Tensor) -> Tensor:
    return torch.from_numpy(golden.pack_int4(x.numpy()))


def as_numpy(x: Tensor | None) -> Any:
    if x is None:
        return None
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


I8, I32, F16, BF16, F32 = (
    torch.int8,
    torch.int32,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)


class Inputs:
    """Random inputs of one row, on the host."""

    def __init__(
        self,
        x: torch.dtype = I8,
        scale: Any = F32,
        offset: bool = False,
        bias: torch.dtype | None = None,
        pertoken: bool = False,
        m: int = 5,
        k: int = 64,
        n: int = 48,
        batch: tuple[int, ...] = (),
        scale_length: int | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(m + k + n)
        low, high = (-8, 8) if x == I32 else (-128, 128)
        self.x1 = torch.randint(low, high, (*batch, m, k), dtype=I8, generator=generator)
        self.weight = torch.randint(low, high, (n, k), dtype=I8, generator=generator)
        if x == I32:
            self.x1, self.weight = pack(self.x1), pack(self.weight)
        size = 0.003 if x == I8 else 0.5
        self.scale = torch.rand(scale_length or n, generator=generator) * size + size / 10
        self.packed = scale == "packed"
        if scale == BF16:
            self.scale = self.scale.to(BF16)
        self.offset = torch.rand(n, generator=generator) * 300 - 150 if offset else None
        self.pertoken = torch.rand(m, generator=generator) if pertoken else None
        self.bias = None
        if bias is not None:
            self.bias = (torch.randn(n, generator=generator) * 100).to(bias)

    def on_npu(self, out: torch.dtype, weight_format: int = ND) -> Tensor:
        def there(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.npu()

        weight = self.weight.npu()
        if weight_format != ND:
            weight = torch_npu.npu_format_cast(weight, weight_format)
            assert torch_npu.get_npu_format(weight) == weight_format
        scale, offset = self.scale.npu(), there(self.offset)
        if self.packed:
            scale = torch_npu.npu_trans_quant_param(scale, offset)
        return torch_npu.npu_quant_matmul(
            self.x1.npu(),
            weight.transpose(-1, -2),
            scale,
            offset=offset,
            pertoken_scale=there(self.pertoken),
            bias=there(self.bias),
            output_dtype=out,
        )

    def by_golden(self, out: torch.dtype) -> np.ndarray:
        return golden.linear_quant(
            self.x1.numpy(),
            self.weight.numpy(),
            as_numpy(self.scale),
            as_numpy(self.offset),
            as_numpy(self.pertoken),
            as_numpy(self.bias),
            str(out).removeprefix("torch."),
        )


def assert_equal(got: Tensor, expected: np.ndarray) -> None:
    """For a tensor of any device."""
    np.testing.assert_array_equal(as_numpy(got.cpu()), expected)


def assert_same(got: Tensor, expected: np.ndarray) -> None:
    assert got.device.type == "npu"
    assert got.shape == expected.shape
    assert_equal(got, expected)


# ---- what it refuses ----


def refused(message: str) -> Any:
    return pytest.raises(RuntimeError, match=message)
