"""lq_graph.check and `python -m lq_graph check`."""

from __future__ import annotations

import re

import pytest
import torch

import lq_graph
from lq_graph import check, command_line
from support import cases
from support.cases import BF16, F16, F32, I8, I32, I64, ROW_CASES, Case
from support.processes import python
from support.table import LEGAL, PRODUCTS, Combination


@pytest.mark.parametrize("product", PRODUCTS)
def test_agrees_with_the_table(product: str) -> None:
    everything = set().union(*LEGAL.values())
    for c in everything:
        x1, scale, offset, bias, pertoken, output = c
        answer = check(
            x1, None, scale, offset, pertoken, bias, output_dtype=output, product=product
        )
        assert bool(answer) == (c in LEGAL[product])
        assert [p.key for p in answer.legal_on] == ([product] if answer else [])


@pytest.mark.parametrize("case", ROW_CASES[::5], ids=str)
def test_takes_the_tensors_of_a_call(case: Case) -> None:
    inputs = cases.make(case)
    answer = check(**inputs, product=cases.PRODUCT)
    (verdict,) = answer.verdicts
    assert verdict.plan == lq_graph.plan(**inputs) and verdict.error is None
    assert check(**cases.on("meta", inputs), product=cases.PRODUCT)


@pytest.mark.parametrize(
    ("kwargs", "legal_on"),
    [
        (dict(), "310P A2 A3 950"),
        (dict(output_dtype=F32), ""),
        (dict(x1=(I8, (4, 512)), weight=(I8, (100, 512)), scale=(F32, (100,))), "310P A2 A3 950"),
        (dict(x1=(I8, (4, 512)), weight=(I8, (100, 256))), ""),
        (dict(scale=(F32, (96,)), bias=I32), "310P A2 A3 950"),
        (dict(scale=(F32, (96,)), bias=(I32, (95,))), ""),
        (dict(x1=(I8, (4, 70000))), "950"),
        (dict(x1=(I8, (0, 512))), "950"),
        (dict(x1=(I8, (512,))), ""),
        (dict(x1=I32, output_dtype=F16, scale=(F32, (20,))), ""),  # int4: n is a multiple of 8
        (dict(scale=I64, output_dtype=BF16), "950"),
        (dict(scale=BF16, output_dtype=BF16, pertoken_scale=F32), "A2 A3 950"),
    ],
)
def test_shapes_and_dtypes(kwargs, legal_on: str) -> None:
    answer = check(**kwargs)
    assert [p.key for p in answer.legal_on] == legal_on.split()
    refused = [v for v in answer.verdicts if v.error]
    assert len(refused) + len(answer.legal_on) == len(PRODUCTS)
    for verdict in refused:
        assert isinstance(verdict.error, lq_graph.LinearQuantError)


def test_nearest_rows_are_the_ones_to_change_to() -> None:
    answer = check(scale=F32, offset=F32, output_dtype=F16, product="A2")
    near = answer.nearest()
    assert [row.output for row in near][:2] == [F16, I8]
    assert Combination(I8, F32, F32, None, None, near[1].output) in LEGAL["A2"]
    text = str(answer)
    assert "no   Atlas A2: offset is float32; with int8" in text
    shown = re.sub(r"\s+", " ", text)
    assert " int8 int64, -* int32, - - float16 float32 8.0.RC1 " in shown and "int8*" in text


def test_products_with_one_reason_are_one_line() -> None:
    text = str(check(output_dtype=F32))
    assert text.count("no   ") == 2  # 310P allows fewer outputs
    assert "no   Atlas A2, Atlas A3, Ascend 950: output_dtype is float32" in text


@pytest.mark.parametrize("argument", ["int8", 8, (8, (1, 2))])
def test_refuses_values_that_are_not_tensors(argument) -> None:
    with pytest.raises(lq_graph.LinearQuantTypeError, match=r"check: x1 is .* a torch\.dtype"):
        check(argument)


def test_unknown_product() -> None:
    with pytest.raises(lq_graph.LinearQuantValueError, match="'H100' is not a product"):
        check(product="H100")


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        ("", 0, "yes  Atlas inference (310P), Atlas A2, Atlas A3, Ascend 950: int8[16, 64]"),
        ("--x1 int8[4,512] --output float16", 0, "x1 int8[4, 512], weight int8[64, 512]"),
        ("--x1 int4[4,512] --output fp16 --product A2", 0, "x1 int32[4, 64], weight int32[64, 64]"),
        ("--scale bf16 --pertoken float32 --output bf16", 0, "matching row"),
        ("--scale int64 --output bf16", 0, "yes  Ascend 950: bfloat16[16, 64]"),
        (
            "--scale float32[1] --output bf16",
            0,
            "; its kernel keeps the first 19 bits",
        ),
        ("--offset float32 --output float16", 1, "nearest legal rows, * where they differ"),
        ("--x1 float16 --product Ascend310P3", 1, "x1 is float16; the product allows int8."),
        ("--weight int8[64,65]", 0, "x1 int8[16, 65]"),
    ],
)
def test_command_line(arguments: str, status: int, shown: str, capsys) -> None:
    assert command_line.main(["check", *arguments.split()]) == status
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--x1 int9", "'int9' is not a dtype"),
        ("--x1 int8[2", "not of the form int8 or int8[16,512]"),
        ("--x1 int4[2,7]", "multiple of 8"),
        ("--product H100", "'H100' is not a product"),
        ("--output int9", "'int9' is not a dtype"),
    ],
)
def test_command_line_mistakes(arguments: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["check", *arguments.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command_needs_no_cann(tmp_path) -> None:
    # torch_npu is installed here and there is no CANN: plain `import torch` would fail
    done = python("-m", "lq_graph", "check", "--output", "float32", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "output_dtype is float32" in done.stdout


def test_check_takes_meta_tensors() -> None:
    assert check(torch.empty(4, 64, dtype=I8, device="meta"), bias=I32, scale=I64)
