"""`python -m lq_graph check`: whether a configuration is legal."""

from __future__ import annotations

import argparse
from typing import Any

from . import model_check
from .dtypes import dtype_of, tensor_of
from .output import add_json, print_json

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "NEEDS_TORCH", "add_arguments", "run"]

HELP = "whether a configuration is legal, on which products, and if not, why"
DESCRIPTION = (
    "Check whether linear_quant takes a configuration, or every quantizing call of a model. "
    "Nothing runs on a device. Write a tensor as a dtype, "
    "int8, or as a dtype and a shape, int8[16,512]; int4 stands for int32 that holds eight int4 "
    "values. An argument that you leave out is absent."
)
EPILOG = "Exit status: 0 if a product takes it, 1 if none does, 2 for a mistake in the command."
NEEDS_TORCH = True

_KEYS = "310P, A2, A3, 950"  # rules.tables would import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "model",
        nargs="?",
        help="FILE.py:FUNCTION or package.module:FUNCTION, which returns a model and a tuple of "
        "its inputs: check each of its calls. Only --product, --cann and --json go with it",
    )
    parser.add_argument("--x1", default="int8", help="default int8")
    parser.add_argument("--weight", help="(..., n, k), untransposed; default as x1")
    parser.add_argument("--scale", default="float32", help="default float32")
    parser.add_argument("--offset")
    parser.add_argument("--pertoken-scale", "--pertoken")
    parser.add_argument("--bias")
    parser.add_argument("--output", default="int8", help="default int8")
    parser.add_argument("--product", help=f"one of {_KEYS}, or a SoC name; default all")
    parser.add_argument(
        "--cann", metavar="VERSION", help="a CANN version, such as 8.2.RC1; default LQ_GRAPH_CANN"
    )
    add_json(parser)


def run(asked: argparse.Namespace) -> int:
    """Check, and print; returns the exit status."""
    if asked.model is not None:
        return model_check.run(asked)
    from ..rules.check import check

    def tensor(name: str) -> Any:  # check says for each argument what it may be
        text = getattr(asked, name)
        return None if text is None else tensor_of(f"--{name.replace('_', '-')}", text)

    answer = check(
        tensor("x1"),
        tensor("weight"),
        tensor("scale"),
        tensor("offset"),
        tensor("pertoken_scale"),
        tensor("bias"),
        output_dtype=dtype_of("--output", asked.output),
        product=asked.product,
        cann=asked.cann,
    )
    if asked.json:
        print_json(answer.as_json())
    else:
        print(answer)
    return 0 if answer else 1
