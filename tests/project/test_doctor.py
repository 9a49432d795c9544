"""`python -m lq_graph doctor`: on set-ups that are broken in one way it names the cause first; its
list of problems; its self-test, which can fail."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cann_host
import lq_graph
from lq_graph import command_line
from lq_graph.analysis import integer_reference, self_test
from lq_graph.doctor import children, inside, problems, report
from lq_graph.doctor.cann import Cann, Installed, find_cann
from lq_graph.doctor.facts import Examination, Facts, StandIn
from lq_graph.doctor.packages import Torch, TorchNpu
from support import cases, golden, setups
from support.processes import output_of, python, told

ROOT = Path(__file__).parents[2]
REAL = ("CANN_", "TORCH_DEVICE", "ASCEND_", "LD_LIBRARY_PATH")  # which a user has not
pytestmark = pytest.mark.filterwarnings("ignore:use_internal_format_weight. weights stay ND")
on_stand_in = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


def doctor(*options: str, path: Path, limit: float = 300, **variables: str) -> dict[str, Any]:
    """What the doctor says as JSON, on a set-up in a folder that PYTHONPATH and HOME name."""
    done = python(
        *("-m", "lq_graph", "doctor", "--json", "--no-self-test", *options),
        without=REAL,
        cwd=path,
        limit=limit,
        PYTHONPATH=str(path),
        HOME=str(path),
        **variables,
    )
    assert done.returncode in (0, 1), told(done)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ok"] is (done.returncode == 0) is not found["problems"]
    assert "Traceback" not in done.stderr, told(done)
    return found


def first(found: dict[str, Any]) -> str:
    name: str = found["problems"][0]["id"] if found["problems"] else "none"
    return name


# ---- five broken set-ups, and more ----


@pytest.mark.slow
@on_stand_in
def test_no_cann(tmp_path: Path) -> None:
    found = doctor(path=tmp_path)
    assert first(found) == "no_cann"
    assert not found["torch_npu"]["imports"]
    assert "python -m cann_host" in found["problems"][0]["fix"]


@pytest.mark.slow
@on_stand_in
def test_cann_that_is_not_sourced(tmp_path: Path) -> None:
    folder = tmp_path / "my 目录"
    home = setups.cann(folder)
    found = doctor(path=folder)
    assert first(found) == "cann_not_sourced"
    assert f"CANN 8.5.0 lies in {home}" in found["problems"][0]["what"]
    assert found["problems"][0]["commands"] == [f"source '{home.parent}/set_env.sh'"]


ABORT = r"""
import os
os.write(2, b"terminate called after throwing an instance of 'c10::Error'\n")
os.write(2, b"  what():  Duplicated key 'a' found in the parser\nframe #0: c10\n")
os.abort()
"""


@pytest.mark.slow
@on_stand_in
@pytest.mark.parametrize("is_sourced", [True, False])
def test_cuda_build_of_torch(is_sourced: bool, tmp_path: Path) -> None:
    """With CANN it is the cause; without, CANN must be there first."""
    release = setups.torch_as_cuda_build(tmp_path)
    setups.stub_torch_npu(tmp_path, ABORT, release, f"torch=={release}.*")
    variables = setups.sourced(setups.cann(tmp_path)) if is_sourced else {}
    found = doctor(path=tmp_path, **variables)
    names = [problem["id"] for problem in found["problems"]]
    assert names[: 2 - is_sourced] == ["no_cann", "cuda_build"][is_sourced:]
    cause = found["problems"][names.index("cuda_build")]
    assert f"torch {release}+cu130 is a build for CUDA 13.0" in cause["what"]
    assert f"torch=={release}+cpu" in cause["commands"][0]
    said = found["torch_npu"]["error"]
    assert said.startswith("Duplicated key") and said.endswith("(the process ended by SIGABRT)")


@pytest.mark.slow
def test_versions_that_do_not_match(tmp_path: Path) -> None:
    program = "raise ImportError('libtorch_npu.so: undefined symbol: _ZN5torch3fooEv')\n"
    setups.stub_torch_npu(tmp_path, program, "2.6.0.post5", "torch (==2.6.0+cpu)")
    (tmp_path / "torch_npu-0.dist-info").mkdir()  # left by another installation, and damaged
    (tmp_path / "torch_npu-0.dist-info/METADATA").write_bytes(b"\xff\0")
    found = doctor(path=tmp_path)
    assert first(found) == "version_mismatch"
    problem = found["problems"][0]
    assert "torch_npu 2.6.0.post5 is made for torch 2.6.0, and this is torch 2." in problem["what"]
    install, without = problem["commands"]
    assert install.startswith('pip install "torch==2.6.0+cpu"')
    assert without == "pip install --no-deps torch_npu==2.6.0.post5"


@pytest.mark.slow
@on_stand_in
@pytest.mark.skipif(not lq_graph.kernels.library.path(), reason="the compiled kernel is not built")
def test_stale_library(tmp_path: Path) -> None:
    setups.stale_package(tmp_path)
    found = doctor(path=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert first(found) == "stale_kernel"
    assert found["problems"][0]["commands"] == ["pip install -e ."]
    assert found["lq_graph"]["folder"] == str(tmp_path / "lq_graph")


def test_no_torch() -> None:
    """-S: without site-packages."""
    done = python("-S", "-m", "lq_graph", "doctor", without=("PYTHONPATH",), cwd=ROOT)
    assert done.returncode == 1, told(done)
    assert done.stdout.startswith(f"torch is not installed for {sys.executable}.\nfix: Install")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise OSError('libtorch_cpu.so: file too short')", "libtorch_cpu.so: file too short"),
        ("import os; os.kill(os.getpid(), 11)", "it said nothing (the process ended by SIGSEGV)"),
    ],
)
def test_torch_that_cannot_be_imported(program: str, said: str, tmp_path: Path) -> None:
    setups.stub_torch(tmp_path, program)
    found = doctor(path=tmp_path)
    assert first(found) == "broken_torch"
    assert said in found["problems"][0]["what"]


def test_old_torch(tmp_path: Path) -> None:
    setups.stub_torch(tmp_path, "raise ImportError", "2.6.0")
    found = [problem["id"] for problem in doctor(path=tmp_path)["problems"]]
    assert found[0] == "old_torch" and "broken_torch" not in found


def test_torch_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setups.stub_torch(tmp_path, "import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(children, "_SECONDS", 1.0)
    child = children.Child("cpu", self_test=False)
    assert list(child.events()) == []
    assert child.error == "it hangs: nothing came from it in 1 s"


@pytest.mark.parametrize(
    ("program", "id"), [("import os; os._exit(0)", "broken_torch"), (None, "shadowed")]
)
def test_torch_that_is_none(program: str | None, id: str, tmp_path: Path) -> None:
    """One that ends the process as if all were well; a file with its name."""
    if program is None:
        (tmp_path / "torch.py").touch()
    else:
        setups.stub_torch(tmp_path, program)
    found = doctor(path=tmp_path)
    assert first(found) == id
    assert program or f"the file {tmp_path / 'torch.py'}" in found["problems"][0]["what"]


def test_the_processes_it_starts_find_the_same_packages(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('not this one')")
    done = python(*("-I", "-m", "lq_graph", "doctor", "--no-self-test"), without=REAL, cwd=tmp_path)
    assert "not this one" not in done.stdout and not done.stderr, told(done)


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    setups.stub_torch(tmp_path, "raise ImportError")
    variables = {
        "PYTHONPATH": str(tmp_path),
        "ASCEND_X": "\udcff\u4e2d",
        "PYTHONIOENCODING": "ascii",
    }
    done = python(
        *("-m", "lq_graph", "doctor", "--no-self-test"), without=REAL, cwd=tmp_path, **variables
    )
    assert r"ASCEND_X=\udcff\u4e2d" in done.stdout and not done.stderr, told(done)


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Examination, "look", lambda self: stop())
    assert command_line.main(["doctor", "--no-self-test"]) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.slow
@on_stand_in
def test_a_set_up_without_a_problem_runs_the_self_test_in_a_child(tmp_path: Path) -> None:
    """As on a machine with an NPU: the process of the doctor itself has no torch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'lq_graph.doctor.inside' in sys.orig_argv and 'npu' in sys.orig_argv:\n"
        "    import cann_host\n"
        "    cann_host.activate()\n"
    )
    done = python("-m", "lq_graph", "doctor", without=REAL, cwd=ROOT, PYTHONPATH=str(tmp_path))
    text = output_of(done)
    for mode in ("cpu", "npu", "graph"):
        assert re.search(rf"^   {mode} +\d+ calls +\d+\.\d s   all right$", text, re.M), text
    assert re.search(r"^   layers of the examples +3/3 +3/3 +3/3$", text, re.M), text
    assert text.endswith("no problem found\n")
    assert max(map(len, text.splitlines())) <= 80


def test_a_mistake_in_the_command() -> None:
    done = python("-m", "lq_graph", "doctor", "--nosuch", without=REAL, cwd=ROOT)
    assert done.returncode == 2
    assert "unrecognized arguments: --nosuch" in done.stderr


# ---- CANN ----


def test_where_cann_lies(tmp_path: Path) -> None:
    home = setups.cann(tmp_path, "8.2.RC1")
    variables = {**setups.sourced(home), "HOME": str(tmp_path)}
    assert find_cann({"HOME": str(tmp_path)}).state == "not sourced"
    found = find_cann(variables)
    assert (found.state, found.used and found.used.version) == ("sourced", "8.2.RC1")
    assert found.library == str(home / "lib64/libascendcl.so")
    for name in ("ASCEND_OPP_PATH", "LD_LIBRARY_PATH"):
        partly = find_cann({**variables, name: ""})
        assert partly.state == "partly sourced"
        assert name in partly.missing
    (tmp_path / "Ascend/cann-9").symlink_to("cann-9")  # to itself
    assert len(find_cann({"HOME": str(tmp_path)}).installed) == 1
    wrong = find_cann({**variables, "ASCEND_HOME_PATH": "/nosuch"})
    assert (wrong.state, wrong.wrong) == ("wrong path", ("ASCEND_HOME_PATH",))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("aarch64-linux/ascend_toolkit_install.info", "arch=aarch64\nversion=9.1.0\n"),
        ("share/info/runtime/version.info", "Version=9.1.0\nversion_dir=cann-9.1.0\n"),
        ("compiler/version.info", "Version=9.1.0\n"),
        ("version.cfg", "[toolkit]\nruntime_running_version=[7.9.0.1:9.1.0]\n"),
    ],
)
def test_the_version_of_cann(file: str, text: str, tmp_path: Path) -> None:
    home = tmp_path / "Ascend/cann"
    (home / file).parent.mkdir(parents=True)
    (home / file).write_text(text)
    found = find_cann({"HOME": str(tmp_path)})
    assert [one.version for one in found.installed] == ["9.1.0"]


# ---- the list of problems ----

NPU = TorchNpu("2.13.0", "2.13.0", "/site/torch_npu", True, True)
CPU_TORCH = Torch("2.13.0+cpu", "CPU", "/site/torch", False)
CUDA_TORCH = Torch("2.13.0+cu130", "CUDA 13.0", "/site/torch", True)
SOURCED = Cann((Installed("/cann", "9.1.0", "/cann/set_env.sh"),), "sourced", "/lib", {}, (), ())
ABSENT = Cann((), "absent", None, {}, (), ())
GOOD = Facts(
    lq_graph={"version": "0.1.0", "folder": "/site/lq_graph"},
    python={"version": "3.11", "executable": "python", "machine": "x86_64", "system": "Linux"},
    torch=CPU_TORCH,
    torch_npu=NPU,
    cann=SOURCED,
    stand_in=StandIn(False),
    device_files=True,
    variables={},
    autoload_off=False,
    torch_error="",
    torch_npu_error="",
    torchair_error="",
    kernel={"why_not": "", "library": "/lib", "instruction_set": "avx2"},
    device={"name": "Ascend910B2", "count": 1, "cann": "9.1.0"},
    allow_internal_format=False,
    product={"name": "Atlas A2", "key": "A2", "known": True, "rows": []},
)


def no_kernel(why_not: str) -> dict[str, str]:
    return {"why_not": why_not, "library": "/lib", "instruction_set": ""}


WRONG = {"group": "g: s", "name": "n", "wrong": 1, "count": 2, "largest": 3.0, "error": "",
         "left_out": "", "passed": False}  # fmt: skip
FAILED = [{"mode": "graph", "seconds": 1.0, "results": [WRONG]}]
NO_LIBRARY = "ImportError: libhccl.so: cannot open shared object file: No such file or directory"
DUPLICATED = "Duplicated key 'a' found (the process ended by SIGABRT)"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"torch": None, "torch_error": None, "torch_npu_error": None}, ["no_torch"]),
        ({"torch_npu": None, "torch_npu_error": None}, ["no_torch_npu"]),
        ({"torch_npu": None, "cann": ABSENT, "device_files": False}, []),
        ({"cann": ABSENT, "torch_npu_error": NO_LIBRARY}, ["no_cann"]),
        ({"cann": ABSENT, "torch_npu_error": NO_LIBRARY, "autoload_off": True}, []),
        ({"cann": ABSENT, "torch_npu_error": ""}, []),  # the loader knows a place of its own
        (
            {"cann": ABSENT, "torch_npu_error": NO_LIBRARY, "torch": CUDA_TORCH},
            ["no_cann", "cuda_build"],
        ),
        ({"torch_npu_error": DUPLICATED, "torch": CUDA_TORCH}, ["cuda_build"]),
        ({"torch_npu_error": NO_LIBRARY, "torch": CUDA_TORCH}, ["cuda_build"]),
        ({"torch": CUDA_TORCH, "stand_in": StandIn(True, "9.1.0")}, []),
        ({"torch_npu_error": NO_LIBRARY}, ["cann_incomplete"]),
        ({"torch_npu_error": "libascend_hal.so: cannot open shared object"}, ["npu_driver"]),
        ({"torch_npu_error": "ImportError: undefined symbol: aclnnNew"}, ["old_cann"]),
        ({"torch_npu_error": "ImportError: undefined symbol: _ZN2at3newE"}, ["broken_torch_npu"]),
        ({"torch_npu_error": "ModuleNotFoundError: No module named 'yaml'"}, ["missing_package"]),
        (
            {"torch": Torch("2.9.0", "CPU", "", False), "torch_npu_error": "undefined symbol: x"},
            ["version_mismatch"],
        ),
        ({"torchair_error": "No module named 'google'"}, ["broken_torchair"]),
        ({"device": None, "device_error": "no device"}, ["no_device"]),
        ({"compute_error": "561000"}, ["no_kernels"]),
        ({"product_error": "LinearQuantValueError: LQ_GRAPH_PRODUCT: x"}, ["wrong_product"]),
        ({"product_error": "LinearQuantValueError: LQ_GRAPH_CANN: x"}, ["wrong_cann_version"]),
        ({"torch": None, "shadowed": {"torch": "/torch.py"}}, ["shadowed"]),
        ({"torch_npu": None, "shadowed": {"torch_npu": "/torch_npu.py"}}, ["shadowed"]),
        ({"product": {"name": "Atlas A2", "key": "A2", "known": False}}, ["unknown_product"]),
        ({"kernel": no_kernel("stale"), "self_test": FAILED}, ["stale_kernel", "self_test"]),
        ({"kernel": no_kernel("absent")}, ["no_kernel"]),
        ({"kernel": no_kernel("processor")}, []),
        ({"self_test_errors": ["the process ended by SIGSEGV"]}, ["self_test"]),
        (
            {"cann": ABSENT, "torch_npu_error": NO_LIBRARY,
             "stand_in": StandIn(False, "", "it is old: run pip install -e . again.")},
            ["no_cann", "stand_in"],
        ),
    ],
)  # fmt: skip
def test_problems_and_their_order(changes: dict[str, Any], names: list[str]) -> None:
    facts = dataclasses.replace(GOOD, **changes)
    found = problems.find_problems(facts)
    assert [problem.id for problem in found] == names
    text = report.problems_text(found) + report.facts_text(facts)
    assert max(map(len, text)) <= 100
    for problem in found:  # sentences that begin and end
        for sentence in (problem.what, problem.fix):
            assert re.fullmatch(r"[A-Z`a-z].*\.", sentence), sentence
            assert not re.search(r"\.\.|\bNone\b|  ", sentence), sentence


def test_every_reason_of_the_kernel_has_a_text() -> None:
    doc = lq_graph.kernels.library.why_not_used.__doc__
    assert doc is not None
    assert {*re.findall(r'"(\w*)"', doc)} == set(report._KERNEL)


# ---- the self-test ----


@pytest.fixture(scope="module")
def rows() -> list[self_test.Case]:
    return self_test.cases_of(lq_graph.get_product())


def test_the_reference_is_the_golden() -> None:
    """Two independent references agree on every row."""
    for case in cases.ROW_CASES:
        inputs = cases.make(case)
        cases.assert_equal(integer_reference.linear_quant(**inputs), inputs)


def test_every_row_is_in_the_self_test(rows: list[self_test.Case]) -> None:
    calls = [case for case in rows if case.group.startswith("linear_quant")]
    assert len(calls) == len(cases.ROW_CASES)
    assert len({(case.group, case.name) for case in rows}) == len(rows)


@on_stand_in
def test_it_is_right_here(rows: list[self_test.Case]) -> None:
    for device in ("cpu", "npu"):
        assert all(result.passed for result in self_test.run_eagerly(rows, device))


def test_a_wrong_number_is_found(rows: list[self_test.Case]) -> None:
    """One bit of one weight, in one input or in one scale."""
    up, down, *_ = (case for case in rows if case.group == self_test.LAYERS)
    for case, changed in ((up, "weight"), (down, "scale")):
        tensor = getattr(case.module, changed).data
        before = tensor.clone()
        tensor.view(-1)[0] = tensor.view(-1)[0] * 2 + 1
        (result,) = self_test.run_eagerly([case], "cpu")
        tensor.copy_(before)
        assert not result.passed and result.wrong and result.largest > 0
        (result,) = self_test.run_eagerly([case], "cpu")
        assert result.passed


def test_a_wrong_dynamic_quant_is_found() -> None:
    x = torch.randn(4, 64)
    peak = x.abs().amax(-1)
    scale = peak / 127
    values = (x / scale[:, None]).round().to(torch.int8)
    assert not integer_reference.dynamic_quant_misses(x, values, scale).any()
    assert integer_reference.dynamic_quant_misses(x, values, scale * 1.01).isinf().all()
    values[1, 2] += 3
    assert int((integer_reference.dynamic_quant_misses(x, values, scale) > 0).sum()) == 1


def test_the_packed_scale_is_the_golden_s() -> None:
    scale, offset = torch.rand(9) * 3 - 1, torch.randn(9) * 300
    want = golden.trans_quant_param(scale.numpy(), offset.numpy())
    assert integer_reference.trans_quant_param(scale, offset).tolist() == want.tolist()


@on_stand_in
def test_a_failing_row_does_not_hide_the_others(rows: list[self_test.Case]) -> None:
    """A graph of all that fails is split into a graph for each row, which names the row."""
    import torchair

    wrong = dataclasses.replace(rows[3], module=torch.nn.Bilinear(2, 2, 2))
    several = [*rows[:2], wrong, *(case for case in rows if case.group.startswith("static_quant"))]
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    results = list(self_test.run_compiled(several, backend, "npu", 60))
    torch._dynamo.reset()
    assert [result.passed for result in results] == [case is not wrong for case in several]
    assert results[2].error
    left = list(self_test.run_compiled([wrong, *rows[:1]], backend, "npu", -1))
    torch._dynamo.reset()
    assert {result.left_out for result in left} == {"there was no time for it"}


@on_stand_in
def test_failures_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = [case for case in self_test.cases_of(lq_graph.get_product()) if "int4" in case.group]
    monkeypatch.setattr(self_test, "cases_of", lambda product: fewer)
    monkeypatch.setattr(inside, "NPU_MODES", ())
    monkeypatch.setattr(inside, "_npu_modes", lambda *_: iter(()))
    with cann_host.faults("aclnnQuantMatmulV5:161002@2"):
        assert command_line.main(["doctor"]) == 1
    torch._dynamo.reset()
    text = capsys.readouterr().out
    assert "1 not right" in text
    assert re.search(r"wrong in npu: linear_quant int4 .*161002", " ".join(text.split())), text
    assert text.endswith("1 problem: self_test\n")


# ---- the page ----


def test_the_page_has_every_field() -> None:
    page = (ROOT / "docs/doctor.md").read_text()
    documented = re.findall(r"^\| `(\w+)`", page.partition("## JSON")[2], re.M)
    assert documented == [*report.as_json(GOOD, [], [])]
    ids = {*re.findall(r'Problem\(\s*"(\w+)"', Path(problems.__file__).read_text())}
    ids |= {name for _, name, *_ in problems._CAUSES} | {
        name for name, *_ in problems._KERNEL.values()
    }
    assert len(ids) > 20
    assert not {name for name in ids if f"`{name}`" not in page}
