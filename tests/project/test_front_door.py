"""What a newcomer types by mistake is answered in a sentence, with exit code 2 and no traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import cann_host
from cann_host import importing, launcher, runtime
from cann_host.options import CannHostError, Options
from lq_graph import command_line
from lq_graph.commands import extras
from support.processes import python, script

REAL = ("CANN_", "TORCH_DEVICE")  # variables of the suite that a user has not

on_stand_in = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what people point at."""
    files = {
        "bad.py": "import torch\nx = = 1\n",
        "run.sh": "#!/bin/sh\necho $1\n",
        "needs.py": "import nothing_of_this_name\ndef f(): pass\n",
        "pk_front/__init__.py": "",
        "sub/own.py": "import beside\ndef f(): return beside.model()\n",
        "sub/beside.py": (
            "from torch import nn, ones\ndef model(): return nn.Linear(4, 4), (ones(2, 4),)\n"
        ),
        "m_front.py": (
            "import torch, lq_graph\n"
            "number = 3\n"
            "def nothing(): pass\n"
            "def asks(size): pass\n"
            "def pair(): return 1, 2\n"
            "def bare(): return lq_graph.LinearQuant(16, 8), torch.ones(2, 16).char()\n"
            "def wrong(): return lq_graph.LinearQuant(16, 8), (torch.ones(2, 9).char(),)\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@on_stand_in
@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("nosuch.py", "no such script: nosuch.py"),
        ("sub", "sub is a folder without __main__.py"),
        ("-m nosuch", "no such module: nosuch"),
        ("-m nosuch.part", "no such module: nosuch.part"),
        ("-m pk_front", "no such module: pk_front.__main__"),
        ("-m pk_front.nosuch", "no such module: pk_front.nosuch"),
        ("-m m_front.py", "-m takes the name of a module; for the file, leave -m out: m_front.py"),
        ("-m .m_front", "'.m_front' is not the name of a module"),
        ("--memory much m_front.py", "memory is 'much'; a size is like 8GiB"),
        ("--fail aclnnNothing:1 m_front.py", "fail names aclnnNothing, which this stand-in does"),
    ],
)
def test_cann_host(command: str, text: str, folder: Path, capsys, monkeypatch) -> None:
    if "--fail" in command:  # asked before anything is imported: as in a new process
        monkeypatch.setattr(runtime, "_current", None)
        monkeypatch.setattr(importing, "check_possible", lambda: None)
    assert launcher.main(command.split()) == 2
    assert capsys.readouterr().err.startswith(f"cann_host: {text}")


def test_cann_host_lets_a_module_s_own_error_through(folder: Path) -> None:
    (folder / "pk_broken").mkdir()
    (folder / "pk_broken/__init__.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        launcher._why_no_module("pk_broken.part", active=True)


@pytest.mark.parametrize("memory", ["1", "1b", "8GiB", "0.5 k", "8388607TiB", 2**63 - 1, 4e9])
def test_memory_that_is_taken(memory: object) -> None:
    given = {"1": 1, "1b": 1, "8GiB": 8 << 30, "0.5 k": 512, "8388607TiB": 8388607 << 40}
    assert Options.of(memory=memory).memory == given.get(str(memory), memory)


NO_SIZE = ["0", "-1", "nan", "inf", "1e30", 1e30, "0.5", "0.9B", "8 XiB", "1_000", "8GiBs", True]
TOO_LARGE = [2**63, 2**64, 2**64 + 4096, "8388608TiB", "9" * 41, "9" * 5000]


@pytest.mark.parametrize("memory", NO_SIZE + TOO_LARGE, ids=lambda value: str(value)[:20])
def test_memory_that_is_no_size(memory: object) -> None:
    with pytest.raises(CannHostError, match="from 1 to 9223372036854775807 bytes"):
        Options.of(memory=memory)


@pytest.mark.parametrize(
    "devices", [0, -1, 65, 2**64, "two", "1.0", 1.5, "nan", "1e1", True, "9" * 5000]
)
def test_devices_that_are_no_number(devices: object) -> None:
    with pytest.raises(CannHostError, match="it must be a number from 1 to 64"):
        Options.of(devices=devices)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    text: str = capsys.readouterr().err
    return text.split(": error: ", 1)[1]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("nosuch", "argument COMMAND: invalid choice: 'nosuch'"),
        ("check --x1 int9", "argument --x1: 'int9' is not a dtype; write int8, int4"),
        ("check --x1 int8[2", "argument --x1: 'int8[2' is not of the form int8 or int8[16,512]"),
        ("check --x1 int8[-1]", "argument --x1: 'int8[-1]' is not of the form"),
        ("check --output nosuch", "argument --output: 'nosuch' is not a dtype"),
        ("check --product A9", "check: 'A9' is not a product that lq_graph knows"),
        ("check more", "check: 'more' is not FILE.py:FUNCTION"),
        ("check m_front.py:pair more", "unrecognized arguments: more"),
        ("explain", "the following arguments are required: model"),
        (
            "explain m_front.py",
            "explain: 'm_front.py' is neither FILE.py:FUNCTION nor a folder with a",
        ),
        ("explain :f", "explain: ':f' is not FILE.py:FUNCTION"),
        ("explain no.py:f", "explain: there is no file no.py"),
        ("explain no.such:f", "explain: no.such: No module named 'no'"),
        ("explain nosuch.sh:f", "explain: nosuch.sh: No module named 'nosuch'"),
        ("explain a-b.txt:f", "explain: a-b.txt is neither a file NAME.py nor the name of"),
        ("explain ..m_front:f", "explain: ..m_front is neither a file NAME.py nor the name"),
        ("explain bad.py:f", 'explain: bad.py is not Python\n  File "bad.py", line 2'),
        ("explain needs.py:f", "explain: needs.py: No module named 'nothing_of_this_name'"),
        ("explain m_front.py:gone", "explain: m_front.py has no function gone"),
        ("explain m_front:number", "explain: m_front has no function number"),
        (
            "explain m_front.py:asks",
            "explain: m_front.py:asks is called without arguments: missing",
        ),
        ("explain m_front.py:nothing", "explain: m_front.py:nothing returned NoneType; it has to"),
        (
            "explain m_front.py:pair",
            "explain: m_front.py:pair returned (int, int); it has to return",
        ),
        ("explain m_front.py:bare", "explain: m_front.py:bare returned (LinearQuant, Tensor); it"),
        ("explain m_front.py:wrong", "linear_quant: x1 (2, 9) and weight (8, 16) differ in k"),
        ("explain sub/own.py:f", "explain: no LinearQuant layer was called"),
        ("explain m_front.py:nothing --html sub", "explain: --html sub: there is no folder for"),
        ("explain m_front.py:nothing --html gone/a.html", "explain: --html gone/a.html: there is"),
    ],
)
def test_lq_graph(command: str, text: str, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert refused(command.split(), capsys).startswith(text)


def test_inspect_without_transformers(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    said = refused(["inspect", ".", "--model", "."], capsys)
    assert said == (
        "inspect: --model needs transformers. What to do: leave it out, or pip install "
        "transformers.\n"
    )


@pytest.mark.slow
@on_stand_in
@pytest.mark.parametrize("arguments", ["--help", "explain --help", "explain m.py:f -h", "check"])
def test_lq_graph_works_without_cann(arguments: str) -> None:
    done = python("-m", "lq_graph", *arguments.split(), without=REAL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m lq_graph" if "-" in arguments else "x1 int8")


@pytest.mark.slow
@on_stand_in
def test_explain_without_a_device_is_a_sentence() -> None:
    done = python("-W", "ignore", "-mlq_graph", "explain", "m.py:f", without=REAL)
    assert (done.returncode, done.stdout) == (2, "")
    _, said = done.stderr.split("python -m lq_graph: error: ")
    assert said.startswith(
        "explain: there is no NPU to lower for. What to do: run it with CANN, or"
    )
    assert "`python -m cann_host -m lq_graph explain ...`" in said
    assert said.count("\n") == 1


@pytest.mark.slow
@on_stand_in
def test_the_command_line_leaves_the_environment() -> None:
    """Autoload is off for the command itself, not for the processes that it starts."""
    for before in (None, "1"):
        env = {} if before is None else {"TORCH_DEVICE_BACKEND_AUTOLOAD": before}
        done = python(*script("imports.py command_line"), without=REAL, **env)
        assert done.stdout == f"{before}\n"


FAKE = 'raise ImportError("libprotobuf.so: undefined symbol: f")\n'


@pytest.mark.slow
@on_stand_in
@pytest.mark.parametrize("autoload", ["1", "0"])
def test_the_error_says_why_torch_npu_cannot_be_imported(autoload: str, tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text(FAKE)
    (tmp_path / "script.py").write_text("")
    env = {"PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    why = "ImportError: libprotobuf.so: undefined symbol: f\n"
    done = python("-m", "cann_host", str(tmp_path / "script.py"), without=REAL, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"cann_host: torch {torch.__version__} and torch_npu ")
    assert done.stderr.endswith(f" cannot be imported: {why}")
    assert done.stderr.count("\n") == 1
    done = python("-c", "import cann_host; cann_host.activate()", without=REAL, **env)
    assert done.stderr.endswith(why)
    assert done.stderr.splitlines()[-1].startswith("cann_host.CannHostError: torch ")
    assert "_leave" not in done.stderr


@pytest.mark.slow
@on_stand_in
def test_import_of_lq_graph_reports_why_torch_npu_failed(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text(FAKE)
    done = python("-c", "import lq_graph", without=REAL, PYTHONPATH=str(tmp_path))
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: lq_graph: torch_npu is installed and cannot be imported")
    assert "ImportError: libprotobuf.so: undefined symbol: f. What to do: " in last
