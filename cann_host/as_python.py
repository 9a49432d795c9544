"""Runs a program as `python` does: sys.argv, sys.path[0], `__main__`, tracebacks, exit codes.

A program gets a `__main__` of its own in this process. The traceback of an error that ends it
begins with the program's first frame; traceback.print_stack and sys._getframe still see the
launcher's frames.
"""

from __future__ import annotations

import builtins
import code
import importlib.machinery
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, ModuleType, TracebackType
from typing import Any

__all__ = ["Program", "command", "file", "folder", "interact", "module", "run", "shown", "text"]


@dataclass(frozen=True)
class Program:
    """What to run.

    Attributes:
        arguments: sys.argv.
        run: runs it in the module `__main__` of this process.
        first_path: sys.path[0]; None is the working directory, as for `python -m`.
        is_found_there: sys.path[0] holds the program itself: it is set under -P and -I too.
        names: of `__main__`, beside those of every program.
    """

    arguments: list[str]
    run: Callable[[], object]
    first_path: str | None = None
    is_found_there: bool = False
    names: dict[str, Any] = field(default_factory=dict)


def command(source: str, arguments: list[str]) -> Program:
    """`python -c source`. Raises SyntaxError."""
    compiled = compile(source, "<string>", "exec", dont_inherit=True)
    return Program(["-c", *arguments], lambda: _execute(compiled), "")


def text(name: str, source: bytes, arguments: list[str]) -> Program:
    """A program on stdin. name: sys.argv[0], "-" or empty. Raises SyntaxError."""
    compiled = compile(source, "<stdin>", "exec", dont_inherit=True)
    names = {"__file__": "<stdin>", "__cached__": None}
    return Program([name, *arguments], lambda: _execute(compiled), "", names=names)


def file(path: str, arguments: list[str]) -> Program:
    """`python path`: a source file, or a compiled one. Raises OSError, SyntaxError."""
    absolute = os.path.join(os.getcwd(), path)
    with io.open_code(absolute) as opened:
        read = opened.read()  # once: it may be a pipe
    kind: Any = importlib.machinery.SourcelessFileLoader
    compiled = pkgutil.read_code(io.BytesIO(read))
    if compiled is None:
        kind = importlib.machinery.SourceFileLoader
        compiled = compile(read, absolute, "exec", dont_inherit=True)
    names = {
        "__file__": absolute,
        "__cached__": None,
        "__loader__": kind("__main__", absolute),
    }
    beside = os.path.dirname(os.path.realpath(path))
    return Program([path, *arguments], lambda: _execute(compiled), beside, names=names)


def folder(path: str, arguments: list[str]) -> Program:
    """`python path`: a folder or a zip file with a `__main__.py`."""
    absolute = os.path.join(os.getcwd(), path)
    return Program([path, *arguments], lambda: _run_module("__main__", False), absolute, True)


def module(name: str, arguments: list[str]) -> Program:
    """`python -m name`."""
    return Program(["-m", *arguments], lambda: _run_module(name, True))


def run(program: Program) -> None:
    """Run a program in a `__main__` of its own."""
    main = ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __loader__=importlib.machinery.BuiltinImporter)
    if sys.version_info < (3, 14):
        vars(main)["__annotations__"] = {}
    vars(main).update(program.names)
    sys.modules["__main__"] = main
    sys.argv[:] = program.arguments
    # with -P or -I, Python put nothing there for this launcher
    has_first = not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))
    if program.first_path is not None:
        if has_first:
            sys.path[0] = program.first_path
        elif program.is_found_there:
            sys.path.insert(0, program.first_path)
    program.run()


def _execute(compiled: CodeType) -> None:
    exec(compiled, vars(sys.modules["__main__"]))


def _run_module(name: str, alters_argv: bool) -> None:
    """What `python` itself calls, so that runpy's two frames are those of `python -m`."""
    run_as_main: Callable[[str, bool], Any] = vars(runpy)["_run_module_as_main"]
    run_as_main(name, alters_argv)


@contextmanager
def shown(*, stays: bool = False) -> Iterator[None]:
    """A block whose errors are the program's: their tracebacks are shown without the frames of
    the launcher, through the sys.excepthook that the program has set.

    Args:
        stays: show the error here and go on, as `python -i` does; otherwise Python shows it when
            it ends this process.
    """
    try:
        yield
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename in _LAUNCHER:
            trace = trace.tb_next
        if not stays:
            _show_later(error, trace)
            raise
        _show_now(error, trace)


# the files whose frames are above the program's
_LAUNCHER = {__file__, os.path.join(os.path.dirname(__file__), "launcher.py")}


def _show_later(error: BaseException, trace: TracebackType | None) -> None:
    """Let Python, which shows the error after it has left the launcher, show this traceback."""
    hook = getattr(sys, "excepthook", sys.__excepthook__)

    def show(kind: type[BaseException], value: BaseException, whole: TracebackType | None) -> None:
        if value is error:
            error.__traceback__ = sys.last_traceback = whole = trace
        try:
            hook(kind, value, whole)
        except BaseException as failed:  # Python shows it, and then the error
            if failed.__traceback__ is not None:
                failed.__traceback__ = failed.__traceback__.tb_next
            raise

    sys.excepthook = show


def _show_now(error: BaseException, trace: TracebackType | None) -> None:
    error.__traceback__ = trace
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    sys.excepthook(type(error), error, trace)


class _Console(code.InteractiveConsole):
    """Shows errors from the first line that was typed, through the sys.excepthook that is set."""

    def showtraceback(self) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            trace = error.__traceback__
            _show_now(error, None if trace is None else trace.tb_next)

    def showsyntaxerror(self, *_: Any, **__: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            _show_now(error, None)


def interact(*, is_new: bool) -> None:
    """A console in `__main__`, with the history and completion that Python's site gives it.

    Args:
        is_new: no program ran: `__main__` gets torch and torch_npu, and $PYTHONSTARTUP is run.
    """
    space = vars(sys.modules["__main__"])
    if hook := getattr(sys, "__interactivehook__", None):
        hook()
    banner = ""
    if is_new:
        import torch
        import torch_npu

        space.update(torch=torch, torch_npu=torch_npu)
        banner = (
            f"Python {sys.version} on {sys.platform}\n"
            f"torch {torch.__version__} and torch_npu {torch_npu.__version__} are imported."
        )
        startup = os.environ.get("PYTHONSTARTUP", "")
        if startup and not sys.flags.ignore_environment:
            with open(startup, "rb") as opened:
                exec(compile(opened.read(), startup, "exec", dont_inherit=True), space)
    _Console(space, "<stdin>").interact(banner, exitmsg="")
