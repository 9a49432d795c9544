"""`python -m lq_graph inspect`: what a checkpoint holds."""

from __future__ import annotations

import argparse
import os

from ..errors import LinearQuantValueError
from .dtypes import dtype_of
from .extras import need
from .output import add_json, only_the_answer, print_json

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "NEEDS_TORCH", "add_arguments", "run"]

HELP = "what a checkpoint holds, what runs it, and what load_checkpoint refuses"
DESCRIPTION = (
    "Say what a quantized checkpoint holds, layer by layer, which products run it, and everything "
    "that load_checkpoint would refuse. Only the JSON and the headers of the files are read."
)
EPILOG = "Exit status: 0 if nothing is refused, 1 if something is, 2 for a mistake in the command."
NEEDS_TORCH = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("folder", help="a folder, or one safetensors file")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a folder with the config.json of the model, often the same one: also say what is "
        "missing and what is more than the model has; needs transformers",
    )
    parser.add_argument(
        "--ignore",
        metavar="PATTERN",
        action="append",
        default=[],
        help="as ignore= of load_checkpoint; may be repeated",
    )
    parser.add_argument("--dtype", help="as dtype= of load_checkpoint")
    parser.add_argument(
        "--prefer", choices=("dynamic", "static"), default="dynamic", help="as prefer= of it"
    )
    parser.add_argument("--all", action="store_true", help="one line for each tensor")
    add_json(parser)


def run(asked: argparse.Namespace) -> int:
    """Inspect, and print; returns the exit status."""
    from ..checkpoints.files import expanded
    from ..checkpoints.inspect import inspect

    if not os.path.exists(expanded(asked.folder)):
        raise LinearQuantValueError(f"inspect: there is no {asked.folder}")
    dtype = None if asked.dtype is None else dtype_of("--dtype", asked.dtype)
    if asked.model is not None:
        need("inspect", "--model", "transformers")
    with only_the_answer(asked.json):
        model = None
        if asked.model is not None:
            from ..integrations.empty_model import empty_model

            model = empty_model(asked.model)
        found = inspect(asked.folder, model, dtype=dtype, ignore=asked.ignore, prefer=asked.prefer)
    if asked.json:
        print_json(found.as_json())
    else:
        print(found.text(everything=asked.all))
    return 0 if found else 1
