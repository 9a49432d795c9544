"""A quantized model through torch.compile and torchair, and its GE graph.

With an NPU and CANN:   python examples/graph_mode.py
Anywhere else:          python -m cann_host examples/graph_mode.py
"""

from __future__ import annotations

import lq_graph  # first: if CANN is missing, its error says what to do

# isort: split
import textwrap
import time

import torch
import torch_npu
import torchair as tng
from torch import Tensor, nn

from lq_graph import LinearQuant, converters

torch.npu.config.allow_internal_format = True  # FRACTAL_NZ weights


class Model(nn.Module):
    """Two A8W8 layers, with int8 between them, and an A4W4 layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = LinearQuant(512, 1024, offset=True)  # int8 to int8
        self.down = LinearQuant(1024, 256, output_dtype=torch.float16)  # int8 to float16
        self.a4w4 = LinearQuant(
            512, 256, bias=False, dtype=torch.int32, output_dtype=torch.float16
        )  # int4, eight to an int32, to float16

    def forward(self, x: Tensor, x_int4: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(self.up(x)), self.a4w4(x_int4)


def fill(model: Model) -> None:
    """Set weights as a checkpoint would."""
    torch.manual_seed(0)
    for layer in (model.up, model.down):
        shape = layer.weight.shape
        layer.weight.data = torch.randint(-128, 128, shape, dtype=torch.int8)
        layer.scale.data = torch.rand(shape[0]) * 4e-4
        layer.bias.data = torch.randint(-5000, 5000, (shape[0],), dtype=torch.int32)
    model.up.offset.data = torch.randn(1024) * 10
    int4 = torch.randint(-8, 8, (256, 512), dtype=torch.int8)
    model.a4w4.weight.data = lq_graph.pack_int4(int4)
    model.a4w4.scale.data = torch.rand(256) * 1e-2


def example() -> tuple[Model, tuple[Tensor, Tensor]]:
    """The model and inputs, for `python -m lq_graph explain examples/graph_mode.py:example`."""
    model = Model()
    fill(model)
    x = torch.randint(-128, 128, (16, 512), dtype=torch.int8)
    return model, (x, lq_graph.pack_int4(torch.randint(-8, 8, (16, 512), dtype=torch.int8)))


def golden(layer: LinearQuant, x: Tensor) -> Tensor:
    """The layer in plain int64 arithmetic, independent of lq_graph's kernels."""
    weight = layer.weight.data
    if weight.dtype == torch.int32:
        x, weight = unpack(x), unpack(weight)
    acc = x.long() @ weight.long().T + (0 if layer.bias is None else layer.bias.long())
    # the packed scale has the top 19 bits of the scale and a 9-bit offset
    scale = (layer.scale.view(torch.int32) & -0x2000).view(torch.float32)
    value = acc.float() * scale
    if layer.output_dtype == torch.float16:
        return value.clamp(-65504, 65504).half()
    offset = 0 if layer.offset is None else layer.offset.round().clamp(-256, 255)
    return (value.round().clamp(-256, 255) + offset).clamp(-128, 127).to(torch.int8)


def unpack(words: Tensor) -> Tensor:
    nibbles = torch.stack([(words >> 4 * i) & 0xF for i in range(8)], -1).flatten(-2)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def main() -> None:
    print(f"device   {torch.npu.get_device_name()}, torch_npu {torch_npu.__version__}\n")
    model, (x, x_int4) = example()
    want = golden(model.down, golden(model.up, x)), golden(model.a4w4, x_int4)

    model = model.npu()
    print("weights prepared")
    print(textwrap.indent(str(lq_graph.use_internal_format_weight(model)), "   "))

    config = tng.CompilerConfig()
    npu_backend = tng.get_npu_backend(compiler_config=config)
    compiled = torch.compile(model, backend=npu_backend, dynamic=False, fullgraph=True)

    x, x_int4 = x.npu(), x_int4.npu()
    with converters.graph.capture(config) as graphs:
        start = time.perf_counter()
        got = compiled(x, x_int4)
        torch.npu.synchronize()
        first = time.perf_counter() - start
    print(f"\nlowered to {len(graphs[0].compute)} GE nodes, first call {first:.2f} s")
    print(textwrap.indent(str(graphs[0]), "   "))

    print("\ncompared with the integer golden, element for element")
    for name, a, b in zip(("A8W8 to int8 to float16", "A4W4 to float16"), got, want, strict=True):
        differ = int((a.cpu() != b).sum())
        print(f"   {name:24s} {tuple(a.shape)} {differ} of {a.numel()} differ")
        if differ:
            raise SystemExit(f"{name}: the graph's result is wrong")


if __name__ == "__main__":
    main()
