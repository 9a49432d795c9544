"""Injects faults and Ctrl-C at any point of a function, for the tests of atomic functions.

Each context manager counts the points where it could strike. With a number, it strikes once, at
this point:

    with ctrl_c() as events:      # a rehearsal: nothing is struck
        action()
    for at in points(events.count, trials=200):
        with ctrl_c(at) as events, pytest.raises(KeyboardInterrupt):
            action()
        assert events.struck
"""

from __future__ import annotations

import contextlib
import errno
import linecache
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lq_graph
from lq_graph.checkpoints import load
from lq_graph.modules import merge
from lq_graph.quantization import quantize

__all__ = [
    "STRIKES",
    "Events",
    "Fault",
    "ctrl_c",
    "folder_state",
    "model_state",
    "modes",
    "op_fault",
    "os_fault",
    "points",
    "rehearse",
]

_PACKAGE = str(Path(lq_graph.__file__).parent)
# contextlib: where a block of ours is entered and left
_WATCHED = (_PACKAGE, contextlib.__file__)
# functions that undo a step are not struck: otherwise nothing could be undone
OS_CALLS = ("open", "write", "fsync", "replace", "mkdir", "preadv", "scandir", "stat", "fstat")


class Fault(RuntimeError):  # noqa: N818 - injected, not met
    """The injected error, if no other error is named."""


@dataclass
class Events:
    """The number of points, and whether the fault struck."""

    at: int | None
    count: int = 0
    struck: bool = False

    def next(self) -> bool:
        """Count one point. Returns whether to strike there."""
        self.count += 1
        now = self.count == self.at
        self.struck = self.struck or now
        return now


@cache
def _is_with(file: str, line: int) -> bool:
    """Whether a line begins a with block: the tracer sees it again at the block's end, before the
    block is left, where no signal can come. Python delivers one after a call or a jump back."""
    return linecache.getline(file, line).lstrip().startswith("with ")


class ctrl_c:  # noqa: N801 - used like the functions below
    """A real SIGINT at the at-th line that lq_graph runs in this thread. Lines of contextlib count
    too, because blocks begin and end there."""

    # a class: the end of a generator's block runs lines of contextlib itself

    def __init__(self, at: int | None = None) -> None:
        self._events = Events(at)

    def __enter__(self) -> Events:
        # importing torchair puts another handler in the place of Python's
        self._handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self._events

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)
        signal.signal(signal.SIGINT, self._handler)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        del event, argument
        return self._line if frame.f_code.co_filename.startswith(_WATCHED) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        del argument
        if event != "line" or _is_with(frame.f_code.co_filename, frame.f_lineno):
            return self._line
        if self._events.next():
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return self._line


class _OpFault(TorchDispatchMode):
    def __init__(self, events: Events) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if self._events.next():
            raise Fault(f"injected in place of {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def op_fault(at: int | None = None) -> Iterator[Events]:
    """A Fault instead of the at-th operator that torch dispatches in this thread."""
    events = Events(at)
    with _OpFault(events):
        yield events


@contextmanager
def os_fault(
    at: int | None = None, calls: tuple[str, ...] = OS_CALLS, code: int = errno.ENOSPC
) -> Iterator[Events]:
    """An OSError instead of the at-th call of one of these functions of os."""
    events = Events(at)

    def faulty(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if events.next():
                raise OSError(code, os.strerror(code), f"injected in os.{name}")
            return real(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in calls:
            stack.enter_context(mock.patch.object(os, name, faulty(name, getattr(os, name))))
        yield events


# by name, for parametrize; each with what may be raised where it strikes
STRIKES: dict[str, tuple[Callable[..., Any], type[BaseException]]] = {
    "ctrl_c": (ctrl_c, KeyboardInterrupt),
    "op_fault": (op_fault, Fault),
    "os_fault": (os_fault, Exception),
}


def rehearse(strike: Callable[..., Any], action: Callable[[], object]) -> int:
    """The number of points of an action that a context manager of this file could strike."""
    with strike() as events:
        action()
    assert events.count
    return int(events.count)


def points(count: int, trials: int, seed: int = 0) -> list[int]:
    """Numbers of the points to strike: random, or all points if there are at most `trials`."""
    if count <= trials:
        return list(range(1, count + 1))
    return sorted(random.Random(seed).sample(range(1, count + 1), trials))


def modes() -> tuple[object, ...]:
    """The modes of the process that a function could leave changed."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        [_is_free(lock) for lock in (load._LOCK, merge._ONE_AT_A_TIME, quantize._LOCK)],
    )


def _is_free(lock: threading.RLock) -> bool:
    """Whether another thread could take it."""
    found = []

    def take() -> None:
        if lock.acquire(blocking=False):
            found.append(lock)
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return bool(found)


def model_state(model: nn.Module) -> dict[str, object]:
    """Everything of a model that must be bit-equal: types, modes, hooks, tensors, and which tensors
    are the same object."""
    state: dict[str, object] = {}
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[name] = (seen.setdefault(id(module), name), type(module), module.training)
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v}
        state[f"{name} hooks"] = hooks
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                state[f"{name} {key}"] = None
                continue
            state[f"{name} {key}"] = (
                seen.setdefault(id(tensor), f"{name} {key}"),
                type(tensor),
                tensor.dtype,
                tuple(tensor.shape),
                tensor.requires_grad,
                str(tensor.device),
                b"" if tensor.is_meta else _bytes(tensor),
            )
    return state


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def folder_state(folder: Path) -> dict[str, bytes | None]:
    """The files of a folder, hidden ones too, and their bytes; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
