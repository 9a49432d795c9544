"""scripts/check_wheels.py names what a wheel asks for and this checkout lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from cann_host import _native
from support.compiler import COMPILER, needs_compiler
from support.ge_layouts import CSRC

pytest.importorskip("elftools")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import check_wheels

pytestmark = [
    pytest.mark.native,
    needs_compiler,
    pytest.mark.skipif(_native.library_directory() is None, reason="needs cann_host's libraries"),
]

SOURCE = """
extern "C" void aclrtNotThere();
extern "C" void aclrtMalloc();
extern "C" void PyErr_SetString();
extern "C" const char* const strings[] = {STRINGS};
extern "C" void calls() { aclrtNotThere(); aclrtMalloc(); PyErr_SetString(); }
"""


def wheel(folder: Path, train: int, strings: list[str], torchair: dict[str, str]) -> Path:
    """A wheel with one library, which holds the schemas of a train and other strings."""
    schemas = [f"{name}({known[train]}" for name, known in check_wheels.SCHEMAS.items()]
    quoted = ",\n".join('"' + text.replace('"', '\\"') + '"' for text in ["x", *schemas, *strings])
    source, library = folder / "library.cpp", folder / "libtorch_npu.so"
    source.write_text(SOURCE.replace("STRINGS", quoted))
    command = [str(COMPILER), "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    path = folder / "torch_npu-0.0.1-cp311-cp311-manylinux_2_28_x86_64.whl"
    with ZipFile(path, "w") as file:
        file.write(library, "torch_npu/lib/libtorch_npu.so")
        file.write(CSRC / "ge_abi.h", "torch_npu/include/ge/ge_abi.h")
        file.writestr("torch_npu/include/ge/ge_api.h", '#include "ge_abi.h"\n')
        file.writestr("torch_npu/include/graph/types.h", "DT_INT4, DT_MAX\n")
        for name, text in torchair.items():
            file.writestr(f"torch_npu/dynamo/torchair/{name}", text)
    return path


@pytest.fixture
def torchair() -> dict[str, str]:
    """Sources that define the names that converters/_torchair.py imports."""
    names = check_wheels.torchair_names()
    files: dict[str, str] = {}
    for module, name in names:
        path = "/".join([*module.split(".")[1:], "__init__.py"])
        files[path] = files.get(path, "") + f"{name} = None\n"
    assert len(files) > 2
    return files


@pytest.mark.parametrize("train", [0, 1])
def test_what_is_there_is_not_named(train: int, tmp_path: Path, torchair: dict[str, str]) -> None:
    path = wheel(tmp_path, train, ["aclnnQuantMatmulV5"], torchair)
    checker = check_wheels.Checker(tmp_path)
    _, missing = checker.check(check_wheels.Wheel(path))
    assert missing == ["symbol aclrtNotThere"]


def test_what_is_missing_is_named(tmp_path: Path, torchair: dict[str, str]) -> None:
    changed = "npu_quantize(Tensor input, Tensor scale) -> Tensor"
    torchair["__init__.py"] = "registered = None\n"
    path = wheel(tmp_path, 1, ["aclnnQuantMatmulV9", changed], torchair)
    checker = check_wheels.Checker(tmp_path)
    cells, missing = checker.check(check_wheels.Wheel(path))
    assert missing == [
        "symbol aclrtNotThere",
        "aclnn aclnnQuantMatmulV9",
        f"schema {changed}",
        "torchair torchair.register_fx_node_ge_converter",
    ]
    assert cells[0] == "2, 1 missing"
