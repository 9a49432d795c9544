"""RMSNorm of tensors that are parts of others, or transposed: as norms of queries and keys are."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cann_host
from support import golden_fused
from support.eager import BF16, F16, F32
from support.fused import EPSILON, K, assert_bits, dtype_of, exact, norm_of
from support.fused_graphs import calls_of, fused, outcomes

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
pytest.importorskip("torch_npu")

ROWS = (2, 3, 4)
# of x (2, 3, 4, 3 K)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a part": lambda x: x[..., K : 2 * K],
    "every second": lambda x: x[:, ::2, :, :K],
    "transposed": lambda x: x[..., :K].contiguous().transpose(1, 2),
    "a transposed part": lambda x: x[..., K : 2 * K].transpose(1, 2),
    "permuted": lambda x: x[..., :K].contiguous().permute(1, 2, 0, 3),
    "heads of a part": lambda x: x[..., : 2 * K].unflatten(-1, (2, K)).transpose(2, 3),
}


def norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(F32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return w * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_of(layout: str, dtype: torch.dtype) -> None:
    of = LAYOUTS[layout]
    whole, w = exact(*ROWS, 3 * K, dtype=dtype), exact(K, dtype=dtype)
    module, report = fused(lambda x, w: norm(of(x), w), whole.npu(), w.npu())
    assert outcomes(report) == {"rms_norm": [""]}
    assert calls_of(module)["npu_rms_norm"] == 1 and not calls_of(module)["rsqrt"]
    (call,) = (node for node in module.graph.nodes if "npu_rms_norm" in str(node.target))
    assert not re.match("transpose|permute", str(call.args[0]))  # that comes after the norm
    x, y = of(whole), module(whole.npu(), w.npu())
    want, _, _ = norm_of(x, torch.zeros_like(x), w)
    assert_bits(y, golden_fused.rounded(want, dtype_of(x)))
    assert y.stride() == norm(x, w).stride()  # what a view of the result needs


@pytest.mark.parametrize("dim", [2, 1], ids=["BSND", "BNSD"])
def test_a_norm_of_what_is_rotated(dim: int) -> None:
    """The rotation is an operator; its sum is not the norm's residual, which would save less."""

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x if dim == 2 else x.transpose(1, 2)
        first, second = x[..., : K // 2], x[..., K // 2 :]
        return x * cos + torch.cat([-second, first], -1) * sin

    x, w = exact(2, 5, 4, K, dtype=F16), exact(K, dtype=F16)
    cos, sin = (exact(2, 5, K, dtype=F16, seed=i).unsqueeze(dim) for i in (1, 2))
    inputs = [t.npu() for t in (x, cos, sin, w)]
    module, report = fused(lambda x, cos, sin, w: norm(rotated(x, cos, sin), w), *inputs)
    assert outcomes(report) == {"rms_norm": [""], "rope": [""]}
    assert {"npu_rms_norm", "npu_rotary_mul"} <= calls_of(module).keys()
    assert not calls_of(module)["add.Tensor"] and not calls_of(module)["rsqrt"]
    got, want = module(*inputs).cpu(), norm(rotated(x, cos, sin), w)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want)
