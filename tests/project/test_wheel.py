"""A wheel of this package loads wherever torch_npu's does: no library of ours needs a newer version
of a system library than some library of torch_npu's needs."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from cann_host import _native
from lq_graph import kernels

READELF = shutil.which("readelf")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

# What may differ between systems: GNU libc, libstdc++ (two families), libgcc
FAMILIES = ("GLIBC", "GLIBCXX", "CXXABI", "GCC")

pytestmark = [
    pytest.mark.skipif(READELF is None, reason="needs readelf (binutils)"),
    pytest.mark.native,
]

Version = tuple[int, ...]


def version_of(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


def our_libraries() -> list[Path]:
    folders = [_native.library_directory(), *(Path(p) / "lib" for p in kernels.__path__)]
    return sorted(so for folder in folders if folder for so in folder.glob("*.so"))


def needs(library: Path) -> dict[str, dict[Version, list[str]]]:
    """What a library takes from others: {family: {version: symbols}}."""
    command = [str(READELF), "--dyn-syms", "--wide", str(library)]
    environment = {**os.environ, "LC_ALL": "C"}
    lines = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    found: dict[str, dict[Version, list[str]]] = {family: {} for family in FAMILIES}
    for line in lines.splitlines():
        match = re.search(r" UND (\S+)@([A-Z]+)_([0-9.]+)\b", line)
        if match:
            symbol, family, text = match.groups()
            found.setdefault(family, {}).setdefault(version_of(text), []).append(symbol)
    return found


def newest(libraries: Iterable[Path]) -> dict[str, Version]:
    """The newest version any of them needs, by family."""
    result: dict[str, Version] = {}
    for library in libraries:
        for family, versions in needs(library).items():
            result[family] = max([result.get(family, ()), *versions])
    return result


def too_new(library: Path, limits: dict[str, Version]) -> list[str]:
    """The symbols of a library that are newer than the limits, as `GLIBC_2.34 dlsym`."""
    return sorted(
        f"{family}_{'.'.join(map(str, version))} {symbol}"
        for family, versions in needs(library).items()
        for version, symbols in versions.items()
        for symbol in symbols
        if version > limits.get(family, ())
    )


@pytest.fixture(scope="module")
def limits() -> dict[str, Version]:
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the torch_npu wheel")
    libraries = list(Path(next(iter(spec.submodule_search_locations))).rglob("*.so"))
    assert len(libraries) > 5
    return newest(libraries)


def test_what_the_torch_npu_wheel_needs(limits: dict[str, Version]) -> None:
    """It is tagged manylinux_2_28, and so can ours be."""
    assert set(limits) == set(FAMILIES) and all(limits.values())
    assert limits["GLIBC"] <= (2, 28)


@pytest.mark.skipif(
    platform.libc_ver()[0] == "glibc" and version_of(platform.libc_ver()[1]) > (2, 36),
    reason="built on a newer system than wheels are: its headers bring names of their own",
)
@pytest.mark.parametrize("library", our_libraries(), ids=lambda so: so.name)
def test_no_newer_than_the_torch_npu_wheel(library: Path, limits: dict[str, Version]) -> None:
    found = too_new(library, limits)
    assert not found, f"{library.name}: {found}; cann_host/csrc/portable.h is where to mend it"


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_newer_one_would_be_found(tmp_path: Path, limits: dict[str, Version]) -> None:
    source, library = tmp_path / "new.cpp", tmp_path / "new.so"
    source.write_text("#include <vector>\nint f() { return *std::vector<int>(3).rbegin(); }")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    lower = {**limits, "GLIBCXX": (3, 4), "GLIBC": (2, 0), "CXXABI": (1, 0)}
    found = too_new(library, lower)
    assert found and all(re.fullmatch(r"[A-Z]+_[0-9.]+ \S+", text) for text in found)
    assert not too_new(library, dict.fromkeys(FAMILIES, (99,)))
