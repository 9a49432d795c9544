"""Gradients of SwiGLU and of rotary embeddings: numbers beside the golden, refusals, eager beside
torchair's graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
from cann_host.rules import (
    INVALID,
    NO_KERNEL,
    TILING,
    RotaryGradCall,
    SwiGluCall,
    SwiGluGradCall,
    check_rotary_grad,
    check_rotary_mul_grad,
    check_swi_glu_grad,
)
from support import golden_fused, golden_rope
from support.eager import BF16, F16, F32, refused
from support.fused import as_array, compute, dtype_of, either_way
from support.has import need_operator
from support.refusals import described, told

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=lambda d: str(d)[6:])
CLOSE = {F32: 3e-6, F16: 1e-3, BF16: 8e-3}  # one rounding


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, want: np.ndarray, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and tuple(got.shape) == want.shape
    np.testing.assert_allclose(as_array(got.cpu()), want, rtol=CLOSE[dtype], atol=1e-5)


# ---- SwiGluGrad ----


@pytest.mark.parametrize("dim", [-1, 0])
@DTYPES
def test_swiglu_gradient(dtype: torch.dtype, dim: int) -> None:
    x = normal(4, 6, 8, dtype=dtype)
    on_npu = x.npu().requires_grad_()
    y = torch_npu.npu_swiglu(on_npu, dim=dim)
    grad = normal(*y.shape, dtype=dtype, seed=1)
    y.backward(grad.npu())
    last = (np.moveaxis(as_array(t), dim, -1) for t in (grad, x))
    want = np.moveaxis(golden_fused.swiglu_grad(*last), -1, dim)
    assert on_npu.grad is not None
    assert_close(on_npu.grad, want, dtype)


X, HALF = described((4, 8)), described((4, 4))
SWI_GLU_REFUSED: list[Any] = [
    # soc, x, y_grad, dim, code of an eager call, of a graph, texts
    (A2, described((4, 8), "int8"), described((4, 4), "int8"), -1, INVALID, NO_KERNEL, "x is int8"),
    (P310, described((4, 8), "bfloat16"), described((4, 4), "bfloat16"), -1, INVALID, NO_KERNEL,
     "x is bfloat16"),
    (A2, X, described((4, 4), "float32"), -1, INVALID, NO_KERNEL, "y_grad is float32 and x"),
    (A2, X, HALF, 2, INVALID, None, "dim is 2"),
    (A2, described((4, 7)), HALF, 1, INVALID, None, "SwiGlu halves that dim"),
    (A2, X, X, -1, None, None, "y_grad has shape (4, 8)"),
    (A950, X, X, -1, TILING, TILING, "y_grad has shape (4, 8)"),
    (A2, described((0, 8)), described((0, 4)), -1, None, None, "no empty one"),
    (P310, X, HALF, -1, TILING, TILING, "multiples of 64"),
]  # fmt: skip


@pytest.mark.parametrize("is_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("soc", "x", "y_grad", "dim", "eager", "graph", "text"), SWI_GLU_REFUSED)
def test_swiglu_gradient_refused(
    soc: str, x: Any, y_grad: Any, dim: int, eager: Any, graph: Any, text: str, is_graph: bool
) -> None:
    call = SwiGluGradCall(y_grad, SwiGluCall(soc, x, dim, is_graph))
    refusal = check_swi_glu_grad(call)
    assert refusal is not None and refusal.code == (graph if is_graph else eager), refusal
    assert text in str(refusal)


def test_swiglu_gradient_takes_what_fits() -> None:
    assert check_swi_glu_grad(SwiGluGradCall(HALF, SwiGluCall(A2, X, -1))) is None


# ---- RotaryPositionEmbeddingGrad ----

# shapes of x and of cos, mode
ROTARY = [
    ((2, 3, 4, 64), (1, 3, 1, 64), "half"),  # BSND
    ((2, 3, 4, 64), (2, 3, 1, 64), "half"),
    ((2, 4, 3, 32), (1, 1, 3, 32), "half"),  # BNSD
    ((2, 4, 3, 32), (2, 1, 3, 32), "half"),
    ((5, 2, 4, 24), (5, 1, 1, 24), "half"),  # SBND
    ((5, 2, 4, 24), (5, 2, 1, 24), "half"),
    ((2, 3, 4, 64), (2, 3, 4, 64), "half"),
    ((2, 3, 4, 64), (1, 3, 1, 64), "interleave"),
    ((2, 4, 3, 32), (1, 1, 3, 32), "interleave"),
    ((5, 2, 4, 24), (5, 1, 1, 24), "interleave"),
]


@DTYPES
@pytest.mark.parametrize(("x_shape", "cos_shape", "mode"), ROTARY, ids=str)
def test_rotary_gradients(x_shape: Any, cos_shape: Any, mode: str, dtype: torch.dtype) -> None:
    x, cos, sin = (
        normal(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate((x_shape, cos_shape, cos_shape))
    )
    dy = normal(*x_shape, dtype=dtype, seed=3)
    need_operator("npu_rotary_mul", "rotary_mode")
    on_npu = [t.npu().requires_grad_() for t in (x, cos, sin)]
    torch_npu.npu_rotary_mul(*on_npu, mode).backward(dy.npu())
    arrays = (as_array(t) for t in (dy, x, cos, sin))
    wanted = golden_rope.rotary_grad(*arrays, mode, dtype_of(x))
    for tensor, want in zip(on_npu, wanted, strict=True):
        assert tensor.grad is not None
        assert_close(tensor.grad, want, dtype)


def test_rotary_gradient_of_x_alone() -> None:
    """Without x, dcos and dsin are left as they are."""
    x, cos, sin, dy = normal(2, 3, 4, 8), normal(1, 3, 1, 8), normal(1, 3, 1, 8), normal(2, 3, 4, 8)
    dx, dcos, dsin = torch.zeros_like(x), torch.full_like(cos, 7), torch.full_like(sin, 7)
    compute("aclnnRotaryPositionEmbeddingGrad", dy, cos, sin, None, 0, dx, dcos, dsin)
    arrays = (as_array(t) for t in (dy, x, cos, sin))
    assert_close(dx, golden_rope.rotary_grad(*arrays, "half", "float32")[0], F32)
    assert dcos.eq(7).all() and dsin.eq(7).all()


def test_a_mode_that_the_chip_does_not_have() -> None:
    """The kernel rotates halves."""
    dy, cos = normal(2, 3, 4, 8), normal(1, 3, 1, 8)
    got, want = torch.zeros_like(dy), torch.zeros_like(dy)
    rest = (torch.zeros_like(cos), torch.zeros_like(cos))
    compute("aclnnRotaryPositionEmbeddingGrad", dy, cos, cos, None, 0, want, *rest)
    with pytest.warns(RuntimeWarning, match="mode 2 has no effect on Ascend910B2"):
        compute("aclnnRotaryPositionEmbeddingGrad", dy, cos, cos, None, 2, got, *rest)
    assert torch.equal(got, want)


def rotary_call(soc: str = A2, **changed: Any) -> RotaryGradCall:
    shapes = {"dy": (2, 3, 4, 64), "cos": (1, 3, 1, 64), "dtype": "float16", "mode": 0, **changed}
    dtype = shapes.pop("dtype")
    shapes.setdefault("sin", shapes["cos"])
    shapes.setdefault("x", shapes["dy"])
    described_ = {
        key: described(value, dtype) if isinstance(value, tuple) else value
        for key, value in shapes.items()
    }
    return RotaryGradCall(soc, **described_)


ROTARY_REFUSED: list[Any] = [
    (rotary_call(P310), NO_KERNEL, "no kernel on Ascend310P3"),
    (rotary_call(A950), None, "Ascend950PR_9579"),
    (rotary_call(dtype="int8"), INVALID, "dy is int8"),
    (rotary_call()._replace(x=described((2, 3, 4, 64), "float32")), INVALID, "x is float32"),
    (rotary_call(dy=(3, 4, 64), cos=(3, 1, 64)), TILING, "four dims"),
    (rotary_call(sin=(1, 3, 4, 64)), TILING, "sin (1, 3, 4, 64)"),
    (rotary_call(cos=(1, 3, 1, 32)), TILING, "last dims"),
    (rotary_call(dy=(2, 3, 4, 898), cos=(1, 3, 1, 898)), TILING, "at most 896"),
    (rotary_call(dy=(2, 3, 4, 7), cos=(1, 3, 1, 7)), TILING, "D must be even"),
    (rotary_call(cos=(1, 3, 4, 64)), TILING, "this broadcast"),
    (rotary_call(cos=(2, 1, 1, 64), mode=1, dy=(3, 3, 4, 64)), TILING, "two are 1"),
    (rotary_call(cos=(2, 3, 1, 64), mode=1), TILING, "two are 1"),
    (rotary_call(dy=(2, 3, 4, 898), cos=(1, 3, 1, 898), mode=1), None, "at most 896"),
    (rotary_call(dy=(40, 3, 40, 64)), None, "B and N are 40 and 40"),
    (rotary_call(dy=(1000, 3, 1, 64), x=None), None, "B and N are 1000 and 1"),
    (rotary_call(dy=(40, 3, 25, 64), mode=1), None, "B and N are 40 and 25"),
    (rotary_call(dy=(2, 0, 4, 64), cos=(1, 0, 1, 64)), None, "cannot be empty"),
    (rotary_call(x=(2, 3, 5, 64)), None, "must be like dy"),
]


@pytest.mark.parametrize(("call", "code", "text"), ROTARY_REFUSED)
def test_rotary_gradient_refused(call: RotaryGradCall, code: int | None, text: str) -> None:
    told(check_rotary_grad(call), code, text)


@pytest.mark.parametrize(
    "call",
    [
        rotary_call(),
        rotary_call(dy=(40, 3, 40, 64), x=None),
        rotary_call(dy=(1, 3, 4, 64)),
        rotary_call(dy=(1, 1, 4, 64), cos=(1, 1, 1, 64)),
        rotary_call(dy=(2000, 3, 4, 64), cos=(2000, 3, 4, 64)),
    ],
)
def test_rotary_gradient_takes(call: RotaryGradCall) -> None:
    assert check_rotary_grad(call) is None


def test_refusals_arrive_by_torch_npu() -> None:
    x, cos = (normal(*s).npu().requires_grad_() for s in ((40, 3, 40, 8), (1, 3, 1, 8)))
    with refused("aclnnRotaryPositionEmbeddingGrad: .* B and N are 40 and 40"):
        torch_npu.npu_rotary_mul(x, cos, cos).sum().backward()


# ---- aten ----


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [
        ((5,), (5,)),
        ((5,), (5, 4)),
        ((5,), (2, 5, 4)),
        ((3, 5), (5,)),
        ((2, 3, 5), (5,)),
        ((3, 5), (5, 4)),
        ((2, 3, 5), (5, 4)),
        ((3, 5), (2, 5, 4)),
        ((2, 1, 3, 5), (4, 5, 6)),
    ],
    ids=str,
)
def test_matmul_backward(x_shape: Any, y_shape: Any) -> None:
    x, y = normal(*x_shape).requires_grad_(), normal(*y_shape, seed=1).requires_grad_()
    product = torch.matmul(x, y)
    grad = normal(*product.shape, seed=2)
    product.backward(grad)
    on_npu = [t.detach().npu() for t in (grad, x, y)]
    both = torch.ops.aten.matmul_backward(*on_npu, [True, True])
    for got, leaf in zip(both, (x, y), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(got.cpu(), leaf.grad)
    one, absent = torch.ops.aten.matmul_backward(*on_npu, [True, False])
    assert torch.equal(one.cpu(), both[0].cpu()) and absent is None


def test_a_compiled_linear_has_gradients() -> None:
    """Its graph calls matmul_backward, which PyTorch has for nested tensors only."""
    torch._dynamo.reset()
    linear = torch.nn.Linear(8, 4, bias=False).npu()
    x = normal(2, 3, 8).npu()
    linear(x).square().sum().backward()
    assert linear.weight.grad is not None
    want = linear.weight.grad.cpu()
    linear.weight.grad = None
    torch.compile(linear, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad.cpu(), want)


# ---- graphs ----


@pytest.mark.parametrize("name", ["swiglu", "rotary"])
def test_a_graph_gives_the_same_bits(name: str) -> None:
    backward: dict[str, Any] = {
        "swiglu": (torch_npu.npu_swiglu_backward, (normal(4, 8), normal(4, 16, seed=1))),
        "rotary": (
            torch_npu.npu_rotary_mul_backward,
            (normal(2, 3, 4, 64), normal(2, 3, 4, 64, seed=1), *[normal(1, 3, 1, 64, seed=2)] * 2),
        ),
    }
    function, tensors = backward[name]
    on_npu = [t.npu() for t in tensors]
    got = either_way(lambda *given: function(*given), "static")(*on_npu)
    want = function(*(t.requires_grad_() for t in on_npu))
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True):
        assert torch.equal(one.cpu(), other.cpu())


def test_rules_of_the_graphs_rotary_gradient_are_its_own() -> None:
    assert check_rotary_mul_grad(rotary_call()) is None
    told(check_rotary_mul_grad(rotary_call(x=(2, 3, 5, 64))), None, "cann_host takes equal ones")
