"""A stand-in for CANN: the real torch_npu and torchair on any Linux machine, computed on the CPU.

    python -m cann_host script.py [args]        run a script
    python -m cann_host -m module [args]        run a module, pytest for example

or, before anything imports torch:

    import cann_host
    cann_host.activate()

It shows that the wheels' Python and C++ accept a program and that its graphs mean what CANN's
documents say. It does not show what a chip does.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.metadata
import importlib.util
import multiprocessing.spawn
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from cann_host import allocator_keys
from cann_host.options import CannHostError, Fault, Options, parse_faults

__all__ = ["CannHostError", "activate", "entries", "faults", "info", "is_active"]

# What torch_npu and torchair are here, in pip's words; the extra npu of lq-graph.
NEEDED = ("torch==2.13.0", "torch_npu==2.13.0", "packaging", "protobuf")

_options: Options | None = None  # of this process, once active
_library: ctypes.CDLL
_fault_count = 0
_is_worker = False  # of a process that is on the stand-in and has said so


def is_active() -> bool:
    """Whether this process runs on the stand-in."""
    return _options is not None


def info() -> dict[str, Any]:
    """What the stand-in is in this process: its options, libraries; `active` says whether."""
    from cann_host import _native

    directory = _native.library_directory()
    fallbacks = 0
    if is_active():
        from cann_host.aten import kernels

        fallbacks = kernels.count
    return {
        "active": is_active(),
        **asdict(_options or Options.of()),
        "libraries": None if directory is None else str(directory),
        "aten_fallbacks": fallbacks,
    }


def activate(
    soc: str | None = None,
    *,
    cann_version: str | None = None,
    devices: int | None = None,
    memory: int | str | None = None,
    streams: str | None = None,
    fail: str | None = None,
    overruns: str | None = None,
) -> None:
    """Put the stand-in in the place of CANN in this process, and import torch and torch_npu.

    Call it before anything imports torch. Worker processes that multiprocessing starts become
    active by themselves. A second call does nothing.

    Args:
        soc: the product to report, as CANN names it; default the variable CANN_HOST_SOC, else
            Ascend910B2.
        cann_version: the CANN version to report; CANN_HOST_CANN_VERSION, else 9.1.0.
        devices: how many there are; CANN_HOST_DEVICES, else 1.
        memory: bytes of each, a number or a text such as "8GiB"; CANN_HOST_MEMORY, else the
            devices share the host's. An allocation beyond it is out of memory.
        streams: "now": a launch is done when it returns. "late": only when somebody waits for it,
            which shows a wait that was forgotten. CANN_HOST_STREAMS, else "now".
        fail: calls that fail, such as "aclnnQuantMatmulV5:161002@3"; CANN_HOST_FAIL. See `faults`.
        overruns: "warn" or "refuse" where CANN's kernel writes past its result and says nothing;
            CANN_HOST_OVERRUNS, else "warn".

    Raises:
        CannHostError: it cannot be done here; the text says why and what to do.
    """
    global _options, _library
    given = dict(
        soc=soc,
        cann_version=cann_version,
        devices=devices,
        memory=memory,
        streams=streams,
        fail=fail,
        overruns=overruns,
    )
    options = Options.of(**given)
    if _options is not None:
        for name, value in given.items():
            have, want = getattr(_options, name), getattr(options, name)
            if value is not None and want != have:
                raise CannHostError(
                    f"cann_host is already active with {name} {have}; start another process for "
                    f"{want}."
                )
        return
    library = _load()
    source = "CANN_HOST_FAIL" if fail is None else "fail"
    _read_faults(options.fail, source)  # before anything is imported
    _configure(library, options)
    # With its task queue on, torch_npu reports a failed launch late, at another one. Without, each
    # launch fails where it is.
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
    _import_torch_npu(library)

    from cann_host import aclnn
    from cann_host.aten import kernels
    from cann_host.graph import compiler, executor

    executor.overruns = options.overruns
    aclnn.install(library, options.soc)
    compiler.install(library)
    kernels.install(library)
    _library, _options = library, options
    _activate_workers()
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
    _add_faults(options.fail, source)
    print(
        f"cann_host: no NPU here; a stand-in for CANN {options.cann_version} ({options.soc}) "
        "computes on the CPU",
        file=sys.stderr,
    )


@contextmanager
def faults(fail: str) -> Iterator[None]:
    """Let calls of CANN's functions fail while the block runs.

        with cann_host.faults("aclnnQuantMatmulV5:161002@3"):
            ...  # the third launch of that operator returns 161002

    Args:
        fail: `symbol:code@n`, more of them after commas; the nth call from now on of that symbol
            returns that code. Without `@n` every call does. Symbols are CANN's own names, as
            `entries` lists them; ge.load, ge.add, ge.compile and ge.run are the graph engine's,
            whose codes are texts such as EZ9999.

    Raises:
        CannHostError: cann_host is not active, the text is not of that form, or there is no such
            symbol.
    """
    if not is_active():
        raise CannHostError("cann_host is not active in this process: call activate() first.")
    before = _fault_count
    _add_faults(fail, "fail")
    try:
        yield
    finally:
        _drop_faults(before)


def entries() -> list[tuple[str, str, str]]:
    """What of CANN is here: (group, symbol, kind), where kind is "does", "fails" by its name, or
    "makes" for a function that returns no code.

    Raises:
        CannHostError: the native libraries were not built.
    """
    library = _library if is_active() else _open()
    library.cann_host_entries.restype = ctypes.c_char_p
    lines = library.cann_host_entries().decode().splitlines()
    return [(group, symbol, kind) for group, symbol, kind in (line.split("\t") for line in lines)]


def _read_faults(text: str, source: str) -> list[Fault]:
    wanted = parse_faults(text, source)
    possible = {symbol for _, symbol, kind in entries() if kind == "does"}
    for fault in wanted:
        if fault.symbol not in possible:
            near = sorted(s for s in possible if fault.symbol in s)
            others = f"it has {', '.join(near)}" if near else "cann_host.entries() lists them"
            raise CannHostError(
                f"{source} names {fault.symbol}, which this stand-in does not have or cannot let "
                f"fail; {others}."
            )
    return wanted


def _add_faults(text: str, source: str) -> None:
    global _fault_count
    for fault in _read_faults(text, source):
        _library.cann_host_add_fault(
            fault.symbol.encode(), fault.number, fault.code.encode(), fault.call
        )
        _fault_count += 1


def _drop_faults(keep: int) -> None:
    global _fault_count
    _library.cann_host_drop_faults(keep)
    _fault_count = keep


class _Worker:
    """Pickled with what multiprocessing tells a new worker; unpickling it there activates."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _activate_worker, (asdict(_options or Options()),)


def _activate_worker(options: dict[str, Any]) -> None:
    global _is_worker
    _is_worker = True
    given = {name: value for name, value in options.items() if value}
    activate(**given)


def _activate_workers() -> None:
    """Let processes that start anew (spawn, forkserver) do so on the stand-in."""
    prepare = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {"cann_host": _Worker(), **prepare(name)}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


def _load() -> ctypes.CDLL:
    """Check that activation is possible and load the native libraries."""
    from cann_host import _native

    if not sys.platform.startswith("linux"):
        raise CannHostError(f"cann_host runs on Linux only, and this is {sys.platform}.")
    if "torch" in sys.modules:
        raise CannHostError(
            "torch is already imported: call cann_host.activate() before the first import of "
            "torch, or start the program with `python -m cann_host`."
        )
    real = _native.loaded_libraries("libascendcl.so")
    if real:
        raise CannHostError(
            f"a CANN is already loaded in this process ({real[0]}); cann_host does not replace it."
        )
    if importlib.util.find_spec("torch_npu") is None:
        raise CannHostError(
            f"torch_npu is not installed: pip install {' '.join(NEEDED)} brings the version this "
            "was made for."
        )
    return _open()


def _open() -> ctypes.CDLL:
    from cann_host import _native

    directory = _native.library_directory()
    if directory is None:
        raise CannHostError(
            "cann_host's native libraries were not built, because no C++ compiler was found when "
            "lq-graph was installed: install one (apt-get install g++) and install lq-graph again."
        )
    sources = _native.sources()
    if sources is not None and sources != _native.built_from(directory):
        raise CannHostError(
            f"cann_host's native libraries ({directory}) were built from other sources than the "
            "Python beside them: run pip install -e . again."
        )
    return _native.load(directory)


def _configure(library: ctypes.CDLL, options: Options) -> None:
    library.cann_host_configure.argtypes = (
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_int,
    )
    library.cann_host_configure.restype = None
    library.cann_host_configure(
        options.soc.encode(),
        options.cann_version.encode(),
        options.devices,
        options.memory,
        options.streams == "late",
    )
    library.cann_host_add_fault.argtypes = (
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_long,
    )
    library.cann_host_add_fault.restype = None
    library.cann_host_drop_faults.argtypes = (ctypes.c_size_t,)
    library.cann_host_drop_faults.restype = None


class _WithoutLine:
    """A text stream that drops one exact line; the rest goes to the stream behind it."""

    def __init__(self, stream: Any, line: str) -> None:
        self._stream = stream
        self._line = line
        self._dropped = False

    def write(self, text: str) -> int:
        if text == self._line:
            self._dropped = True
        elif self._dropped and text == "\n":  # print() writes its line end apart
            self._dropped = False
        else:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _import_torch_npu(library: ctypes.CDLL) -> None:
    stdout = sys.stdout
    # torch_npu warns on stdout that no CANN is installed, which is the point of this package.
    line = "Warning: ASCEND_HOME_PATH environment variable is not set."
    sys.stdout = _WithoutLine(stdout, line)
    # At exit handlers run in reverse: _drain, torch_npu's own, _leave.
    atexit.register(_leave)
    try:
        with allocator_keys.set_aside(library) as both:
            import torch  # loads torch_npu too, unless autoload is off
            import torch_npu  # noqa: F401
    except Exception as error:
        raise CannHostError(_why_not_imported(error)) from error
    finally:
        sys.stdout = stdout
        if "torch_npu" not in sys.modules:
            atexit.unregister(_leave)
    atexit.register(_drain)
    if both and not _is_worker:
        version, _, build = torch.__version__.partition("+")
        build = f" (a {build} build)" if build else ""
        print(
            f"cann_host: torch {version}{build} and torch_npu both register the allocator "
            f"setting{'s' * (len(both) > 1)} {', '.join(both)}. On the stand-in it works; beside a "
            "real CANN expect `import torch_npu` to end the process. There, install the CPU build "
            f"of torch {version}, as the install page of pytorch.org gives it.",
            file=sys.stderr,
        )


def _why_not_imported(error: BaseException) -> str:
    """What stopped the import of torch or torch_npu; torch's autoload wraps it in its own error."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {error}"
    try:
        torch, torch_npu = map(importlib.metadata.version, ("torch", "torch_npu"))
    except importlib.metadata.PackageNotFoundError:
        return f"torch and torch_npu cannot be imported: {text}"
    train = torch_npu.split(".")[:2]
    if torch.split(".")[:2] != train:
        text += f" (this torch_npu is made for torch {'.'.join(train)})"
    return f"torch {torch} and torch_npu {torch_npu} cannot be imported: {text}"


def _before_fork() -> None:
    """Let the child find torch_npu's task queue empty."""
    if _library.cann_host_has_task_queue():
        _drain()


def _after_fork() -> None:
    """The child has no thread for torch_npu's task queue: what it launches must not wait for it."""
    if _library.cann_host_has_task_queue():
        import torch_npu

        torch_npu.npu.set_stream(torch_npu.npu.SyncLaunchStream())


def _drain() -> None:
    """Finish the launches in torch_npu's queue while their Python can still run."""
    import torch_npu

    if not torch_npu.npu.is_initialized():
        return
    try:
        torch_npu.npu.synchronize()
    except RuntimeError as error:
        print(f"cann_host: work that was not waited for has failed: {error}", file=sys.stderr)


def _leave() -> None:
    for name in ("aten.captured", "aclnn"):  # not there if importing torch_npu failed
        if module := sys.modules.get(f"cann_host.{name}"):
            module.uninstall()
