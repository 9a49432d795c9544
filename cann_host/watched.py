"""Weights that were replaced after a graph was made. A graph keeps the format that a weight had,
and the memory of parameters that were captured or became constants.

CANN checks neither of them at a run: it computes with the bytes that are there. So these refusals
are cann_host's own, and say so.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from cann_host import runtime
from cann_host.memory import FRACTAL_NZ

__all__ = [
    "CaptureWatch",
    "ReplacedError",
    "Watched",
    "check",
    "check_format",
    "given_inputs",
    "has_format",
    "note",
    "refuse_frozen",
    "watch",
    "watch_torchair",
]

_OWN = (
    "CANN does not check this, so a device would compute garbage, or with old weights; this "
    "refusal is cann_host's own."
)


class ReplacedError(RuntimeError):
    """A graph would compute with other bytes than the ones it was made for."""


def _format_name(form: int) -> str:
    return "FRACTAL_NZ" if form == FRACTAL_NZ else "ND" if form == 2 else f"format {form}"


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _format_of(tensor: Tensor) -> int:
    import torch_npu

    return int(torch_npu.get_npu_format(tensor))


@dataclass
class Watched:
    """A parameter whose memory a graph holds.

    Attributes:
        parameter: a weak reference to it.
        address: of its storage, when the graph was made.
        form: its format when the graph was made.
        what: dtype and shape, for messages.
    """

    parameter: weakref.ref[Parameter]
    address: int
    form: int
    what: str

    @staticmethod
    def of(parameter: Parameter) -> Watched:
        what = f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}"
        reference = weakref.ref(parameter)
        return Watched(reference, _storage_of(parameter), _format_of(parameter), what)

    def changed(self) -> str:
        """How the parameter changed since; empty if it did not."""
        parameter = self.parameter()
        if parameter is None:
            # another Parameter may have the same memory now: nn.Parameter(old.data)
            found = _parameters().get(self.address)
            if found is None:
                return "is gone"
            self.parameter, parameter = weakref.ref(found), found
        if parameter.device.type != "npu":
            return f"is on {parameter.device} now"
        if (form := _format_of(parameter)) != self.form:
            return f"was {_format_name(self.form)} and is {_format_name(form)} now"
        return "" if _storage_of(parameter) == self.address else "has other memory now"


def _parameters() -> dict[int, Parameter]:
    """Every parameter on a device, by the address of its storage."""
    # not isinstance, which would resolve lazy proxies
    alive = [o for o in gc.get_objects() if type(o) is Parameter and o.device.type == "npu"]
    return {_storage_of(parameter): parameter for parameter in alive}


def watch(addresses: Iterable[int]) -> list[Watched]:
    """The parameters whose memory begins at one of the addresses."""
    wanted = set(addresses)
    if not wanted:
        return []
    return [Watched.of(found) for at, found in _parameters().items() if at in wanted]


def check(what: str, parameters: Iterable[Watched], todo: str) -> None:
    """Refuse a run if one of the parameters was replaced.

    Raises:
        ReplacedError: names the parameter.
    """
    for parameter in parameters:
        if change := parameter.changed():
            raise ReplacedError(
                f"cann_host: {what} uses the memory of a parameter, {parameter.what}, that "
                f"{change}. {_OWN} What to do: {todo}."
            )


def has_format(tensor: Tensor, compiled: int) -> bool:
    """Whether a tensor has the format that a graph was compiled for, as far as it matters."""
    form = _format_of(tensor)
    return form == compiled or FRACTAL_NZ not in (form, compiled)


def check_format(what: str, compiled: int, tensor: Tensor) -> None:
    """Refuse an input in another format than its graph was compiled for.

    Raises:
        ReplacedError: names both formats.
    """
    if not has_format(tensor, compiled):
        form = _format_name(_format_of(tensor))
        raise ReplacedError(
            f"cann_host: {what} is {form} and the graph was compiled for "
            f"{_format_name(compiled)}. {_OWN} What to do: prepare the weights "
            "(use_internal_format_weight) before the first call and after every .cpu().npu() or "
            "weight.data = ...; or torch._dynamo.reset() and call again, which compiles for what "
            "is there now."
        )


def refuse_frozen(what: str, todo: str) -> None:
    """Refuse an input that moved: with frozen_parameter, torchair reads it at the address of the
    first run.

    Raises:
        ReplacedError: always.
    """
    raise ReplacedError(
        f"cann_host: {what} has other memory now, and the graph, compiled with frozen_parameter, "
        f"reads the memory it had. {_OWN} What to do: {todo}."
    )


# ---- captured graphs ----


class CaptureWatch:
    """The memory that the current capture uses.

    The constructor changes torch_npu's captured graphs: they remember the parameters in that
    memory, and check them before a replay.
    """

    def __init__(self) -> None:
        from torch_npu.npu.graphs import NPUGraph

        self._used: set[int] | None = None  # storages read or written by the capture
        begin, end, replay = NPUGraph.capture_begin, NPUGraph.capture_end, NPUGraph.replay

        def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
            begin(graph, *args, **kwargs)
            self._used = set()

        def capture_end(graph: Any) -> None:
            used, self._used = self._used or set(), None
            end(graph)
            graph._cann_host_watched = watch(used)

        def checked_replay(graph: Any) -> None:
            check(
                "the captured graph",
                getattr(graph, "_cann_host_watched", ()),
                "capture again after a weight was replaced, prepared or moved "
                "(torch._dynamo.reset() under torch.compile), or write into it in place, with "
                "weight.copy_()",
            )
            replay(graph)

        NPUGraph.capture_begin, NPUGraph.capture_end = capture_begin, capture_end
        NPUGraph.replay = checked_replay

    def note(self, addresses: Iterable[int]) -> None:
        """Record the storages that a launch uses, if a graph is being captured."""
        if self._used is not None:
            self._used.update(addresses)


def note(addresses: Iterable[int]) -> None:
    """Record the storages that a launch uses, if this process is capturing a graph."""
    runtime.current().watch.note(addresses)


# ---- torchair's graphs ----

_running = threading.local()


def given_inputs() -> Sequence[Tensor] | None:
    """The tensors of the graph that this thread runs; None if the caller is not torchair."""
    return getattr(_running, "inputs", None)


def watch_torchair(kind: Any) -> None:
    """Keep the tensors that a graph of torchair is called with: torchair passes their formats to
    CANN at the first run only, and then only addresses.

    Args:
        kind: torchair's TorchNpuGraph.
    """
    run: Callable[..., Any] = kind.run
    if hasattr(run, "_cann_host"):
        return

    def kept(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        before = given_inputs()
        _running.inputs = inputs
        try:
            return run(self, inputs, *args, **kwargs)
        finally:
            _running.inputs = before

    kept._cann_host = True  # type: ignore[attr-defined]
    kind.run = kept
