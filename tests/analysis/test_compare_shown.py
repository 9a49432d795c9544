"""What compare shows of many layers: text, JSON, and the picture by kind and depth."""

from __future__ import annotations

import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lq_graph import LinearQuantValueError, compare
from lq_graph.analysis.compare_grid import grid_of, kind_and_depth
from lq_graph.analysis.compare_plot import _draw, _range, cells_of
from lq_graph.analysis.comparison import Comparison, LayerComparison
from lq_graph.analysis.metrics import ErrorMetrics

KINDS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
EXACT, NAN = math.inf, math.nan


def error(sqnr: float) -> ErrorMetrics:
    if sqnr == EXACT:
        return ErrorMetrics(sqnr, 0.0, 1.0)
    return ErrorMetrics(sqnr, 0.25, NAN if math.isnan(sqnr) else 0.999)


def layer(name: str, sqnr: float | None, alone: float | None = None) -> LayerComparison:
    if sqnr is None:
        return LayerComparison(name, 0, None, None)
    sensitivity = None if alone is None else error(alone)
    return LayerComparison(name, 2, error(sqnr), error(sqnr - 2), sensitivity)


def decoder(depth: int, prefix: str = "model.layers") -> Comparison:
    draw = random.Random(depth)
    layers = [
        layer(f"{prefix}.{i}.{kind}", draw.uniform(20, 50)) for i in range(depth) for kind in KINDS
    ]
    return Comparison([*layers, layer("lm_head", 35.0)], error(31.7))


# ---- kinds and depths ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.17.mlp.up_proj", ("model.layers", "mlp.up_proj", 17)),
        ("layers.3.experts.5.w1", ("layers", "experts.*.w1", 3)),
        ("0", ("", "", 0)),
        ("lm_head", ("", "lm_head", None)),
        ("layer1.0.conv2", ("layer1", "conv2", 0)),
        ("", ("", "(model)", None)),
    ],
)
def test_kind_and_depth(name: str, expected: tuple[str, str, int | None]) -> None:
    assert kind_and_depth(name) == expected


@pytest.mark.parametrize(
    ("names", "stack", "kinds", "depths"),
    [
        (["fc1", "fc2"], "", ("fc1", "fc2"), (None,)),
        (["0", "2"], "", ("*",), (0, 2)),
        (["m.10.q", "m.2.q", "head"], "m", ("q", "head"), (None, 2, 10)),
        (["enc.0.q", "dec.0.q", "dec.1.q"], "", ("enc.*.q", "dec.*.q"), (0, 1)),
    ],
)
def test_grid(names, stack: str, kinds, depths) -> None:
    grid = grid_of(layer(name, 30.0) for name in names)
    assert (grid.stack, grid.kinds, grid.depths) == (stack, kinds, depths)
    assert sum(map(len, grid.cells.values())) == len(names)


# ---- cells ----


@pytest.mark.parametrize("depth", [1, 12, 64])
def test_the_cells_are_the_numbers(depth: int) -> None:
    comparison = decoder(depth)
    grid = grid_of(comparison)
    cells = cells_of(comparison, grid)
    golden = np.full((len(KINDS) + 1, depth + 1), np.nan)
    golden[-1, 0] = 35.0
    for number, one in enumerate(list(comparison)[:-1]):
        golden[number % len(KINDS), number // len(KINDS) + 1] = one.own.sqnr
    np.testing.assert_array_equal(np.array(cells.values), golden)
    assert grid.kinds == (*KINDS, "lm_head") and grid.depths == (None, *range(depth))
    assert not cells.marks
    order = np.argsort(golden, axis=None)[: min(10, golden.size - depth - len(KINDS))]
    places = [tuple(map(int, np.unravel_index(at, golden.shape))) for at in order]
    shown = sorted(cells.worst, key=lambda place: cells.worst[place])
    assert shown[: len(places)] == places and len(shown) == min(10, len(comparison))


def test_marks() -> None:
    layers = [
        layer("m.0.q", EXACT),
        layer("m.1.q", NAN),
        layer("m.2.q", None),
        layer("m.3.q", -math.inf),
        layer("m.4.q", 30.0),
        layer("m.5.e.0", 40.0),
        layer("m.5.e.1", 20.0),
        layer("m.5.e.2", EXACT),
        layer("m.6.e.0", EXACT),
        layer("m.6.e.1", None),
    ]
    comparison = Comparison(layers, error(20.0))
    cells = cells_of(comparison, grid_of(comparison))
    noise = "NaN or only noise"
    assert cells.marks == {
        (0, 0): "exact",
        (0, 1): noise,
        (0, 2): "never called",
        (0, 3): noise,
        (1, 6): "exact",
    }
    assert cells.values[0][4] == 30.0 and cells.values[1][5] == 20.0  # the worst of three
    assert cells.worst == {(0, 1): 1, (0, 3): 2, (1, 5): 3, (0, 4): 4}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((30.0, 30.4), (27.2, 33.2)),  # nearly alike
        ((20.0, 40.0), (20.0, 40.0)),
        ((30.0, EXACT, NAN), (27.0, 33.0)),
        ((EXACT,), (0.0, 6.0)),
    ],
)
def test_colours_of_layers_that_are_nearly_alike_are_alike(values, expected) -> None:
    layers = [layer(f"m.{i}.q", value) for i, value in enumerate(values)]
    comparison = Comparison(layers, error(20.0))
    assert _range(cells_of(comparison, grid_of(comparison))) == pytest.approx(expected)


def test_the_worst_are_by_sensitivity_if_it_was_measured() -> None:
    comparison = Comparison([layer("m.0.q", 20.0, 50.0), layer("m.1.q", 40.0, 30.0)], error(29.0))
    cells = cells_of(comparison, grid_of(comparison))
    assert cells.values == [[50.0, 30.0]] and cells.worst == {(0, 1): 1, (0, 0): 2}
    assert comparison.as_json()["worst_by"] == "sensitivity" and comparison.worst.name == "m.1.q"


# ---- the picture ----


@pytest.mark.parametrize("depth", [1, 12, 73, 448])
def test_no_name_is_left_out_of_the_picture(depth: int) -> None:
    pytest.importorskip("matplotlib")
    comparison = decoder(depth)
    figure = _draw(comparison)
    (axes,) = (one for one in figure.axes if len(one.get_yticklabels()) == len(KINDS) + 1)
    assert [text.get_text() for text in axes.get_yticklabels()] == [*KINDS, "lm_head"]
    numbers = [text.get_text() for text in axes.get_xticklabels()]
    assert numbers == ["once", *map(str, range(depth))]
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "Output of the quantized model: 31.7 dB, cosine 0.99900"
    said = " ".join(texts)
    assert "Worst: by the layer's own error, on the float model's input." in said
    assert all(one.name in said for one in comparison.ranking()[:10])
    # every label is inside the picture, and no two names lie on each other
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert all(box.x0 >= 0 for box in boxes)
    assert all(a.y0 >= b.y1 for a, b in pairwise(boxes))
    columns = [text.get_window_extent() for text in axes.get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in pairwise(columns[1:]))
    for text in figure.texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("html", b"<!doctype html>")],
)
def test_formats(suffix: str, begins: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"errors.{suffix}"
    decoder(3).plot(file)
    data = file.read_bytes()
    assert data.startswith(begins) and len(data) > 5000
    if suffix == "html":
        page = data.decode()
        assert "<svg" in page and "model.layers.2.mlp.down_proj" in page
        assert "<script" not in page and "src=" not in page


@pytest.mark.parametrize(
    ("path", "blocked", "message"),
    [
        ("errors.png", True, "compare: a plot needs matplotlib. What to do: pip install matplot"),
        ("errors.nosuch", False, "its suffix must be one of"),
        ("errors", False, "its suffix must be one of"),
        ("nosuch/errors.png", False, "there is no folder for it"),
    ],
)
def test_a_picture_that_cannot_be_saved_is_refused_before_the_work(
    path: str, blocked: bool, message: str, tmp_path: Path, monkeypatch
) -> None:
    class Never(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the model ran")

    monkeypatch.chdir(tmp_path)
    if blocked:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(Never(4, 4))
    with pytest.raises(LinearQuantValueError, match=message):
        compare(*model, [torch.ones(1, 4)], plot=path)
    with pytest.raises(LinearQuantValueError, match=message):
        decoder(1).plot(path)


# ---- text and JSON ----


@pytest.mark.parametrize("depth", [1, 12, 73, 448])
def test_text_fits_80_columns(depth: int) -> None:
    comparison = decoder(depth, "base_model.language_model.model.layers")
    text = str(comparison)
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) < 40
    whole = comparison.text(everything=True)
    assert all(one.name in whole for one in comparison)
    for kind in KINDS if depth > 1 else []:
        (line,) = (line.split() for line in text.splitlines() if line.startswith(f"  {kind} "))
        own = [one.own.sqnr for one in comparison if one.name.endswith(kind)]
        at = int(np.argmin(own))
        median = sorted(own)[(depth - 1) // 2]
        assert line[1:] == [str(depth), f"{min(own):.1f}", str(at), f"{median:.1f}", "0"]


def test_json_has_no_word_that_is_not_json() -> None:
    layers = [layer("m.0", EXACT), layer("m.1", NAN), layer("m.2", None), layer("m.3", 30.0, 25.0)]
    comparison = Comparison(layers, error(NAN))
    answer = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    exact, nan, never, good = answer["layers"]
    assert exact["own"] == {"sqnr": None, "max_abs": 0.0, "cosine": 1.0, "exact": True}
    assert nan["own"] == {"sqnr": None, "max_abs": 0.25, "cosine": None, "exact": False}
    assert never == {
        "name": "m.2", "calls": 0, "own": None, "accumulated": None, "sensitivity": None
    }  # fmt: skip
    assert good["sensitivity"]["sqnr"] == 25.0 and good["accumulated"]["sqnr"] == 28.0
    assert answer["worst"] == "m.1" and answer["output"]["sqnr"] is None
