"""Imports in every situation of a user, each in a separate process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.processes import output_of, python, script

ROOT = Path(__file__).parents[2]
REAL = ("CANN_", "TORCH_DEVICE")  # variables of the suite that a user has not


@pytest.mark.slow
def test_without_torch_npu() -> None:
    command = script("imports.py without_torch_npu")
    output_of(python(*command, without=REAL, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="this machine has CANN: import works"
)
def test_with_torch_npu_but_no_cann_says_what_to_do() -> None:
    result = python("-c", "import lq_graph", without=REAL)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: lq_graph: torch_npu is installed, but neither CANN nor")
    assert "set_env.sh" in message
    assert "python -m cann_host" in message
    assert "lib" + "hccl.so" not in result.stderr  # no stack of loader errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        "lq_graph torch_npu torchair",
        pytest.param("torch_npu torchair lq_graph", marks=pytest.mark.slow),
        pytest.param("torch_npu torchair lq_graph.converters", marks=pytest.mark.slow),
    ],
)
def test_any_import_order_lowers(names: str) -> None:
    output_of(python(*script(f"imports.py in_order {names}"), without=REAL))


@pytest.mark.slow
def test_without_transformers() -> None:
    """Every name can be imported; Config says what it needs when it is called."""
    program = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import lq_graph\n"
        "from lq_graph import *\n"
        "assert Config is lq_graph.Config\n"
        "try:\n"
        "    Config()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    said = output_of(python("-c", program, without=REAL, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    assert said.startswith("lq_graph.Config needs transformers: ")
    assert said.strip().endswith("What to do: pip install transformers.")


# What a program may have under the name of our package: beside a wheel of ours it is found first.
SHADOWS = {
    "a module, imported": {"converters.py": "mine = 1\n"},
    "a package, imported": {"converters/__init__.py": "mine = 1\n", "converters/graph.py": ""},
    "a folder, found": {"converters/notes.txt": ""},
    "a module, found": {"converters.py": "raise ValueError('not to be imported')\n"},
}


@pytest.mark.slow
@pytest.mark.parametrize("shadow", SHADOWS)
def test_a_module_of_that_name_of_the_user_s_own(shadow: str, tmp_path: Path) -> None:
    for name, text in SHADOWS[shadow].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = script(f"imports.py beside {tmp_path} {'found' not in shadow}")
    output_of(python(*command, without=REAL))
