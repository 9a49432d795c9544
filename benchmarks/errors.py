"""What a user sees of common mistakes: eager, and compiled.

    python -m cann_host benchmarks/errors.py [--quick] [--mistake NAME] [--show]

A model of two blocks is called with a mistake in the layer layers.1.mlp.down_proj, as a script
would call it. Each case runs in a process of its own. A cell tells of its error:

+ or -      `except LinearQuantError` catches it, or does not
a number    the lines of Python's traceback above our sentence; "none": it holds no sentence of ours
L, T        the sentence names the layer ("layers.1.mlp.down_proj"), and the tensor
!           the last error that Python prints begins with our sentence

`--show` prints the errors themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lq_graph

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.two_blocks import Model

LAYER = "layers.1.mlp.down_proj"
FIRST = "layers.0.mlp.up_proj"  # the first layer that a model calls
HIDDEN, WIDE, ROWS = 64, 128, 4
F16, F32, I8, I32 = torch.float16, torch.float32, torch.int8, torch.int32
MODES = ("eager cpu", "inductor cpu", "eager npu", "ge npu", "npugraph_ex npu")
SENTENCE = re.compile(r"What to do:")


class Caller(nn.Module):
    """Calls the LinearQuant that a user built by himself, with tensors that he quantized."""

    def __init__(self, linear: lq_graph.LinearQuant) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module(), nn.Module()])
        self.layers[1].mlp = nn.Module()
        self.layers[1].mlp.down_proj = linear

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = self.layers[1].mlp.down_proj(*args)
        return out


def quantized(config: Any = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A quantized model on the CPU, and its inputs."""
    torch.manual_seed(0)
    model, x = Model(HIDDEN, WIDE), torch.randn(ROWS, HIDDEN, dtype=F16)
    config = config or lq_graph.A8W8Dynamic()
    lq_graph.quantize(model, config, [x] if isinstance(config, lq_graph.A8W8Static) else None)
    return model, (x,)


def built(dtype: torch.dtype = I8, **settings: Any) -> tuple[Caller, tuple[Tensor, ...]]:
    """A LinearQuant in a model, and an int8 input."""
    settings = {"output_dtype": F16, **settings}
    linear = lq_graph.LinearQuant(WIDE, HIDDEN, dtype=dtype, **settings)
    return Caller(linear), (torch.ones(ROWS, linear.weight.shape[1], dtype=dtype),)


def layer_of(model: nn.Module) -> lq_graph.LinearQuant:
    found: Any = model.get_submodule(LAYER)
    linear: lq_graph.LinearQuant = getattr(found, "linear", found)
    return linear


Case = tuple[nn.Module, tuple[Tensor, ...]]
Place = Callable[[Any], Any]  # moves a module or a tensor to the device


def wrong_dtype(place: Place) -> Case:
    model, (x,) = quantized(lq_graph.A8W8Static())
    return place(model), (place(x.float()),)


def scale_dtype(place: Place) -> Case:
    model, inputs = quantized()
    linear = layer_of(model)
    linear.scale.data = linear.scale.data.half()
    return place(model), tuple(map(place, inputs))


def transposed(place: Place) -> Case:
    model, inputs = quantized()
    linear = layer_of(model)
    linear.weight.data = linear.weight.data.t().contiguous()
    return place(model), tuple(map(place, inputs))


def weight_left(place: Place) -> Case:
    model, inputs = quantized()
    return model, tuple(map(place, inputs))


def input_left(place: Place) -> Case:
    model, inputs = quantized()
    return place(model), inputs


def bias_left(place: Place) -> Case:
    model, inputs = built()
    place(model)
    linear = layer_of(model)
    assert linear.bias is not None
    linear.bias = nn.Parameter(linear.bias.data.cpu(), requires_grad=False)
    return model, tuple(map(place, inputs))


def on_meta(place: Place) -> Case:
    model, inputs = quantized()
    layer_of(model).to("meta")
    return place_rest(model, place), tuple(map(place, inputs))


def place_rest(model: nn.Module, place: Place) -> nn.Module:
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and not value.is_meta:
                module._parameters[name] = nn.Parameter(place(value.data), requires_grad=False)
    return model


def not_prepared(place: Place) -> Case:
    model, inputs = built()
    return place(model), tuple(map(place, inputs))


def float_input(place: Place) -> Case:
    model, (x,) = built()
    return place(model), (place(x.half()),)


def wrong_k(place: Place) -> Case:
    model, (x,) = built()
    return place(model), (place(x[:, :HIDDEN].contiguous()),)


def unpacked_int4(place: Place) -> Case:
    model, _ = built(I32)
    return place(model), (place(torch.ones(ROWS, WIDE, dtype=I32)),)


def pertoken_length(place: Place) -> Case:
    model, (x,) = built(pertoken_scale=True, bias=False)
    return place(model), (place(x), place(torch.ones(ROWS - 1)))


def offset_given(place: Place) -> Case:
    model, inputs = built(offset=True)
    return place(model), tuple(map(place, inputs))


def training(place: Place) -> Case:
    model, (x,) = quantized()
    return place(model), (place(x).requires_grad_(),)


def autocast(place: Place) -> Case:
    model, (x,) = quantized(lq_graph.A8W8Static())
    return place(model), (place(x.float()),)


class Mistake(NamedTuple):
    """A mistake, as a user would call it.

    Attributes:
        make: makes the model and its inputs.
        tensor: what the sentence should name.
        layer: what the sentence should name.
        npu_only: the mistake needs two devices.
        soc: the chip that the stand-in reports; empty for its default.
    """

    make: Callable[[Place], Case]
    tensor: str
    layer: str = LAYER
    npu_only: bool = False
    soc: str = ""


MISTAKES = {
    "float32 x, static float16 layer": Mistake(wrong_dtype, "x", FIRST),
    "scale is float16": Mistake(scale_dtype, "scale"),
    "weight is transposed": Mistake(transposed, "weight"),
    "model without .npu()": Mistake(weight_left, "weight", FIRST, npu_only=True),
    "x without .npu()": Mistake(input_left, "x1", FIRST, npu_only=True),
    "bias on the CPU": Mistake(bias_left, "bias", npu_only=True),
    "one layer still on meta": Mistake(on_meta, "weight"),
    "not prepared, 310P": Mistake(not_prepared, "weight", npu_only=True, soc="Ascend310P3"),
    "float x into LinearQuant": Mistake(float_input, "x1"),
    "x of another k": Mistake(wrong_k, "x1"),
    "int4 not packed": Mistake(unpacked_int4, "x1"),
    "pertoken_scale of another length": Mistake(pertoken_length, "pertoken_scale"),
    "offset with float16 output": Mistake(offset_given, "offset"),
    "x requires grad": Mistake(training, "x", FIRST),
    "autocast to bfloat16, static float16": Mistake(autocast, "x", FIRST),
}
QUICK = ("scale is float16", "model without .npu()")


def call(model: Any, inputs: tuple[Tensor, ...], mode: str) -> Any:
    """What the user's script does."""
    how = mode.split()[0]
    if how == "inductor":
        model = torch.compile(model)
    elif how == "ge":
        import torchair

        backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
        model = torch.compile(model, backend=backend, dynamic=False)
    elif how == "npugraph_ex":
        model = torch.compile(model, backend="npugraph_ex", dynamic=False)
    return model(*inputs)


def run(name: str, mode: str) -> None:
    """Call the model, print what Python would print, then a line of JSON."""
    device = mode.split()[1]
    mistake = MISTAKES[name]
    warnings.simplefilter("ignore")
    model, inputs = mistake.make(lambda value: value.to(device))
    model.eval()
    warnings.filterwarnings("always", message="(?s).*What to do:")
    facts: dict[str, Any] = {"class": "", "ours": False}
    grad = mistake.make is training
    cast = mistake.make is autocast
    print("=== begin", file=sys.stderr, flush=True)
    try:
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(device, torch.bfloat16, enabled=cast),
        ):
            call(model, inputs, mode)
    except BaseException as error:
        facts = {
            "class": type(error).__name__,
            "ours": isinstance(error, lq_graph.LinearQuantError),
            "first": bool(SENTENCE.search(first_line(error))),
        }
        traceback.print_exception(error)
    print("=== end", file=sys.stderr, flush=True)
    print("facts " + json.dumps(facts), flush=True)
    os._exit(0)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


class Seen(NamedTuple):
    """What a user saw."""

    text: str
    facts: dict[str, Any]

    @property
    def above(self) -> int | None:
        """Lines above our sentence."""
        lines = self.text.splitlines()
        return next((i for i, line in enumerate(lines) if SENTENCE.search(line)), None)

    def cell(self, mistake: Mistake) -> str:
        above = self.above
        if above is None:
            return f"- none {self.facts['class']}" if self.facts["class"] else "runs"
        said = self.text.splitlines()[above]
        marks = "L" if mistake.layer in said else ""
        marks += "T" if re.search(rf"\b{mistake.tensor}\b", said) else ""
        if not self.facts["class"]:
            return f"warns {above} {marks}"
        caught = "+" if self.facts["ours"] else "-"
        return f"{caught} {above} {marks}{'!' if self.facts['first'] else ''}"


def see(name: str, mode: str) -> Seen:
    env = dict(os.environ)
    if soc := MISTAKES[name].soc:
        env["CANN_HOST_SOC"] = soc
    ran = subprocess.run(
        [sys.executable, "-m", "cann_host", __file__, "--run", name, mode],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    facts = re.search(r"^facts (.*)$", ran.stdout, re.M)
    if facts is None:
        sys.exit(f"errors.py: {name}, {mode}:\n{ran.stderr}")
    text = ran.stderr.partition("=== begin\n")[2].partition("=== end")[0]
    return Seen(text, json.loads(facts[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a few mistakes only")
    parser.add_argument("--mistake", help="those whose name holds this")
    parser.add_argument("--mode", default="", help="those whose name holds this")
    parser.add_argument("--show", action="store_true", help="the errors themselves")
    asked = parser.parse_args()
    if asked.run:
        run(*asked.run)
    names = QUICK if asked.quick else [n for n in MISTAKES if (asked.mistake or "") in n]
    modes = [mode for mode in MODES if asked.mode in mode]
    print(f"torch {torch.__version__}")
    width = max(map(len, names))
    print(" ".join([" " * width, *(f"{mode:<28}" for mode in modes)]).rstrip())
    for name in names:
        mistake, cells = MISTAKES[name], []
        for mode in modes:
            if mistake.npu_only and mode.endswith("cpu"):
                cells.append("")
                continue
            seen = see(name, mode)
            cells.append(seen.cell(mistake))
            if asked.show:
                print(f"--- {name}, {mode}\n{seen.text}", flush=True)
        line = [f"{name:<{width}}", *(f"{cell:<28}" for cell in cells)]
        print(" ".join(line).rstrip(), flush=True)


if __name__ == "__main__":
    main()
