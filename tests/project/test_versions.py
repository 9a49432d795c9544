"""The versions of torch_npu that pages, packages and the matrix name are the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support.versions import VERSIONS

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
RESULTS = json.loads((ROOT / "docs" / "versions.json").read_text())


def test_runs_are_of_these_versions() -> None:
    """In their order, with their torch; the page names those that were not run."""
    run = [(one["torch_npu"], one["torch"].partition("+")[0]) for one in RESULTS]
    assert run == [
        (version.torch_npu, version.torch) for version in VERSIONS if version.torch_npu in dict(run)
    ]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["torch_npu"])
def test_a_run_is_green(result: dict) -> None:
    assert result["examples"] == {"eager.py": True, "graph_mode.py": True}
    assert result["failed"] == []
    assert result["passed"] > 2000
    assert all(re.search(r"\w", reason) for reason in result["skipped"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert re.fullmatch(r"[0-9a-f]{7,}", result["commit"]), "run from a clean checkout"


def test_pythons_from_3_10_to_3_13_are_met() -> None:
    assert {version.python for version in VERSIONS} == {"3.10", "3.11", "3.12", "3.13"}


def test_the_extra_allows_these_versions_and_no_older_ones() -> None:
    tomllib = pytest.importorskip("tomllib")
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch, torch_npu = (
        next(one for one in map(requirements.Requirement, listed) if one.name == name).specifier
        for name, listed in (
            ("torch", project["dependencies"]),
            ("torch_npu", project["optional-dependencies"]["npu"]),
        )
    )
    assert all(version.torch_npu in torch_npu and version.torch in torch for version in VERSIONS)
    assert "2.6.0.post5" not in torch_npu
    assert "2.6.0" not in torch


@pytest.mark.parametrize("page", ["README.md", "docs/versions.md", "docs/install.md"])
def test_pages_name_the_first_and_the_last(page: str) -> None:
    assert f"{VERSIONS[0].torch_npu} to {VERSIONS[-1].torch_npu}" in (ROOT / page).read_text()
