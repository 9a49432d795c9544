"""CANN's public C++ unit tests as rows: for each case, the call and CANN's answer.

It reads them with small patterns, without a compiler: cases in another form are counted as not
read. Used by cann_tables.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# aclDataType and ge::DataType have the same numbers
DTYPES = {
    "FLOAT": 0,
    "FLOAT16": 1,
    "INT8": 2,
    "INT32": 3,
    "UINT8": 4,
    "INT16": 6,
    "INT64": 9,
    "UINT64": 10,
    "DOUBLE": 11,
    "BOOL": 12,
    "COMPLEX64": 16,
    "BF16": 27,
    "INT4": 29,
    "HIFLOAT8": 34,
    "FLOAT8_E5M2": 35,
    "FLOAT8_E4M3FN": 36,
}
FORMATS = {"NCHW": 0, "NHWC": 1, "ND": 2, "NC1HWC0": 3, "FRACTAL_NZ": 29, "NCDHW": 30}
SOCS = {"910b": "Ascend910B2", "910_93": "Ascend910_9391", "310p": "Ascend310P3"}
SOC_950 = "Ascend950PR_9589"


class Tensor(NamedTuple):
    """dtype as aclDataType, shape, format as aclFormat."""

    dtype: int
    shape: tuple[int, ...]
    format: int = 2


class Case(NamedTuple):
    """One call of a test.

    Attributes:
        name: suite and case.
        function: aclnn function, or GE operator.
        soc: chip the test pretends.
        inputs: arguments in order: tensors, None, numbers, texts.
        outputs: tensors in order.
        attrs: attributes of a GE operator.
        expected: the constant it is compared with, "" if it is not.
        shapes: shapes the results are compared with, where they are.
    """

    name: str
    function: str
    soc: str
    inputs: list[Any]
    outputs: list[Any]
    attrs: dict[str, Any]
    expected: str
    shapes: list[tuple[int, ...]]


def soc_of(text: str) -> str | None:
    """The chip a text names."""
    if re.search(r"950", text):
        return SOC_950
    found = re.search(r"910_93|910b|310p", text, re.IGNORECASE)
    return SOCS[found[0].lower()] if found else None


def cases_of(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each case of a file, without comments."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(errors="replace"), flags=re.DOTALL)
    parts = re.split(r"\nTEST_F\(\s*\w+,\s*(\w+)\s*\)", text)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _closing(text: str, at: int) -> int:
    """Where the bracket that opens before `at` closes."""
    depth = 1
    while depth:
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(text[at], 0)
        at += 1
    return at


def split(text: str) -> list[str]:
    """Arguments between commas that stand outside of brackets."""
    parts, depth, last = [], 0, 0
    for i, letter in enumerate(text):
        depth += {"(": 1, "{": 1, "[": 1, "<": 1, ")": -1, "}": -1, "]": -1, ">": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append(text[last:i].strip())
            last = i + 1
    return [part for part in (*parts, text[last:].strip()) if part]


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"-?\d+", text))


def constant(text: str) -> Any:
    """The value of a C++ constant; None for a null pointer or what is not known."""
    text = re.sub(r"^static_cast<\w+>\((.*)\)$", r"\1", text.strip())
    text = re.sub(r"^\(\w+\s*\*?\)\s*", "", text)
    if text in ("true", "false"):
        return text == "true"
    if text.startswith('"'):
        return text.strip('"')
    if re.fullmatch(r"-?[\d.]+(e-?\d+)?f?", text):
        text = text.rstrip("f")
        return float(text) if "." in text or "e" in text else int(text)
    return DTYPES.get(re.sub(r"^(ge::)?(ACL_|DT_)", "", text))


def op_api(path: Path) -> Iterator[Case]:
    """Calls by OP_API_UT."""
    for name, text in cases_of(path):
        known: dict[str, Any] = {}
        for kind, variable, value in re.findall(
            r"(?:const\s+)?(vector<int64_t>&?|std::vector<int64_t>|bool|int\w*|double|float|"
            r"aclDataType|char\s*\*)\s+(\w+)\s*=\s*([^;]+);",
            text,
        ):
            known[variable] = sizes(value) if "vector" in kind else constant(value)

        def tensor(arguments: str, known: dict[str, Any] = known) -> Tensor:
            shape, dtype, *form = split(arguments)
            dims = sizes(shape) if shape.startswith("{") else known[shape]
            code = known[dtype] if dtype in known else constant(dtype)
            form_name = form[0].removeprefix("ACL_FORMAT_") if form else "ND"
            return Tensor(code, dims, FORMATS.get(form_name, 2))

        for found in re.finditer(r"(?:auto|TensorDesc)\s+(\w+)\s*=\s*TensorDesc\(", text):
            known[found[1]] = tensor(text[found.end() : _closing(text, found.end()) - 1])
        for found in re.finditer(r"OP_API_UT\(\s*(\w+),\s*INPUT\(", text):
            end = _closing(text, found.end())
            arguments = split(text[found.end() : end - 1])
            output = re.compile(r"\s*,\s*OUTPUT\(").match(text, end)
            results = split(text[output.end() : _closing(text, output.end()) - 1]) if output else []
            expected = re.search(r"EXPECT_EQ\(\w+,\s*(\w+)\)", text[end:])
            into, out = ([known.get(a, constant(a)) for a in part] for part in (arguments, results))
            # the framework takes a whole name; a part of one is its usual chip
            chip = re.match(r"ascend(910B\d|910_93\d\d|310P\d|950)", name, re.IGNORECASE)
            soc = (chip and soc_of(chip[0])) or "Ascend910B2"
            yield Case(name, found[1], soc, into, out, {}, expected[1] if expected else "", [])


def tiling(path: Path) -> Iterator[Case]:
    """Calls of a tiling function by TilingContextFaker."""
    for name, text in cases_of(path):
        op = re.search(r'op_type\("(\w+)"\)', text)
        faker = text.find("TilingContextFaker")
        if op is None or faker < 0:
            continue
        places: dict[str, tuple[int, ...]] = {}
        for found in re.finditer(r"StorageShape\s+(\w+)\s*=\s*\{", text):
            both = split(text[found.end() : _closing(text, found.end()) - 1])
            places[found[1]] = sizes(both[0])
        rest = text[faker:]

        def described(what: str, rest: str = rest, places: dict[str, Any] = places) -> list[Any]:
            listed = re.search(what + r"Shapes\(\{(.*?)\}\)", rest, re.DOTALL)
            dtypes = dict(re.findall(rf"Node{what}Td\(\s*(\d),\s*(?:ge::)?DT_(\w+)", rest))
            names = [part.strip("& ") for part in listed[1].split(",")] if listed else []
            return [
                Tensor(DTYPES[dtypes.get(str(i), "FLOAT")], places[one]) if one in places else None
                for i, one in enumerate(names)
            ]

        attrs = {
            key: constant(value)
            for key, value in re.findall(r'\{"(\w+)",\s*[\w:]+<[\w:]+>\(([^)]*)\)\}', rest)
        }
        expected = re.findall(r"(?:EXPECT|ASSERT)_EQ\(tiling_func\(\w+\),\s*(?:ge::)?(\w+)\)", rest)
        version = " ".join(re.findall(r'"(?:Short_SoC_version|NpuArch)",\s*"(\w+)"', text))
        version = version.replace("3510", "950").replace("2002", "310P").replace("2201", "910B")
        usual = SOC_950 if "arch35" in path.parts else "Ascend910B2"
        soc = soc_of(version) or soc_of(name) or usual
        inputs, outputs = described("Input"), described("Output")
        yield Case(name, op[1], soc, inputs, outputs, attrs, (expected or [""])[-1], [])


def infer_shape(path: Path) -> Iterator[Case]:
    """InferShape by UpdateInputDesc, or by InferShapeContextFaker."""
    for name, text in cases_of(path):
        op = re.search(r"ge::op::(\w+) ", text) or re.search(
            r'GetOpImpl\("(\w+)"\)->infer_shape', text
        )
        if op is None or "InferDataTypeContextFaker" in text:
            continue
        soc = soc_of(text) or "Ascend910B2"
        shapes = [sizes(s) for s in re.findall(r"expected\w*\s*=\s*\{(.*?)\};", text)]
        expected = re.findall(r"_EQ\(\w*[iI]nferShape\w*\(.*?\),\s*(?:ge::)?(GRAPH_\w+)\)", text)
        attrs: dict[str, Any] = {
            key: constant(value)
            for key, value in re.findall(r'\{"(\w+)",\s*[\w:]+<[\w:]+>\(([^)]*)\)\}', text)
        }
        attrs |= {
            key: constant(value)
            for key, value in re.findall(r'SetAttr\("(\w+)",\s*([^)]+)\)', text)
        }
        inputs: list[Any] = []
        by_name: dict[str, Tensor] = {}
        for key, value in re.findall(r'UpdateInputDesc\("(\w+)",\s*(.*?)\);', text):
            if value.startswith("create_desc"):
                dims, dtype = split(value[value.index("(") + 1 : -1])[:2]
                by_name[key] = Tensor(constant(dtype), sizes(dims))
            else:
                kind = re.search(rf"{value}\.SetDataType\(ge::DT_(\w+)\)", text)
                place = re.search(rf"{value}\.SetShape\((\w+)\)", text)
                dims_of = place and re.search(rf"ge::Shape {place[1]}\(\{{(.*?)\}}\)", text)
                if kind and dims_of:
                    by_name[key] = Tensor(DTYPES[kind[1]], sizes(dims_of[1]))
        if not by_name and "InferShapeContextFaker" in text:
            places = {
                found[1]: sizes(split(text[found.end() : _closing(text, found.end()) - 1])[0])
                for found in re.finditer(r"StorageShape\s+(\w+)\s*=\s*\{", text)
            }
            dtypes = dict(re.findall(r"NodeInputTd\((\d),\s*(?:ge::)?DT_(\w+)", text))
            listed = re.search(r"InputShapes\(\{(.*?)\}\)", text, re.DOTALL)
            names = [part.strip("& ") for part in listed[1].split(",")] if listed else []
            inputs = [
                Tensor(DTYPES[dtypes[str(i)]], places[one])
                for i, one in enumerate(names)
                if one in places
            ]
            shapes = [sizes(s) for s in re.findall(r'ToString\(\*\w+\),\s*"\[(.*?)\]"', text)]
        attrs["__inputs__"] = by_name
        yield Case(name, op[1], soc, inputs, [], attrs, (expected or [""])[-1], shapes)
