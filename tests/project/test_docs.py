"""README and docs/: code blocks run or are marked with a reason, links lead to files, the tables
and the API reference are complete."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cann_host
import lq_graph
import lq_graph.parallel
from lq_graph.rules.tables import PRODUCTS, QUANT_ROWS, ROWS

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
sys.path[:0] = [str(ROOT / "tests/scripts"), str(ROOT / "docs/_ext")]

import tables  # noqa: E402
from run_doc_pages import blocks, matches  # noqa: E402

FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "cann_host/README.md"]
PAGES = [*FRONT, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
WITH_CODE = [page for page in PAGES if any(blocks(page.read_text()))]
NAMES = [str(page.relative_to(ROOT)) for page in WITH_CODE]

# Why a block may be left out. "run by FILE" names the program or test that runs it.
REASONS = {
    "needs an NPU",
    "needs a checkpoint",
    "needs the network",
    "a drawing",
    "a sketch",
    "another program's message",
}


@pytest.fixture(scope="module")
def run() -> subprocess.CompletedProcess[str]:
    """All pages in one run: importing torch takes longer than most of them."""
    program = ROOT / "tests/scripts/run_doc_pages.py"
    done = subprocess.run(
        [sys.executable, "-m", "cann_host", str(program), str(ROOT), *map(str, WITH_CODE)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def failures(run: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_of_a_page_run(name: str, failures: dict[str, list[str]]) -> None:
    found = failures[str(ROOT / name)]
    assert not found, "\n".join([name, *found])


@pytest.mark.slow
@pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
def test_the_line_of_cann_host_is_the_one_shown(run: subprocess.CompletedProcess[str]) -> None:
    shown = re.search(
        r"^cann_host: no NPU here.*$", (ROOT / "cann_host/README.md").read_text(), re.M
    )
    assert shown
    assert shown[0] in run.stderr.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_are_not_run_have_a_reason(name: str, tally) -> None:
    for block in blocks((ROOT / name).read_text()):
        reason = block.marker.removeprefix("not run: ")
        if not block.marker.startswith("not run"):
            continue
        where = f"{name}, line {block.line}"
        if reason.startswith("run by "):
            program = reason.removeprefix("run by ")
            assert (ROOT / program).is_file() or [*(ROOT / "tests").rglob(program)], where
        else:
            assert reason in REASONS, where
        tally(f"blocks of pages not run: {reason}")


@pytest.mark.parametrize(
    ("shown", "got", "same"),
    [
        ("a\nb\n", "a  \nb", True),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("took 0.57 s", "took 1.2 s", True),
        ("took 0.57 s", "took 0.57 m", False),
        ("a", "a\nb", False),
        ("(1.5)", "(1x5)", False),
    ],
)
def test_output_is_compared(shown: str, got: str, same: bool) -> None:
    assert matches(shown, got) is same


PAGE = """
```python
x = 1
```

<!-- not run: needs an NPU -->

```bash
rm -rf /
```

<!-- setup:
y = 2
-->

````{note}
text
````
"""


def test_blocks_are_found() -> None:
    assert [(b.language, b.marker, b.text.strip()) for b in blocks(PAGE)] == [
        ("python", "", "x = 1"),
        ("bash", "not run: needs an NPU", "rm -rf /"),
        ("setup", "", "y = 2"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).is_file(), target


NAMED = re.compile(r"`((?:benchmarks|converters|examples|lq_graph|cann_host|tests)/[\w./]+)`")


def test_files_that_pages_name_are_there() -> None:
    for page in PAGES:
        if page.parent.name != "cann_host":  # which names the vendor's files too
            for name in NAMED.findall(page.read_text()):
                assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: {name}"


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", text, re.M))
    assert documented == set(lq_graph.__all__) | set(lq_graph.parallel.__all__)
    members = re.search(r"automodule:: cann_host\n +:members: (.*)", text)
    assert members
    assert set(members[1].split(", ")) == set(cann_host.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_in_pages_are_the_generated_ones(page: Path) -> None:
    text = page.read_text()
    assert text == tables.put_in(text, tables.TABLES), "run docs/_ext/tables.py"


@pytest.mark.parametrize(
    ("name", "rows"),
    [("linear_quant", len(ROWS)), ("activations", len(QUANT_ROWS)), ("products", len(PRODUCTS))],
)
def test_tables_have_a_line_for_each_row(name: str, rows: int) -> None:
    lines = tables.TABLES[name]().splitlines()
    assert len(lines) == 2 + rows
    assert len({line.count("|") for line in lines}) == 1


# the least number of lines, and how often each kind of title is in the benchmark's file
@pytest.mark.parametrize(
    ("name", "file", "title", "lines_each", "least"),
    [
        ("cpu_kernel", "cpu_kernel", r"\(\d+, \d{3,}, \d+\)", 1, 6),
        ("cpu_scales", "cpu_kernel", r"\(\d+, \d+, \d+\)", 1, 8),
        ("cpu_activations", "cpu_layer", "activations", 2, 10),
        ("cpu_layer", "cpu_layer", "layer", 1, 6),
        ("cpu_models", "cpu_models", "MiniLM", 1, 4),
    ],
)
def test_tables_of_the_cpu_have_every_figure(
    name: str, file: str, title: str, lines_each: int, least: int
) -> None:
    text = (ROOT / f"benchmarks/{file}.txt").read_text()
    titles = len(re.findall(f"^{title}", text, re.M))
    lines = tables.TABLES[name]().splitlines()[2:]
    if name == "cpu_models":
        titles += 2 * len(re.findall("^SmolLM2", text, re.M))  # prefill and decode
    assert len(lines) == titles * lines_each >= least
    for line in lines:
        figures = re.findall(r"\d+\.\d+", line)
        assert len(figures) >= 4
        assert all(float(figure) > 0 for figure in figures)


def test_figures_of_the_cpu_are_those_of_their_lines() -> None:
    """One figure of each table, found again in the benchmark's file by hand."""
    lines = {
        file: (ROOT / f"benchmarks/{file}.txt").read_text().splitlines()
        for file in ("cpu_kernel", "cpu_layer", "cpu_models")
    }

    def line(file: str, title: str, name: str) -> list[str]:
        at = next(i for i, text in enumerate(lines[file]) if text.startswith(title))
        return next(text.split() for text in lines[file][at:] if text.startswith(f"   {name}  "))

    kernel = tables.cpu_kernel().splitlines()[2]
    wanted = line("cpu_kernel", "(1, 4096, 4096)", "oneDNN qlinear u8 to bfloat16")
    assert kernel.split("|")[7].strip() == wanted[8]
    layer = tables.cpu_layer().splitlines()[2]
    wanted = line("cpu_layer", "layer (1, 4096, 4096)", "fp32 nn.Linear")
    assert layer.split("|")[-2].strip() == wanted[-1]
    activations = tables.cpu_activations().splitlines()[2]
    wanted = line("cpu_layer", "activations (1, 4096)", "dynamic_quant to int8, bfloat16")
    assert activations.split("|")[4].strip() == f"{wanted[-3]} us ({wanted[-1]})"
    models = tables.cpu_models().splitlines()[2]
    floats = [
        float(line("cpu_models", "SmolLM2", dtype)[1].replace(",", ""))
        for dtype in ("float16", "bfloat16", "float32")
    ]
    assert f"{min(floats):.1f} ms" in models.split("|")[4]
