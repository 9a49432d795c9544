"""A folder of transformers on the command line: a step of its model, before there are weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LinearQuantValueError
from .extras import need

if TYPE_CHECKING:
    from torch import nn

__all__ = ["add_arguments", "is_config", "model_and_inputs"]

_SCHEMES = {"a8w8": "A8W8Dynamic", "a8w8-static": "A8W8Static", "a4w4": "A4W4Dynamic"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of such a model."""
    group = parser.add_argument_group(
        "with a folder", "its model is made on meta: no weights are read, and none take memory"
    )
    group.add_argument("--quant", choices=_SCHEMES, help="default a8w8")
    group.add_argument("--batch", type=int, metavar="N", help="sequences; default 1")
    group.add_argument("--context", type=int, metavar="N", help="tokens of the cache; default 128")
    group.add_argument(
        "--prefill", action="store_true", help="a step of so many tokens; default: of one token"
    )


def is_config(model: str) -> bool:
    """Whether the command line names a folder or a JSON file."""
    place = Path(model).expanduser()
    return place.is_dir() or place.suffix == ".json"


def refuse_options(asked: argparse.Namespace) -> None:
    """Refuse what is neither a folder nor a function, and a folder's options for a function.

    Raises:
        LinearQuantValueError: one was given; or asked.model is neither.
    """
    for name in ("quant", "batch", "context", "prefill"):
        if getattr(asked, name) not in (None, False):
            raise LinearQuantValueError(
                f"explain: --{name} goes with a folder that has a config.json; {asked.model} "
                "returns the model and the inputs"
            )
    if ":" not in asked.model:
        raise LinearQuantValueError(
            f"explain: {asked.model!r} is neither FILE.py:FUNCTION nor a folder with a config.json"
        )


def model_and_inputs(asked: argparse.Namespace) -> tuple[nn.Module, list[Any], Any]:
    """The model on meta, its inputs, and the scheme that quantizes it.

    Raises:
        LinearQuantValueError: transformers is not installed, or cannot make the model; a number
            below 1.
    """
    need("explain", "a folder", "transformers")
    batch = 1 if asked.batch is None else asked.batch
    context = 128 if asked.context is None else asked.context
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise LinearQuantValueError(f"explain: --{name} is {value}, below 1")
    from ..integrations.steps import step_of_config
    from ..quantization import schemes

    model, inputs = step_of_config(asked.model, batch=batch, context=context, prefill=asked.prefill)
    return model, inputs, getattr(schemes, _SCHEMES[asked.quant or "a8w8"])()
