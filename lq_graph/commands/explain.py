"""`python -m lq_graph explain`: the GE nodes of a model."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from ..errors import LinearQuantValueError
from . import config_model
from .model_file import model_and_inputs
from .output import add_json, only_the_answer, print_json

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "NEEDS_TORCH", "add_arguments", "run"]

HELP = "the GE nodes of a model, beside the vendor's lowering"
DESCRIPTION = (
    "Lower a model and show the GE nodes of each LinearQuant layer. Without an NPU: python -m "
    "cann_host -m lq_graph explain ..."
)
EPILOG = "Exit status: 0, or 2 for a mistake in the command or a model that cannot be lowered."
NEEDS_TORCH = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "model",
        help="FILE.py:FUNCTION or package.module:FUNCTION; the function returns the model and a "
        "tuple of its inputs. Or a folder with a config.json of transformers, or that file",
    )
    config_model.add_arguments(parser)
    parser.add_argument("--html", metavar="FILE", help="also write a page with the graphs drawn")
    add_json(parser)


def run(asked: argparse.Namespace) -> int:
    """Explain, and print; returns the exit status."""
    html = asked.html
    if html is not None:
        page = Path(html)
        if page.is_dir() or not page.absolute().parent.is_dir():
            raise LinearQuantValueError(f"explain: --html {html}: there is no folder for that file")
    from ..analysis.explain import explain

    with only_the_answer(asked.json):
        _find_npu()
        if config_model.is_config(asked.model):
            model, inputs, scheme = config_model.model_and_inputs(asked)
            explanation = explain(model, inputs, scheme=scheme)
        else:
            config_model.refuse_options(asked)
            explanation = explain(*model_and_inputs("explain", asked.model))
    if asked.json:
        print_json(explanation.as_json())
    else:
        print(explanation)
    if html is not None:
        try:
            explanation.html(html)
        except OSError as error:
            raise LinearQuantValueError(f"explain: --html: {error}") from None
        print(f"\nwritten: {html}", file=sys.stderr if asked.json else sys.stdout)
    return 0


def _find_npu() -> None:
    """Import torch_npu. torch imports it by itself, except under `python -m lq_graph`.

    Raises:
        LinearQuantValueError: there is no device.
    """
    from ..analysis.explain import require_npu

    why = ""
    if importlib.util.find_spec("torch_npu") is not None:
        try:
            importlib.import_module("torch_npu")
        except Exception as error:
            why = f" (torch_npu cannot be imported: {error})"
    try:
        require_npu()
    except LinearQuantValueError as error:
        raise LinearQuantValueError(f"{error}{why}") from None
