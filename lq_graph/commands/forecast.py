"""`python -m lq_graph forecast MODEL`: time and memory of a model on an NPU."""

from __future__ import annotations

import argparse

from ..errors import LinearQuantValueError
from .output import add_json, print_json

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "NEEDS_TORCH", "add_arguments", "run"]

HELP = "how long a decoder takes on an NPU, and how much memory, from its config.json"
DESCRIPTION = (
    "Forecast a decoder on an NPU: prefill and decode, kernel by kernel, in float, W8A8 and W4A4, "
    "from its config.json alone. Nothing runs; no NPU, CANN or transformers is needed. The cost of "
    "a kernel is fitted to public measurements, or to your own profile."
)
EPILOG = "Exit status: 0, or 2 for a mistake in the command."
NEEDS_TORCH = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "model",
        nargs="?",
        help="a folder with a config.json, such a file, or a short name, such as qwen3-8b "
        "(left out: the answer lists them)",
    )
    parser.add_argument(
        "--product",
        default="A3",
        help="A2, A3 (one die), 950, 310P, a chip: A3-560T, or its SoC name: Ascend910B3; "
        "default A3",
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="sequences of a decode step; default 1"
    )
    parser.add_argument(
        "--context", type=int, default=4096, help="positions a decode step reads; default 4096"
    )
    parser.add_argument(
        "--prompt", type=int, help="tokens of a prefill, of one sequence; default the context"
    )
    parser.add_argument(
        "--tp", type=int, default=1, help="devices (dies on A3) that share the model; default 1"
    )
    parser.add_argument(
        "--quant", default="bf16,w8a8,w4a4", help="of bf16, w8a8, w4a4; default all"
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="fit to kernel_details.csv of torch_npu.profiler or op_summary csv of msprof",
    )
    parser.add_argument("--no-fusion", action="store_true", help="leave our fusions out")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="also print the kernels of a layer, and what each fusion saves",
    )
    add_json(parser)
    parser.add_argument(
        "--measurements",
        action="store_true",
        help="print every public figure beside its forecast, instead of a model",
    )


def run(asked: argparse.Namespace) -> int:
    """Forecast, and print; returns the exit status.

    Raises:
        LinearQuantValueError: a mistake in the arguments.
    """
    from ..forecast import forecast_model, public_models
    from ..forecast.text import measurements_json, measurements_text, text

    if asked.measurements:
        if asked.json:
            print_json(measurements_json())
        else:
            print(measurements_text())
        return 0
    if asked.model is None:
        raise LinearQuantValueError(
            "forecast: which model? Write a folder with a config.json, such a file, or one of "
            f"{', '.join(public_models())}"
        )
    found = forecast_model(
        asked.model,
        asked.product,
        batch=asked.batch,
        context=asked.context,
        prompt=asked.prompt,
        tp=asked.tp,
        quants=[quant.strip().lower() for quant in asked.quant.split(",")],
        fusions=not asked.no_fusion,
        profile=asked.profile,
    )
    if asked.json:
        print_json(found.as_json())
    else:
        print(text(found, kernels=asked.kernels))
    return 0
