"""cann_host in eager mode: tensors, copies, aten operators, what is refused, and for how long.

Everything goes through the real torch_npu; what is compared with is `golden`, plain numpy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cann_host
from support.eager import (
    BF16,
    F16,
    I8,
    I32,
    Inputs,
    assert_same,
    refused,
    values,
)

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
ND, FRACTAL_NZ = 2, 29
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


@pytest.fixture
def internal_formats() -> Any:
    """Let tensors have FRACTAL_NZ, as the vendor's examples do."""
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False  # its default on this product; not readable


# ---- its description ----


def test_info_has_the_options() -> None:
    info = cann_host.info()
    assert info["active"]
    assert info["soc"] == "Ascend910B2" == torch.npu.get_device_name()
    assert info["cann_version"] == "9.1.0"
    assert torch.npu.device_count() == 1


def test_activate_again_does_nothing_but_cannot_change_the_product() -> None:
    cann_host.activate()
    cann_host.activate(soc=cann_host.info()["soc"])
    with pytest.raises(cann_host.CannHostError, match="already active with soc Ascend910B2"):
        cann_host.activate(soc="Ascend310P3")


# ---- tensors and copies ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 4, 5)], ids=str)
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = values(*shape, dtype=dtype)
    there = x.npu()
    assert there.device.type == "npu"
    assert there.dtype == dtype
    assert torch.equal(there.cpu(), x)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.t().contiguous(),
    "columns": lambda x: x[:, 1::2].contiguous(),
    "row": lambda x: x[2],
    "expand": lambda x: x[0].expand(3, -1).contiguous(),
    "flatten": lambda x: x.t().reshape(-1),
    "clone of a view": lambda x: x[1:, :3].clone(),
    "cast of a view": lambda x: x.t().to(torch.int32),
    "into a view": lambda x: x.clone().t().copy_(x.t() + 1),
    "set item": lambda x: x.clone().index_fill_(0, torch.tensor([1], device=x.device), 9),
    "view as another dtype": lambda x: x.view(torch.int32),
    "half and back": lambda x: x.half().float(),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies(name: str) -> None:
    x = values(4, 6)
    assert torch.equal(COPIES[name](x.npu()).cpu(), COPIES[name](x))


def test_copy_between_host_and_device_with_strides_and_cast() -> None:
    x = values(4, 6)
    assert torch.equal(x.t().npu().cpu(), x.t())
    half = torch.empty(4, 6, dtype=torch.float16, device="npu").copy_(x)
    assert torch.equal(half.cpu(), x.half())
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert torch.equal(pinned.npu(non_blocking=True).cpu(), x)


# ---- ordinary operators ----

ATEN: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + x,
    "scalar": lambda x: 1 - x * 2.5,
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "in place on a view": lambda x: (y := x.clone(), y[1:].sub_(1))[0],
    "out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    "out resized": lambda x: torch.add(x, x, out=x.new_empty(0)),
    "compare": lambda x: x >= 0,
    "where": lambda x: torch.where(x > 0, x, -x),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(0, keepdim=True),
    "max": lambda x: x.max(1),
    "argmax": lambda x: x.argmax(-1),
    "any": lambda x: (x > 1).any(),
    "index": lambda x: x[[2, 0]],
    "index by mask": lambda x: x[x > 0],
    "assign by mask": lambda x: (y := x.clone(), y.__setitem__(y > 0, 0))[0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "gather": lambda x: x.gather(1, x.argsort(1)),
    "sort": lambda x: x.sort(-1),
    "topk": lambda x: x.topk(2),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x]),
    "matmul": lambda x: x @ x.t(),
    "batched matmul": lambda x: torch.matmul(x.expand(3, -1, -1), x.t()),
    "linear": lambda x: torch.nn.functional.linear(x, x[:2], x[:2, 0]),
    "softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "gelu": torch.nn.functional.gelu,
    "round": torch.round,
    "clamp": lambda x: x.clamp(-1, 1),
    "bits": lambda x: (x.int() << 2) & 0xFF,
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "foreach": lambda x: torch._foreach_add([x, x], 1.0),
    "composite": lambda x: torch.nn.functional.cross_entropy(x, x.argmax(1)),
}


def same(got: Any, expected: Any) -> None:
    if isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for one_got, one_expected in zip(got, expected, strict=True):
            same(one_got, one_expected)
    else:
        assert got.device.type == "npu"
        assert got.dtype == expected.dtype
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("name", ATEN)
def test_aten(name: str) -> None:
    x = values(4, 6)
    if name in ("matmul", "linear"):  # some torch_npu decompose them: another order of the sums
        torch.testing.assert_close(ATEN[name](x.npu()).cpu(), ATEN[name](x), rtol=1e-6, atol=0)
        return
    same(ATEN[name](x.npu()), ATEN[name](x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, 4, device="npu"),
        lambda: torch.full((3, 4), 2.0, device="npu"),
        lambda: torch.ones_like(torch.empty(3, 4, device="npu")),
        lambda: torch.rand(3, 4, device="npu"),
        lambda: torch.randint(-5, 5, (3, 4), device="npu"),
        lambda: torch.arange(12, device="npu").view(3, 4),
        lambda: torch.empty(3, 4, device="npu").normal_(),
    ],
)
def test_factories(make: Callable[[], Tensor]) -> None:
    made = make()
    assert (made.device.type, tuple(made.shape)) == ("npu", (3, 4))
    assert bool((made.cpu() < 20).all())


def test_random_numbers_repeat() -> None:
    torch.manual_seed(3)
    first = torch.randn(5, device="npu")
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(5, device="npu"))
    generator = torch.Generator("npu").manual_seed(3)
    one, two = (torch.randn(5, device="npu", generator=generator) for _ in range(2))
    assert not torch.equal(one, two)
    generator.manual_seed(3)
    assert torch.equal(one, torch.randn(5, device="npu", generator=generator))


@pytest.mark.parametrize(
    "x", [torch.ones(3), torch.ones(2, 2, dtype=torch.int8), torch.tensor(True), values(50, 60)]
)
def test_printing(x: Tensor) -> None:
    assert repr(x.npu()).replace(", device='npu:0'", "") == repr(x)


def test_gradients() -> None:
    weight = values(3, 6) / 50
    grads = []
    for device in ("cpu", "npu"):
        layer = torch.nn.Linear(6, 3, bias=False).to(device)
        layer.weight.data.copy_(weight)
        layer(values(4, 6).to(device)).softmax(-1).pow(2).sum().backward()
        grads.append(layer.weight.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0])


def test_a_default_device_does_not_leak_into_the_stand_in() -> None:
    torch.set_default_device("npu")
    try:
        packed = torch_npu.npu_trans_quant_param(torch.ones(3))
        assert (torch.ones(3) + 1).device.type == packed.device.type == "npu"
    finally:
        torch.set_default_device(None)


def test_events_measure_time() -> None:
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.ones(1000, device="npu").sum()
    end.record()
    torch.npu.synchronize()
    assert 0 < start.elapsed_time(end) < 60_000


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "offset with a float output": (
        lambda: Inputs(offset=True).on_npu(F16),
        "(?s)161002.*offset given is not supported",
    ),
    "scale of another length": (
        lambda: Inputs(scale_length=5).on_npu(I8),
        r"(?s)161002.*scale has shape \(5,\)",
    ),
    "bias of a dtype outside the row": (
        lambda: Inputs(bias=F16).on_npu(I8),
        "(?s)161002.*bias dtype float16",
    ),
    "bfloat16 scale for float16": (
        lambda: Inputs(scale=BF16).on_npu(F16),
        "(?s)161002.*scale dtype bfloat16",
    ),
    "scale for trans_quant_param in half": (
        lambda: torch_npu.npu_trans_quant_param(torch.ones(4, dtype=F16).npu()),
        "(?s)161002.*scale is float16",
    ),
    "dynamic_quant of float32": (
        lambda: torch_npu.npu_dynamic_quant(torch.ones(2, 8, device="npu")),
        "(?s)161002.*x is float32; Ascend910B2 allows float16 or bfloat16",
    ),
    "dynamic_quant with groups that do not hold all rows": (
        lambda: torch_npu.npu_dynamic_quant(
            torch.ones(2, 8, device="npu", dtype=F16),
            smooth_scales=torch.ones(2, 8, device="npu", dtype=F16),
            group_index=torch.tensor([0, 1], dtype=I32).npu(),
        ),
        "(?s)161002.*group_index ends with 1 and must rise to 2",
    ),
    "quantize by a division, with scales of another length": (
        lambda: torch.ops.npu.npu_quantize(
            torch.ones(2, 8, device="npu"), torch.ones(7).npu(), None, torch.qint8, -1
        ),
        # some torch_npu refuse it themselves
        r"(?s)161002.*scales has shape \(7,\); it must have 1 or 8 values|length of scales must",
    ),
    "quantize with a scale of another dtype": (
        lambda: torch_npu.npu_quantize(
            torch.ones(2, 8, device="npu", dtype=F16),
            torch.ones(1, device="npu"),
            None,
            torch.qint8,
            -1,
            False,
        ),
        "(?s)161002.*scale is float32 and x float16; they must be of one dtype",
    ),
    "quantize with a scale of another length": (
        lambda: torch_npu.npu_quantize(
            torch.ones(2, 8, device="npu"), torch.ones(7).npu(), None, torch.qint8, -1, False
        ),
        r"(?s)161002.*scale has shape \(7,\); it must have 1 or 8 values",
    ),
    "y_scale beside int8": (
        lambda: torch_npu.npu_quant_matmul(
            torch.ones(2, 32, dtype=I8).npu(),
            torch.ones(32, 8, dtype=I8).npu(),
            torch.ones(8).npu(),
            output_dtype=F16,
            y_scale=torch.ones(8).npu(),
        ),
        "(?s)161001.*y_scale is given; int8 x1 takes none",
    ),
    "an operator nobody implemented, through aclnn": (
        lambda: torch_npu.npu_swiglu_quant(torch.ones(4, 8, device="npu")),
        "SwiGluQuant",
    ),
    "an operator nobody implemented, through aclop": (
        lambda: torch_npu.npu_fast_gelu(torch.ones(3, 4, device="npu")),
        "operator FastGelu was called through aclopCompileAndExecute",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, message = REFUSALS[name]
    if "y_scale" in name and "y_scale" not in str(torch_npu.npu_quant_matmul.default._schema):
        pytest.skip("npu_quant_matmul of this torch_npu has no y_scale")
    with refused(message):
        call()
    # The refusal leaves the device as it was.
    assert_same(Inputs().on_npu(I8), Inputs().by_golden(I8))


def test_k_mismatch_is_refused() -> None:
    x, weight = torch.ones(4, 64, dtype=I8), torch.ones(96, 16, dtype=I8)
    with refused("(?s)161002.*k is 64 in x1 .* and 96 in x2"):
        torch_npu.npu_quant_matmul(x.npu(), weight.npu(), torch.ones(1).npu(), output_dtype=I8)


@pytest.mark.usefixtures("internal_formats")
def test_int4_cast_like_an_int32_tensor_is_refused() -> None:
    with refused("(?s)161002.*FRACTAL_NZ with storage shape"):
        Inputs(x=I32).on_npu(F16, FRACTAL_NZ)


# ---- for how long and from where ----


def test_threads() -> None:
    inputs = Inputs(offset=True, bias=I32)
    expected = inputs.by_golden(I8)
    wrong: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert_same(inputs.on_npu(I8), expected)
                torch.npu.synchronize()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def resident_kilobytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") // 1024


def test_memory_stays() -> None:
    x, weight = (torch.ones(size, 32, dtype=I8, device="npu") for size in (4, 16))
    scale = torch_npu.npu_trans_quant_param(torch.ones(16, device="npu"))

    def call(times: int) -> None:
        for _ in range(times):
            torch_npu.npu_quant_matmul(x, weight.t(), scale, output_dtype=I8)

    call(500)
    before = resident_kilobytes()
    call(3000)
    assert resident_kilobytes() - before < 1000  # a leak of one descriptor a call is 1,500
