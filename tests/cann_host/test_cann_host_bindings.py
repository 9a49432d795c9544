"""The native library in Python: the signatures and structs of bindings.py compared with those of
csrc/bindings.h, and libraries that were built from other sources; and the one object that holds
what a process has."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cann_host
from cann_host import _native, bindings, runtime

CSRC = Path(__file__).parents[2] / "cann_host" / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

C_TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "long": ctypes.c_long,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "char*": ctypes.c_char_p,
    "void*": ctypes.c_void_p,
    "int64_t*": ctypes.POINTER(ctypes.c_int64),
    "cann_host_ge_summary*": ctypes.c_void_p,  # Python only hands it back
    "cann_host_ge_outputs*": ctypes.c_void_p,
}


def c_type(declaration: str, *, has_name: bool = True) -> object:
    words = declaration.replace("const ", "").split()
    return C_TYPES["".join(words[:-1] if has_name else words)]


def header() -> str:
    return re.sub(r"//.*", "", (CSRC / "bindings.h").read_text())


def test_the_functions_are_those_of_the_header() -> None:
    found = re.findall(r"^([\w ]+[ *]+)(cann_host_\w+)\(([^)]*)\);", header(), re.M)
    declared = {
        name: (
            c_type(returns, has_name=False),
            tuple(c_type(one) for one in arguments.split(",") if one.strip()),
        )
        for returns, name, arguments in found
    }
    assert len(found) == len(declared) > 20
    assert declared == bindings.FUNCTIONS
    assert set(bindings.CALLBACKS) == {name for name in declared if "_set_" in name} - {
        "cann_host_set_error",
        "cann_host_set_keys_aside",
        "cann_host_ge_set_static",
    }


def test_the_structs_are_those_of_the_header() -> None:
    found = re.findall(r"^struct (\w+) \{(.*?)^\};", header(), re.M | re.S)
    declared = {
        name: [(one.split()[-1], c_type(one)) for one in body.split(";") if one.strip()]
        for name, body in found
    }
    assert declared == {name: list(s._fields_) for name, s in bindings.STRUCTS.items()}


def test_every_function_of_the_library_is_declared() -> None:
    """One that Python calls without a signature would take pointers for ints."""
    directory = _native.library_directory()
    if directory is None or shutil.which("nm") is None:
        pytest.skip("needs nm and cann_host's libraries")
    command = ["nm", "-D", "--defined-only", str(directory / _native.NAMES[0])]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1].partition("@")[0] for line in shown.splitlines()}
    assert {name for name in symbols if name.startswith("cann_host_")} == set(bindings.FUNCTIONS)


def build(folder: Path, header: str, digest: str, *linked: str) -> str:
    """bindings.cpp, which says what a library is, of other sources; `linked` has the rest."""
    (folder / "bindings.h").write_text(header)
    shutil.copy(CSRC / "bindings.cpp", folder)
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", f'-DCANN_HOST_SOURCES="{digest}"']
    command += [
        str(folder / "bindings.cpp"),
        "-o",
        str(folder / "libother.so"),
        "-Wl,--no-as-needed",
    ]
    subprocess.run([*command, *linked], check=True)
    return "libother.so"


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("struct", r"another layout: cann_host_ge_tensor has 56 bytes there and 48 in Python; it"),
        ("function", r"\(.*libother.so\) has no cann_host_configure; it"),
        ("digest", r"native libraries \(.*\)"),
    ],
)
def test_a_library_of_other_sources_is_refused(
    case: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel has no sources to compare; there the library's own structs and functions decide."""
    source, directory = (CSRC / "bindings.h").read_text(), _native.library_directory()
    assert directory is not None
    here = str(directory / _native.NAMES[0])
    if case == "digest":
        shutil.copytree(CSRC, tmp_path / "csrc")
        (tmp_path / "csrc" / "core.cpp").open("a").write("// pulled\n")
        digest = _native.digest_of(tmp_path / "csrc")
        name = build(tmp_path, source, str(digest), here)
    else:
        monkeypatch.setattr(_native, "sources", lambda: None)
        field = "struct cann_host_ge_tensor {\n  uint64_t added;"
        source = source.replace("struct cann_host_ge_tensor {", field)
        name = build(tmp_path, source, "", *([here] if case == "struct" else []))
    monkeypatch.setattr(_native, "NAMES", (name,))
    monkeypatch.setattr(_native, "library_directory", lambda: tmp_path)
    todo = "built from other sources than the Python beside (it|them): run pip install -e . again"
    with pytest.raises(cann_host.CannHostError, match=f"cann_host's .*{text}.* {todo}"):
        runtime.open_library()


# ---- the one object ----


def test_no_function_replaces_a_module_s_variables() -> None:
    """What a process has is in runtime's `_current`."""
    package = Path(cann_host.__file__).parent
    found = {
        (path.relative_to(package).as_posix(), name)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Global)
        for name in node.names
        if not path.relative_to(package).as_posix().startswith("aclnn")
    }
    assert found == {("runtime.py", "_current")}


def test_an_inactive_process_reports_it_without_torch() -> None:
    program = """
import sys
import cann_host, cann_host.runtime as runtime
assert not cann_host.is_active() and not cann_host.info()["active"]
assert runtime.options().soc == "Ascend910B2"
for call in (runtime.current, cann_host.faults("aclrtMalloc:207001").__enter__):
    try:
        call()
    except cann_host.CannHostError as error:
        print(error)
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "CANN_HOST_SOC": ""},
        check=True,
    )
    text = "cann_host is not active in this process: call activate() first."
    assert done.stdout.splitlines() == [text, text, "False"]


def test_types_are_shipped() -> None:
    assert (Path(cann_host.__file__).parent / "py.typed").is_file()
