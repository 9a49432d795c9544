"""`python -m lq_graph`: help without torch, exit codes, JSON, colours, pipes, and 80 columns."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import cann_host
import lq_graph
from lq_graph import command_line
from lq_graph.commands import COMMANDS, check
from lq_graph.rules.tables import PRODUCTS
from support.processes import python

ROOT = Path(__file__).parents[2]
REAL = ("CANN_", "TORCH_DEVICE", "COLUMNS", "NO_COLOR", "FORCE_COLOR")
LONG = "base_model.language_model.model.layers.0.block_sparse_moe.experts.0.gate_up_projection"
LEGAL, ILLEGAL = ["check"], ["check", "--output", "float32"]

on_stand_in = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """FILE.py with functions that return models, one of them with long names."""
    file = tmp_path / "models_of_mine.py"
    file.write_text(
        "import copy\n"
        "import torch\n"
        "from torch import nn\n"
        "import lq_graph\n"
        "def make(long=False, layers=2):\n"
        "    print('said by the model')\n"
        "    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))\n"
        f"    for name in reversed({LONG!r}.split('.') if long else []):\n"
        "        outer = nn.Sequential()\n"
        "        outer.add_module(name, model)\n"
        "        model = outer\n"
        "    model = model.half()\n"
        "    other = copy.deepcopy(model)\n"
        "    lq_graph.quantize(other, lq_graph.A8W8Dynamic())\n"
        "    return model, other, [torch.ones(2, 64).half()]\n"
        "def long(): return make(True, 30)\n"
        "def swapped(): a, b, x = make(); return b, a, x\n"
        "def one(): return make()[0]\n"
        "def on_npu(): return make(layers=1)[1].npu(), (torch.ones(2, 64).half().npu(),)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(file)


def run(*arguments: str) -> int:
    try:
        return command_line.main([*arguments])
    except SystemExit as left:
        return int(left.code or 0)


# ---- without torch ----


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """Variables of a process in which neither torch nor torch_npu can be imported."""
    for name in ("torch", "torch_npu"):
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name={name!r})\n"
        (tmp_path / f"{name}.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_without_torch(command: str, without_torch: dict[str, str]) -> None:
    arguments = [command] if command else []
    done = python("-m", "lq_graph", *arguments, "--help", without=REAL, **without_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["usage: python -m lq_graph", *arguments]))
    assert all(name in done.stdout for name in ([] if command else COMMANDS))
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version_without_torch(without_torch: dict[str, str]) -> None:
    done = python("-m", "lq_graph", "--version", without=REAL, **without_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"lq_graph {lq_graph.__version__}, torch ")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "doctor"])
def test_a_command_without_torch_says_what_to_do(
    command: str, without_torch: dict[str, str]
) -> None:
    needs = [] if command == "check" else ["x.py:f"]
    done = python("-m", "lq_graph", command, *needs, without=REAL, **without_torch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("python -m lq_graph: error: torch is not installed. What to do:")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "orig", "prog"),
    [
        (["/x/lq_graph/__main__.py"], ["python", "-m", "lq_graph"], "python -m lq_graph"),
        (["/venv/bin/lq-graph"], ["python", "/venv/bin/lq-graph"], "lq-graph"),
        (
            ["/x/lq_graph/__main__.py"],
            ["python", "-m", "cann_host", "-m", "lq_graph"],
            "python -m cann_host -m lq_graph",
        ),
    ],
)
def test_usage_names_how_it_was_started(argv, orig, prog, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig)
    assert run("check", "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {prog} check [-h]")


def test_the_console_script_is_this_program(tmp_path: Path, without_torch: dict[str, str]) -> None:
    """As pip writes it."""
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nlq-graph = "lq_graph.command_line:main"\n' in text
    script = tmp_path / "lq-graph"
    script.write_text("import sys\nfrom lq_graph.command_line import main\nsys.exit(main())\n")
    done = python(script, "--help", without=REAL, **without_torch)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: lq-graph ")


def test_the_products_in_the_help_are_all() -> None:
    assert ", ".join(product.key for product in PRODUCTS) == check._KEYS


# ---- exit codes ----


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["nosuch"], 2),
        (LEGAL, 0),
        (ILLEGAL, 1),
        ([*LEGAL, "--json"], 0),
        ([*ILLEGAL, "--json"], 1),
        (["check", "--x1", "int9"], 2),
        (["check", "--x1", "int9", "--json"], 2),
        (["compare", "FILE:make"], 0),
        (["compare", "FILE:swapped"], 2),
        (["compare", "FILE:one"], 2),
        (["compare", "FILE:nosuch"], 2),
        (["compare", "FILE:make", "--plot", "nosuch/a.png"], 2),
        (["compare", "FILE:make", "--plot", "a.nosuch"], 2),
        (["inspect", "nosuch"], 2),
        (["inspect", "."], 1),
    ],
    ids=str,
)
def test_exit_codes(arguments: list[str], status: int, models: str, capsys, tmp_path) -> None:
    os.chdir(tmp_path)
    assert run(*(argument.replace("FILE", models) for argument in arguments)) == status
    said = capsys.readouterr()
    assert bool(said.err) == (status == 2)
    if status == 2 and arguments and arguments[0] in COMMANDS:
        assert said.out in ("", "said by the model\n")
        assert said.err.startswith("python -m lq_graph: error: ") and said.err.count("\n") == 1


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stop(asked: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "run", stop)
    assert run("check") == 130
    assert capsys.readouterr() == ("", "stopped\n")


def test_an_error_of_the_users_own_is_not_a_no(tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "fails_of_mine.py"
    file.write_text("def make(): raise ValueError('of mine')\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run("check", f"{file}:make") == 2
    said = capsys.readouterr()
    assert not said.out and said.err.endswith("ValueError: of mine\n")
    assert f'File "{file}", line 1, in make' in said.err


def test_stdout_may_be_closed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run(*LEGAL) == 0
    assert run(*ILLEGAL, "--json") == 1


# ---- JSON ----


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [
        (LEGAL, {"legal": True, "output": "int8"}),
        (ILLEGAL, {"legal": False, "output": "float32"}),
        (["compare", "FILE:make"], {"worst_by": "own"}),
        (["compare", "FILE:make", "--sensitivity"], {"worst_by": "sensitivity"}),
        (["inspect", "."], {"ok": False}),
    ],
    ids=str,
)
def test_json_is_one_document(arguments, holds, models: str, capfd, tmp_path) -> None:
    os.chdir(tmp_path)
    run(*(argument.replace("FILE", models) for argument in arguments), "--json")
    said = capfd.readouterr()
    answer = json.loads(said.out)
    assert answer["structure"] == 1 and holds.items() <= answer.items()
    assert ("said by the model" in said.err) == (arguments[0] == "compare")


@on_stand_in
def test_explain_as_json_is_one_document(models: str, capfd) -> None:
    assert run("explain", f"{models}:on_npu", "--json") == 0
    said = capfd.readouterr()
    (layer,) = json.loads(said.out)["layers"]
    assert layer["name"].startswith("0") and "said by the model" in said.err


def test_check_as_json_says_what_check_found(capsys) -> None:
    run("check", "--x1", "int4", "--output", "float16", "--cann", "9.0.0", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["cann"] == "9.0.0"
    assert answer["arguments"]["x1"] == {"dtype": "int32", "shape": [16, 8]}
    assert answer["arguments"]["bias"] is None
    by_product = {product["product"]: product for product in answer["products"]}
    assert [by_product[key]["legal"] for key in ("310P", "A2", "A3", "950")] == [
        False,
        True,
        True,
        False,
    ]
    assert by_product["A2"]["output_shape"] == [16, 64]
    assert "allows this from CANN 9.1.0 on" in by_product["950"]["why"]


# ---- the terminal ----


def in_a_terminal(*arguments: str, **variables: str) -> str:
    """What a command prints on a terminal."""
    ours, theirs = pty.openpty()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(REAL)}
    with subprocess.Popen(
        [sys.executable, "-m", "lq_graph", *arguments],
        stdout=theirs,
        env={**kept, "TERM": "xterm", **variables},
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # closed at the other end
            pass
        os.close(ours)
        process.wait(60)
    return shown.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=str,
)
def test_colours_on_a_terminal(variables: dict[str, str], coloured: bool) -> None:
    text = in_a_terminal("check", "--product", "A2", **variables)
    assert ("\x1b[32myes  \x1b[0mAtlas A2" in text) == coloured == ("\x1b" in text)


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
    ids=str,
)
def test_colours_in_a_pipe(variables, coloured: bool, monkeypatch, capsys) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run(*ILLEGAL)
    assert ("\x1b[31mno   \x1b[0m" in capsys.readouterr().out) == coloured
    assert "\x1b" not in str(lq_graph.check())  # what a program prints has none


@pytest.mark.slow
def test_nobody_reads() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "lq_graph", "check"],
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


CONFIGURATIONS = [
    "",
    "--x1 int4 --output bf16 --pertoken float32",
    "--offset float32 --output float16",
    "--scale bfloat16 --bias float32 --pertoken float32 --output float32",
    "--x1 int8[2,3,4,5,16,512] --weight int8[2,3,4,5,1024,512] --output float16 --cann 8.2.RC1",
    "--x1 float16 --weight int8[4,7]",
]


@pytest.mark.parametrize("arguments", CONFIGURATIONS)
def test_check_fits_80_columns(arguments: str, capsys) -> None:
    run("check", *arguments.split())
    assert 0 < max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("columns", [60, 80, 132])
def test_compare_fits_the_terminal(columns: int, models: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    run("compare", f"{models}:long", "--sensitivity")
    lines = capsys.readouterr().out.splitlines()
    long = [line for line in lines if len(line) > columns]
    assert all(f"{LONG}." in line.strip().split(" ")[0] for line in long)  # words to be copied
    assert len(long) <= 2
    run("compare", f"{models}:long", "--all")
    text = capsys.readouterr().out
    assert all(f"{LONG}.{i} " in text for i in range(30))
