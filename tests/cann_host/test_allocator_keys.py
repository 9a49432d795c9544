"""torch_npu with a torch that has registered the same allocator keys, like CUDA builds of 2.10 and
later do. The build here is a CPU one, so a library registers them in the real c10 in its stead, at
the moment `import torch` loads what a CUDA build would have loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.compiler import COMPILER, needs_compiler
from support.processes import SCRIPTS, python, script

pytestmark = [
    needs_compiler,
    pytest.mark.slow,
    pytest.mark.native,
    pytest.mark.skipif(os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="of the stand-in"),
]

BOTH = "per_process_memory_fraction, pinned_reserve_segment_size_mb"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that makes the torch here register what a CUDA build registers."""
    folder = tmp_path_factory.mktemp("cuda")
    source, library = SCRIPTS / "allocator_keys_site.cpp", folder / "libcuda_keys.so"
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    shutil.copy(SCRIPTS / "allocator_keys_site.py", folder / "sitecustomize.py")
    return folder


def test_without_the_way_round_the_process_ends(site: Path) -> None:
    """What the others rest on: here as with a CUDA build."""
    done = python(*script("activation.py keys_kept"), PYTHONPATH=str(site))
    assert done.returncode == -6
    assert "Duplicated key '" in done.stderr


@pytest.mark.parametrize("autoload", ["1", "0"])
def test_torch_npu_is_imported_and_no_key_is_lost(site: Path, autoload: str) -> None:
    command = f"beside_allocator_keys.py imported {site / 'libcuda_keys.so'} {autoload}"
    done = python(*script(command), PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2.0, 2.0]\n1 1 1 1 0\n"
    said = [line for line in done.stderr.splitlines() if "allocator setting" in line]
    assert len(said) == 1
    assert said[0].startswith("cann_host: torch ")
    assert f"both register the allocator settings {BOTH}. " in said[0]
    assert "beside a real CANN expect `import torch_npu` to end the process" in said[0]
    assert "install the CPU build of torch" in said[0]


def test_workers_too_and_it_is_said_once(site: Path) -> None:
    done = python(*script("beside_allocator_keys.py workers"), PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["spawn [[2.0, 2.0]]", "forkserver [[2.0, 2.0]]"]
    assert done.stderr.count("allocator settings") == 1
