"""Builds the native libraries with AddressSanitizer and UndefinedBehaviorSanitizer, for `run.py`.

The folder gets the layout of the installed packages: cann_host/lib, lq_graph/kernels/lib. The
libraries that only carry CANN's names come from the installed package.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cann_host
from cann_host import _native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HEADERS = [*ROOT.glob("cann_host/csrc/**/*.h"), *ROOT.glob("lq_graph/kernels/csrc/**/*.h")]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-w", "-fno-omit-frame-pointer"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# device memory lies between pages that nobody may touch: see entry.cpp
WRAP = ["-Wl,--wrap=posix_memalign", "-Wl,--wrap=free"]


class NoSanitizersError(Exception):
    """The compiler is missing, or has no sanitizers."""


def runtime() -> list[str]:
    """The libraries to load before Python: the sanitizer, and libstdc++ for exceptions."""
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        try:
            asked = [COMPILER, f"-print-file-name={name}"]
            path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            raise NoSanitizersError(f"there is no compiler {COMPILER}") from None
        if not Path(path).is_absolute():
            raise NoSanitizersError(f"{COMPILER} has no {name}")
        paths.append(str(Path(path).resolve()))
    return paths


def _compile(source: Path, target: Path, flags: list[str]) -> Path:
    made = target / f"{source.stem}.o"
    newest = max(f.stat().st_mtime for f in (source, *HEADERS))
    if not made.exists() or made.stat().st_mtime < newest:
        command = [COMPILER, *FLAGS, *SANITIZE, *flags, "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
    return made


def build(folder: Path) -> None:
    """Build the libraries that are out of date.

    Raises:
        NoSanitizersError: this machine cannot build them.
    """
    runtime()
    installed = _native.library_directory()
    if installed is None:
        raise NoSanitizersError("cann_host was installed without its native libraries")
    probe = folder / "probe.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    probe.write_text("int main() {}")
    command = [COMPILER, *SANITIZE, str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True).returncode:
        raise NoSanitizersError(f"{COMPILER} has no sanitizers")

    csrc = Path(cann_host.__file__).parent / "csrc"
    objects, libraries = folder / "objects", folder / "cann_host" / "lib"
    for path in (objects, libraries, folder / "lq_graph" / "kernels" / "lib"):
        path.mkdir(parents=True, exist_ok=True)
    for name in _native.NAMES[1:]:
        shutil.copy(installed / name, libraries / name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        flags = [f"-I{csrc}", f'-DCANN_HOST_SOURCES="{_native.sources()}"']
        sources = [*csrc.glob("*.cpp"), HERE / "entry.cpp"]
        (objects / "bindings.o").unlink(missing_ok=True)  # it says what all of them are
        made = list(pool.map(lambda source: _compile(source, objects, flags), sources))
    link = [COMPILER, *SANITIZE, *WRAP, "-shared", "-Wl,-soname,libcann_host.so"]
    target = libraries / "libcann_host.so"
    subprocess.run([*link, *map(str, made), "-o", str(target), "-ldl", "-lpthread"], check=True)

    machine = platform.machine()
    if machine in ("x86_64", "aarch64"):  # the CPU kernel reads what the operators hand it
        csrc = ROOT / "lq_graph" / "kernels" / "csrc"
        targets = [
            file
            for file in csrc.glob("targets/*.cpp")
            if file.stem.startswith("neon") == (machine == "aarch64")
        ]
        flags = ["-fopenmp", "-fwrapv", f'-DLQ_SOURCES="{_native.digest_of(csrc)}"']
        flags += [f"-DLQ_HAS_{file.stem}" for file in targets]
        sources = [csrc / "dispatch.cpp", *targets]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda source: _compile(source, objects, flags), sources))
        target = folder / "lq_graph" / "kernels" / "lib" / "liblq_graph_cpu.so"
        # without OpenMP's library: it takes the one torch has loaded
        shared = [COMPILER, *SANITIZE, "-shared", *map(str, made), "-o", str(target)]
        subprocess.run(shared, check=True)
