"""cann_host in eager mode: tensors, copies, aten and aclnn operators, refusals, the launcher.

Everything goes through the real torch_npu; what is compared with is `golden`, plain numpy.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
from cann_host import aclnn, executor
from lq_graph.backends.npu import cast_format
from support import golden
from support.processes import SCRIPTS, python, script, start

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


A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"
ARITHMETIC = {A2: "multiply", A950: "divide", P310: "half"}


def pretend(monkeypatch: pytest.MonkeyPatch, soc: str) -> None:
    """Let the operators, not torch_npu, be those of another chip."""
    monkeypatch.setattr(aclnn, "_soc", soc)
    monkeypatch.setattr(executor, "soc_name", lambda: soc)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


# ---- what it says it is ----


def test_says_what_it_is() -> None:
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


# ---- the aclnn operators ----


def pack(x: Tensor) -> Tensor:
    return torch.from_numpy(golden.pack_int4(x.numpy()))


def as_numpy(x: Tensor | None) -> np.ndarray | None:
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

# The A2 table: x dtype, scale dtype ("packed": by npu_trans_quant_param first), offset, bias
# dtypes, pertoken, output dtype.
ROWS: list[tuple[torch.dtype, Any, bool, list[torch.dtype | None], bool, torch.dtype]] = [
    (I8, "packed", False, [None, I32], False, F16),
    (I8, F32, False, [None, I32], False, F16),
    (I8, "packed", True, [None, I32], False, I8),
    (I8, F32, True, [None, I32], False, I8),
    (I8, F32, False, [None, I32], False, I8),
    (I8, F32, False, [None, I32, BF16, F32], False, BF16),
    (I8, BF16, False, [None, I32, BF16, F32], False, BF16),
    (I8, F32, False, [None, I32, BF16, F32], True, BF16),
    (I8, BF16, False, [None, I32, BF16, F32], True, BF16),
    (I8, F32, False, [None, I32, F16, F32], True, F16),
    (I32, "packed", False, [None, I32], False, F16),
    (I32, F32, False, [None, I32], False, F16),
    (I8, F32, False, [None, I32], False, I32),
    (I8, BF16, False, [None, I32], False, I32),
]
CASES = [
    pytest.param(x, scale, offset, bias, pertoken, out, id=f"{i}-{bias}")
    for i, (x, scale, offset, biases, pertoken, out) in enumerate(ROWS)
    for bias in biases
]


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


def assert_same(got: Tensor, expected: np.ndarray) -> None:
    assert got.device.type == "npu"
    host = as_numpy(got.cpu())
    assert host.shape == expected.shape
    np.testing.assert_array_equal(host, expected)


@pytest.mark.parametrize(("x", "scale", "offset", "bias", "pertoken", "out"), CASES)
def test_quant_matmul(
    x: torch.dtype,
    scale: Any,
    offset: bool,
    bias: torch.dtype | None,
    pertoken: bool,
    out: torch.dtype,
) -> None:
    inputs = Inputs(x, scale, offset, bias, pertoken)
    assert_same(inputs.on_npu(out), inputs.by_golden(out))


@pytest.mark.parametrize(
    "shape",
    [
        {"m": 1, "k": 32, "n": 16},
        {"m": 33, "k": 100, "n": 7},
        {"m": 3, "k": 64, "n": 64, "batch": (2,)},
        {"m": 3, "k": 40, "n": 24, "batch": (2, 3)},
        {"scale_length": 1},
    ],
    ids=str,
)
def test_quant_matmul_shapes(shape: dict[str, Any]) -> None:
    inputs = Inputs(bias=I32, **shape)
    assert_same(inputs.on_npu(I8), inputs.by_golden(I8))


@pytest.mark.usefixtures("internal_formats")
@pytest.mark.parametrize("shape", [(48, 64), (16, 32), (50, 70), (128, 512)], ids=str)
def test_quant_matmul_with_fractal_nz_weight(shape: tuple[int, int]) -> None:
    inputs = Inputs(offset=True, bias=I32, n=shape[0], k=shape[1])
    assert_same(inputs.on_npu(I8, FRACTAL_NZ), inputs.by_golden(I8))


def test_quant_matmul_with_an_untransposed_weight() -> None:
    inputs = Inputs(bias=I32)
    result = torch_npu.npu_quant_matmul(
        inputs.x1.npu(),
        inputs.weight.t().contiguous().npu(),
        inputs.scale.npu(),
        bias=inputs.bias.npu(),
        output_dtype=I8,
    )
    assert_same(result, inputs.by_golden(I8))


@pytest.mark.parametrize("round_mode", [0, 1])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [((1,), None), ((7,), None), ((7,), (7,)), ((1,), (7,)), ((7,), (1,)), ((1, 7), None)],
    ids=str,
)
def test_trans_quant_param(
    scale: tuple[int, ...], offset: tuple[int, ...] | None, round_mode: int
) -> None:
    s = values(*scale).abs() / 100
    o = None if offset is None else values(*offset, seed=1) * 10
    got = torch_npu.npu_trans_quant_param(
        s.npu(), None if o is None else o.npu(), round_mode=round_mode
    )
    assert got.dtype == torch.int64
    assert_same(got, golden.trans_quant_param(as_numpy(s), as_numpy(o), round_mode))


@pytest.mark.parametrize("soc", [A2, A950, P310])
@pytest.mark.parametrize("offset", [(7,), (1, 7)], ids=str)
def test_one_scale_and_an_offset_each_are_as_many_words(
    offset: tuple[int, ...], soc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch_npu makes the result, long enough; what a graph declares is another thing."""
    pretend(monkeypatch, soc)
    s, o = values(1).abs() / 100, values(*offset, seed=1) * 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch_npu.npu_trans_quant_param(s.npu(), o.npu())
    assert got.shape == offset
    assert_same(got, golden.trans_quant_param(as_numpy(s), as_numpy(o)))


@pytest.mark.parametrize("soc", [A2, A950, P310])
def test_words_past_an_eager_result(soc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu gives (1, 1) for a scale of that shape, whatever the offset has."""
    pretend(monkeypatch, soc)
    s, o = values(1, 1).abs() / 100, values(7, seed=1) * 10
    with pytest.warns(
        RuntimeWarning, match=r"the kernel writes 7 words: 6 overwrite .*cann_host's"
    ):
        got = torch_npu.npu_trans_quant_param(s.npu(), o.npu())
    assert_same(got, golden.trans_quant_param(as_numpy(s), as_numpy(o[:1]).reshape(1, 1)))
    monkeypatch.setattr(executor, "overruns", "refuse")
    with refused("(?s)7 words.*refused by cann_host's option overruns"):
        torch_npu.npu_trans_quant_param(s.npu(), o.npu())


@pytest.mark.usefixtures("internal_formats")
def test_a_wide_scale_beside_a_fractal_nz_weight() -> None:
    """aclnnQuantMatmulWeightNz takes (1, n) and reads n values; aclnnQuantMatmulV5 does not."""
    inputs = Inputs(scale=F32, pertoken=True)
    weight = torch_npu.npu_format_cast(inputs.weight.npu(), FRACTAL_NZ)
    options = {"pertoken_scale": inputs.pertoken.npu(), "output_dtype": F16}
    wide = inputs.scale.reshape(1, -1).npu()
    got = torch_npu.npu_quant_matmul(inputs.x1.npu(), weight.T, wide, **options)
    assert_same(got, inputs.by_golden(F16))
    with refused(r"(?s)aclnnQuantMatmulV5.*scale has shape \(1, 48\)"):
        torch_npu.npu_quant_matmul(inputs.x1.npu(), inputs.weight.npu().T, wide, **options)


@pytest.mark.usefixtures("internal_formats")
def test_int4_in_fractal_nz_goes_by_weight_nz_only() -> None:
    inputs = Inputs(x=I32, k=128)
    weight = cast_format(inputs.weight.npu(), FRACTAL_NZ)  # of 64 int4, not of eight int32
    call = torch_npu.npu_quant_matmul
    x, scale = inputs.x1.npu(), inputs.scale.npu()
    assert_same(call(x, weight.T, scale, output_dtype=F16), inputs.by_golden(F16))
    with refused("(?s)aclnnQuantMatmulV5.*161002.*int4 x2 is FRACTAL_NZ"):
        call(x, weight.T, torch_npu.npu_trans_quant_param(scale), output_dtype=F16)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_nd_weight_on_310p(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """aclnn brings it to FRACTAL_NZ itself."""
    pretend(monkeypatch, P310)
    inputs = Inputs(bias=I32)
    weight = inputs.weight.npu()
    weight = weight.T if transposed else weight.T.contiguous()
    got = torch_npu.npu_quant_matmul(
        inputs.x1.npu(), weight, inputs.scale.npu(), bias=inputs.bias.npu(), output_dtype=I8
    )
    assert_same(got, inputs.by_golden(I8))


@pytest.mark.usefixtures("internal_formats")
def test_pertoken_on_310p(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, P310)
    inputs = Inputs(scale=F32, pertoken=True, bias=I32)
    assert_same(inputs.on_npu(F16, FRACTAL_NZ), inputs.by_golden(F16))
    with refused("(?s)161002.*bias dtype float32"):
        Inputs(scale=F32, pertoken=True, bias=F32).on_npu(F16, FRACTAL_NZ)


@pytest.mark.usefixtures("internal_formats")
@pytest.mark.parametrize(("dtype", "c0"), [(I8, 32), (F16, 16), (BF16, 16), (I32, 16), (F32, 16)])
@pytest.mark.parametrize("shape", [(16, 32), (50, 70), (3, 20, 33)], ids=str)
def test_format_cast(dtype: torch.dtype, c0: int, shape: tuple[int, ...]) -> None:
    x = values(*shape, dtype=dtype)
    nz = torch_npu.npu_format_cast(x.npu(), FRACTAL_NZ)
    assert torch_npu.get_npu_format(nz) == FRACTAL_NZ
    rows, columns = shape[-2:]
    blocks = (*shape[:-2], -(-columns // c0), -(-rows // 16), 16, c0)
    assert nz.untyped_storage().nbytes() >= np.prod(blocks) * dtype.itemsize
    assert torch.equal(nz.cpu(), x)  # torch_npu casts it back on the way
    back = torch_npu.npu_format_cast(nz, ND)
    assert torch_npu.get_npu_format(back) == ND
    assert torch.equal(back.cpu(), x)


# ---- quantized activations, by the vendor's calls ----


def exact_rows(*shape: int, dtype: torch.dtype) -> Tensor:
    """Rows whose peak is a power of two, so that 127 / peak and 7 / peak are exact."""
    x = values(*shape, dtype=dtype).clamp(-60, 60)
    x[..., 0] = 64
    return x


def either_way(function: Callable[..., Any], way: str) -> Callable[..., Any]:
    """The function as it is, or compiled by torchair."""
    if way == "eager":
        return function
    import torchair

    torch._dynamo.reset()
    backend = torchair.get_npu_backend()
    return torch.compile(function, backend=backend, dynamic=way == "dynamic", fullgraph=True)


WAYS = pytest.mark.parametrize("way", ["eager", "static", "dynamic"])


@WAYS
@pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 40)], ids=str)
def test_npu_dynamic_quant(
    shape: tuple[int, ...], dtype: torch.dtype, int4: bool, way: str
) -> None:
    x = exact_rows(*shape, dtype=dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch_npu.npu_dynamic_quant(x, dst_type=torch.quint4x2 if int4 else I8)

    y, scale = either_way(run, way)(x.npu())
    want, want_scale = golden.dynamic_quant(x.float().numpy(), 7 if int4 else 127)
    want = golden.pack_int4(want.astype(np.int8)) if int4 else want.astype(np.int8)
    assert y.dtype == (I32 if int4 else I8) and scale.dtype == F32
    np.testing.assert_array_equal(y.cpu().numpy(), want)
    np.testing.assert_array_equal(scale.cpu().numpy(), want_scale)


def assert_quantized(
    got: tuple[Tensor, ...], want: tuple[np.ndarray, ...], int4: bool = False
) -> None:
    """Integers, float32 scales and perhaps offsets, bit by bit."""
    y, *steps = (one.cpu().numpy() for one in got)
    first = want[0].astype(np.int8)
    np.testing.assert_array_equal(y, golden.pack_int4(first) if int4 else first)
    assert len(steps) == len(want) - 1
    for one, other in zip(steps, want[1:], strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


@WAYS
@pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("soc", [A2, A950, P310])
def test_npu_dynamic_quant_asymmetric(
    soc: str, dtype: torch.dtype, int4: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, soc)
    x = values(2, 3, 64, dtype=dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch_npu.npu_dynamic_quant_asymmetric(x, dst_type=torch.quint4x2 if int4 else I8)

    if soc == P310 and (int4 or dtype == BF16):
        with refused(f"(?s){'561002' if way != 'eager' else '161002'}.*Ascend310P3 allows"):
            either_way(run, way)(x.npu())
        return
    given = as_numpy(x) if dtype == F16 else as_numpy(x.float())
    top = 7 if int4 else 127
    want = golden.dynamic_quant_with_offset(given, top, ARITHMETIC[soc])
    assert_quantized(either_way(run, way)(x.npu()), want, int4)


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize("grouped", [False, True])
def test_npu_dynamic_quant_asymmetric_with_smooth_scales(grouped: bool, way: str) -> None:
    x, smooth = values(2, 3, 40, dtype=F16), values(2, 40, dtype=F16, seed=1) / 50
    smooth = smooth if grouped else smooth[0].contiguous()
    groups = torch.tensor([2, 6], dtype=I32) if grouped else None

    def run(x: Tensor, smooth: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        call = torch_npu.npu_dynamic_quant_asymmetric
        return call(x, smooth_scales=smooth, group_index=groups)

    factors = smooth.float().numpy()
    if grouped:
        factors = factors[[0, 0, 1, 1, 1, 1]].reshape(2, 3, 40)
    given = None if groups is None else groups.npu()
    got = either_way(run, way)(x.npu(), smooth.npu(), given)
    assert_quantized(got, golden.dynamic_quant_with_offset(x.float().numpy() * factors, 127))


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mode", ["pertensor", "perchannel"])
def test_npu_dynamic_quant_of_950_by_other_modes(
    mode: str, symmetric: bool, smooth: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aclnnDynamicQuantV4, and DynamicQuantV2 in a graph."""
    pretend(monkeypatch, A950)
    x = values(2, 5, 64, dtype=F16)
    length = 5 if mode == "perchannel" else 64
    factors = (values(length, dtype=F16, seed=1) / 50) if smooth else None

    def run(x: Tensor, factors: Tensor | None) -> tuple[Tensor, ...]:
        name = "npu_dynamic_quant" + "_asymmetric" * (not symmetric)
        return getattr(torch_npu, name)(x, smooth_scales=factors, quant_mode=mode)

    got = either_way(run, way)(x.npu(), None if factors is None else factors.npu())
    value = x.float().numpy()
    if factors is not None:
        each = factors.float().numpy()
        value = value * (each[:, None] if mode == "perchannel" else each)
    rows = value.reshape(1, -1) if mode == "pertensor" else np.swapaxes(value, -1, -2)
    arithmetic = golden.dynamic_quant if symmetric else golden.dynamic_quant_with_offset
    want, *steps = arithmetic(rows, 127, "divide")
    want = want.reshape(value.shape) if mode == "pertensor" else np.swapaxes(want, -1, -2)
    assert_quantized(got, (want, *steps))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("soc", [A2, P310])
def test_other_modes_are_for_950(soc: str, asymmetric: bool, monkeypatch) -> None:
    pretend(monkeypatch, soc)
    call = getattr(torch_npu, "npu_dynamic_quant" + "_asymmetric" * asymmetric)
    for options in ({"quant_mode": "pertensor"}, {"dst_type_max": 3.0}):
        with refused(f"(?s)aclnnDynamicQuantV4.*for Ascend 950, and this is {soc}.*561000"):
            call(values(4, 64, dtype=F16).npu(), **options)


def test_310p_reads_no_smooth_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, P310)
    x, smooth = values(3, 64, dtype=F16), values(64, dtype=F16, seed=1)
    with pytest.warns(RuntimeWarning, match="smooth_scales has no effect on Ascend310P3"):
        got = torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=smooth.npu())
    assert_quantized(got, golden.dynamic_quant(as_numpy(x), 127, "half"))
    with refused("(?s)561002.*multiple of 32"):
        torch_npu.npu_dynamic_quant(x[:, :48].contiguous().npu())
    with refused("(?s)4128 on Ascend310P3.*never writes one"):
        torch_npu.npu_dynamic_quant_asymmetric(torch.ones(2, 4128, dtype=F16).npu())


def test_group_index_alone_has_no_effect() -> None:
    x, groups = exact_rows(4, 40, dtype=F16), torch.tensor([1, 4], dtype=I32)
    with pytest.warns(RuntimeWarning, match="group_index has no effect without smooth_scales"):
        got = torch_npu.npu_dynamic_quant(x.npu(), group_index=groups.npu())
    assert_quantized(got, golden.dynamic_quant(x.float().numpy(), 127))


def test_asymmetric_although_symmetry_is_asked_for() -> None:
    """What torchair makes of dst_type_max on A2, where the kernel knows offsets only."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch_npu.npu_dynamic_quant(x, dst_type_max=3.0)

    x = values(3, 64, dtype=F16)
    with pytest.warns(RuntimeWarning, match="its kernel quantizes with an offset all the same"):
        got = either_way(run, "static")(x.npu())
    assert_quantized(got, golden.dynamic_quant_with_offset(x.float().numpy(), 127)[:2])


@WAYS
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_npu_quantize(dtype: torch.dtype, length: int, zero_points: bool, way: str) -> None:
    x = (values(2, 3, 40) / 50).to(dtype)
    scale = values(length, seed=1).abs().to(dtype)
    offset = values(length, seed=2).to(dtype) if zero_points else None

    def run(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        return torch_npu.npu_quantize(x, scale, offset, torch.qint8, -1, False)

    y = either_way(run, way)(x.npu(), scale.npu(), None if offset is None else offset.npu())
    steps = as_numpy(x.float()) * as_numpy(scale.float())
    if offset is not None:
        steps = steps + as_numpy(offset.float())
    assert y.dtype == I8
    np.testing.assert_array_equal(y.cpu().numpy(), np.clip(np.rint(steps), -128, 127))


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])
def test_npu_dynamic_quant_with_smooth_scales(int4: bool, grouped: bool, way: str) -> None:
    x, smooth = values(2, 3, 40, dtype=F16), values(3, 40, dtype=F16, seed=1) / 50
    smooth = smooth if grouped else smooth[0].contiguous()
    groups = torch.tensor([2, 2, 6], dtype=I32) if grouped else None  # the second one is empty

    def run(x: Tensor, smooth: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.quint4x2 if int4 else I8
        return torch_npu.npu_dynamic_quant(
            x, smooth_scales=smooth, group_index=groups, dst_type=dtype
        )

    given = None if groups is None else groups.npu()
    y, scale = either_way(run, way)(x.npu(), smooth.npu(), given)
    factors = smooth.float().numpy()
    if grouped:
        factors = factors[[0, 0, 2, 2, 2, 2]].reshape(2, 3, 40)
    arithmetic = "reciprocal" if grouped else "multiply"  # dynamic_quant_moe.h writes it so
    top, product = 7 if int4 else 127, x.float().numpy() * factors
    want, want_scale = golden.dynamic_quant(product, top, arithmetic)
    want = want.astype(np.int8)
    np.testing.assert_array_equal(y.cpu().numpy(), golden.pack_int4(want) if int4 else want)
    np.testing.assert_array_equal(scale.cpu().numpy(), want_scale)


@pytest.mark.parametrize("way", ["eager", "static"])
def test_npu_quantize_to_int4(way: str) -> None:
    x, scale = values(3, 40, dtype=F16), values(40, dtype=F16, seed=1) / 99

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return torch_npu.npu_quantize(x, scale, None, torch.quint4x2, -1, False)

    y = either_way(run, way)(x.npu(), scale.npu())
    steps = np.clip(np.rint(x.float().numpy() * scale.float().numpy()), -8, 7).astype(np.int8)
    np.testing.assert_array_equal(y.cpu().numpy(), golden.pack_int4(steps))


QUANTIZE = [
    # chips, dtype of x, of scales, of zero_points, to, axis, length, range of the result
    ((A2, A950, P310), F32, F32, I32, torch.qint32, 0, 3, (-(2**31), 2**31 - 1)),
    ((A2, A950, P310), F32, F32, I8, torch.qint8, 1, 40, (-128, 127)),
    ((A2, A950, P310), F16, F16, I32, torch.quint8, -1, 40, (0, 255)),
    ((A2, A950, P310), F32, F16, None, torch.qint8, 1, 40, (-128, 127)),
    ((A2, A950), BF16, F32, None, torch.qint8, 0, 3, (-128, 127)),
    ((A2, A950), BF16, BF16, BF16, torch.qint8, 1, 40, (-128, 127)),
    ((A950,), F32, F32, F32, torch.quint8, 1, 1, (0, 255)),
]


@pytest.mark.parametrize(
    ("socs", "dtype", "scales", "points", "to", "axis", "length", "limits"), QUANTIZE
)
@pytest.mark.parametrize("soc", [A2, A950, P310])
def test_npu_quantize_by_a_division(
    soc, socs, dtype, scales, points, to, axis, length, limits, monkeypatch
) -> None:
    pretend(monkeypatch, soc)
    x, scale = values(3, 40, dtype=dtype), values(length, seed=1).abs().to(scales)
    offset = None if points is None else (values(length, seed=2) / 9).to(points)
    given = (x.npu(), scale.npu(), None if offset is None else offset.npu(), to, axis)
    if soc not in socs:
        with refused(f"(?s)161002.*{soc} allows"):
            torch_npu.npu_quantize(*given)
        return
    y = torch_npu.npu_quantize(*given)
    along = (-1, 1) if axis == 0 else (1, -1)
    steps = x.float().numpy() / scale.float().numpy().reshape(along)
    if offset is not None:
        steps = steps + offset.float().numpy().reshape(along)
    np.testing.assert_array_equal(y.cpu().numpy(), np.clip(np.rint(steps), *limits))


@pytest.mark.parametrize(
    ("scale", "points", "message"),
    [
        (torch.ones(1, dtype=BF16), None, "x is float32, scales and zero_points bfloat16; if one"),
        (torch.ones(40), torch.ones(1, dtype=I32), r"zero_points has shape \(1,\); .* \(40,\)"),
        (torch.ones(1), torch.ones(40, dtype=I32), r"zero_points has shape \(40,\); .* \(1,\)"),
        (torch.ones(1), torch.ones(1), "zero_points is float32; Ascend910B2 allows int8"),
    ],
    ids=["bfloat16", "short", "long", "float32"],
)
def test_npu_quantize_refuses(scale: Tensor, points: Tensor | None, message: str) -> None:
    with refused(f"(?s)161002.*{message}"):
        there = None if points is None else points.npu()
        torch_npu.npu_quantize(values(3, 40).npu(), scale.npu(), there, torch.qint8, 1)


def test_npu_quantize_casts_the_scale_of_a_float32_x() -> None:
    x, scale = values(3, 40), torch.tensor([0.3], dtype=F16)
    y = torch_npu.npu_quantize(x.npu(), scale.npu(), None, torch.qint8, -1, False)
    steps = x.numpy() * scale.float().numpy()
    np.testing.assert_array_equal(y.cpu().numpy(), np.clip(np.rint(steps), -128, 127))


def test_npu_quantize_along_rows() -> None:
    x, scale = values(2, 3, 40) / 50, values(3, seed=1).abs()
    y = torch_npu.npu_quantize(x.npu(), scale.npu(), None, torch.qint8, -2, False)
    steps = x.numpy() * scale.numpy()[:, None]
    np.testing.assert_array_equal(y.cpu().numpy(), np.clip(np.rint(steps), -128, 127))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)], ids=str)
def test_npu_dynamic_quant_of_nothing(shape: tuple[int, ...]) -> None:
    y, scale = torch_npu.npu_dynamic_quant(torch.empty(shape, dtype=F16).npu())
    assert (y.shape, scale.shape) == (shape, shape[:1])


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_attention(dtype: torch.dtype, mask: str | None) -> None:
    """torch's sdpa, which torch_npu makes its fused attention of."""
    q, k, v = (values(2, 4, 6, 8, dtype=dtype, seed=i) / 50 for i in range(3))
    hide = torch.arange(6) >= torch.tensor([4, 6]).view(2, 1, 1, 1)
    given = {None: None, "bool": ~hide, "float": hide.to(dtype) * -1e4}[mask]
    there = None if given is None else given.npu()
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q.npu(), k.npu(), v.npu(), attn_mask=there)
    scores = q.double() @ k.double().mT / 8**0.5
    if mask:
        scores = scores.masked_fill(hide, -torch.inf)
    want = scores.softmax(-1) @ v.double()
    assert (out.device.type, out.dtype) == ("npu", dtype)
    tolerance = {F16: 2e-3, BF16: 2e-2, F32: 1e-5}[dtype]
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)


# ---- what it refuses ----


def refused(message: str) -> Any:
    return pytest.raises(RuntimeError, match=message)


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
        r"(?s)161002.*scales has shape \(7,\); it must have 1 or 8 values",
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, gamma = values(3, 5, 16, dtype=dtype), values(16, dtype=dtype, seed=1)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 0.5)
    a, g = x.double().numpy(), gamma.double().numpy()
    factor = 1 / np.sqrt((a * a).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(rstd.cpu().numpy(), factor, rtol=1e-5)
    close = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(y.cpu().double().numpy(), a * factor * g, rtol=close)
    with pytest.raises(RuntimeError, match=r"aclnnRmsNorm: gamma has shape \(8,\)"):
        torch_npu.npu_rms_norm(x.npu(), gamma[:8].npu(), 0.5)


NORM_DTYPES = [
    # chip, dtype of x and of gamma; what npu_rms_norm says, and npu_add_rms_norm
    (A2, F16, F32, None, "gamma is float32 and x float16"),
    (A950, BF16, F32, None, "gamma is float32 and x bfloat16"),
    (A2, torch.float64, torch.float64, "x is float64", "x is float64"),
    (A2, F32, F16, "gamma is float16 and x float32", "gamma is float16 and x float32"),
    (P310, F16, F16, None, None),
    (P310, BF16, BF16, "x is bfloat16", "x is bfloat16"),
    (P310, F16, F32, "gamma is float32 and x float16", "gamma is float32 and x float16"),
]


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize(("soc", "dtype", "gamma", "alone", "added"), NORM_DTYPES, ids=str)
def test_norm_dtypes(soc, dtype, gamma, alone, added, way, monkeypatch) -> None:
    pretend(monkeypatch, soc)
    x, g = values(3, 16, dtype=dtype).npu(), values(16, dtype=gamma, seed=1).npu()

    def run(x: Tensor, g: Tensor) -> Tensor:
        return torch_npu.npu_rms_norm(x, g, 0.5)[0]

    def run_added(x: Tensor, g: Tensor) -> Tensor:
        return torch_npu.npu_add_rms_norm(x, x, g, 0.5)[0]

    a, factors = x.cpu().double().numpy(), g.cpu().double().numpy()
    code = "161002" if way == "eager" else "561003"
    for function, times, message in ((run, 1, alone), (run_added, 2, added)):
        call = either_way(function, way)
        if message is not None:
            with refused(f"(?s){message}.*CANN error {code}"):
                call(x, g)
            continue
        total = a * times
        want = total / np.sqrt((total * total).mean(-1, keepdims=True) + 0.5) * factors
        got = call(x, g).cpu().double().numpy()
        np.testing.assert_allclose(got, want, rtol={F16: 1e-3, BF16: 8e-3}.get(dtype, 1e-5))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x1, x2 = values(3, 5, 16, dtype=dtype), values(3, 5, 16, dtype=dtype, seed=1)
    gamma = values(16, dtype=dtype, seed=2)
    y, rstd, x = torch_npu.npu_add_rms_norm(x1.npu(), x2.npu(), gamma.npu(), 0.5)
    total = x1.double().numpy() + x2.double().numpy()
    factor = 1 / np.sqrt((total * total).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(rstd.cpu().numpy(), factor, rtol=1e-5)
    close = {F32: 1e-5, F16: 1e-3, BF16: 8e-3}[dtype]
    np.testing.assert_allclose(x.cpu().double().numpy(), total, rtol=close, atol=1e-5)
    want = total * factor * gamma.double().numpy()
    np.testing.assert_allclose(y.cpu().double().numpy(), want, rtol=close, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"aclnnAddRmsNorm: x1 is .* x2 .* \(3, 5, 8\)"):
        torch_npu.npu_add_rms_norm(x1.npu(), x2[..., :8].contiguous().npu(), gamma.npu(), 0.5)


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


# ---- the launcher, in processes of its own ----


def test_launcher_runs_a_script() -> None:
    done = start("launched.py --flag x", CANN_HOST_SOC="Ascend910B4")
    assert done.returncode == 7
    assert done.stdout == "['--flag', 'x'] __main__ 42 Ascend910B4\n[2.0, 2.0, 2.0]\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("cann_host: no NPU")]
    assert len(said) == 1
    assert "CANN 9.1.0 (Ascend910B4) computes on the CPU" in said[0]


@pytest.mark.slow
def test_launcher_runs_a_module_and_shows_its_exception() -> None:
    done = python("-m", "cann_host", "-m", "boom", "y", PYTHONPATH=str(SCRIPTS))
    assert done.returncode == 1
    assert done.stdout.startswith("['y']\n")  # torch_npu adds a line of its own
    assert done.stderr.rstrip().endswith("ValueError: from the script")


def test_launcher_alone_says_what_the_options_make_of_it() -> None:
    done = python("-m", "cann_host", "--soc", "Ascend310P3", "--devices", "2")
    assert {"soc: Ascend310P3", "devices: 2", "active: False"} <= set(done.stdout.splitlines())


def test_launcher_alone_says_what_it_is() -> None:
    done = python("-m", "cann_host")
    assert done.returncode == 0
    assert "usage: python -m cann_host [options] script.py" in done.stdout
    assert "soc: Ascend910B2" in done.stdout


NOT_ACTIVE = {
    # function of activation.py: why not
    "torch_first": "torch is already imported: call cann_host.activate",
    "no_libraries": "native libraries were not built, because no C\\+\\+ compiler was found",
    "no_torch_npu": "torch_npu is not installed: "
    "pip install torch==2.13.0 torch_npu==2.13.0 packaging",
    "another_platform": "runs on Linux only, and this is darwin",
    "a_cann_is_loaded": "a CANN is already loaded in this process .*libascendcl.so",
}


@pytest.mark.parametrize("name", NOT_ACTIVE)
def test_activation_says_in_one_sentence_why_not(name: str) -> None:
    done = python(*script(f"activation.py {name}"))
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("cann_host.CannHostError: ")
    assert re.search(NOT_ACTIVE[name], last), last


@pytest.mark.slow
@pytest.mark.parametrize("queue", ["0", "1", "2"])
def test_exit_with_launches_in_flight(queue: str) -> None:
    """torch_npu's task queue runs our Python on its own thread; leaving must not hang or crash."""
    done = start("task_queue.py exit", TASK_QUEUE_ENABLE=queue)
    assert (done.returncode, done.stdout) == (0, f"{64 * 64 * 64}\n"), done.stderr


MIXED = {
    "add": lambda npu, cpu: npu + cpu,
    "matmul": lambda npu, cpu: npu @ cpu,
    "in place": lambda npu, cpu: npu.add_(cpu),
    "linear": lambda npu, cpu: torch.nn.functional.linear(npu, cpu),
    "embedding": lambda npu, cpu: torch.nn.functional.embedding(cpu.long(), npu),
    "a list": lambda npu, cpu: torch.cat([npu, cpu]),
    "where": lambda npu, cpu: torch.where(npu > 0, npu, cpu),
    "by name": lambda npu, cpu: torch.nn.functional.layer_norm(npu, (3,), bias=cpu[0]),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_tensor_left_on_the_cpu_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"on the same device.* of aten\.\S+ is on the CPU"):
        MIXED[name](torch.ones(3, 3).npu(), torch.ones(3, 3))


def test_what_torch_npu_takes_from_the_cpu() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    for take in (
        lambda t: t + torch.tensor(2.0),
        lambda t: t.masked_fill(torch.tensor(True), 1.0),
        lambda t: t[torch.tensor([1, 0])],
        lambda t: t[torch.tensor([True, False])],
        lambda t: t.index_put((torch.tensor([0]),), torch.tensor(9.0)),
        lambda t: t.clone().copy_(x.mul(2)),
    ):
        assert torch.equal(take(x.npu()).cpu(), take(x))
