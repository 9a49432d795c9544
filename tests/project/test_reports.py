"""reports: tables that fit, names shortened in the middle, equal lines folded."""

from __future__ import annotations

import io
import random
import sys

import pytest

from lq_graph.reports import counted, folded, pattern_of, shortened, table, terminal_width, wrapped

NAME = "model.layers.17.self_attn.q_proj"


@pytest.mark.parametrize(
    ("size", "encoding", "expected"),
    [
        (32, "utf-8", NAME),
        (31, "utf-8", "model.layers.17…elf_attn.q_proj"),
        (16, "utf-8", "model.l…n.q_proj"),
        (16, "ascii", "model.....q_proj"),
        (8, "ascii", "mo...roj"),
    ],
)
def test_shortened(size: int, encoding: str, expected: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert len(expected) <= size and shortened(NAME, size) == expected


@pytest.mark.parametrize(
    ("rows", "width", "expected"),
    [
        (
            [["name", "n"], ["a", 1024], ["bb", 8]],
            80,
            ["name      n", "a     1,024", "bb        8"],
        ),
        # a sentence is broken into lines first
        (
            [["name", "why"], ["q_proj", "its input is not the output of one norm"]],
            32,
            ["name    why", "q_proj  its input is not the", "        output of one norm"],
        ),
        # then the head
        (
            [["name", "bytes before", "n"], ["q_proj", 1234, 5]],
            20,
            ["name        bytes  n", "           before", "q_proj      1,234  5"],
        ),
        # a note that has no room goes below
        (
            [["name", "bytes", "more", ""], ["q_proj", 12345678, 12345, "it stays as it has been"]],
            36,
            [
                "name         bytes    more",
                "q_proj  12,345,678  12,345",
                "  it stays as it has been",
            ],
        ),
        # and a long name above
        (
            [["name", "bytes", "more"], [NAME, 123456789, 12345]],
            40,
            ["name", "        bytes    more", NAME, "  123,456,789  12,345"],
        ),
        (
            [["name", "n"], [NAME, 1]],
            24,
            ["name                   n", "model.laye…ttn.q_proj  1"],
        ),
        # a count stays beside its name
        (
            [["name", "n"], [f"{NAME} x12", 1]],
            24,
            ["name                   n", "model.laye…q_proj x12  1"],
        ),
        (
            [["name", "why"], ["q_proj x12", "it has no row of its own"]],
            26,
            ["name        why", "q_proj x12  it has no row", "            of its own"],
        ),
    ],
    ids=["fits", "sentence", "head", "note", "name", "short", "count", "count of words"],
)  # fmt: skip
def test_table(rows, width: int, expected, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert table(rows, width=width) == expected


def test_any_table_fits_and_keeps_its_numbers() -> None:
    draw = random.Random(0)
    parts = ["model", "layers", "17", "self_attn", "block_sparse_moe", "q_proj", "weight"]
    words = ["its", "weight", "is", "float32", "and", "the", "layer", "before", "it"]
    for _ in range(300):
        columns = [draw.choice(["name", "number", "prose", "short"]) for _ in range(4)]
        rows: list[list[object]] = [["name", *(f"{kind} of it" for kind in columns)]]
        for _ in range(3):
            cells: list[object] = [".".join(draw.choices(parts, k=8))]
            for kind in columns:
                if kind == "number":
                    cells.append(draw.randrange(10**8))
                elif kind == "prose":
                    cells.append(" ".join(draw.choices(words, k=draw.randrange(30))))
                else:
                    cells.append(".".join(draw.choices(parts, k=5 if kind == "name" else 1)))
            rows.append(cells)
        lines = table(rows, "  ", width=80)
        assert max(map(len, lines)) <= 80 and all(line.startswith("  ") for line in lines)
        text = "\n".join(lines)
        for row in rows[1:]:
            assert all(f"{cell:,}" in text for cell in row if isinstance(cell, int))


def test_names_alike_are_folded() -> None:
    names = [f"layers.{i}.{kind}_proj" for i in range(8) for kind in "qk"] + ["lm_head"]
    groups = folded(names, lambda name: name)
    assert [counted(group) for group in groups] == [
        "layers.*.q_proj x8",
        "layers.*.k_proj x8",
        "lm_head",
    ]
    alone = folded(names, lambda name: name, everything=True)
    assert [counted(group) for group in alone] == names
    assert len(folded(names[:12], lambda name: name)) == 12  # few are read one by one
    apart = folded(names, lambda name: name, lambda name: name == "layers.3.q_proj")
    assert [len(group) for group in apart] == [7, 8, 1, 1]
    assert pattern_of(["layers.1.q8", "layers.2.q8"]) == "layers.*.q8"


def test_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    assert terminal_width() == 80
    monkeypatch.setenv("COLUMNS", "132")
    assert terminal_width() == 132
    assert max(map(len, wrapped("word " * 100))) <= 100
    assert wrapped("a " + "b" * 200, "  ", 80) == ["a", "  " + "b" * 200]
