"""`python -m lq_graph check ...` checks a configuration, `... explain ...` explains a model, `...
inspect` looks at a checkpoint, `... doctor` at the machine."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .analysis.explain import explain, require_npu
from .checkpoints.files import expanded
from .checkpoints.inspect import inspect as inspect_checkpoint
from .doctor import command
from .errors import LinearQuantError, LinearQuantValueError
from .kernels import storage_k
from .rules.check import check
from .rules.plan import Spec
from .rules.tables import PRODUCTS, STORAGE_DTYPES

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _dtype(text: str) -> torch.dtype:
    try:
        return _DTYPES[text]
    except KeyError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a dtype; write int8, int4, float32, bfloat16, ..."
        ) from None


def _tensor(text: str) -> torch.dtype | Spec:
    """Parse int8, int8[16,512], or int4[16,512] for int32 that holds eight int4 values."""
    found = re.fullmatch(r"(\w+)(?:\[([\d,\s]*)\])?", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form int8 or int8[16,512]")
    name, sizes = found.groups()
    int4 = name == "int4"
    dtype = torch.int32 if int4 else _dtype(name)
    if sizes is None:
        return dtype
    shape = [int(size) for size in sizes.split(",") if size.strip()]
    if int4 and shape:
        pack = STORAGE_DTYPES[torch.int32]
        if shape[-1] % pack:
            raise argparse.ArgumentTypeError(
                f"{text!r}: k of int4 must be a multiple of {pack}, the values in an int32"
            )
        shape[-1] = storage_k(shape[-1], torch.int32)
    return Spec(dtype, tuple(shape))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lq_graph")
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser(
        "check",
        help="whether a configuration is legal, on which products, and if not, why",
        description="Check whether linear_quant takes a configuration. Nothing runs. Write a "
        "tensor as a dtype, int8, or as a dtype and a shape, int8[16,512]; int4 stands for int32 "
        "that holds eight int4 values. An argument that you leave out is absent.",
        epilog="Exit status: 0 if a product takes it, 1 if none does, 2 for a mistake in the "
        "command.",
    )
    asking.add_argument("--x1", type=_tensor, default=torch.int8, help="default int8")
    asking.add_argument("--weight", type=_tensor, help="(..., n, k), untransposed; default as x1")
    asking.add_argument("--scale", type=_tensor, default=torch.float32, help="default float32")
    asking.add_argument("--offset", type=_tensor)
    asking.add_argument("--pertoken-scale", "--pertoken", type=_tensor)
    asking.add_argument("--bias", type=_tensor)
    asking.add_argument("--output", type=_dtype, default=torch.int8, help="default int8")
    keys = ", ".join(product.key for product in PRODUCTS)
    asking.add_argument("--product", help=f"one of {keys}, or a SoC name; default all")
    asking.add_argument(
        "--cann", metavar="VERSION", help="a CANN version, such as 8.2.RC1; default LQ_GRAPH_CANN"
    )

    explaining = commands.add_parser(
        "explain",
        help="the GE nodes of a model, beside the vendor's lowering",
        description="Lower a model and show the GE nodes of each LinearQuant layer. Without an "
        "NPU: python -m cann_host -m lq_graph explain ...",
    )
    explaining.add_argument(
        "model",
        help="FILE.py:FUNCTION or package.module:FUNCTION; the function returns the model and a "
        "tuple of its inputs",
    )
    explaining.add_argument(
        "--html", metavar="FILE", help="also write a page with the graphs drawn"
    )
    inspecting = commands.add_parser(
        "inspect",
        help="what a checkpoint holds, what runs it, and what load_checkpoint refuses",
        description="Say what a quantized checkpoint holds, layer by layer, which products run it, "
        "and everything that load_checkpoint would refuse. Only the JSON and the headers of the "
        "files are read.",
        epilog="Exit status: 0 if nothing is refused, 1 if something is, 2 for a mistake in the "
        "command.",
    )
    inspecting.add_argument("folder", help="a folder, or one safetensors file")
    inspecting.add_argument(
        "--model",
        metavar="DIR",
        help="a folder with the config.json of the model, often the same one: also say what is "
        "missing and what is more than the model has; needs transformers",
    )
    inspecting.add_argument(
        "--ignore",
        metavar="PATTERN",
        action="append",
        default=[],
        help="as ignore= of load_checkpoint; may be repeated",
    )
    inspecting.add_argument("--dtype", type=_dtype, help="as dtype= of load_checkpoint")
    inspecting.add_argument(
        "--prefer", choices=("dynamic", "static"), default="dynamic", help="as prefer= of it"
    )
    inspecting.add_argument("--all", action="store_true", help="one line for each tensor")
    inspecting.add_argument("--json", action="store_true", help="print the answer as JSON")
    doctor = commands.add_parser(
        "doctor",
        help=command.HELP,
        description=command.DESCRIPTION,
        epilog=command.EPILOG,
    )
    command.add_arguments(doctor)
    return parser


def _load(where: str) -> tuple[nn.Module, Sequence[torch.Tensor]]:
    """What FILE.py:FUNCTION or package.module:FUNCTION returns."""
    file, colon, name = where.rpartition(":")
    if not colon or not file or not name:
        raise LinearQuantValueError(f"explain: {where!r} is not FILE.py:FUNCTION")
    found = _names_in(file)
    if not callable(found.get(name)):
        raise LinearQuantValueError(f"explain: {file} has no function {name}")
    try:
        inspect.signature(found[name]).bind()
    except ValueError:  # a builtin without a signature
        pass
    except TypeError as error:
        raise LinearQuantValueError(
            f"explain: {where} is called without arguments: {error}"
        ) from None
    made = found[name]()
    shown = type(made).__name__
    if isinstance(made, tuple):
        if len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(made[1], tuple | list):
            return made[0], made[1]
        shown = f"({', '.join(type(item).__name__ for item in made)})"
    raise LinearQuantValueError(
        f"explain: {where} returned {shown}; it has to return the model and a tuple of its inputs"
    )


def _names_in(file: str) -> dict[str, Any]:
    """The globals of a file or a module, imported."""
    try:
        if not file.endswith(".py"):
            if not all(part.isidentifier() for part in file.split(".")):
                raise LinearQuantValueError(
                    f"explain: {file} is neither a file NAME.py nor the name of a module"
                )
            return vars(importlib.import_module(file))
        if not Path(file).is_file():
            raise LinearQuantValueError(f"explain: there is no file {file}")
        sys.path.insert(0, str(Path(file).resolve().parent))  # as if it were run
        return runpy.run_path(file)
    except (ModuleNotFoundError, OSError) as error:
        raise LinearQuantValueError(f"explain: {file}: {error}") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        text = "".join(traceback.format_exception_only(error)).rstrip()
        raise LinearQuantValueError(f"explain: {file} is not Python\n{text}") from None


def _find_npu() -> None:
    """Import torch_npu. torch imports it by itself, except under `python -m lq_graph`.

    Raises:
        LinearQuantValueError: there is no device.
    """
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


def _explain(asked: argparse.Namespace) -> int:
    html = asked.html
    if html is not None:
        page = Path(html)
        if page.is_dir() or not page.absolute().parent.is_dir():
            raise LinearQuantValueError(f"explain: --html {html}: there is no folder for that file")
    _find_npu()
    explanation = explain(*_load(asked.model))
    print(explanation)
    if html is not None:
        try:
            explanation.html(html)
        except OSError as error:
            raise LinearQuantValueError(f"explain: --html: {error}") from None
        print(f"\nwritten: {html}")
    return 0


def _inspect(asked: argparse.Namespace) -> int:
    if not os.path.exists(expanded(asked.folder)):
        raise LinearQuantValueError(f"inspect: there is no {asked.folder}")
    model = None
    if asked.model is not None:
        if importlib.util.find_spec("transformers") is None:
            raise LinearQuantValueError(
                "inspect: --model needs transformers. What to do: leave it out, or pip install "
                "transformers."
            )
        from .integrations.empty_model import empty_model

        model = empty_model(asked.model)
    found = inspect_checkpoint(
        asked.folder, model, dtype=asked.dtype, ignore=asked.ignore, prefer=asked.prefer
    )
    if asked.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print(found.text(everything=asked.all))
    return 0 if found else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.command == "doctor":
        return command.run(asked)
    if asked.command in ("explain", "inspect"):
        try:
            return _inspect(asked) if asked.command == "inspect" else _explain(asked)
        except LinearQuantError as error:
            parser.error(str(error))
    try:
        answer = check(
            asked.x1,
            asked.weight,
            asked.scale,
            asked.offset,
            asked.pertoken_scale,
            asked.bias,
            output_dtype=asked.output,
            product=asked.product,
            cann=asked.cann,
        )
    except LinearQuantError as error:
        parser.error(str(error))
    print(answer)
    return 0 if answer else 1
