"""The state of the stand-in in this process, in one object: `activate` makes the `Runtime`, and
other modules get it from `current`. Nothing here imports torch before `activate` does."""

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

from cann_host import _native, callers, importing, releases
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
    """The calls of CANN's functions that will fail, as the library has them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._count = 0

    def read(self, text: str, source: str) -> list[Fault]:
        """Read faults from a text.

        Raises:
            CannHostError: it does not have the form of faults, or names a symbol that cannot fail.
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
        """Let these calls fail; calls are counted from now on."""
        for fault in wanted:
            self._library.cann_host_add_fault(
                fault.symbol.encode(), fault.number, fault.code.encode(), fault.call
            )
        self._count += len(wanted)

    @contextmanager
    def during(self, wanted: list[Fault]) -> Iterator[None]:
        """Let these calls fail while the block runs."""
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
        options: its options.
        library: libcann_host.so, with the signatures of `bindings`.
        faults: the calls that will fail.
        operators: the operators of eager calls.
        graphs: the Python half of the graph engine.
        captures: PyTorch's work in captured graphs.
        watch: the memory that a capture uses.
        aten: PyTorch's operators, which replace torch_npu's kernels.
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
    """The options of the stand-in; the defaults if it is not active."""
    return Options() if _current is None else _current.options


def info() -> dict[str, Any]:
    """The options and libraries of the stand-in in this process; `active` says whether it runs,
    `aten_fallbacks` and `prefetches` count what it did."""
    directory = _native.library_directory()
    return {
        "active": is_active(),
        **asdict(Options.of() if _current is None else _current.options),
        "libraries": None if directory is None else str(directory),
        "aten_fallbacks": 0 if _current is None else _current.aten.count,
        "prefetches": 0 if _current is None else _current.library.cann_host_prefetches(),
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
    fill: str | None = None,
) -> None:
    """Activate the stand-in in this process instead of CANN, and import torch and torch_npu.

    Call it before anything imports torch. In worker processes that multiprocessing starts, the
    stand-in is activated automatically. A second call does nothing.

    Args:
        soc: the chip to report, as CANN names it; default the variable CANN_HOST_SOC, else
            Ascend910B2.
        cann_version: the CANN version to report; CANN_HOST_CANN_VERSION, else 9.1.0.
        devices: number of devices; CANN_HOST_DEVICES, else 1.
        memory: bytes of each device, a number or a text such as "8GiB"; CANN_HOST_MEMORY, else the
            devices share the host's memory. A larger allocation is out of memory.
        streams: "now": the work of a launch is done when the launch returns. "late": only when the
            program waits for it, which shows a forgotten wait. CANN_HOST_STREAMS, else "now".
        fail: calls that fail, such as "aclnnQuantMatmulV5:161002@3"; CANN_HOST_FAIL. See `faults`.
        overruns: "warn" or "refuse", if CANN's kernel writes past its result without an error;
            CANN_HOST_OVERRUNS, else "warn".
        fill: "nan", "zero" or a byte such as "0xAB", with which new device memory is filled, so
            that a read of memory that nothing wrote shows; CANN_HOST_FILL, else left as it is.

    Raises:
        CannHostError: the stand-in cannot be activated; the text says why and what to do.
    """
    given = dict(
        soc=soc,
        cann_version=cann_version,
        devices=devices,
        memory=memory,
        streams=streams,
        fail=fail,
        overruns=overruns,
        fill=fill,
    )
    named = [name for name, value in given.items() if value is not None]
    _activate(Options.of(**given), named)


def _activate(wanted: Options, named: list[str], *, is_worker: bool = False) -> None:
    """Activate, or check that an active stand-in has the values of the named options."""
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
    releases.hide(library, wanted.cann_version)
    known = Faults(library)
    failing = known.read(wanted.fail, "fail" if "fail" in named else "CANN_HOST_FAIL")
    library.cann_host_configure(
        wanted.soc.encode(),
        wanted.cann_version.encode(),
        wanted.devices,
        wanted.memory,
        wanted.streams == "late",
        wanted.fill_byte,
    )
    if wanted.fill:
        # torch_npu's allocator would give a freed block to the next tensor with its old values
        os.environ["PYTORCH_NO_NPU_MEMORY_CACHING"] = "1"
    # With its task queue on, torch_npu reports a failed launch late, at another launch. With the
    # queue off, each launch raises its own error.
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
    """Load the native libraries. Returns the library with the code.

    Raises:
        CannHostError: they were not built, or were built from other sources than the Python here.
    """
    directory = _native.library_directory()
    if directory is None:
        raise CannHostError(
            "cann_host has no native libraries here: lq-graph is not installed, or was installed "
            "where no C++ compiler was found. What to do: install one (apt-get install g++), then "
            "lq-graph (in a checkout: pip install -e .)."
        )
    sources = _native.sources()
    if sources is not None and sources != _native.built_from(directory):
        raise CannHostError(
            f"cann_host's native libraries ({directory}) were built from other sources than the "
            "Python beside them: run pip install -e . again."
        )
    return _native.load(directory)


def _connect(wanted: Options, library: ctypes.CDLL, faults: Faults) -> Runtime:
    """Pass the Python functions to the library, and replace torch_npu's kernels by PyTorch's."""
    from cann_host.aclnn import Runner
    from cann_host.aten.captured import CapturedWork
    from cann_host.aten.kernels import AtenKernels
    from cann_host.graph.engine import GraphEngine
    from cann_host.watched import CaptureWatch

    callers.watch()
    captures = CapturedWork(library)
    return Runtime(
        options=wanted,
        library=library,
        faults=faults,
        operators=Runner(library, wanted.soc),
        graphs=GraphEngine(library),
        captures=captures,
        watch=CaptureWatch(),
        aten=AtenKernels(library, captures),
    )


@contextmanager
def faults(fail: str) -> Iterator[None]:
    """Let calls of CANN's functions fail while the block runs.

        with cann_host.faults("aclnnQuantMatmulV5:161002@3"):
            ...  # the third launch of that operator returns 161002

    Args:
        fail: `symbol:code@n`, or several of them with commas between; from now on, the nth call of
            that symbol returns that code. Without `@n` every call does. Symbols are CANN's own
            names, as `entries` lists them; ge.load, ge.add, ge.compile and ge.run belong to the
            graph engine, whose codes are texts such as EZ9999.

    Raises:
        CannHostError: cann_host is not active, the text does not have that form, or there is no
            such symbol.
    """
    mine = current().faults
    with mine.during(mine.read(fail, "fail")):
        yield


def entries() -> list[tuple[str, str, str]]:
    """The functions of CANN that cann_host has, as (group, symbol, kind). kind is "does"; "fails"
    for a function that fails by name; or "makes" for a function that returns no code.

    Raises:
        CannHostError: the native libraries were not built.
    """
    return _entries(open_library() if _current is None else _current.library)


def _entries(library: ctypes.CDLL) -> list[tuple[str, str, str]]:
    lines = library.cann_host_entries().decode().splitlines()
    rows = [(group, symbol, kind) for group, symbol, kind in (line.split("\t") for line in lines)]
    return [row for row in rows if row[1] not in releases.hidden()]


# ---- other processes ----


class _Worker:
    """Pickled with the data that multiprocessing sends to a new worker; unpickling it there
    activates the stand-in."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _activate_worker, (asdict(options()),)


def _activate_worker(given: dict[str, Any]) -> None:
    named = [name for name, value in given.items() if value]
    _activate(Options(**given), named, is_worker=True)


def _activate_workers() -> None:
    """Let new processes (spawn, forkserver) start on the stand-in."""
    prepare = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {"cann_host": _Worker(), **prepare(name)}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


def _before_fork() -> None:
    """Empty torch_npu's task queue, so that it is empty in the child."""
    if current().library.cann_host_has_task_queue():
        _drain()


def _after_fork() -> None:
    """Let the child launch without torch_npu's task queue: the queue's thread does not exist there,
    and launches would wait for it."""
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
    """Late work then fails by name instead of calling an interpreter that ends."""
    if _current is None:  # importing torch_npu failed
        return
    _current.captures.uninstall()
    _current.operators.close()
