"""csrc/ge_abi.h against the headers torch_npu ships: the same sizes, layouts and symbols."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cann_host import _native
from support.compiler import COMPILER, needs_compiler, torch_npu_include

CSRC = Path(__file__).parents[2] / "cann_host" / "csrc"


pytestmark = pytest.mark.native

# Every type that crosses the border by value, by reference or inside a container
TYPES = (
    "AscendString",
    "Shape",
    "TensorDesc",
    "Tensor",
    "Operator",
    "GNode",
    "Graph",
    "Session",
    "DataType",
    "Format",
    "Placement",
    "Status",
    "graphStatus",
    "Tensor::DeleteFunc",
)
VALUES = (
    "DT_FLOAT",
    "DT_UNDEFINED",
    "DT_INT4",
    "DT_MAX",
    "FORMAT_ND",
    "FORMAT_FRACTAL_NZ",
    "kPlacementHost",
    "kPlacementDevice",
    "GRAPH_SUCCESS",
    "GRAPH_FAILED",
)
PROBE = """
#include <cstdio>
#include <type_traits>
%(include)s
template <typename T>
void Describe(const char* name) {
  std::printf("%%s size %%zu align %%zu polymorphic %%d copies-by-bits %%d\\n", name, sizeof(T),
              alignof(T), std::is_polymorphic<T>::value, std::is_trivially_copyable<T>::value);
}
int main() {
%(body)s
}
"""


LATER = {"DT_INT4", "DT_MAX"}  # names that the headers of 2.7.1 and 2.8.0 do not have


def probe(folder: Path, name: str, values: list[str], include: str, *flags: str) -> str:
    body = [f'  Describe<ge::{type_}>("{type_}");' for type_ in TYPES]
    body += [f'  std::printf("{v} %lld\\n", static_cast<long long>(ge::{v}));' for v in values]
    source = folder / f"{name}.cpp"
    source.write_text(PROBE % {"include": include, "body": "\n".join(body)})
    program = folder / name
    command = [COMPILER, "-std=c++17", *flags, "-c", str(source), "-o", f"{program}.o"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    link = [COMPILER, f"{program}.o", "-o", str(program)]
    subprocess.run(link, check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@needs_compiler
def test_layouts_equal_the_wheels_headers(tmp_path: Path) -> None:
    found = torch_npu_include().rglob("ge/ge_api.h")  # in third_party, or two equal ones
    include = min(found, key=lambda header: len(header.parts)).parents[1]
    types = re.sub("//.*", "", (include / "graph" / "types.h").read_text())
    values = [v for v in VALUES if v not in LATER or re.search(rf"\b{v}\b", types)]
    folders = [f"-I{include}", f"-I{include / 'graph'}", f"-I{include / 'ge'}"]
    theirs = probe(tmp_path, "theirs", values, '#include "ge/ge_api.h"', *folders)
    ours = probe(tmp_path, "ours", values, '#include "ge_abi.h"', f"-I{CSRC}")
    assert ours == theirs
    assert ours.count("\n") == len(TYPES) + len(values)


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
