"""What torch_npu's wheels ask for, from the wheels alone: no torch and no torch_npu is installed.

    python tests/scripts/check_wheels.py                      every version, x86-64
    python tests/scripts/check_wheels.py --machine aarch64 2.10.0.post4
    python tests/scripts/check_wheels.py --wheels FOLDER      kept there for the next time

The versions are those of support/versions.py.
It downloads them with pip, and needs lq-graph installed, pyelftools and a C++ compiler. For each
wheel it compares

    symbols     what its libraries import from CANN's, with what libcann_host.so exports
    aclnn       the operators near ours that it looks up by name, with the same
    schemas     the operators that lq_graph calls, with the schemas below, which it is written for
    torchair    the names that converters/_torchair.py imports, with torchair's sources
    layouts     GE's classes in its headers, with those of csrc/ge_abi.h

and exits with 1 if one is missing or new.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerSymSection
from elftools.elf.sections import SymbolTableSection

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from cann_host import _native  # noqa: E402
from support.ge_layouts import GE_HEADER, compare_layouts  # noqa: E402
from support.versions import VERSIONS  # noqa: E402

# Symbols of torch, Python, C and C++; what else a library imports must be the stand-in's.
OF_OTHERS = re.compile(
    r"_?Py[A-Z_]|_ZT?[A-Z]*N?K?St|THP|ParameterClass|aoti_torch|dl(addr|close|error|open|sym)$|pthread_"
    r"|_Z\w*(2at|3c10|4c10d|5torch|6caffe2|9libkineto|THP|PyInterpreter|8functorch)"
)
# Its symbols are those of ATB, a library beside CANN that torch_npu loads only if it is there.
NOT_LOADED = "libop_plugin_atb.so"

# Operators near ours that torch_npu looks up by name.
ACLNN = re.compile(
    rb"\0(aclnn(?:QuantMatmul(?:V\d|WeightNz)|DynamicQuant(?:V\d)?|AscendQuant(?:V\d)?|Quantize"
    rb"|TransQuantParam(?:V\d)?|NpuFormatCast\w*?|Cast|InplaceCopy|ConstantPadNd))"
    rb"(?=\0)"
)

# operator: its schemas, of the first releases of 2.7.1, 2.8.0 and 2.9.0, then of all others
TRAINS = ("first", "later")
SCHEMAS = {
    "npu_quant_matmul": (
        "Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
        "Tensor? bias=None, ScalarType? output_dtype=None, SymInt[]? group_sizes=None) -> Tensor",
        "Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
        "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
        "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, "
        "Tensor? y_scale=None) -> Tensor",
    ),
    "npu_quantize": (
        "Tensor input, Tensor scales, Tensor? zero_points, ScalarType dtype, int axis=1, "
        "bool div_mode=True) -> Tensor",
        "Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, "
        "bool div_mode=True) -> Tensor",
    ),
    "npu_dynamic_quant": (
        "Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
        "ScalarType? dst_type=None) -> (Tensor, Tensor)",
        "Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
        'int? dst_type=None, str quant_mode="pertoken", float dst_type_max=0.0) '
        "-> (Tensor, Tensor)",
    ),
    "npu_trans_quant_param": (
        "Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
        "Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
    ),
    "npu_format_cast": (
        "Tensor input, int acl_format, int? customize_dtype=None) -> Tensor",
        "Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) "
        "-> Tensor",
    ),
}
SCHEMA = re.compile(rb"\0(?:npu::)?(%s)\(([^\0]*)(?=\0)" % "|".join(SCHEMAS).encode())

TORCHAIR = PurePosixPath("torch_npu/dynamo/torchair")


class Wheel:
    """One wheel, read as a zip file."""

    def __init__(self, path: Path) -> None:
        self.zip = ZipFile(path)
        self.names = frozenset(self.zip.namelist())
        self.version = path.name.split("-")[1]
        self.libraries = {
            PurePosixPath(name).name: self.zip.read(name)
            for name in sorted(self.names)
            if name.endswith(".so")
        }

    def imports(self) -> set[str]:
        """The symbols its libraries import from CANN's."""
        wanted: set[str] = set()
        own: set[str] = set()
        for name, content in self.libraries.items():
            imported, exported = symbols(content)
            own |= exported
            if name != NOT_LOADED:
                wanted |= imported
        wanted = {name for name in wanted - own if not OF_OTHERS.match(name)}
        if not wanted:
            raise SystemExit(f"torch_npu {self.version} asks for no symbol of CANN")
        return wanted

    def aclnn(self) -> set[str]:
        found = {name.decode() for name in ACLNN.findall(self.libraries["libtorch_npu.so"])}
        if not found:  # the pattern would then find nothing in any wheel
            raise SystemExit(f"torch_npu {self.version} looks up no aclnn operator that is known")
        return found

    def schemas(self) -> dict[str, str]:
        found = SCHEMA.findall(self.libraries["libtorch_npu.so"])
        return {name.decode(): rest.decode() for name, rest in found}

    def has_torchair(self, module: str, name: str) -> bool:
        """Whether a module of torchair defines or imports a name, or has a module of that name."""
        path = TORCHAIR.joinpath(*module.split(".")[1:])
        places = (path.with_suffix(".py"), path / "__init__.py")
        if {str(path / name) + ".py", str(path / name / "__init__.py")} & self.names:
            return True
        for place in map(str, places):
            if place in self.names:
                return name in top_level(self.zip.read(place).decode())
        return False

    def headers(self) -> tuple[str, list[str]]:
        """The folder of GE's headers, and the files in it."""
        found = [name for name in self.names if name.endswith(f"/{GE_HEADER}")]
        folder = min(found, key=lambda name: (name.count("/"), name)).removesuffix(GE_HEADER)
        names = sorted(name for name in self.names if name.startswith(folder))
        return folder, [name for name in names if "/csrc/" not in name.removeprefix(folder)]


def symbols(content: bytes) -> tuple[set[str], set[str]]:
    """Names that a library imports, and names that it exports. Imports with a version of their own
    are those of the C and C++ libraries, and weak ones need not be there."""
    file = ELFFile(BytesIO(content))
    table, versions = file.get_section_by_name(".dynsym"), file.get_section_by_name(".gnu.version")
    assert isinstance(table, SymbolTableSection)
    assert versions is None or isinstance(versions, GNUVerSymSection)
    imported: set[str] = set()
    exported: set[str] = set()
    for index, symbol in enumerate(table.iter_symbols()):
        if symbol["st_shndx"] != "SHN_UNDEF":
            exported.add(symbol.name)
        elif symbol["st_info"]["bind"] == "STB_GLOBAL":
            version = versions.get_symbol(index)["ndx"] if versions else "VER_NDX_GLOBAL"
            if isinstance(version, str):
                imported.add(symbol.name)
    return imported, exported


def top_level(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def torchair_names() -> list[tuple[str, str]]:
    """Module and name of each import of torchair in converters/_torchair.py that no `try` holds."""
    tree = ast.parse((ROOT / "converters" / "_torchair.py").read_text())
    tried = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for inner in ast.walk(node)
    }
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in tried
        if node.module.split(".")[0] == "torchair"
        for alias in node.names
    ]


@cache
def exports() -> frozenset[str]:
    """What libcann_host.so exports."""
    directory = _native.library_directory()
    if directory is None:
        raise SystemExit("cann_host has no native libraries here: pip install -e . first")
    return frozenset(symbols((directory / _native.NAMES[0]).read_bytes())[1])


class Checker:
    """Compares wheels with this checkout. Headers that several wheels share are compiled once."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.known: dict[str, list[str]] = {}
        self.torchair = torchair_names()

    def check(self, wheel: Wheel) -> tuple[list[str], list[str]]:
        """The cells of a wheel's line, and what is missing."""
        imported, looked_up, schemas = wheel.imports(), wheel.aclnn(), wheel.schemas()
        other = [
            f"{name}({schemas.get(name, ' is not there')}"
            for name, known in SCHEMAS.items()
            if schemas.get(name) not in known
        ]
        of_train = (
            train
            for index, train in enumerate(TRAINS)
            if all(schemas.get(name) == known[index] for name, known in SCHEMAS.items())
        )
        train = next(of_train, "mixed")
        absent = [f"{m}.{n}" for m, n in self.torchair if not wheel.has_torchair(m, n)]
        layouts = self.layouts(wheel)
        parts: list[tuple[str, str, Iterable[str]]] = [
            ("symbol", str(len(imported)), imported - exports()),
            ("aclnn", str(len(looked_up)), looked_up - exports()),
            ("schema", train, other or ([] if train != "mixed" else ["of both trains"])),
            ("torchair", str(len(self.torchair)), absent),
            ("layout", "same", layouts),
        ]
        cells = [
            f"{cell}, {len(missing)} missing" if missing else cell
            for _, cell, found in parts
            for missing in [list(found)]
        ]
        return cells, [f"{what} {name}" for what, _, found in parts for name in sorted(found)]

    def layouts(self, wheel: Wheel) -> list[str]:
        """The lines that differ between its headers and ge_abi.h."""
        include, names = wheel.headers()
        digest = sha256(b"".join(wheel.zip.read(name) for name in names)).hexdigest()
        if digest not in self.known:
            folder = self.scratch / digest
            wheel.zip.extractall(folder, names)
            ours, theirs = compare_layouts(self.scratch, folder / include)
            self.known[digest] = sorted(set(ours.splitlines()) ^ set(theirs.splitlines()))
        return self.known[digest]


def download(versions: Iterable[str], machine: str, folder: Path) -> list[Path]:
    """The wheels of one machine, for the Python that all of them have."""
    paths = []
    for version in versions:
        pattern = f"torch_npu-{version}-*_{machine}.whl"
        if not [*folder.glob(pattern)]:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
            command += [f"--platform=manylinux_2_28_{machine}", f"--dest={folder}"]
            subprocess.run([*command, f"torch_npu=={version}"], check=True, cwd=folder)
        paths.append(next(folder.glob(pattern)))
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=[one.torch_npu for one in VERSIONS])
    parser.add_argument("--machine", default="x86_64", choices=["x86_64", "aarch64"])
    parser.add_argument("--wheels", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.wheels or Path(scratch, "wheels")
        folder.mkdir(parents=True, exist_ok=True)
        paths = download(given.versions, given.machine, folder.absolute())
        checker = Checker(Path(scratch))
        lines = [["torch_npu", "symbols of CANN", "aclnn", "schemas", "torchair", "layouts"]]
        failures = []
        for path in paths:
            wheel = Wheel(path)
            cells, missing = checker.check(wheel)
            lines.append([wheel.version, *cells])
            failures += [f"torch_npu {wheel.version}: {what}" for what in missing]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(given.machine)
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    for failure in failures:
        print(f"missing or new: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
