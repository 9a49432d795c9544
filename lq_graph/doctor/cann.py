"""Where CANN lies, its version, and whether this shell has sourced it: from variables and files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os.path import isdir, isfile, realpath  # unlike Path's, they raise no error
from pathlib import Path

__all__ = ["LIBRARY", "Cann", "Installed", "find_cann", "has_device_files"]

LIBRARY = "libascendcl.so"
HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
# What CANN's set_env.sh sets, besides LD_LIBRARY_PATH. torch_npu reads the first, GE the last.
VARIABLES = (*HOMES, "ASCEND_OPP_PATH")
# Below /usr/local/Ascend, ~/Ascend, or the folder that the installer wrote down. CANN 8.5 and
# later lie in cann, older ones in ascend-toolkit (nnae: the same without compilers).
_PLACES = (
    "cann",
    "ascend-toolkit/latest",
    "nnae/latest",
    "latest",
    "cann-*",
    "ascend-toolkit/[0-9]*",
    "nnae/[0-9]*",
)
_WRITTEN_DOWN = Path("/etc/Ascend/ascend_cann_install.info")
_INFO = (
    "*-linux/ascend_*_install.info",
    "ascend_*_install.info",
    "share/info/*/version.info",
    "version.cfg",
    "*/version.info",
)


@dataclass(frozen=True)
class Installed:
    """A CANN on this machine.

    Attributes:
        folder: of the toolkit, such as /usr/local/Ascend/ascend-toolkit/latest.
        version: such as "8.5.0"; "unknown" if no file says it.
        set_env: its script to source; None if it has none.
    """

    folder: str
    version: str
    set_env: str | None


@dataclass(frozen=True)
class Cann:
    """CANN as this shell sees it.

    Attributes:
        installed: every CANN found; first the one that the variables name.
        state: "sourced", "partly sourced" (of the variables and LD_LIBRARY_PATH, some are set),
            "not sourced" (one is installed), "wrong path" (a variable names a folder that is not
            there) or "absent".
        library: where the loader finds libascendcl.so; None if LD_LIBRARY_PATH has none.
        variables: CANN's own, as set.
        missing: those that are not set, LD_LIBRARY_PATH among them if it lacks the library.
        wrong: those that name a folder that is not there.
    """

    installed: tuple[Installed, ...]
    state: str
    library: str | None
    variables: dict[str, str]
    missing: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def used(self) -> Installed | None:
        """The CANN that counts here."""
        return self.installed[0] if self.installed else None


def find_cann(environ: Mapping[str, str]) -> Cann:
    """Look for CANN.

    Args:
        environ: the variables, such as os.environ.
    """
    variables = {name: environ[name] for name in VARIABLES if environ.get(name)}
    wrong = tuple(name for name, folder in variables.items() if not isdir(folder))
    library = _library(environ)
    installed = tuple(_installed(environ))
    missing = tuple(name for name in VARIABLES if name not in variables)
    if library is None:
        missing += ("LD_LIBRARY_PATH",)
    if wrong:
        state = "wrong path"
    elif library and set(HOMES) & set(variables) and "ASCEND_OPP_PATH" in variables:
        state = "sourced"
    elif library or variables:
        state = "partly sourced"
    else:
        state = "not sourced" if installed else "absent"
    return Cann(installed, state, library, variables, missing, wrong)


def has_device_files() -> bool:
    """Whether the driver of an NPU made its device files: /dev/davinci0 and so on."""
    return any(Path("/dev").glob("davinci[0-9]*"))


def _library(environ: Mapping[str, str]) -> str | None:
    for folder in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        file = Path(folder or ".") / LIBRARY
        if folder and isfile(file):
            return str(file)
    return None


def _installed(environ: Mapping[str, str]) -> Iterator[Installed]:
    seen = set()
    for folder in _candidates(environ):
        real = realpath(folder)
        if real in seen or not _is_cann(folder):
            continue
        seen.add(real)
        yield Installed(str(folder), _version_of(folder), _set_env_of(folder))


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    for name in HOMES:
        if environ.get(name):
            yield Path(environ[name])
    if environ.get("ASCEND_OPP_PATH"):
        yield Path(environ["ASCEND_OPP_PATH"]).parent
    library = _library(environ)
    if library is not None:  # .../lib64/libascendcl.so
        yield Path(library).parent.parent
    tops = [Path("/usr/local/Ascend")]
    if environ.get("HOME"):
        tops.append(Path(environ["HOME"]) / "Ascend")
    if isfile(_WRITTEN_DOWN):
        found = re.search(r"^Install_Path=(.+)$", _text(_WRITTEN_DOWN), re.M | re.I)
        if found:
            tops.append(Path(found[1].strip()))
    for top in tops:
        for place in _PLACES:
            yield from sorted(top.glob(place), reverse=True)


def _is_cann(folder: Path) -> bool:
    return isdir(folder) and (
        isfile(folder / "lib64" / LIBRARY) or any(True for _ in _info_files(folder))
    )


def _info_files(folder: Path) -> Iterator[Path]:
    for pattern in _INFO:
        yield from sorted(folder.glob(pattern))


def _version_of(folder: Path) -> str:
    """The version that its files give: version=8.5.0 in an install.info, Version=8.5.0 in a
    version.info, ...=[7.9.0.1:8.5.0] in version.cfg."""
    for file in _info_files(folder):
        text = _text(file)
        found = re.search(r"^version\s*=\s*(\S+)", text, re.M | re.I) or re.search(
            r"version=.*\[(?:[^\]:]*:)?(?:CANN-)?(\d+\.[\w.]+)\]", text, re.I
        )
        if found:
            return found[1]
    found = re.search(r"\d+\.\d+\.[\w.]+$", realpath(folder))
    return found[0] if found else "unknown"


def _set_env_of(folder: Path) -> str | None:
    for file in (folder / "set_env.sh", folder.parent / "set_env.sh", folder / "bin/setenv.bash"):
        if isfile(file):
            return str(file)
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
