"""When the kernel's library is used: switches, other sources, threads and processes."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cann_host
import lq_graph
from cann_host import _native, runtime
from lq_graph.kernels import calls, library
from support.native import by_torch, needs_kernel, values
from support.processes import output_of, python, script

pytestmark = pytest.mark.native
I8, I32, F16, BF16, F32 = torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def asked_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Look for the kernel again, and once more afterwards."""
    library.loaded.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.loaded.cache_clear()


@pytest.mark.parametrize("value", ["0", "off", "false", "no", "OFF", " False "])
def test_it_can_be_switched_off(value: str, asked_again: pytest.MonkeyPatch) -> None:
    asked_again.setenv("LQ_GRAPH_NATIVE", value)
    assert library.loaded() is None


@needs_kernel
@pytest.mark.parametrize("value", ["", "1", "on", "true", "Yes"])
def test_it_can_be_asked_for(value: str, asked_again: pytest.MonkeyPatch) -> None:
    asked_again.setenv("LQ_GRAPH_NATIVE", value)
    assert library.loaded() is not None


@needs_kernel
def test_it_can_be_an_instruction_set(asked_again: pytest.MonkeyPatch) -> None:
    for name in library.instruction_sets():
        library.loaded.cache_clear()
        asked_again.setenv("LQ_GRAPH_NATIVE", name)
        found = library.loaded()
        assert found is not None and found.instruction_set == name
        other = found.can[-1]
        with library.using(other):
            assert found.instruction_set == other
        assert found.instruction_set == name
        with pytest.raises(ValueError, match="instruction set 'mmx'; this processor has "):
            found.use("mmx")


@needs_kernel
def test_an_instruction_set_that_is_not_there(asked_again: pytest.MonkeyPatch) -> None:
    found = library.loaded()
    assert found is not None
    name = next((name for name, (has, _) in found.sets.items() if not has), None)
    if name is None:
        pytest.skip("this processor has all of them")
    library.loaded.cache_clear()
    asked_again.setenv("LQ_GRAPH_NATIVE", name)
    text = f"LQ_GRAPH_NATIVE is '{name}', which this processor does not have; .*{found.can[0]}"
    with pytest.warns(RuntimeWarning, match=text):
        assert library.loaded() is None


def test_another_value_gives_a_warning(asked_again: pytest.MonkeyPatch) -> None:
    asked_again.setenv("LQ_GRAPH_NATIVE", "perhaps")
    text = "LQ_GRAPH_NATIVE is 'perhaps'; allowed are 0, off, false, no .* not used now"
    with pytest.warns(RuntimeWarning, match=text):
        assert library.loaded() is None


def build(path: Path, source: str) -> Path:
    """A library of this C++ source, as an older or another checkout would have built it."""
    path.parent.mkdir(parents=True)
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-shared", "-fPIC", "-", "-o", str(path)]
    try:
        subprocess.run(command, input=source, text=True, check=True)
    except OSError:
        pytest.skip("no compiler")
    return path


# a kernel that would write where its struct ends, were it called
_OLD = """extern "C" { int lq_targets() { return 1; } int lq_matmul(void*) { return 0; } }"""

_OTHER = _OLD + """ extern "C" const char* lq_sources() { return "other"; }"""


@pytest.mark.parametrize("source", [_OLD, _OTHER], ids=["older", "other"])
def test_a_library_of_other_sources_is_left_alone(
    source: str, tmp_path: Path, asked_again: pytest.MonkeyPatch
) -> None:
    """Torch computes the same, so it is a warning, once."""
    build(tmp_path / "lib" / library.NAME, source)
    here = str(Path(library.__file__).parent)
    asked_again.setattr(library, "__path__", [str(tmp_path), here])
    x, weight, scale = values(4, 64), values(8, 64), torch.rand(8)
    text = "built from other sources than the Python beside it: run pip install -e . again"
    with pytest.warns(RuntimeWarning, match=text):
        out = lq_graph.linear_quant(x, weight, scale, output_dtype=BF16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert library.loaded() is None
    assert torch.equal(out, by_torch(x, weight, scale, output_dtype=BF16))


STRUCTS = [("LqMatmul", calls.MATMUL), ("LqQuantize", calls.QUANTIZE)]


@needs_kernel
def test_a_struct_of_another_size_is_not_read() -> None:
    found = library.loaded()
    assert found is not None
    for function, call in ((found.matmul, calls.MATMUL), (found.quantize, calls.QUANTIZE)):
        size = call.size + 8
        assert function(bytes(size), size) == 3


_OLD_STAND_IN = """extern "C" int cann_host_entries() { return 0; }"""


@pytest.mark.parametrize("says", ["", "other"])
def test_the_stand_in_takes_no_library_of_other_sources(
    says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    symbol = f'extern "C" const char* cann_host_sources() {{ return "{says}"; }}'
    path = build(tmp_path / "lib" / _native.NAMES[0], _OLD_STAND_IN + (says and symbol))
    monkeypatch.setattr(_native, "library_directory", lambda: path.parent)
    text = "were built from other sources than the Python beside them: run pip install -e . again"
    with pytest.raises(cann_host.CannHostError, match=text):
        runtime.open_library()


def test_the_libraries_here_are_of_these_sources() -> None:
    directory = _native.library_directory()
    if directory is None or _native.sources() is None:
        pytest.skip("not built here")
    assert _native.built_from(directory) == _native.sources()


# ---- threads and processes ----


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ("4", {"OMP_STACKSIZE": "16k"}),
        ("1000", {"OMP_THREAD_LIMIT": "300"}),
        ("4 more", {}),
    ],
    ids=["small stacks", "more threads than there may be", "fork, and from 12 threads"],
)
def test_in_a_process_of_its_own(arguments: str, environment: dict[str, str]) -> None:
    command = script(f"kernel_threads.py exact {arguments}")
    done = python(*command, TORCH_DEVICE_BACKEND_AUTOLOAD="0", limit=120, **environment)
    assert output_of(done) == "done\n"


@pytest.mark.parametrize(("name", "packed"), STRUCTS)
def test_the_calls_have_the_layout_the_kernels_read(name: str, packed: struct.Struct) -> None:
    """Pointers, 64-bit numbers, 32-bit ones."""
    source = (Path(lq_graph.__file__).parent / "kernels" / "csrc" / "call.h").read_text()
    body = source.split(f"struct {name} {{")[1].split("};")[0]
    fields = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()]
    kinds = ""
    for field in filter(None, fields):
        kind = "q" if "*" in field or field.startswith("int64_t") else "i"
        kinds += kind * (field.count(",") + 1)
    assert kinds == "".join(kind * int(n) for n, kind in re.findall(r"(\d+)(\w)", packed.format))


@pytest.mark.parametrize(
    ("steps", "available", "want"),
    [
        (0, 64, 1),
        ((1 << 18) - 1, 64, 1),
        (1 << 18, 64, 2),
        (1 << 18, 1, 1),
        (576 * 576, 64, 2),
        (1 << 20, 4, 4),
        (1 << 20, 64, 8),
        (1 << 24, 64, 64),
        (1 << 40, 64, 64),
    ],
)
def test_each_thread_has_enough_to_do(
    steps: int, available: int, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: available)
    assert calls.threads_for(steps) == want
