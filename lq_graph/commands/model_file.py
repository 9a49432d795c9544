"""FILE.py:FUNCTION on the command line: a function of the user's own that makes a model."""

from __future__ import annotations

import importlib
import inspect
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LinearQuantValueError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["call_function", "model_and_inputs", "what_it_is"]


def model_and_inputs(command: str, where: str) -> tuple[nn.Module, Sequence[torch.Tensor]]:
    """The model and the inputs that FILE.py:FUNCTION or package.module:FUNCTION returns.

    Args:
        command: for the messages: "explain".
        where: as on the command line.

    Raises:
        LinearQuantValueError: there is no such function, or it returns something else.
    """
    from torch import nn

    made = call_function(command, where)
    if (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], nn.Module)
        and isinstance(made[1], tuple | list)
    ):
        return made[0], made[1]
    raise LinearQuantValueError(
        f"{command}: {where} returned {what_it_is(made)}; it has to return the model and a tuple "
        "of its inputs"
    )


def what_it_is(made: Any) -> str:
    """What a function returned, for a message: "(int, int)"."""
    if isinstance(made, tuple):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return type(made).__name__


def call_function(command: str, where: str) -> Any:
    """What FILE.py:FUNCTION or package.module:FUNCTION returns.

    Raises:
        LinearQuantValueError: there is no such function, or it needs arguments.
    """
    file, colon, name = where.rpartition(":")
    if not colon or not file or not name:
        raise LinearQuantValueError(f"{command}: {where!r} is not FILE.py:FUNCTION")
    found = _names_in(command, file)
    if not callable(found.get(name)):
        raise LinearQuantValueError(f"{command}: {file} has no function {name}")
    try:
        inspect.signature(found[name]).bind()
    except ValueError:  # a builtin without a signature
        pass
    except TypeError as error:
        raise LinearQuantValueError(
            f"{command}: {where} is called without arguments: {error}"
        ) from None
    return found[name]()


def _names_in(command: str, file: str) -> dict[str, Any]:
    """The globals of a file or a module, imported."""
    try:
        if not file.endswith(".py"):
            if not all(part.isidentifier() for part in file.split(".")):
                raise LinearQuantValueError(
                    f"{command}: {file} is neither a file NAME.py nor the name of a module"
                )
            return vars(importlib.import_module(file))
        if not Path(file).is_file():
            raise LinearQuantValueError(f"{command}: there is no file {file}")
        sys.path.insert(0, str(Path(file).resolve().parent))  # as if it were run
        return runpy.run_path(file)
    except (ModuleNotFoundError, OSError) as error:
        raise LinearQuantValueError(f"{command}: {file}: {error}") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        text = "".join(traceback.format_exception_only(error)).rstrip()
        raise LinearQuantValueError(f"{command}: {file} is not Python\n{text}") from None
