"""csrc/ge_abi.h against the headers torch_npu ships: the same sizes, layouts and symbols."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cann_host import _native
from support.compiler import needs_compiler, torch_npu_include
from support.ge_layouts import GE_HEADER, LATER, TYPES, VALUES, compare_layouts

pytestmark = pytest.mark.native


@pytest.mark.slow
@needs_compiler
def test_layouts_equal_the_wheels_headers(tmp_path: Path) -> None:
    found = torch_npu_include().rglob(GE_HEADER)  # in third_party, or two equal ones
    include = min(found, key=lambda header: len(header.parts)).parents[1]
    ours, theirs = compare_layouts(tmp_path, include)
    assert ours == theirs
    assert ours.count("\n") >= len(TYPES) + len(VALUES) - len(LATER)


def test_every_ge_symbol_torchair_wants_is_here() -> None:
    nm = shutil.which("nm")
    directory = _native.library_directory()
    if nm is None or directory is None:
        pytest.skip("needs nm and cann_host's libraries")

    def symbols(library: Path, kind: str) -> set[str]:
        command = [nm, "-D", kind, str(library)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {line.split()[-1].split("@")[0] for line in lines.splitlines()}

    core = torch_npu_include().parent / "dynamo" / "torchair" / "core"
    wanted = set().union(*(symbols(so, "--undefined-only") for so in core.glob("*.so")))
    wanted = {name for name in wanted if name.startswith(("_ZN2ge", "_ZNK2ge"))}
    assert len(wanted) > 50
    assert wanted - symbols(directory / "libcann_host.so", "--defined-only") == set()
