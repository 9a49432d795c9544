"""Quantized layers in Inductor's programs on the CPU: one call of our function for each layer, and
the bits of the layer called eagerly."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static
from lq_graph.fusion import inductor
from support import has

F16, BF16 = torch.float16, torch.bfloat16
CONFIGS = {"dynamic": A8W8Dynamic(), "static": A8W8Static(), "int4": A4W4Dynamic()}
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    has.need_inductor()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        yield


class Block(nn.Module):
    """Two layers that read one tensor, and one that reads what they make."""

    def __init__(self, k: int = 72, n: int = 40, bias: bool = True) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(k, n, bias=bias), nn.Linear(k, n, bias=bias)
        self.down = nn.Linear(n, k, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.gate(x)) * self.up(x)) + x
        return out


def quantized(config: str, dtype: torch.dtype, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    model = Block(bias=bias).to(dtype).eval()
    batches = [torch.randn(9, 72).to(dtype)] if config == "static" else None
    lq_graph.quantize(model, CONFIGS[config], batches)
    return model


def program(function: Callable[..., Any], *args: Any) -> tuple[Any, list[str]]:
    """What a compiled function returns, and what of ours its program calls, in order: "into" for
    our function, or an operator's name."""
    out, code = run_and_get_code(function, *args)
    calls = re.findall(
        r"torch\.ops\.lq_graph\.(\w+)\.default\(|(lq_graph_quantized_linear)\(", code[0]
    )
    return out, [op or "into" for op, _ in calls]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("bias", [True, False])
def test_each_layer_is_one_call(config: str, dtype: torch.dtype, bias: bool) -> None:
    model, x = quantized(config, dtype, bias=bias), torch.randn(2, 5, 72).to(dtype)
    out, calls = program(torch.compile(model, fullgraph=True), x)
    assert torch.equal(out, model(x))
    assert calls == ["into"] * 3


SHAPES = [(1, 72), (3, 72), (4, 9, 72), (72,), (2, 3, 4, 72)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], dynamic: bool) -> None:
    model, x = quantized("dynamic", F16), torch.randn(shape).half()
    out, calls = program(torch.compile(model, dynamic=dynamic), x)
    assert torch.equal(out, model(x))
    assert calls == ["into"] * 3


def test_one_program_for_all_numbers_of_rows() -> None:
    model = quantized("dynamic", F16)
    compiled = torch.compile(model, dynamic=True)
    compiled(torch.randn(7, 72).half())
    with torch.compiler.set_stance("fail_on_recompile"):
        for m in (2, 5, 64):
            x = torch.randn(m, 72).half()
            assert torch.equal(compiled(x), model(x))


STRIDES = {
    "columns of a wider tensor": torch.randn(6, 144)[:, :72],
    "every second row": torch.randn(12, 72)[::2],
    "transposed": torch.randn(72, 6).t(),
    "one row, expanded": torch.randn(1, 72).expand(6, 72),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_strides_of_the_input(strides: str) -> None:
    # strides stay, which .bfloat16() does not promise
    x = torch.empty_like(STRIDES[strides], dtype=BF16).copy_(STRIDES[strides])
    x = STRIDES[strides].to(BF16) if strides == "one row, expanded" else x
    model = quantized("dynamic", BF16)
    out, calls = program(torch.compile(model), x)
    assert torch.equal(out, model(x))
    assert calls == ["into"] * 3


def test_an_input_that_is_computed_in_the_graph() -> None:
    model = quantized("dynamic", F16)

    def step(x: Tensor) -> Tensor:
        out: Tensor = model(x.t().neg() * 2)
        return out

    x = torch.randn(72, 5).half()
    out, calls = program(torch.compile(step), x)
    assert torch.equal(out, step(x))
    assert calls == ["into"] * 3


def test_merged_layers() -> None:
    model, x = quantized("dynamic", F16), torch.randn(5, 72).half()
    want = model(x)
    assert lq_graph.merge(model, x)
    out, calls = program(torch.compile(model), x)
    assert torch.equal(out, want)
    assert calls == ["into"] * 2


def test_a_program_in_cpp_calls_the_operator() -> None:
    model, x = quantized("dynamic", F16), torch.randn(5, 72).half()
    with torch._inductor.config.patch(cpp_wrapper=True):
        out, code = run_and_get_code(torch.compile(model), x)
    assert torch.equal(out, model(x))
    assert "lq_graph::quantized_linear" in code[0] or "lq_graph.quantized_linear" in code[0]


# ---- what stays two operators ----


def apart(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The rows' scales are changed before the product."""
    values, pertoken = lq_graph.dynamic_quant(x)
    return lq_graph.linear_quant(
        values, weight, scale, pertoken_scale=pertoken * 2, output_dtype=F16
    )


def other_scales(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    values, _ = lq_graph.dynamic_quant(x)
    _, pertoken = lq_graph.dynamic_quant(x + 1)
    return lq_graph.linear_quant(values, weight, scale, pertoken_scale=pertoken, output_dtype=F16)


def both_used(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    values, pertoken = lq_graph.dynamic_quant(x)
    out = lq_graph.linear_quant(values, weight, scale, pertoken_scale=pertoken, output_dtype=F16)
    return out, values


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (apart, ["dynamic_quant", "linear_quant"]),
        (other_scales, ["dynamic_quant", "dynamic_quant", "linear_quant"]),
        (both_used, ["dynamic_quant", "into"]),
    ],
)
def test_graphs_of_a_user_s_own(function: Callable[..., Any], calls: list[str]) -> None:
    x, scale = torch.randn(3, 16).half(), torch.rand(8)
    weight = torch.randint(-128, 128, (8, 16), dtype=torch.int8)
    out, called = program(torch.compile(function), x, weight, scale)
    torch.testing.assert_close(out, function(x, weight, scale), rtol=0, atol=0)
    assert sorted(called) == calls


# ---- slices that look like the parts of a merged weight ----

I8 = torch.int8
GIVEN = torch.randint(-128, 128, (16, 64), dtype=I8), torch.rand(16) / 100, torch.ones(8)
LOOKALIKES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "x1 is a slice of the weight": lambda x, w, s, o: (
        lq_graph.linear_quant(w[:8], w[:8], s[:8], output_dtype=F16),
        lq_graph.linear_quant(w[8:], w[8:], s[8:], output_dtype=F16),
    ),
    "the scales of the rows are those of the weight": lambda x, w, s, o: (
        lq_graph.linear_quant(x, w[:8], s[:8], pertoken_scale=s[:8], output_dtype=F16),
        lq_graph.linear_quant(x, w[8:], s[8:], pertoken_scale=s[:8], output_dtype=F16),
    ),
    "batch dims": lambda x, w, s, o: (
        lq_graph.linear_quant(x[None], w.view(2, 8, 64)[:1], s[:1], output_dtype=F16),
        lq_graph.linear_quant(x[None], w.view(2, 8, 64)[1:], s[1:2], output_dtype=F16),
    ),
    "one offset for both": lambda x, w, s, o: (
        lq_graph.linear_quant(x, w[:8], s[:8], o),
        lq_graph.linear_quant(x, w[8:], s[8:], o),
    ),
    "an offset of one value": lambda x, w, s, o: (
        lq_graph.linear_quant(x, w[:8], s[:8], o[:1]),
        lq_graph.linear_quant(x, w[8:], s[8:], o[:1]),
    ),
    "other scales": lambda x, w, s, o: (
        lq_graph.linear_quant(x, w[:8], s[8:], output_dtype=F16),
        lq_graph.linear_quant(x, w[8:], s[:8], output_dtype=F16),
    ),
    "rows twice": lambda x, w, s, o: (
        lq_graph.linear_quant(x, w[:9], s[:9], output_dtype=F16),
        lq_graph.linear_quant(x, w[8:], s[8:], output_dtype=F16),
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("alike", LOOKALIKES)
def test_slices_of_a_user_s_own(alike: str, dynamic: bool) -> None:
    function, x = LOOKALIKES[alike], torch.randint(-128, 128, (8, 64), dtype=I8)
    compiled = torch.compile(function, dynamic=dynamic, fullgraph=True)
    for got, want in zip(compiled(x, *GIVEN), function(x, *GIVEN), strict=True):
        assert got.shape == want.shape and torch.equal(got, want)


def test_a_scale_that_is_not_finite_is_refused_in_the_operator_s_words() -> None:
    model, x = quantized("static", F16), torch.randn(3, 72).half()
    compiled = torch.compile(model)
    compiled(x)
    model.down.linear.scale.data[3] = float("nan")
    with pytest.raises(lq_graph.LinearQuantError) as eager:
        model(x)
    with pytest.raises(lq_graph.LinearQuantError) as in_graph:
        compiled(x)
    assert str(eager.value) == f"down: {in_graph.value}"  # a program knows no layers


def test_weights_written_later_are_read() -> None:
    model, x = quantized("dynamic", F16), torch.randn(3, 72).half()
    compiled = torch.compile(model)
    compiled(x)
    model.up.linear.weight.data = torch.zeros_like(model.up.linear.weight)
    assert torch.equal(compiled(x), model(x))
    model.gate.linear.weight.fill_(3)
    assert torch.equal(compiled(x), model(x))


# ---- programs in files ----

PROGRAM = """
import torch, lq_graph
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32)).half()
lq_graph.quantize(model, lq_graph.A8W8Dynamic())
x = torch.randn(4, 64).half()
with torch.no_grad():
    print(torch.equal(torch.compile(model)(x), model(x)), counters["inductor"]["fxgraph_cache_hit"])
"""


def test_a_program_that_another_process_compiled(tmp_path: Path) -> None:
    """torch keeps it in a folder; it imports our function by itself."""
    said = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        said.append(result.stdout.split())
    assert said == [["True", "0"], ["True", "1"]]
    programs = [file.read_text() for file in tmp_path.rglob("*.py")]
    assert sum(bool(re.search(r"^from lq_graph.* import into as", p, re.M)) for p in programs) == 1


def test_an_inductor_without_a_list_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.fx_passes import joint_graph, post_grad

    monkeypatch.setattr(inductor, "_known", False)
    for stage in (joint_graph, post_grad):
        monkeypatch.delattr(stage, "pass_patterns")
    inductor.register()
    assert inductor._known
