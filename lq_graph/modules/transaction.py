"""Atomic changes: steps are undone on failure, Ctrl-C waits, one thread at a time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

__all__ = [
    "all_or_nothing",
    "keeps_grad_mode",
    "one_at_a_time",
    "uninterrupted",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def keeps_grad_mode(function: _Function) -> _Function:
    """Decorator: restores whether gradients are recorded.

    Without it, if Ctrl-C comes while torch.no_grad() ends, gradients stay off for the rest of the
    process.
    """

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return cast(_Function, wrapper)


def one_at_a_time() -> threading.RLock:
    """A lock that is free in a forked process, where the thread that held it does not exist."""
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """A block that Ctrl-C does not interrupt: it waits for the end of the block.

    The block gets a function. When the block calls it, a waiting Ctrl-C is raised. Python delivers
    Ctrl-C to the main thread only, so in other threads this does nothing.
    """
    caught: list[tuple[Any, ...]] = []
    before = signal.getsignal(signal.SIGINT)

    def deliver() -> None:
        if not caught:
            return
        args = caught.pop()
        if callable(before):
            before(*args)
        elif before is signal.SIG_DFL:  # the process ends, as it would without this
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    # None: the handler is not a Python one and cannot be restored
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield deliver
        return
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, before)
        deliver()


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """A block whose steps are undone, the last one first, when one of them fails.

    Before each step, tell the stack how to undo it: `undo.callback(...)`. Ctrl-C waits for the end
    of the block, so do slow work before the block.
    """
    with uninterrupted(), ExitStack() as undo:
        yield undo
        undo.pop_all()
