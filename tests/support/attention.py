"""What the tests of attention share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchair
from torch import Tensor

__all__ = ["TRIANGLE", "close", "compiled"]

# the mask of sparse_mode 2, 3 and 4
TRIANGLE = torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1)
_STEPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}


def close(given: Tensor, want: Any, dtype: torch.dtype) -> None:
    """Compare with values that are not rounded: one step of the dtype, as one probability may be
    rounded to the other side."""
    step = _STEPS[dtype]
    np.testing.assert_allclose(given.float().numpy(), want, rtol=step, atol=2 * step)


def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """A function in a GE graph."""
    torch._dynamo.reset()
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)
