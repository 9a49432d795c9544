"""What this process has of the stand-in, in one object: `activate` makes the `Runtime`, and the
other modules ask `current` for it. Nothing here imports torch before `activate` does."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing.spawn
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cann_host import _native, importing
from cann_host.options import CannHostError, Fault, Options, parse_faults

if TYPE_CHECKING:
    from cann_host.aclnn import Runner
    from cann_host.aten.captured import CapturedWork
    from cann_host.aten.kernels import AtenKernels
    from cann_host.graph.engine import GraphEngine
    from cann_host.watched import CaptureWatch

__all__ = [
    "Faults",
    "Runtime",
    "activate",
    "current",
    "entries",
    "faults",
    "info",
    "is_active",
    "options",
]


class Faults:
    """The calls of CANN's functions that are to fail, as the library knows them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._count = 0

    def read(self, text: str, source: str) -> list[Fault]:
        """The faults that a text asks for.

        Raises:
            CannHostError: it is not of that form, or names a symbol that cannot fail.
        """
        wanted = parse_faults(text, source)
        possible = {symbol for _, symbol, kind in _entries(self._library) if kind == "does"}
        for fault in wanted:
            if fault.symbol not in possible:
                near = sorted(s for s in possible if fault.symbol in s)
                others = f"it has {', '.join(near)}" if near else "cann_host.entries() lists them"
                raise CannHostError(
                    f"{source} names {fault.symbol}, which this stand-in does not have or cannot "
                    f"let fail; {others}."
                )
        return wanted

    def add(self, wanted: list[Fault]) -> None:
        """From now on these calls fail, counted from here."""
        for fault in wanted:
            self._library.cann_host_add_fault(
                fault.symbol.encode(), fault.number, fault.code.encode(), fault.call
            )
        self._count += len(wanted)

    @contextmanager
    def during(self, wanted: list[Fault]) -> Iterator[None]:
        """These calls fail while the block runs."""
        before = self._count
        self.add(wanted)
        try:
            yield
        finally:
            self._library.cann_host_drop_faults(before)
            self._count = before


@dataclass
class Runtime:
    """The stand-in in this process.

    Attributes:
        options: what it pretends to be.
        library: libcann_host.so, with the signatures of `bindings`.
        faults: the calls that are to fail.
        operators: the operators of eager calls.
        graphs: the graph engine's half in Python.
        captures: PyTorch's work in captured graphs.
        watch: the memory that a capture uses.
        aten: PyTorch's operators in the place of torch_npu's kernels.
    """

    options: Options
    library: ctypes.CDLL
    faults: Faults
    operators: Runner
    graphs: GraphEngine
    captures: CapturedWork
    watch: CaptureWatch
    aten: AtenKernels


_current: Runtime | None = None  # of this process, once active


def is_active() -> bool:
    """Whether this process runs on the stand-in."""
    return _current is not None


def current() -> Runtime:
    """The stand-in of this process.

    Raises:
        CannHostError: it is not active.
    """
    if _current is None:
        raise CannHostError("cann_host is not active in this process: call activate() first.")
    return _current


def options() -> Options:
    """What the stand-in pretends to be; the defaults where it is not active."""
    return Options() if _current is None else _current.options


def info() -> dict[str, Any]:
    """What the stand-in is in this process: its options, libraries; `active` says whether."""
    directory = _native.library_directory()
    return {
        "active": is_active(),
        **asdict(Options.of() if _current is None else _current.options),
        "libraries": None if directory is None else str(directory),
        "aten_fallbacks": 0 if _current is None else _current.aten.count,
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
    given = dict(
        soc=soc,
        cann_version=cann_version,
        devices=devices,
        memory=memory,
        streams=streams,
        fail=fail,
        overruns=overruns,
    )
    named = [name for name, value in given.items() if value is not None]
    _activate(Options.of(**given), named)


def _activate(wanted: Options, named: list[str], *, is_worker: bool = False) -> None:
    """Activate, or check that an active stand-in is what the named options say."""
    global _current
    if _current is not None:
        for name in named:
            have, want = getattr(_current.options, name), getattr(wanted, name)
            if want != have:
                raise CannHostError(
                    f"cann_host is already active with {name} {have}; start another process for "
                    f"{want}."
                )
        return
    importing.check_possible()
    library = open_library()
    known = Faults(library)
    failing = known.read(wanted.fail, "fail" if "fail" in named else "CANN_HOST_FAIL")
    library.cann_host_configure(
        wanted.soc.encode(),
        wanted.cann_version.encode(),
        wanted.devices,
        wanted.memory,
        wanted.streams == "late",
    )
    # With its task queue on, torch_npu reports a failed launch late, at another one. Without, each
    # launch fails where it is.
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
    # Exit handlers run in reverse: _drain, torch_npu's own, _leave.
    atexit.register(_leave)
    try:
        importing.import_torch_npu(library, quiet=is_worker)
    finally:
        if "torch_npu" not in sys.modules:
            atexit.unregister(_leave)
    atexit.register(_drain)
    _current = _connect(wanted, library, known)
    _activate_workers()
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
    known.add(failing)
    print(
        f"cann_host: no NPU here; a stand-in for CANN {wanted.cann_version} ({wanted.soc}) "
        "computes on the CPU",
        file=sys.stderr,
    )


def open_library() -> ctypes.CDLL:
    """Load the native libraries; the one with the code.

    Raises:
        CannHostError: they were not built, or from other sources than the Python here.
    """
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


def _connect(wanted: Options, library: ctypes.CDLL, faults: Faults) -> Runtime:
    """Give the library its Python halves, and torch_npu the operators of PyTorch."""
    from cann_host.aclnn import Runner
    from cann_host.aten.captured import CapturedWork
    from cann_host.aten.kernels import AtenKernels
    from cann_host.graph.engine import GraphEngine
    from cann_host.watched import CaptureWatch

    captures = CapturedWork(library)
    return Runtime(
        options=wanted,
        library=library,
        faults=faults,
        operators=Runner(library, wanted.soc),
        graphs=GraphEngine(library),
        captures=captures,
        watch=CaptureWatch(),
        aten=AtenKernels(captures),
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
    mine = current().faults
    with mine.during(mine.read(fail, "fail")):
        yield


def entries() -> list[tuple[str, str, str]]:
    """What of CANN is here: (group, symbol, kind), where kind is "does", "fails" by its name, or
    "makes" for a function that returns no code.

    Raises:
        CannHostError: the native libraries were not built.
    """
    return _entries(open_library() if _current is None else _current.library)


def _entries(library: ctypes.CDLL) -> list[tuple[str, str, str]]:
    lines = library.cann_host_entries().decode().splitlines()
    return [(group, symbol, kind) for group, symbol, kind in (line.split("\t") for line in lines)]


# ---- other processes ----


class _Worker:
    """Pickled with what multiprocessing tells a new worker; unpickling it there activates."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _activate_worker, (asdict(options()),)


def _activate_worker(given: dict[str, Any]) -> None:
    named = [name for name, value in given.items() if value]
    _activate(Options(**given), named, is_worker=True)


def _activate_workers() -> None:
    """Let processes that start anew (spawn, forkserver) do so on the stand-in."""
    prepare = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {"cann_host": _Worker(), **prepare(name)}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


def _before_fork() -> None:
    """Let the child find torch_npu's task queue empty."""
    if current().library.cann_host_has_task_queue():
        _drain()


def _after_fork() -> None:
    """The child has no thread for torch_npu's task queue: what it launches must not wait for it."""
    if current().library.cann_host_has_task_queue():
        import torch_npu

        torch_npu.npu.set_stream(torch_npu.npu.SyncLaunchStream())


# ---- the end ----


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
    """Late work then fails by name instead of entering a dying interpreter."""
    if _current is None:  # importing torch_npu failed
        return
    _current.captures.uninstall()
    _current.operators.close()
