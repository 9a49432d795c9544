"""torch and torch_npu as their files describe them. Nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import re
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

__all__ = [
    "Torch",
    "TorchNpu",
    "find_file_instead",
    "find_torch",
    "find_torch_npu",
    "is_installed",
    "release_of",
]


@dataclass(frozen=True)
class Torch:
    """An installed torch.

    Attributes:
        version: such as "2.13.0+cpu".
        build: "CPU", or the toolkit of another build, such as "CUDA 13.0".
        folder: where it lies.
        registers_allocator_keys: whether its CUDA half registers settings with c10's allocator
            configuration.
    """

    version: str
    build: str
    folder: str
    registers_allocator_keys: bool

    @property
    def release(self) -> tuple[int, ...]:
        """Its release as numbers: (2, 13, 0)."""
        return release_of(self.version)


@dataclass(frozen=True)
class TorchNpu:
    """An installed torch_npu.

    Attributes:
        version: such as "2.10.0.post4".
        made_for: the version of torch that it is made for, as its wheel requires it: "2.10.0".
        folder: where it lies.
        has_torchair: whether torchair is part of it.
        registers_allocator_keys: as in `Torch`; torch_npu 2.10.0.post7 and later do. If both do,
            `import torch_npu` ends the process.
    """

    version: str
    made_for: str
    folder: str
    has_torchair: bool
    registers_allocator_keys: bool


def release_of(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: (2, 13, 0) of "2.13.0.post1+cpu"."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def is_installed(package: str) -> bool:
    """Whether Python finds a package."""
    return _folder(package) is not None


def find_torch() -> Torch | None:
    """The torch that `import torch` would take; None if there is none."""
    folder = _folder("torch")
    if folder is None:
        return None
    text = _read(folder / "version.py")
    build = "CPU"
    for toolkit in ("cuda", "hip", "xpu"):
        found = re.search(rf"^{toolkit}\b[^=]*= *'([^']+)'", text, re.MULTILINE)
        if found:
            build = f"{toolkit.upper()} {found[1]}"
    return Torch(
        _version("torch", text),
        build,
        str(folder),
        _registers_keys(folder / "lib/libc10_cuda.so"),
    )


def find_torch_npu() -> TorchNpu | None:
    """The torch_npu that `import torch_npu` would take; None if there is none."""
    folder = _folder("torch_npu")
    if folder is None:
        return None
    version = _version("torch_npu", _read(folder / "version.py"))
    return TorchNpu(
        version,
        _required_torch(version),
        str(folder),
        (folder / "dynamo/torchair").is_dir(),
        _registers_keys(folder / "lib/libtorch_npu.so"),
    )


def find_file_instead(package: str) -> str:
    """The file that `import` takes instead of a package, because it has its name: torch.py in the
    folder in which Python was started, for example. "" if there is none."""
    found = _spec(package)
    if found is None or found.submodule_search_locations is not None:
        return ""
    return found.origin or ""


def _folder(package: str) -> Path | None:
    found = _spec(package)
    if found is None or found.origin is None:  # absent, or a folder that only has the name
        return None
    places = found.submodule_search_locations
    return Path(next(iter(places))) if places else None


def _spec(package: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _version(package: str, version_py: str) -> str:
    """The version that the package itself states; else what pip installed."""
    found = re.search(r"^__version__[^=]*= *'([^']+)'", version_py, re.MULTILINE)
    if found:
        return found[1]
    try:
        return importlib.metadata.version(package) or "unknown"
    except Exception:  # absent, or damaged in any way
        return "unknown"


def _required_torch(version: str) -> str:
    """The release of torch that a torch_npu requires. Its wheels say torch==2.10.0+cpu,
    torch==2.13.0.*; without such a line, X.Y.Z.postN is made for X.Y.Z."""
    try:
        distribution = importlib.metadata.distribution("torch_npu")
        required = distribution.requires or [] if distribution.version == version else []
    except Exception:  # absent, or damaged in any way
        required = []
    for line in required:
        found = re.match(r"torch\s*\(?\s*==\s*(\d+\.\d+\.\d+)", line)
        if found:
            return found[1]
    return ".".join(map(str, release_of(version)))


def _registers_keys(library: Path) -> bool:
    """Whether a library calls the function of c10/core/AllocatorConfig.h that registers settings;
    a name that is registered twice ends the process."""
    try:
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return data.find(b"registerDeviceConfigParserHook") >= 0
    except (OSError, ValueError):  # absent or empty
        return False
