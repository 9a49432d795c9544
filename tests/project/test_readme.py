"""README's support table is the data of formats.py, and its error is the real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cann_host
import lq_graph
from lq_graph import __main__ as command_line
from lq_graph.rules.tables import (
    PRODUCTS,
    QUANT_ROWS,
    ROWS,
    QuantRow,
    Row,
    dtype_name,
    storage_name,
)
from support.processes import output_of, python, script

README = (Path(__file__).parents[2] / "README.md").read_text()


def table() -> str:
    """The support table in Markdown."""

    def cell(choices: tuple[torch.dtype | None, ...]) -> str:
        return ", ".join(dtype_name(dtype) for dtype in choices)

    def line(row: Row) -> str:
        cells = [
            storage_name(row.storage),
            *map(cell, (row.scale, row.offset, row.bias, row.pertoken_scale)),
        ]
        marks = ["yes" if product in row.products else "" for product in PRODUCTS]
        return "| " + " | ".join([*cells, dtype_name(row.output), *marks]) + " |"

    head = ["x1, weight", "scale", "offset", "bias", "pertoken_scale", "output"]
    head += [product.name for product in PRODUCTS]
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(line(row) for row in ROWS)]
    )


def test_support_table() -> None:
    shown = README.split("<!-- table: support -->")[1].split("\n\n")[1]
    assert shown == table(), f"README should show:\n{table()}"


def activation_table() -> str:
    """The table of the operators that quantize activations in Markdown."""

    def line(row: QuantRow) -> str:
        cells = [row.op, ", ".join(map(dtype_name, row.x)), storage_name(row.output_dtype)]
        marks = ["yes" if product in row.products else "" for product in PRODUCTS]
        return "| " + " | ".join([*cells, *marks]) + " |"

    head = ["operator", "x", "output", *(product.name for product in PRODUCTS)]
    rows = [line(row) for row in QUANT_ROWS]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows])


def test_activation_table() -> None:
    shown = README.split("<!-- table: activations -->")[1].split("\n\n")[1]
    assert shown == activation_table(), f"README should show:\n{activation_table()}"


def test_error_shown_is_the_real_one() -> None:
    shown = re.search(r"```\n(LinearQuantTypeError.*?)```", README, re.DOTALL)
    assert shown
    layer = lq_graph.LinearQuant(512, 128, offset=True, output_dtype=torch.float16)
    with pytest.raises(lq_graph.LinearQuantTypeError) as caught:
        layer(torch.zeros(4, 512, dtype=torch.int8))
    assert " ".join(shown[1].split()) == f"LinearQuantTypeError: {caught.value}"


def test_the_two_commands_come_first() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert [block.strip() for block in blocks[:2]] == [
        'pip install -e ".[npu]" && python -m cann_host examples/graph_mode.py',
        'pip install -e ".[test]" && python -m pytest',
    ]


@pytest.mark.slow
@pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
def test_use_it_is_a_program_and_prepares_the_weights() -> None:
    """In a process of its own: nothing but the block itself sets anything."""
    done = python(*script(f"prepared_model.py {ROOT / 'README.md'}"))
    assert output_of(done).splitlines() == ["FRACTAL_NZ torch.int64"] * 2


ROOT = Path(__file__).parents[2]
TOLD = [
    (file.relative_to(ROOT), found[1])
    for folder in ("lq_graph", "converters", "cann_host", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
    for found in re.finditer(r"pip install (?!-e)([^`\n]*?)(?:\.?\"|\)|\n|$)", file.read_text())
]


def extras() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found


def test_what_a_message_says_to_install_is_a_package_of_an_index() -> None:
    """lq-graph itself is on none, and `.` is the reader's folder, which need not be a checkout."""
    known = {
        re.split(r"[=<>]", package)[0] for packages in extras().values() for package in packages
    }
    assert len(TOLD) >= 5
    for file, packages in TOLD:
        if "{" not in packages:
            assert set(packages.split()) <= known - {"lq-graph"}, f"{file}: pip install {packages}"
    assert list(cann_host.NEEDED) == extras()["npu"]


def test_check_shown_is_the_real_one(capsys) -> None:
    shown = re.search(r"```\n\$ python -m lq_graph (check .*)\n([^`]*)```", README)
    assert shown
    command_line.main(shown[1].split())
    assert capsys.readouterr().out == shown[2]


def test_explain_shown_is_the_real_one(capsys) -> None:
    shown = re.search(r"```\n\$ python -m cann_host -m lq_graph explain [^\n]*\n([^`]*)```", README)
    assert shown
    example = Path(__file__).parents[2] / "examples/graph_mode.py"
    command_line.main(["explain", f"{example}:example"])
    assert capsys.readouterr().out.startswith(shown[1].removesuffix("...\n"))
