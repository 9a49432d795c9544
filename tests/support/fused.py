"""Inputs of the tests of fused operators, and the two ways to call one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cann_host.aclnn import OPERATORS, AclTensor
from cann_host.aclnn.tensors import ACL_DTYPES
from support import golden_fused
from support.eager import F32, as_numpy

K, EPSILON = 64, 0.25


def exact(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Multiples of 1/8: sums of their squares are exact, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-24, 25, shape, generator=generator) / 8).to(dtype)


def positive(*shape: int, dtype: torch.dtype = F32, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(dtype)


def as_array(x: Tensor | None) -> Any:
    """numpy, float32 if it is bfloat16 or float16."""
    return None if x is None else as_numpy(x.float() if x.is_floating_point() else x)


def there(x: Any) -> Any:
    return x.npu() if isinstance(x, Tensor) else x


def either_way(function: Callable[..., Any], way: str) -> Callable[..., Any]:
    """The function as it is, or compiled by torchair."""
    if way == "eager":
        return function
    import torchair

    torch._dynamo.reset()
    backend = torchair.get_npu_backend()
    return torch.compile(function, backend=backend, dynamic=way == "dynamic", fullgraph=True)


def dtype_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def norm_of(x1: Tensor, x2: Tensor, gamma: Tensor, rounds: str = "") -> Any:
    """The golden's norm of a sum, with `EPSILON`."""
    a, b, g = (as_array(t) for t in (x1, x2, gamma))
    return golden_fused.norm_of_sum(a, b, g, EPSILON, dtype_of(x1), rounds)


def assert_bits(got: Tensor, want: Any) -> None:
    np.testing.assert_array_equal(as_array(got.cpu()), want)


def compute(name: str, *arguments: Any, soc: str = "Ascend910B2") -> None:
    """Check and compute an aclnn operator, which this torch_npu does not call, on host tensors."""
    codes = {dtype: code for code, dtype in ACL_DTYPES.items()}

    def passed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape, strides = tuple(value.shape), value.stride()
        return AclTensor(value.data_ptr(), codes[value.dtype], 2, 0, shape, strides, shape)

    operator = OPERATORS[name]
    call = operator.arguments(*(passed(value) for value in arguments))
    operator.check(call, soc)
    operator.compute(call, soc)
