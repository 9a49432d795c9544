"""Matrix products with a FRACTAL_NZ weight in captured graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
import torch_npu
import torchair  # noqa: F401 # for the backend npugraph_ex
from torch import Tensor, nn

import cann_host
import lq_graph
from support.has import HAS_PASSES, INSTALLED

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")

M, K, N = 5, 48, 24  # n is no multiple of 16
FRACTAL_NZ = 29


@pytest.fixture(autouse=True)
def _internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_npu(weight: Tensor) -> Tensor:
    there: Tensor = torch_npu.npu_format_cast(weight.npu(), FRACTAL_NZ)
    assert torch_npu.get_npu_format(there) == FRACTAL_NZ
    return there


def captured(product: Callable[[], Tensor]) -> tuple[torch.npu.NPUGraph, Tensor]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = product()
    return graph, out


def replayed(graph: torch.npu.NPUGraph, out: Tensor) -> Tensor:
    graph.replay()
    torch.npu.synchronize()
    return out.cpu()


@pytest.fixture(scope="module")
def _captures_casts() -> None:
    """Skip where torch_npu casts to ND by an aclop, so that cann_host refuses the product."""
    torch.npu.config.allow_internal_format = True
    weight = on_npu(values(K, N, seed=0))
    try:
        captured(lambda: torch_npu.npu_format_cast(weight, 2))
    except RuntimeError as error:
        if "aclop" not in str(error):
            raise
        pytest.skip(f"{INSTALLED} casts formats by aclop, which no graph captures")


needs_casts = pytest.mark.usefixtures("_captures_casts")


PRODUCTS: dict[str, tuple[tuple[int, int], Callable[..., Tensor]]] = {
    # shape of the weight; the product of x, weight, bias
    "mm": ((K, N), lambda x, w, b: x @ w),
    "mm, transposed": ((N, K), lambda x, w, b: x @ w.t()),
    "mm, a square transposed": ((K, K), lambda x, w, b: x @ w.t()),
    "addmm": ((K, N), lambda x, w, b: torch.addmm(b, x, w, beta=2, alpha=0.5)),
    "linear": ((N, K), lambda x, w, b: nn.functional.linear(x, w)),
    "linear, bias": ((N, K), lambda x, w, b: nn.functional.linear(x, w, b)),
    "linear, 3 dims": ((N, K), lambda x, w, b: nn.functional.linear(x[None], w, b)),
    "out=": ((K, N), lambda x, w, b: torch.mm(x, w, out=torch.empty_like(x @ w))),
    "a view of the same shape": ((K, N), lambda x, w, b: x @ w.view(N, K).view(K, N)),
    "n is 1": ((1, K), lambda x, w, b: x @ w.t()),
}


@needs_casts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype) -> None:
    """Each replay reads what x and the weight hold then."""
    shape, product = PRODUCTS[name]
    x, weight = values(M, K, seed=0, dtype=dtype), values(*shape, seed=1, dtype=dtype)
    bias = values(N, seed=2, dtype=dtype)
    there = [x.npu(), on_npu(weight), bias.npu()]
    graph, out = captured(lambda: product(*there))
    torch.testing.assert_close(replayed(graph, out), product(x, weight, bias))
    for one, seed in ((x, 3), (weight, 4)):
        one.copy_(values(*one.shape, seed=seed, dtype=dtype))
    there[0].copy_(x)
    there[1].copy_(weight)
    assert torch_npu.get_npu_format(there[1]) == FRACTAL_NZ
    torch.testing.assert_close(replayed(graph, out), product(x, weight, bias))


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # x (M, 32), weight (32, 32) in FRACTAL_NZ
    "another shape of as many elements": lambda x, w: x[:, :16] @ w.view(16, 64),
    "its transpose": lambda x, w: x.view(-1, 16)[:, :16] @ w.view(64, 16).t(),
    "rows": lambda x, w: x[:, :16] @ w[:16],
    "columns": lambda x, w: x @ w[:, :16],
    "rows, copied": lambda x, w: x[:, :16] @ w[16:].contiguous(),
    "a batch": lambda x, w: torch.bmm(x[None], w[None]),
    "on the left": lambda x, w: w @ x.t(),
    "on both sides": lambda x, w: w @ w,
    "added": lambda x, w: torch.addmm(w, w, x.t() @ x),
    "no product": lambda x, w: w + 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    x, weight = values(M, 32, seed=0).npu(), on_npu(values(32, 32, seed=1))
    with pytest.raises(RuntimeError, match=r"cann_host: aten\.\S+ of an internal format"):
        captured(lambda: REFUSED[name](x, weight))


def test_float32_is_refused() -> None:
    """torch_npu launches an aclop there, which no graph captures."""
    x, weight = (values(32, 32, seed=seed, dtype=torch.float32).npu() for seed in (0, 1))
    there = on_npu(weight)
    with pytest.raises(RuntimeError, match=r"cann_host: aten\.mm\.default of an internal format"):
        captured(lambda: x @ there)


@needs_casts
def test_a_weight_that_is_gone_is_an_error() -> None:
    x, held = values(M, 2048, seed=0).npu(), [on_npu(values(2048, 4096, seed=1))]
    graph, out = captured(lambda: x @ held[0])
    replayed(graph, out)
    held.clear()
    gc.collect()
    torch.npu.empty_cache()
    with pytest.raises(RuntimeError, match=r"aclnnNpuFormatCast: .* bytes at"):
        replayed(graph, out)


@needs_casts
@pytest.mark.skipif(not HAS_PASSES, reason=f"{INSTALLED} has no npugraph_ex")
def test_a_float_head_beside_quantized_layers() -> None:
    """What quantize leaves float is cast to FRACTAL_NZ too."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 40, bias=False)).half().eval()
    lq_graph.quantize(model.requires_grad_(False), {"1": None, "*": lq_graph.A8W8Dynamic()})
    x = values(M, 64, seed=0)
    model.npu()
    wanted = model(x.npu()).cpu()
    lq_graph.use_internal_format_weight(model)
    assert torch_npu.get_npu_format(model[1].weight) == FRACTAL_NZ
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="npugraph_ex", dynamic=False, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x.npu()).cpu(), wanted)
    torch._dynamo.reset()
