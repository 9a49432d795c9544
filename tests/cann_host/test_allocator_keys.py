"""torch_npu beside a torch that has registered the same allocator keys, as CUDA builds of 2.10 and
later do. The build here is a CPU one, so a library registers them in the real c10 in its stead, at
the moment `import torch` loads what a CUDA build would have loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="of the stand-in"),
]

# What libtorch_cuda registers, and one key that torch_npu has not.
REGISTERS = """
#include <string>
#include <unordered_set>
namespace c10::CachingAllocator {
struct AcceleratorAllocatorConfig { static std::unordered_set<std::string>& getMutableKeys(); };
}
static bool registered = [] {
  for (auto key :
       {"pinned_reserve_segment_size_mb", "per_process_memory_fraction", "of_cuda_alone"})
    c10::CachingAllocator::AcceleratorAllocatorConfig::getMutableKeys().insert(key);
  return true;
}();
extern "C" int has(const char* key) {
  return c10::CachingAllocator::AcceleratorAllocatorConfig::getMutableKeys().count(key);
}
"""
# Runs in every process of the test, workers too. torch.cuda is imported once torch's C++ is loaded.
SITE = """
import ctypes, os, sys
from importlib.abc import MetaPathFinder
class Cuda(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname == "torch.cuda":
            ctypes.CDLL("libc10.so", mode=os.RTLD_NOLOAD | ctypes.RTLD_GLOBAL)
            ctypes.CDLL({library!r})
sys.meta_path.insert(0, Cuda())
"""
ADD = "(torch.ones(2).npu() + 1).cpu().tolist()"
BOTH = "per_process_memory_fraction, pinned_reserve_segment_size_mb"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that makes the torch here register what a CUDA build registers."""
    folder = tmp_path_factory.mktemp("cuda")
    source, library = folder / "cuda.cpp", folder / "libcuda_keys.so"
    source.write_text(REGISTERS)
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    (folder / "sitecustomize.py").write_text(SITE.format(library=str(library)))
    return folder


def run(site: Path, program: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(program)
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=False,
    )


def test_without_the_way_round_the_process_ends(site: Path, tmp_path: Path) -> None:
    """What the others rest on: here as with a CUDA build."""
    program = (
        "import contextlib, cann_host, cann_host.allocator_keys as keys\n"
        "keys.set_aside = lambda library: contextlib.nullcontext([])\n"
        "cann_host.activate()\n"
    )
    done = run(site, program, tmp_path)
    assert done.returncode == -6
    assert "Duplicated key '" in done.stderr


@pytest.mark.parametrize("autoload", ["1", "0"])
def test_torch_npu_is_imported_and_no_key_is_lost(
    site: Path, tmp_path: Path, autoload: str
) -> None:
    program = (
        f"import ctypes, os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '{autoload}'\n"
        "import cann_host, sys\n"
        "cann_host.activate()\n"
        "assert not {f.__module__ for f in sys.meta_path} & {'cann_host.allocator_keys'}\n"
        f"assert os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] == '{autoload}'\n"
        "import torch\n"
        f"print({ADD})\n"
        f"cuda = ctypes.CDLL({str(site / 'libcuda_keys.so')!r})\n"
        "print(*(cuda.has(key) for key in\n"
        "        (b'of_cuda_alone', b'pinned_reserve_segment_size_mb', b'base_addr_aligned_kb',\n"
        "         b'max_split_size_mb', b'nobody')))\n"
    )
    done = run(site, program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2.0, 2.0]\n1 1 1 1 0\n"
    said = [line for line in done.stderr.splitlines() if "allocator setting" in line]
    assert len(said) == 1
    assert said[0].startswith("cann_host: torch ")
    assert f"both register the allocator settings {BOTH}. " in said[0]
    assert "beside a real CANN expect `import torch_npu` to end the process" in said[0]
    assert "install the CPU build of torch" in said[0]


def test_workers_too_and_it_is_said_once(site: Path, tmp_path: Path) -> None:
    program = (
        "import cann_host\n"
        "def add(_):\n"
        "    import torch\n"
        f"    return {ADD}\n"
        "if __name__ == '__main__':\n"
        "    cann_host.activate()\n"
        "    import multiprocessing\n"
        "    for method in ('spawn', 'forkserver'):\n"
        "        with multiprocessing.get_context(method).Pool(1) as pool:\n"
        "            print(method, pool.map(add, [1]))\n"
    )
    done = run(site, program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["spawn [[2.0, 2.0]]", "forkserver [[2.0, 2.0]]"]
    assert done.stderr.count("allocator settings") == 1
