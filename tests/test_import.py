"""Importing in every situation a user can be in, each in a process of its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ROW = "lq_graph.LinearQuant(16, 8)(torch.ones(2, 16, dtype=torch.int8)).shape == (2, 8)"


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CANN_", "TORCH_DEVICE"))}
    return subprocess.run(
        [sys.executable, *args, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**clean, **env},
    )


def test_without_torch_npu() -> None:
    result = python(
        "import sys; sys.modules['torch_npu'] = sys.modules['torchair'] = None\n"
        "import torch, lq_graph\n"
        f"assert {ROW}\n"
        "layer = lq_graph.LinearQuant(16, 8)\n"
        "compiled = torch.compile(layer, fullgraph=True)\n"
        "assert compiled(torch.ones(2, 16, dtype=torch.int8)).shape == (2, 8)\n",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(
    os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="this machine has CANN: import works"
)
def test_with_torch_npu_but_no_cann_says_what_to_do() -> None:
    result = python("import lq_graph")
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: lq_graph: torch_npu is installed, but neither CANN nor")
    assert "set_env.sh" in message
    assert "python -m cann_host" in message
    assert "lib" + "hccl.so" not in result.stderr  # no stack of loader errors


@pytest.mark.parametrize(
    "imports",
    [
        "import lq_graph, torch_npu, torchair",
        "import torch_npu, torchair, lq_graph",
        "import torch_npu, torchair, lq_graph.converters",
    ],
)
def test_any_import_order_lowers(imports: str) -> None:
    result = python(
        "import os\n"
        "if os.environ.get('LQ_GRAPH_TEST_NPU') != '1':\n"
        "    import cann_host; cann_host.activate()\n"
        f"{imports}\n"
        "import torch, lq_graph, torchair as tng\n"
        "layer = lq_graph.LinearQuant(16, 8).npu()\n"
        "x = torch.ones(2, 16, dtype=torch.int8).npu()\n"
        "backend = tng.get_npu_backend(compiler_config=tng.CompilerConfig())\n"
        "compiled = torch.compile(layer, backend=backend, dynamic=False, fullgraph=True)\n"
        "assert torch.equal(compiled(x).cpu(), layer(x).cpu())\n"
    )
    assert result.returncode == 0, result.stderr


# What a program may have under the name of our package: beside a wheel of ours it is found first.
SHADOWS = {
    "a module, imported": {"converters.py": "mine = 1\n"},
    "a package, imported": {"converters/__init__.py": "mine = 1\n", "converters/graph.py": ""},
    "a folder, found": {"converters/notes.txt": ""},
    "a module, found": {"converters.py": "raise ValueError('not to be imported')\n"},
}


@pytest.mark.parametrize("shadow", SHADOWS)
def test_a_module_of_that_name_of_the_user_s_own(shadow: str, tmp_path: Path) -> None:
    for name, text in SHADOWS[shadow].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    imported = "" if "found" in shadow else "import converters"
    result = python(
        "import os, sys\n"
        "from importlib.machinery import PathFinder\n"
        "class First:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'converters':\n"
        f"            return PathFinder.find_spec(name, [{str(tmp_path)!r}])\n"
        "sys.meta_path.insert(0, First)\n"
        f"{imported}\n"
        "if os.environ.get('LQ_GRAPH_TEST_NPU') != '1':\n"
        "    import cann_host; cann_host.activate()\n"
        "import torch, torch_npu, lq_graph, torchair as tng\n"
        "layer = lq_graph.LinearQuant(16, 8).npu()\n"
        "x = torch.ones(2, 16, dtype=torch.int8).npu()\n"
        "backend = tng.get_npu_backend(compiler_config=tng.CompilerConfig())\n"
        "compiled = torch.compile(layer, backend=backend, dynamic=False, fullgraph=True)\n"
        "assert torch.equal(compiled(x).cpu(), layer(x).cpu())\n"
        "story = lq_graph.explain(lq_graph.LinearQuant(16, 8), (x.cpu(),))\n"
        "assert story.layers[0].ours.ops() == ['QuantBatchMatmulV3']\n"
        "mine = sys.modules.get('converters')\n"
        f"assert {'mine and ' if imported else 'not mine or '}not hasattr(mine, 'register')\n"
    )
    assert result.returncode == 0, result.stderr


# package -> what its modules may import outside functions, beside the standard library
LAYERS = {
    "lq_graph": {"torch", "tqdm", "lq_graph"},
    "converters": {"torch", "torch_npu", "torchair", "google", "lq_graph", "converters"},
    "cann_host": {"torch", "lq_graph.kernels", "cann_host"},
}


@pytest.mark.parametrize("package", LAYERS)
def test_dependencies_point_one_way(package: str) -> None:
    found = set()
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                module = node.module or ""
                found |= {f"{module}.{alias.name}" for alias in node.names}
    strangers = {
        name
        for name in found
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(f"{name}.".startswith(f"{allowed}.") for allowed in LAYERS[package])
    }
    assert found
    assert not strangers
