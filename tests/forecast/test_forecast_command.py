"""`python -m lq_graph forecast`, where there is neither an NPU nor torch_npu nor transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lq_graph import command_line
from lq_graph.forecast.kernels import FUSIONS
from lq_graph.forecast.measurements import measurements
from support.processes import python

_BLOCKED = """
import sys
for name in ("torch_npu", "torchair", "transformers", "cann_host", "numpy.linalg"):
    sys.modules[name] = None
from lq_graph import command_line
sys.exit(command_line.main(sys.argv[1:]))
"""


def asked(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert command_line.main(["forecast", *arguments]) == 0
    return capsys.readouterr().out


def test_it_needs_no_npu_and_no_transformers() -> None:
    done = python("-c", _BLOCKED, "forecast", "qwen3-8b", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert "qwen3-8b (8.19 B parameters) on one die of A3-752T" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("qwen3-8b",),
        ("qwen3-8b", "--kernels"),
        ("qwen3-32b", "--tp", "2", "--batch", "64", "--context", "32768", "--kernels"),
        ("llama-3.1-8b", "--no-fusion", "--kernels"),
        ("qwen3-0.6b", "--product", "950", "--kernels"),
        ("qwen2.5-72b", "--product", "310P"),
        ("--measurements",),
    ],
)
def test_lines_fit_80_columns(arguments: tuple[str, ...], capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = asked(*arguments, capsys=capsys)
    assert out and not [line for line in out.splitlines() if len(line) > 80]


def test_what_is_told(capsys) -> None:
    out = asked("qwen3-8b", "--batch", "4", "--quant", "bf16,w8a8", capsys=capsys)
    assert re.search(r"^W8A8 +\d+\.\d+ ms ± \d+ % +\d+ +\d+ ms ± \d+ % +\d+\.\d ", out, re.M)
    assert re.search(r"^W8A8 takes 0\.\d\d of bf16's decode step, 0\.\d\d of its pre", out, re.M)
    assert "decode bandwidth" in out and "W8A8 fits into 64 GiB, with up to" in out
    assert "W4A4" not in out and "36 layers of" not in out and len(out.splitlines()) < 30


def test_kernels_and_what_fusions_save(capsys) -> None:
    out = asked("qwen3-8b", "--quant", "bf16,w8a8", "--kernels", capsys=capsys)
    assert "36 layers of 14 kernels" in out
    for fusion in FUSIONS[1:]:
        assert re.search(rf"^{fusion} +[\d,]+ +[\d,]+ +\+", out, re.M), fusion


def test_a_model_that_does_not_fit(capsys) -> None:
    out = asked("qwen2.5-72b", capsys=capsys)
    assert "bf16 does not fit into 64 GiB: no sequence fits; share it among more" in out
    out = asked("qwen3-8b", "--batch", "512", capsys=capsys)
    assert re.search(r"bf16 does not fit into 64 GiB: \d+ sequences of 4,096 positions fit", out)


def test_json(capsys) -> None:
    found = json.loads(asked("qwen3-8b", "--json", capsys=capsys))
    assert [one["quant"] for one in found["forecasts"]] == ["bf16", "w8a8", "w4a4"]
    decode = found["forecasts"][1]["decode"]
    total = sum(kernel["times"] * kernel["seconds"] for kernel in decode["kernels"])
    assert total == pytest.approx(decode["seconds"])
    rows = json.loads(asked("--measurements", "--json", capsys=capsys))
    assert [row["id"] for row in rows] == [row.id for row in measurements()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which model? Write a folder with a config.json, such a file, or one of llama-3.2-1b"),
        (("nowhere",), "there is no nowhere; write a folder with a config.json"),
        (("qwen3-8b", "--quant", "fp8"), "quantization 'fp8' is not known"),
        (("qwen3-8b", "--tp", "5"), "5 devices cannot share the 32 heads"),
        (("qwen3-8b", "--profile", "pyproject.toml"), "is neither a kernel_details.csv nor"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, capsys) -> None:
    root = next(one for one in Path(__file__).parents if (one / "pyproject.toml").is_file())
    arguments = tuple(str(root / one) if one.endswith(".toml") else one for one in arguments)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["forecast", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
