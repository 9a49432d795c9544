"""Set-ups that are broken in one way each, made from what is at hand: folders for PYTHONPATH and
variables, with which the doctor runs in a process of its own."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "cann",
    "sourced",
    "stale_package",
    "stub_torch",
    "stub_torch_npu",
    "torch_as_cuda_build",
]

ROOT = Path(__file__).parents[2]

# what a library that registers settings with c10's allocator configuration asks the loader for
_REGISTERS = b"\0registerDeviceConfigParserHook\0"


def cann(folder: Path, version: str = "8.5.0") -> Path:
    """A CANN as the installer lays it out, with libraries that are empty files; returns its
    folder."""
    home = folder / "Ascend/ascend-toolkit/latest"
    for name in ("opp", "runtime", "compiler", "lib64", "x86_64-linux"):
        (home / name).mkdir(parents=True)
    (home / "lib64/libascendcl.so").touch()
    info = f"package_name=Ascend-cann-toolkit\nversion={version}\narch=x86_64\n"
    (home / "x86_64-linux/ascend_toolkit_install.info").write_text(info)
    (home.parent / "set_env.sh").write_text(f"export ASCEND_HOME_PATH={home}\n")
    return home


def sourced(home: Path) -> dict[str, str]:
    """The variables that the script of a CANN sets."""
    return {
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_TOOLKIT_HOME": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
        "LD_LIBRARY_PATH": str(home / "lib64"),
    }


def stub_torch(folder: Path, program: str, version: str = "2.13.0+cpu") -> None:
    """A torch that runs a program when it is imported."""
    (folder / "torch").mkdir()
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    (folder / "torch/__init__.py").write_text(program)


def stub_torch_npu(folder: Path, program: str, version: str, torch: str) -> None:
    """A torch_npu that runs a program when it is imported, with the metadata of a wheel.

    Args:
        folder: to be put in PYTHONPATH.
        program: what its import does.
        version: its version.
        torch: what it requires, such as "torch==2.9.0+cpu".
    """
    package, info = folder / "torch_npu", folder / f"torch_npu-{version}.dist-info"
    (package / "lib").mkdir(parents=True)
    (package / "dynamo/torchair").mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\nRequires-Dist: {torch}\n"
    )
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    (package / "lib/libtorch_npu.so").write_bytes(_REGISTERS)
    (package / "__init__.py").write_text(program)


def torch_as_cuda_build(folder: Path) -> str:
    """The torch here, which says that it is a CUDA build and has a CUDA half; returns its
    release."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    real = Path(spec.origin).parent
    made = folder / "torch"
    (made / "lib").mkdir(parents=True)
    for source, target in ((real, made), (real / "lib", made / "lib")):
        for file in source.iterdir():
            if file.name not in ("lib", "version.py", "libc10_cuda.so"):
                (target / file.name).symlink_to(file)
    release = version("torch").partition("+")[0]
    text = re.sub("(?m)^__version__ = .*", "", (real / "version.py").read_text())
    text += f"__version__ = '{release}+cu130'\ncuda = '13.0'\n"
    (made / "version.py").write_text(text)
    (made / "lib/libc10_cuda.so").write_bytes(_REGISTERS)
    return release


# An editable install finds its packages before PYTHONPATH does: here it finds cann_host alone.
_OWN_LQ_GRAPH = """
import sys

for finder in [f for f in sys.meta_path if "ScikitBuild" in type(f).__name__]:
    def find_spec(name, *rest, real=finder.find_spec):
        return None if name.partition(".")[0] == "lq_graph" else real(name, *rest)
    finder.find_spec = find_spec
"""


def stale_package(folder: Path) -> None:
    """lq_graph with its compiled kernel, and a source file that was changed afterwards."""
    from lq_graph.kernels import library

    leave = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "lq_graph", folder / "lq_graph", ignore=leave)
    file = library.path()
    assert file is not None
    (folder / "lq_graph/kernels/lib").mkdir()
    shutil.copy(file, folder / "lq_graph/kernels/lib")
    with (folder / "lq_graph/kernels/csrc/dispatch.cpp").open("a") as source:
        source.write("// changed\n")
    (folder / "sitecustomize.py").write_text(_OWN_LQ_GRAPH)
