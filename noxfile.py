"""The examples and the core tests on every supported torch_npu, on cann_host.

    nox -s "versions(2.10.0.post4)"                   one version, in a fresh environment
    nox -s "versions(2.7.1)" -- tests/converters      other tests; the result is not kept
    nox -s versions table                             all, and the table in docs/versions.md
    nox -s core                                       the tests alone, with the `python` on PATH

A version whose Python is not on this machine is skipped. With an index's CUDA build of torch, an
environment takes 5 GB and is removed after the run. LQ_MATRIX_PYTHONS names a folder that has
environments already, FOLDER/2.10.0.post4/bin/python for example: they are used, and not changed.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests"))

from support.versions import VERSIONS, Version  # noqa: E402

RESULTS = ROOT / ".nox" / "results"  # one file a version, until `table` collects them
PAGE_DATA = ROOT / "docs" / "versions.json"
PREPARED = os.environ.get("LQ_MATRIX_PYTHONS")

if PREPARED and not Path(PREPARED).is_dir():  # or every version would be skipped, and nothing fail
    raise SystemExit(f"LQ_MATRIX_PYTHONS is {PREPARED}, which is not a folder")

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["versions"]
nox.options.error_on_missing_interpreters = False

EXAMPLES = ("eager.py", "graph_mode.py")
CORE = (
    "-m",
    "not slow",
    "tests/ops",
    "tests/modules",
    "tests/converters",
    "tests/cann_host/test_cann_host_abi.py",
    "tests/cann_host/test_cann_host_eager.py",
    "tests/cann_host/test_cann_host_graph.py",
)
SETUPTOOLS = "setuptools<81"  # torchair of 2.7.1, 2.8.0 and 2.9.0 imports its pkg_resources
PACKAGES = (
    "hypothesis",
    "matplotlib",
    "numpy",
    "packaging",
    "protobuf",
    "pytest",
    "pyyaml",
    "safetensors",
    SETUPTOOLS,
    "tqdm",
)


def interpreter(version: Version) -> str:
    """The Python of a version: a prepared one, else on PATH, else of pyenv."""
    if PREPARED:
        return str(Path(PREPARED).absolute() / version.torch_npu / "bin" / "python")
    name = f"python{version.python}"
    # pyenv puts a program of each name on PATH, which fails for versions that are not chosen
    if shutil.which(name):
        asked = subprocess.run([name, "--version"], capture_output=True, check=False)
        if asked.returncode == 0:
            return name
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(pyenv.glob(f"versions/{version.python}.*/bin/python"))
    return str(found[-1]) if found else name


@nox.session(venv_backend="uv|virtualenv")
@nox.parametrize(
    ("python", "version"),
    [nox.param(interpreter(one), one, id=one.torch_npu) for one in VERSIONS],
)
def versions(session: nox.Session, version: Version) -> None:
    """Examples and core tests on one torch_npu."""
    install(session, version)
    result = {
        "torch_npu": version.torch_npu,
        **facts(session),
        "examples": {
            name: runs(session, "-m", "cann_host", f"examples/{name}") for name in EXAMPLES
        },
    }
    report = Path(session.create_tmp()) / "report.xml"
    report.unlink(missing_ok=True)
    chosen = session.posargs or CORE
    ended = runs(
        session, "-m", "pytest", "-q", "--disable-warnings", f"--junitxml={report}", *chosen
    )
    result |= counts(report) if report.is_file() else {"failed": ["pytest did not end by itself"]}
    if not session.posargs:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"{version.torch_npu}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
    if not ended or not all(result["examples"].values()):
        session.error(f"torch_npu {version.torch_npu}: the environment stays, for a look")
    shutil.rmtree(session.virtualenv.location)


def install(session: nox.Session, version: Version) -> None:
    """torch, torch_npu, what the tests import, and lq_graph of this checkout."""
    if PREPARED:
        folders = [site_packages(interpreter(version))]
        session.install(SETUPTOOLS)
        if (ROOT / "cann_host" / "lib").is_dir():  # built into the checkout
            folders.append(str(ROOT))
        else:
            session.install("--no-deps", "-e", ".")
        file = Path(site_packages(f"{session.bin}/python"), "prepared.pth")
        file.write_text("\n".join(folders) + "\n")
        return
    # x86-64 wheels of torch_npu up to 2.11 ask for torch==X+cpu, which an index may lack.
    session.install(f"torch=={version.torch}", *PACKAGES)
    session.install("--no-deps", f"torch_npu=={version.torch_npu}")
    # The CUDA build brings it. Some torch_npu take it for triton-ascend, and Inductor fails.
    uv = session.venv_backend == "uv"
    remove = ["uv", "pip", "uninstall"] if uv else ["pip", "uninstall", "-y"]
    session.run(*remove, "triton", external=True)
    session.install("--no-deps", "-e", ".")


def site_packages(python: str) -> str:
    program = "import site; print(site.getsitepackages()[0])"
    return subprocess.check_output([python, "-c", program], text=True).strip()


def facts(session: nox.Session) -> dict[str, Any]:
    program = (
        "import sys, platform, importlib.metadata as m; "
        "print(m.version('torch'), platform.python_version(), platform.machine())"
    )
    torch, python, machine = session.run("python", "-c", program, silent=True).split()
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    return {
        "torch": torch,
        "python": python,
        "machine": machine,
        "commit": commit + ("+" if changed else ""),
        "date": datetime.date.today().isoformat(),
    }


def runs(session: nox.Session, *arguments: str) -> bool:
    try:
        session.run("python", *arguments)
    except CommandFailed:
        return False
    return True


def counts(report: Path) -> dict[str, Any]:
    """From a JUnit report: how many passed, which failed, how many were skipped for what reason."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ET.parse(report).iter("testcase"):
        outcomes = {part.tag: part for part in case}
        if "failure" in outcomes or "error" in outcomes:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in outcomes:
            skipped[outcomes["skipped"].get("message", "")] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": sorted(failed), "skipped": dict(sorted(skipped.items()))}


@nox.session(venv_backend="none")
def core(session: nox.Session) -> None:
    """The core tests in the environment that is active."""
    session.run("python", "-m", "pytest", "-q", "--disable-warnings", *CORE, external=True)


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Collect the results, and write the table into docs/versions.md."""
    kept = {one["torch_npu"]: one for one in json.loads(PAGE_DATA.read_text())}
    kept |= {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    rows = [kept[one.torch_npu] for one in VERSIONS if one.torch_npu in kept]
    PAGE_DATA.write_text(json.dumps(rows, indent=1) + "\n")
    session.run(sys.executable, "docs/_ext/versions.py", external=True)
