"""Finds and loads the native libraries of the stand-in."""

from __future__ import annotations

import ctypes
from hashlib import sha256
from pathlib import Path

from cann_host import bindings

# libcann_host holds all the code; the others carry the names torch_npu and torchair look for.
NAMES = (
    "libcann_host.so",
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libhccl.so",
    "libgraph.so",
    "libge_runner.so",
    "libfmk_parser.so",
    "libascend_protobuf.so",
    "libopapi.so",
    "libmspti.so",
    "libnnopbase.so",
)


def library_directory() -> Path | None:
    """The folder that holds the libraries, or None if they were not built.

    An editable install keeps the Python files in the checkout and the libraries in
    site-packages; the package's path lists both.
    """
    import cann_host

    for folder in cann_host.__path__:
        candidate = (Path(folder) / "lib").absolute()
        if all((candidate / name).is_file() for name in NAMES):
            return candidate
    return None


def sources() -> str | None:
    """The digest of the C++ sources beside this package, as CMakeLists.txt computes it; None in a
    wheel, which has no sources."""
    import cann_host

    return digest_of(*(Path(folder, "csrc") for folder in cann_host.__path__))


def digest_of(*folders: Path) -> str | None:
    """The digest of the sources in folders; None if there are none."""
    files = sorted(
        (file.as_posix(), file)
        for folder in folders
        for file in folder.rglob("*")
        if file.suffix in (".cpp", ".h")
    )
    digests = "".join(sha256(file.read_bytes()).hexdigest() for _, file in files)
    return sha256(digests.encode()).hexdigest() if files else None


def built_from(directory: Path) -> str:
    """The digest of the sources that a library was built from; "" if it is too old to have one.
    Loads it."""
    library = ctypes.CDLL(str(directory / NAMES[0]))
    try:
        library.cann_host_sources.restype = ctypes.c_char_p
    except AttributeError:
        return ""
    found: bytes = library.cann_host_sources()
    return found.decode()


def loaded_libraries(name: str) -> list[Path]:
    """Paths of the libraries of this file name that the process has mapped."""
    paths = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line[line.find("/") :] if "/" in line else ""
        if path.rpartition("/")[2].startswith(name):
            paths.add(Path(path))
    return sorted(paths)


def load(directory: Path) -> ctypes.CDLL:
    """Load every library by its absolute path. Returns the library with the code, with the
    signatures of `bindings`.

    If a library with a SONAME is in the process, the loader returns it for every request of that
    name, so no LD_LIBRARY_PATH is needed.

    Raises:
        CannHostError: its functions or structs differ from those of `bindings`.
    """
    libraries = [ctypes.CDLL(str(directory / name)) for name in NAMES]
    return bindings.declare(libraries[0])
