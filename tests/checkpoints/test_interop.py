"""Folders that llmcompressor and msmodelslim make here and now, loaded. A tool's cases run if there
is a Python that has it: LQ_INTEROP_LLMCOMPRESSOR, LQ_INTEROP_MSMODELSLIM, or this one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
interop: Any = pytest.importorskip("interop")

pytestmark = pytest.mark.slow

QUICK = [name for name, case in interop.CASES.items() if case.quick]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path]]:
    """The error of a case's tool, and the folder that holds its checkpoint. All cases of a tool are
    made at once."""
    folders: dict[str, tuple[dict[str, str], Path]] = {}

    def of(name: str) -> tuple[str, Path]:
        tool = interop.CASES[name].tool
        if tool not in folders:
            folder = tmp_path_factory.mktemp(tool)
            mine = [other for other in QUICK if interop.CASES[other].tool == tool]
            folders[tool] = interop.make(tool, interop.python_of(tool), folder, mine), folder
        errors, folder = folders[tool]
        return errors[name], folder

    return of


@pytest.mark.parametrize("name", QUICK)
def test_a_folder_of_the_tool(name: str, made: Callable[[str], tuple[str, Path]]) -> None:
    case = interop.CASES[name]
    if not interop.python_of(case.tool):
        pytest.skip(f"no Python that has {case.tool}")
    failed, folder = made(name)
    assert not failed
    row = interop.measure(case, folder)
    assert not row.wrong, "  ".join(row.cells())
