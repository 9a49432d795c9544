"""`python -m lq_graph compare`: the errors of a quantized model, layer by layer."""

from __future__ import annotations

import argparse
import sys

from ..errors import LinearQuantValueError
from .model_file import call_function, what_it_is
from .output import add_json, only_the_answer, print_json

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "NEEDS_TORCH", "add_arguments", "run"]

HELP = "the errors of a quantized model against its float model, layer by layer"
DESCRIPTION = (
    "Run a float model and its quantized copy, and show the error of each layer, the worst ten "
    "first. It runs where the function puts the models; one that needs an NPU imports torch_npu."
)
EPILOG = "Exit status: 0, or 2 for a mistake in the command or models that cannot be compared."
NEEDS_TORCH = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "models",
        help="FILE.py:FUNCTION or package.module:FUNCTION; the function returns the float model, "
        "the quantized model and a list of inputs, one for each batch",
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="also measure how each layer alone changes the output, and rank by that",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="also save a picture: .png, .svg, .html, ..."
    )
    parser.add_argument("--all", action="store_true", help="one line for each layer")
    add_json(parser)


def run(asked: argparse.Namespace) -> int:
    """Compare, and print; returns the exit status."""
    from ..analysis.compare import compare
    from ..analysis.compare_plot import check_plot

    if asked.plot is not None:
        check_plot(asked.plot)
    with only_the_answer(asked.json):
        made = call_function("compare", asked.models)
        if not isinstance(made, tuple) or len(made) != 3:
            raise LinearQuantValueError(
                f"compare: {asked.models} returned {what_it_is(made)}; it has to return the float "
                "model, the quantized model and a list of inputs"
            )
        found = compare(*made, sensitivity=asked.sensitivity, plot=asked.plot)
    if asked.json:
        print_json(found.as_json())
    else:
        print(found.text(everything=asked.all))
    if asked.plot is not None:
        print(f"\nwritten: {asked.plot}", file=sys.stderr if asked.json else sys.stdout)
    return 0
