"""`python -m cann_host X` compared with `python X`: output, traceback, exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cann_host
from cann_host import launcher
from support.processes import LIMIT, SCRIPTS

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")

NAMES = """
import sys
main = sys.modules["__main__"]
print(sys.argv, sys.path[0], vars(main) is globals(), __name__)
names = {k: v for k, v in vars(main).items() if k not in ("__builtins__", "sys", "main")}
print({k: getattr(v, "name", v) if k == "__spec__" else type(v) if k == "__loader__" else v
       for k, v in sorted(names.items())})
"""
CHAIN = """
def outer():
    try:
        inner()
    except ZeroDivisionError as error:
        raise ValueError("outer") from error
def inner():
    1 / 0
outer()
"""
GROUP = "raise ExceptionGroup('several', [ValueError(1), TypeError('two')])"
HOOK = """
import sys
def hook(kind, error, trace):
    print("mine:", kind.__name__, error, trace.tb_frame.f_code.co_name, trace.tb_lineno)
sys.excepthook = hook
[][1]
"""
BAD_HOOK = "import sys\nsys.excepthook = lambda *given: 1 / 0\n[][1]\n"
AT_EXIT = """
import atexit, sys
def last():
    print(repr(sys.last_value), sys.last_traceback.tb_lineno)
atexit.register(last)
int("x")
"""
THREAD = """
import threading
def work(): 1 / 0
thread = threading.Thread(target=work, name="mine")
thread.start()
thread.join()
"""
PICKLE = """
import pickle
class Point:
    x = 3
print(pickle.loads(pickle.dumps(Point())).x, Point.__module__)
"""
SPAWN = """
import multiprocessing, sys
class Point:
    def __init__(self, x): self.x = x
def double(point): return type(point).__module__, point.x * 2
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [Point(1), Point(2)]))
"""

PROGRAMS = {
    "names": NAMES,
    "chain": CHAIN,
    "group": GROUP,
    "hook": HOOK,
    "bad_hook": BAD_HOOK,
    "at_exit": AT_EXIT,
    "thread": THREAD,
    "pickle": PICKLE,
    "text": "raise SystemExit('that is all')",
    "code": "import sys; sys.exit(5)",
    "none": "raise SystemExit",
    "interrupted": "raise KeyboardInterrupt",
    "syntax": "x = 1\nif x:\nprint(x)\n",
    "warns": "import warnings\nwarnings.warn('careful')\nprint('\\d')\n",
    "future": "from __future__ import annotations\ndef f(x: no): pass\nprint(f.__annotations__)",
    "reads": "print(repr(input()))",
    "asserts": "assert False, 'it runs without -O'",
    "missing": "import nothing_of_this_name",
}
SAFE_PATH = pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is of Python 3.11")
AS_STDIN = [name for name in PROGRAMS if name != "reads"]
FORMS = ["p_{name}.py", "./sub/../p_{name}.py -x -- --soc y", "-m p_{name} -i", "d_{name} z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with each program as a file and as a folder."""
    here = tmp_path_factory.mktemp("programs")
    (here / "sub").mkdir()
    for name, text in PROGRAMS.items():
        (here / f"p_{name}.py").write_text(text)
        (here / f"d_{name}").mkdir()
        (here / f"d_{name}" / "__main__.py").write_text(text)
    return here


def outcome(
    arguments: list[str], folder: Path, stdin: str = "line\n", *, before: list[str], under: str
) -> tuple[int, str, list[str]]:
    """Exit status, stdout and the lines of stderr of `python BEFORE -m UNDER ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, *before, *(["-m", under] if under else []), *arguments],
        cwd=folder,
        input=stdin,
        text=True,
        capture_output=True,
        timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("cann_host: no NPU")]
    return done.returncode, done.stdout, lines


def same(
    arguments: list[str],
    folder: Path,
    stdin: str = "line\n",
    before: tuple[str, ...] = (),
    under: str = "not_activated",
) -> tuple[int, str, list[str]]:
    """The outcome, which is that of Python."""
    wanted = outcome(arguments, folder, stdin, before=list(before), under="")
    assert outcome(arguments, folder, stdin, before=list(before), under=under) == wanted
    return wanted


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("form", FORMS)
def test_files_and_modules(form: str, name: str, folder: Path) -> None:
    same(form.format(name=name).split(), folder)


@pytest.mark.parametrize("name", PROGRAMS)
def test_code(name: str, folder: Path) -> None:
    same(["-c", PROGRAMS[name], "-c", "--", "--memory"], folder)


@pytest.mark.parametrize("name", AS_STDIN)
@pytest.mark.parametrize("arguments", [[], ["-", "-a", "--", "b"]])
def test_stdin(arguments: list[str], name: str, folder: Path) -> None:
    same(arguments, folder, PROGRAMS[name])


@pytest.mark.parametrize(
    ("before", "arguments"),
    [
        ("-O", "p_asserts.py"),
        ("-W error", "p_warns.py"),
        ("-X dev", "p_chain.py"),
        pytest.param("-P", "p_names.py", marks=SAFE_PATH),
        pytest.param("-P", "d_names", marks=SAFE_PATH),
        ("", "-cprint(__name__) a"),
        ("", "-mp_names a"),
        ("", "-- p_names.py a"),
        ("", "-m json.tool p_names.py"),
        ("", "-m d_names"),
    ],
)
def test_options(before: str, arguments: str, folder: Path) -> None:
    same(arguments.split(), folder, before=tuple(before.split()))


def test_the_table_has_what_it_says(folder: Path) -> None:
    """Python's own side of the comparisons, once."""
    assert outcome(["p_chain.py"], folder, before=[], under="")[0] == 1
    assert outcome(["p_interrupted.py"], folder, before=[], under="")[0] == -signal.SIGINT
    code, said, _ = outcome(["p_names.py"], folder, before=[], under="")
    assert code == 0 and "'__cached__': None" in said and "SourceFileLoader" in said


# ---- with the stand-in ----

NPU = "import torch\nprint((torch.ones(2).npu() + 1).tolist())\n1 / 0\n"


@pytest.mark.slow
def test_an_error_is_shown_as_python_shows_it(folder: Path) -> None:
    """Without the line that torch_npu adds on stdout for an error that is not its own."""
    (folder / "npu.py").write_text(NPU)
    code, said, lines = outcome(["npu.py"], folder, before=[], under="cann_host")
    at = lines.index("Traceback (most recent call last):")  # below torch_npu's warnings
    assert (code, said) == (1, "[2.0, 2.0]\n")
    assert lines[at + 1] == f'  File "{folder / "npu.py"}", line 3, in <module>'
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert len(lines) - at in (4, 5)  # the marks below the line came with Python 3.11


@pytest.mark.slow
@pytest.mark.parametrize("form", ["p_chain.py", "-m p_interrupted", "d_hook", "p_code.py"])
def test_programs_on_the_stand_in(form: str, folder: Path) -> None:
    same(form.split(), folder, under="cann_host")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["spawned.py", "-m spawned"])
def test_processes_of_a_program(form: str, folder: Path) -> None:
    (folder / "spawned.py").write_text(SPAWN)
    code, said, _ = same(form.split(), folder, under="cann_host")
    assert (code, said) == (0, "[('__mp_main__', 2), ('__mp_main__', 4)]\n")


@pytest.mark.slow
def test_a_program_in_a_pipe(folder: Path) -> None:
    program = "import torch; print((torch.ones(2).npu() + 1).tolist()); 1 / 0\n"
    code, said, lines = outcome([], folder, program, before=[], under="cann_host")
    assert (code, said) == (1, "[2.0, 2.0]\n")
    assert lines[-3:] == [
        "Traceback (most recent call last):",
        '  File "<stdin>", line 1, in <module>',
        "ZeroDivisionError: division by zero",
    ]


@pytest.mark.slow
def test_torchrun_starts_its_processes_on_the_stand_in(folder: Path) -> None:
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "cann_host",
        "--devices",
        "2",
    ]
    ranks = [*command, str(SCRIPTS / "all_reduces.py")]
    code, said, lines = outcome(ranks, folder, before=[], under="cann_host")
    assert code == 0, lines
    assert sorted(said.splitlines()) == ["rank 0: [3.0, 3.0]", "rank 1: [3.0, 3.0]"]


TYPED = """torch.ones(2).npu().tolist()
1 / 0
x = = 1
def f():
    return torch_npu.npu.device_count()

f()
exit(3)
"""


@pytest.mark.slow
def test_console(folder: Path) -> None:
    code, said, lines = outcome(["-i"], folder, TYPED, before=[], under="cann_host")
    told = "\n".join(lines)
    assert code == 3
    assert "[1.0, 1.0]" in said and said.replace(">>> ", "").replace("... ", "").strip()[-1] == "1"
    assert 'Traceback (most recent call last):\n  File "<stdin>", line 1, in <module>\n' in told
    assert "ZeroDivisionError" in told and "SyntaxError: invalid syntax" in told
    assert "code.py" not in told and "torch_npu" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "typed", "code", "said"),
    [
        (["-i", "p_code.py"], "sys.flags.optimize\n", 0, ">>> 0\n>>> "),  # SystemExit is shown
        (["-ic", "import sys; x = 5", "a"], "x, sys.argv\n", 0, ">>> (5, ['-c', 'a'])\n>>> "),
    ],
)
def test_console_after_a_program(
    arguments: list[str], typed: str, code: int, said: str, folder: Path
) -> None:
    assert outcome(arguments, folder, typed, before=[], under="cann_host")[:2] == (code, said)


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "own", "program"),
    [
        ("", [], []),
        ("x.py -i -m y", [], ["x.py", "-i", "-m", "y"]),
        ("--soc A x.py --soc B", ["--soc", "A"], ["x.py", "--soc", "B"]),
        ("--soc=A -- -x.py -- y", ["--soc=A"], ["-x.py", "--", "y"]),
        ("-i", ["-i"], []),
        ("-i --devices 2 -m pytest -x", ["-i", "--devices", "2"], ["-m", "pytest", "-x"]),
        ("-mpytest -x", [], ["-m", "pytest", "-x"]),
        ("-icpass -x", ["-i"], ["-c", "pass", "-x"]),
        ("-ic pass -x", ["-i"], ["-c", "pass", "-x"]),
        ("- -c x", [], ["-", "-c", "x"]),
        ("-c", [], ["-c"]),
        ("--memory", ["--memory"], []),
        ("-u x.py", ["-u"], ["x.py"]),
    ],
)
def test_where_the_program_begins(arguments: str, own: list[str], program: list[str]) -> None:
    assert launcher._split(arguments.split()) == (own, program)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("-c", "-c needs code"),
        ("-m", "-m needs the name of a module"),
        ("-u x.py", "unrecognized arguments: -u"),
        ("--memory", "argument --memory: expected one argument"),
        ("--nosuch x.py", "unrecognized arguments: --nosuch"),
    ],
)
def test_a_wrong_command_line(arguments: str, text: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        launcher.main(arguments.split())
    assert text in capsys.readouterr().err
