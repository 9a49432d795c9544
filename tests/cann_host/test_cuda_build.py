"""`import lq_graph` on a machine with an NPU, beside a CUDA build of torch: one sentence instead of
a process that ends. The stand-in's libraries are found as CANN's would be."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from cann_host import _native
from support.processes import python

pytestmark = pytest.mark.skipif(
    os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="the machine's CANN is loaded"
)

IMPORT = "import lq_graph, sys; print(lq_graph.__name__, 'torch_npu' in sys.modules)"
FOLDER = str(_native.library_directory())


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build")
def test_with_the_torch_here(tmp_path: Path) -> None:
    bare = python("-c", "import torch", LD_LIBRARY_PATH=FOLDER)
    done = python("-c", IMPORT, LD_LIBRARY_PATH=FOLDER)
    if bare.returncode == 0:  # torch before 2.10, or a torch_npu that registers no settings
        assert done.stdout.splitlines()[-1] == "lq_graph True"
        return
    assert "Duplicated key" in bare.stderr
    assert done.returncode == 1
    assert f"ImportError: lq_graph: torch {torch.__version__.partition('+')[0]}" in done.stderr
    assert "install the CPU build of torch" in done.stderr


# what stands in for torch's package: how its import ends
ABORTS = "import os; os.write(2, b\"Duplicated key 'x'\"); os.abort()"
FAILS = "raise RuntimeError('another fault')"


def packages(folder: Path, ends: str, *, cuda: bool = True, registers: bool = True) -> None:
    for package, library, text in (
        ("torch", "libc10_cuda.so" if cuda else "libc10.so", "registerDeviceConfigParserHook"),
        (
            "torch_npu",
            "libtorch_npu.so",
            "registerDeviceConfigParserHook" if registers else "nothing",
        ),
    ):
        (folder / package / "lib").mkdir(parents=True)
        (folder / package / "lib" / library).write_text(text)
        (folder / package / "__init__.py").write_text(ends)


@pytest.mark.parametrize(
    ("ends", "cuda", "registers", "autoload", "said"),
    [
        (ABORTS, True, True, "1", "What to do: install the CPU build of torch"),
        (FAILS, True, True, "1", "RuntimeError: another fault"),
        (FAILS, False, True, "1", "RuntimeError: another fault"),
        (FAILS, True, False, "1", "RuntimeError: another fault"),
        (FAILS, True, True, "0", "RuntimeError: another fault"),
    ],
)
def test_only_what_ends_the_process_is_refused(
    tmp_path: Path, ends: str, cuda: bool, registers: bool, autoload: str, said: str
) -> None:
    packages(tmp_path, ends, cuda=cuda, registers=registers)
    done = python(
        "-c",
        "import lq_graph",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
        TORCH_DEVICE_BACKEND_AUTOLOAD=autoload,
    )
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]


def test_a_python_that_imports_it_at_its_start_tries_once(tmp_path: Path) -> None:
    packages(tmp_path, ABORTS)
    started = tmp_path / "started"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os; from pathlib import Path; started = Path({str(started)!r})\n"
        "with started.open('a') as file: print(os.getpid(), file=file)\n"
        "if started.read_text().count('\\n') > 4: os._exit(1)\n"
        "import lq_graph\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = python("-c", "pass", PYTHONPATH=path, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert "install the CPU build of torch" in done.stderr
    assert len(started.read_text().splitlines()) == 2
