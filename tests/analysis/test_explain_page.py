"""The page of an Explanation, its text and its JSON: what they show, and that it is right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from lq_graph import A8W8Dynamic, explain, quantize
from lq_graph.analysis.explain_fold import fold, folded_names
from lq_graph.analysis.explain_page import page
from lq_graph.analysis.explain_style import CSS
from lq_graph.analysis.explain_svg import Point, draw_roofline
from lq_graph.analysis.explanation import Explanation, Machine
from lq_graph.analysis.units import bytes_text, count_text, seconds_text
from lq_graph.rules.tables import Peak

VOID = {"br", "input", "meta", "wbr"}
LAYERS = 64


class DecoderLayer(nn.Module):
    """A norm of a sum, SwiGLU, and a sum; m is 4 below, k and n are 32."""

    def __init__(self) -> None:
        super().__init__()
        self.post_attention_layernorm = nn.RMSNorm(32, eps=1e-6).half()
        self.mlp = nn.ModuleDict(
            {n: nn.Linear(32, 32, bias=False).half() for n in ("gate_proj", "up_proj", "down_proj")}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + x.relu()
        normed = self.post_attention_layernorm(x)
        gate, up, down = self.mlp.values()
        return x + down(nn.functional.silu(gate(normed)) * up(normed))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(DecoderLayer() for _ in range(2))
        quantize(self.requires_grad_(False), A8W8Dynamic())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def two() -> Explanation:
    return explain(Decoder(), [torch.randn(4, 32).half()])


@pytest.fixture(scope="module")
def many(two: Explanation) -> Explanation:
    """The same with 64 layers: those of the second, repeated with their names."""

    def renamed(name: str, number: int) -> str:
        return name.replace("model.layers.1", f"model.layers.{number}")

    second = [layer for layer in two.layers if ".layers.1." in layer.name]
    block = next(block for block in two.blocks if block.name == "model.layers.1")
    more = range(2, LAYERS)

    def kernels(old, number):
        return tuple(dataclasses.replace(k, module=renamed(k.module, number)) for k in old)

    return dataclasses.replace(
        two,
        layers=two.layers
        + tuple(dataclasses.replace(s, name=renamed(s.name, i)) for i in more for s in second),
        blocks=two.blocks
        + tuple(
            dataclasses.replace(
                block,
                name=renamed(block.name, i),
                before=kernels(block.before, i),
                after=kernels(block.after, i),
                lines=tuple(
                    dataclasses.replace(line, layer=renamed(line.layer, i)) for line in block.lines
                ),
            )
            for i in more
        ),
    )


class Parsed(HTMLParser):
    """Tags with their attributes, and whether each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: Counter[str] = Counter()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.texts[data.strip()] += 1

    def values(self, attribute: str) -> list[str]:
        return [found for _, attrs in self.tags if (found := attrs.get(attribute))]


@pytest.mark.parametrize("count", [2, LAYERS])
def test_it_is_one_file_of_correct_html(two: Explanation, many: Explanation, count: int) -> None:
    text = page(two if count == 2 else many)
    assert len(text) < 200_000
    parsed = Parsed(text)
    assert parsed.open == []
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    links = parsed.values("href")
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    # nothing is loaded
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert not {"link", "img", "iframe"} & {tag for tag, _ in parsed.tags}
    assert not parsed.values("src")


def test_each_row_leads_to_its_graph_and_back(two: Explanation) -> None:
    text = page(two)
    rows = re.findall(r"<tr id=(row-\d+) .*?href=#(graph-\d+)", text)
    assert len(rows) == 3  # gate, up, down
    for row, graph in rows:
        section = text[text.index(f"id={graph}>") :]
        assert f"href=#{row}>" in section[: section.index("</section>")]


def test_it_can_be_read_without_seeing_it(two: Explanation) -> None:
    text = page(two)
    parsed = Parsed(text)
    assert all("scope" in attrs for tag, attrs in parsed.tags if tag == "th")
    assert text.count("<svg") == len(re.findall(r"<svg[^>]*><title", text))
    assert "<html lang=en>" in text and "<label>Filter" in text


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


COLOURS = dict(re.findall(r"--(\w+): light-dark\((#\w+, #\w+)\)", CSS))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["card", "page"])
@pytest.mark.parametrize("colour", ["ink", "quiet", "link", "k0", "k1", "k2", "k3", "k4"])
def test_contrast_is_that_of_wcag_aa(colour: str, ground: str, theme: int) -> None:
    one, other = (_luminance(COLOURS[c].split(", ")[theme]) for c in (colour, ground))
    assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5


def test_equal_layers_are_one(many: Explanation) -> None:
    text = page(many).replace("<wbr>", "")
    assert [group.name for group in many.groups] == [
        f"model.layers.[0-63].mlp.{name}_proj.linear" for name in ("gate", "up", "down")
    ]
    assert text.count(f"data-v='{LAYERS}'") == 3  # the column "times"
    assert text.count("<h3>model.layers.[0-63]</h3>") == 1
    assert text.count("<li>model.layers.17.mlp.down_proj.linear</li>") == 1


# Bytes of the fused kernels, by hand: m 4, k and n 32; float16 is 2 bytes, float32 and int32 are 4.
GOLDEN = [
    ("Relu", 4 * 32 * 2 * 2),
    # both summands, the weights; int8, the sum, a scale for each row
    ("AddRmsNormDynamicQuant", 2 * 4 * 32 * 2 + 32 * 2 + 4 * 32 + 4 * 32 * 2 + 4 * 4),
    # gate and up as one of n 64, to int32: x1, weight, scale, out
    ("QuantBatchMatmulV3", 4 * 32 + 64 * 32 + 64 * 4 + 4 * 64 * 4),
    # int32, the weights' scale, that of the rows; int8 and its scale
    ("DequantSwigluQuant", 4 * 64 * 4 + 64 * 4 + 4 * 4 + 4 * 32 + 4 * 4),
    # x1, weight, scale, pertoken_scale, out
    ("QuantBatchMatmulV3", 4 * 32 + 32 * 32 + 32 * 4 + 4 * 4 + 4 * 32 * 2),
    ("Add", 3 * 4 * 32 * 2),
]


def test_bars_are_the_bytes(two: Explanation) -> None:
    first = page(two).split("<section")[1]
    found = re.findall(
        r"<th scope=row title='[^']*'>(\w+)</th>.*?title='([\d,]+) bytes'>.*?"
        r"style='width:([\d.]+)%'",
        first,
    )
    most = max(count for _, count in GOLDEN)
    assert [(op, count) for op, count, _ in found] == [(op, f"{n:,}") for op, n in GOLDEN]
    for (_, _, width), (_, count) in zip(found, GOLDEN, strict=True):
        assert float(width) == pytest.approx(100 * count / most, abs=0.01)


def test_totals_are_sums(many: Explanation) -> None:
    kernels = [kernel for block in many.blocks for kernel in block.after]
    assert many.total.launches == len(kernels)
    assert many.total.seconds == pytest.approx(sum(k.cost.seconds for k in kernels))
    assert many.total.unknown == 0
    assert 0 < many.total.seconds < many.unfused_total.seconds
    assert many.total.bytes >= LAYERS * sum(count for _, count in GOLDEN)


@pytest.mark.parametrize("stand_in", [True, False])
def test_it_says_where_it_ran(two: Explanation, stand_in: bool) -> None:
    machine = Machine({"torch": "2.99", "CANN": "9.9"}, stand_in)
    told = dataclasses.replace(two, machine=machine)
    for text in (page(told), re.sub(r"\s+", " ", str(told))):
        assert ("no time is measured" in text) is stand_in
    assert "torch 2.99, CANN 9.9" in page(told)
    assert told.as_json()["stand_in"] is stand_in


def test_it_says_which_model_and_inputs(two: Explanation) -> None:
    assert two.model.endswith(", called with float16[4, 32]")
    assert two.model in page(two) and two.as_json()["model"] == two.model


def test_text_fits_80_columns(many: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = "a_very_long_name_of_a_module." * 4

    layers = tuple(dataclasses.replace(s, name=long + s.name) for s in many.layers)
    blocks = tuple(dataclasses.replace(block, name=long + block.name) for block in many.blocks)
    for told in (many, dataclasses.replace(many, layers=layers, blocks=blocks)):
        lines = str(told).splitlines()
        assert max(map(len, lines)) <= 80
        assert len([line for line in lines if line.startswith("in ") and "x64" in line]) == 1
        assert len([line for line in lines if re.search("^  mlp.*_proj +4 x 32 x 32 ", line)]) == 3


def test_json(two: Explanation) -> None:
    told = json.loads(json.dumps(two.as_json()))
    assert told == two.as_json()
    assert told["launches"] == dict(zip(("unfused", "fused"), two.launches, strict=True))
    assert [layer["name"] for layer in told["layers"]] == [layer.name for layer in two.layers]
    down = told["layers"][2]
    assert down["tensors"]["weight"] == {"dtype": "int8", "shape": [32, 32]}
    assert (down["m"], down["k"], down["n"], down["macs"]) == (4, 32, 32, 4 * 32 * 32)
    assert down["bytes"] == GOLDEN[4][1]
    block = told["blocks"][0]
    assert [kernel["op"] for kernel in block["fused"]] == [op for op, _ in GOLDEN]


@pytest.mark.parametrize(
    "points",
    [
        [(2.0, 4e10)] * 12,  # layers of one size
        [(2.0 * i, 1e11 * i) for i in range(1, 25)],
        [(0.1, 1e6), (4000.0, 5e14)],
    ],
    ids=["equal", "close", "far"],
)
def test_labels_of_the_roofline_are_apart(points: list[tuple[float, float]]) -> None:
    named = [Point(str(i), f"#row-{i}", "", *point) for i, point in enumerate(points, 1)]
    drawn = draw_roofline(named, Peak("a chip", 640e12, 1.6e12, "made up"))
    width, height = map(int, re.search(r"viewBox='0 0 (\d+) (\d+)'", drawn).groups())
    circle = r"cx=([\d.]+) cy=([\d.]+)"
    labels = [(float(x), float(y)) for x, y in re.findall(rf"class=label {circle}", drawn)]
    dots = [(float(x), float(y)) for x, y in re.findall(rf"class=dot {circle}", drawn)]
    assert len(labels) == len(dots) == len(points)
    assert all(math.dist(a, b) > 20 for a, b in itertools.combinations(labels, 2))
    assert all(math.dist(label, dot) > 14 for label in labels for dot in dots)
    assert all(10 < x < width - 10 and 10 < y < height - 10 for x, y in labels)


def test_the_roofline_is_logarithmic() -> None:
    peak = Peak("a chip", 1e14, 1e12, "made up")
    points = [(1.0, 1e12), (10.0, 1e13), (100.0, 1e14), (1.0, 1e11)]  # three are on the line
    drawn = draw_roofline([Point("1", "#", "", *point) for point in points], peak)
    dots = re.findall(r"class=dot cx=([\d.]+) cy=([\d.]+)", drawn)
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = [(float(x), float(y)) for x, y in dots]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and x4 == x1
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2) == pytest.approx(y4 - y1, abs=0.2)
    assert f"L{x3} {y3}H" in drawn  # where the two lines meet


@pytest.mark.parametrize(
    ("names", "one"),
    [
        (["lm_head"], "lm_head"),
        (["a.0.b", "a.1.b", "a.2.b"], "a.[0-2].b"),
        (["a.0.b", "a.3.b", "a.2.b"], "a.[0, 2-3].b"),
        (["a.10.b", "a.9.b"], "a.[9-10].b"),
        (["a.0.e.0", "a.0.e.1", "a.1.e.0", "a.1.e.1"], "a.[0-1].e.[0-1]"),
        (["a.0.e.0", "a.1.e.1"], "a.*.e.*"),
        (["a.1", "a.1"], "a.1"),  # called twice
    ],
)
def test_names_are_folded(names: list[str], one: str) -> None:
    assert folded_names(names) == one


class Stacks(nn.Module):
    """Equal layers at names that cannot be written as one."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self._place(name)
        quantize(self.requires_grad_(False), A8W8Dynamic())

    def _place(self, name: str) -> None:
        *parents, last = name.split(".")
        at: nn.Module = self
        for part in parents:
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, nn.Sequential(nn.Linear(32, 32, bias=False).half()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.modules():
            if isinstance(module, nn.Sequential):
                x = module(x)
        return x


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["enc.0", "enc.1", "dec.0", "dec.1"], ["dec.[0-1]", "enc.[0-1]"]),
        (["encoder.0", "decoder.block.0"], ["decoder.block.0", "encoder.0"]),
    ],
)
def test_equal_layers_of_two_stacks(names: list[str], titles: list[str]) -> None:
    found = explain(Stacks(names), torch.randn(4, 32).half())
    groups = [folded_names(group) for _, group in found.block_groups]
    assert [title for title in groups if "rest" not in title] == titles
    for title in titles:
        assert title in str(found)
        assert title in re.sub("<wbr>", "", page(found))


def test_layers_that_differ_are_not_folded(two: Explanation) -> None:
    first = two.layers[0]
    other = dataclasses.replace(first, name="model.layers.7.mlp.gate_proj.linear")
    assert len(fold([first, other])) == 1
    assert len(fold([first, dataclasses.replace(other, weight_format="other")])) == 2
    assert len(fold([first, dataclasses.replace(other, name="lm_head")])) == 2
    assert len(fold([first, dataclasses.replace(other, vendor=first.ours)])) == 2


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(1000), "0.98 KiB"),
        (bytes_text(1024), "1.00 KiB"),
        (bytes_text(1023 * 1024), "1.00 MiB"),
        (bytes_text(10 * 2**20), "10.0 MiB"),
        (bytes_text(3 * 2**40), "3.00 TiB"),
        (count_text(8_388_608, "MAC"), "8.39 MMAC"),
        (count_text(640e12, "op/s"), "640 Top/s"),
        (seconds_text(0.35e-6), "0.35 us"),
        (seconds_text(1.2e-3), "1.20 ms"),
        (seconds_text(2.5), "2.50 s"),
    ],
)
def test_numbers_have_units(made: str, text: str) -> None:
    assert made == text
