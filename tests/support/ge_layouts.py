"""Sizes and values of GE's classes, asked from a C++ compiler: of csrc/ge_abi.h, and of the headers
that a torch_npu wheel has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from support.compiler import COMPILER

CSRC = Path(__file__).parents[2] / "cann_host" / "csrc"
GE_HEADER = "ge/ge_api.h"

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


def compare_layouts(scratch: Path, include: Path) -> tuple[str, str]:
    """Sizes and values of csrc/ge_abi.h, and those of a wheel's headers: a line for each name that
    the headers have.

    Args:
        include: the folder of ge/ge_api.h's folder.
    """
    types = re.sub("//.*", "", (include / "graph" / "types.h").read_text())
    values = [value for value in VALUES if value not in LATER or re.search(rf"\b{value}\b", types)]
    folders = [f"-I{include}", f"-I{include / 'graph'}", f"-I{include / 'ge'}"]
    theirs = _probe(scratch, "theirs", values, f'#include "{GE_HEADER}"', *folders)
    return _probe(scratch, "ours", values, '#include "ge_abi.h"', f"-I{CSRC}"), theirs


def _probe(folder: Path, name: str, values: list[str], include: str, *flags: str) -> str:
    body = [f'  Describe<ge::{type_}>("{type_}");' for type_ in TYPES]
    body += [f'  std::printf("{v} %lld\\n", static_cast<long long>(ge::{v}));' for v in values]
    source = folder / f"{name}.cpp"
    source.write_text(PROBE % {"include": include, "body": "\n".join(body)})
    program = folder / name
    command = [str(COMPILER), "-std=c++17", *flags, "-c", str(source), "-o", f"{program}.o"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    link = [str(COMPILER), f"{program}.o", "-o", str(program)]
    subprocess.run(link, check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
