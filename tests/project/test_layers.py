"""The tree: which part may import which, and names that hide no module.

The table is the design. An import that it does not allow is a decision to make, in design and
table, and no line to add in passing.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import get_type_hints

import pytest

import lq_graph
from lq_graph.ops import OPERATORS

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
FOLDERS = {
    "lq_graph": ROOT / "lq_graph",
    "lq_graph.converters": ROOT / "converters",
    "cann_host": ROOT / "cann_host",
}

# Parts, the lowest first: the folders of lq_graph, and its modules outside them.
BASE = {"errors", "reports"}
RULES = BASE | {"kernels", "rules"}
OPS = RULES | {"backends", "ops"}
MODULES = OPS | {"modules"}
ALL = MODULES | {
    "quantization",
    "checkpoints",
    "parallel",
    "analysis",
    "converters",
    "forecast",
    "fusion",
    "integrations",
}
DOCTOR = ALL | {"torch", "torch_npu", "torchair", "cann_host"}  # in other processes


@dataclass(frozen=True)
class Allowed:
    """What a part may import: of lq_graph, of other packages, and of both inside functions only,
    because not every user has them or because they are slow to import."""

    ours: set[str]
    others: set[str]
    late: frozenset[str] = frozenset()


NPU = frozenset({"torch_npu", "torchair"})
TABLE = {
    "_import_torch": Allowed({"_cuda_build"}, {"torch"}),
    "_cuda_build": Allowed({"doctor"}, set()),  # its packages, which need no torch
    "errors": Allowed(set(), set()),
    "reports": Allowed(set(), set()),
    "kernels": Allowed(set(), {"torch"}),
    "rules": Allowed(BASE | {"kernels"}, {"torch"}),
    "backends": Allowed(RULES, {"torch"}, NPU),
    # The records name functions of these; what is imported at the first call counts here too.
    "ops": Allowed({"errors", "rules", "backends", "converters", "parallel", "fusion"}, {"torch"}),
    "modules": Allowed(OPS, {"torch", "tqdm"}, NPU),
    "quantization": Allowed(MODULES, {"torch", "tqdm"}),
    "fusion": Allowed(MODULES, {"torch"}, NPU),
    "checkpoints": Allowed(MODULES, {"torch"}),
    "parallel": Allowed(MODULES, {"torch"}),
    "forecast": Allowed(BASE | {"rules"}, {"torch"}),
    "analysis": Allowed(ALL, {"torch", "tqdm"}, NPU | {"matplotlib"}),
    "integrations": Allowed(ALL, {"torch", "transformers", "peft"}, NPU | {"accelerate"}),
    "converters": Allowed(RULES | {"ops"}, {"torch", "torch_npu", "torchair", "google"}),
    "doctor": Allowed(BASE, set(), frozenset(DOCTOR | {"lq_graph"})),
    # --help must work without torch
    "commands": Allowed({"errors", "doctor"}, set(), frozenset(ALL | {"torch"} | NPU)),
    "command_line": Allowed({"lq_graph", "errors", "reports", "commands"}, set()),
    "__main__": Allowed({"command_line"}, set()),
    "lq_graph": Allowed(ALL | {"_import_torch"}, set()),
    "cann_host": Allowed({"kernels"}, {"torch"}, NPU),
}

# files, by how they begin, that may import private modules of torch
PRIVATE = {
    "lq_graph/backends/compat.py": {
        "torch._C",
        "torch._dynamo",
        "torch._functorch",
        "torch._guards",
        "torch._inductor",
        "torch._ops",
        "torch._subclasses",
    },
    "lq_graph/ops.py": {"torch._ops"},  # a type
    "lq_graph/modules/": {"torch.utils._pytree"},
    "lq_graph/quantization/": {"torch.utils._pytree", "torch.utils._python_dispatch"},
    "lq_graph/parallel/": {"torch.distributed._functional_collectives"},
    "lq_graph/analysis/": {
        "torch._subclasses",
        "torch.utils._pytree",
        "torch.utils._python_dispatch",
    },
}


@dataclass(frozen=True)
class Import:
    """An import of a file: the module or package named, in full, and where it stands."""

    file: str
    part: str
    line: int
    name: str
    where: str  # module, function or typing

    @property
    def target(self) -> str:
        """The part of lq_graph, or the other package, that is imported."""
        first, *rest = self.name.split(".")
        return rest[0] if first == "lq_graph" and rest else first

    @property
    def ours(self) -> bool:
        return self.name.split(".")[0] == "lq_graph"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.where}) imports {self.name}"


def files() -> Iterator[tuple[str, Path]]:
    """Every module with its name and file."""
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if package == "lq_graph" and parts[0] == "converters":  # the link
                continue
            yield ".".join((package, *parts)).removesuffix(".__init__"), file


def imports() -> Iterator[Import]:
    """Every import statement, in functions too."""
    for module, file in files():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        top, *below = module.split(".")
        part = "cann_host" if top == "cann_host" else below[0] if below else "lq_graph"
        for node, where in statements(ast.parse(file.read_text())):
            for name in named(node, package):
                yield Import(str(file.relative_to(ROOT)), part, node.lineno, name, where)


def statements(
    tree: ast.AST, where: str = "module"
) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, where
        inside = where
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = "function"
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inside = "typing"
        yield from statements(node, inside)


def named(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Full names of the modules a statement imports; of what is no module, its module's."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    own = {name for name, _ in files()}
    return [
        full if (full := f"{base}.{alias.name}") in own or full.startswith("torch._") else base
        for alias in node.names
    ]


EVERY = [found for found in imports() if found.name.split(".")[0] not in sys.stdlib_module_names]


def refused(found: Import) -> bool:
    allowed = TABLE[found.part]
    if found.where == "typing":  # it costs nothing and makes no cycle
        return False
    late = allowed.late if found.where == "function" else set()
    if found.ours:
        return found.target not in allowed.ours | late | {found.part}
    here = allowed.others | late
    own = found.part == found.target == "cann_host"
    return not own and found.target not in here


def test_every_import_is_in_the_table() -> None:
    assert {part for part in TABLE if part != "cann_host"} >= {found.part for found in EVERY} - {
        "cann_host"
    }
    assert not [str(found) for found in EVERY if refused(found)]


def test_what_is_imported_by_name_is_in_the_table() -> None:
    for operator in OPERATORS:
        named = {
            value.partition(".")[0]
            for value in vars(operator).values()
            if isinstance(value, str) and ":" in value
        }
        assert named <= TABLE["ops"].ours
    assert {home.partition(".")[0] for home in lq_graph._HOMES} <= TABLE["lq_graph"].ours


def test_private_modules_of_torch_are_imported_in_the_files_named() -> None:
    private = {
        (found.file, match[0])
        for found in EVERY
        if found.part != "cann_host"
        and (match := re.match(r"torch(\.[a-z]\w*)*\._\w+", found.name))
    }
    allowed = {
        (file, name)
        for file, name in private
        if any(file.startswith(begin) and name in names for begin, names in PRIVATE.items())
    }
    assert allowed and private == allowed


def test_the_table_can_refuse() -> None:
    """Slips of every kind, so that an empty list above means something."""
    for slip in (
        Import("lq_graph/rules/plan.py", "rules", 1, "lq_graph.modules.walk", "function"),
        Import("lq_graph/kernels/native.py", "kernels", 1, "lq_graph.rules.plan", "module"),
        Import("lq_graph/modules/prepare.py", "modules", 1, "torchair", "module"),
        Import("lq_graph/kernels/native.py", "kernels", 1, "numpy", "function"),
        Import("cann_host/ge.py", "cann_host", 1, "lq_graph.rules.tables", "module"),
        Import("cann_host/ge.py", "cann_host", 1, "lq_graph", "module"),
        Import("lq_graph/doctor/cann.py", "doctor", 1, "lq_graph.rules.tables", "module"),
        Import("lq_graph/doctor/cann.py", "doctor", 1, "torch", "module"),
    ):
        assert refused(slip), slip
    assert {found.where for found in EVERY} == {"module", "function", "typing"}
    assert len(EVERY) > 300


# ---- names ----

PACKAGES = sorted({name for name, file in files() if file.name == "__init__.py"})


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "cann_host"])
def test_no_name_hides_a_module(name: str) -> None:
    """`import lq_graph.rules.plan as p` gives the module, whatever the package holds."""
    package = importlib.import_module(name)
    for module, file in files():
        parent, _, child = module.rpartition(".")
        if parent == name and not child.startswith("__"):
            if (module, file.name) != (name, "__init__.py"):
                importlib.import_module(module)
            assert isinstance(getattr(package, child), ModuleType), module
    assert name != "lq_graph" or not {*lq_graph.__all__} & {
        module.split(".")[1] for module, _ in files() if module.count(".") == 1
    }


def test_the_public_names_are_said_the_same_three_times() -> None:
    """__all__ is what a reader sees, the imports under TYPE_CHECKING what mypy sees, _HOMES what
    runs."""
    tree = ast.parse((ROOT / "lq_graph" / "__init__.py").read_text())
    typed = {
        (node.module, alias.name)
        for node, where in statements(tree)
        if where == "typing" and isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(home, name) for home, names in lq_graph._HOMES.items() for name in names}
    eager = {operator.name for operator in OPERATORS if operator.public}
    assert {*lq_graph.__all__} == {name for _, name in typed} | eager
    for name in lq_graph.__all__:
        assert getattr(lq_graph, name).__module__.startswith("lq_graph."), name
        assert name in dir(lq_graph)
    with pytest.raises(AttributeError, match="module 'lq_graph' has no attribute 'quantise'"):
        lq_graph.quantise  # noqa: B018


@pytest.mark.parametrize("name", lq_graph.__all__)
def test_type_hints_of_public_names_resolve(name: str) -> None:
    """typing.get_type_hints reads a module's names as they are when it runs."""
    public = getattr(lq_graph, name)
    own = [value for value in vars(public).values() if isinstance(value, FunctionType)]
    for found in [public, *(own if isinstance(public, type) else ())]:
        assert isinstance(get_type_hints(found), dict)


@pytest.mark.slow
def test_modules_of_the_user_s_own_hide_none_of_ours(tmp_path: Path) -> None:
    packages = {"lq_graph", "cann_host", "transformers", "peft"}  # that ours import by these names
    for name in {module.rpartition(".")[2] for module, _ in files()} - packages:
        if name not in sys.stdlib_module_names and not name.startswith("__"):
            (tmp_path / f"{name}.py").write_text("raise ValueError('not to be imported')\n")
    run(
        "import torch, lq_graph\n"
        "layer = lq_graph.LinearQuant(16, 8)\n"
        "assert layer(torch.ones(2, 16, dtype=torch.int8)).shape == (2, 8)\n"
        "assert lq_graph.check(torch.int8)\n"
        "for name in lq_graph.__all__:\n"
        "    getattr(lq_graph, name)\n",
        cwd=tmp_path,
    )


# ---- what an import loads ----

OWN = {"lq_graph", "lq_graph._import_torch", "lq_graph.errors", "lq_graph.ops"}


def run(program: str, cwd: Path | None = None) -> str:
    """The output of a program in a separate process, without torch_npu."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_lq_graph_is_light() -> None:
    """It loads three of its own modules, in at most a twentieth of the time of torch: 50 ms."""
    torch_took, took, *loaded = run(
        "import sys, time\n"
        "start = time.process_time()\n"
        "import torch\n"
        "torch_took, before = time.process_time() - start, {*sys.modules}\n"
        "start = time.process_time()\n"
        "import lq_graph\n"
        "print(torch_took, time.process_time() - start, *({*sys.modules} - before))\n"
        "assert torch.ops.lq_graph.linear_quant.default\n"
    ).split()
    assert {name for name in loaded if name not in sys.stdlib_module_names} == OWN
    assert float(took) < float(torch_took) / 20
