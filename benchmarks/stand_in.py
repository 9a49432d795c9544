"""The time the stand-in adds: `python -m cann_host benchmarks/stand_in.py [layer] [decoder]`.

`decoder` is a step of a decoder in every mode, and its compilation: see stand_in_decoder.py.
`layer` is a quantized matmul: one layer, prepared or not, eagerly and as a torchair graph, beside
the CPU kernel alone on the same tensors. Ours is LinearQuant; the vendor's is npu_quant_matmul on a
transposed weight, which adds Transpose nodes to its graph. All calls of a size run interleaved in
this process; the results are medians and their ratios to the kernel. Times are those of this
machine's CPU, not of a chip.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
import torch_npu
import torchair
from graph import in_turns
from stand_in_decoder import main as decoder
from torch import Tensor, nn

import lq_graph
from lq_graph import kernels
from lq_graph.modules.linear_quant import layer_of
from lq_graph.rules.tables import FRACTAL_NZ

SIZES = [(1, 4096, 4096), (16, 4096, 4096), (128, 4096, 4096)]
ROUNDS = 25


class Vendor(nn.Module):
    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight, self.scale = (nn.Parameter(t, requires_grad=False) for t in (weight, scale))

    def forward(self, x: Tensor, pertoken: Tensor) -> Tensor:
        return torch_npu.npu_quant_matmul(
            x, self.weight.t(), self.scale, pertoken_scale=pertoken, output_dtype=torch.float16
        )


def calls(m: int, k: int, n: int, bits: int) -> dict[str, Callable[[], object]]:
    top = 1 << (bits - 1)
    x = torch.randint(-top, top, (m, k), dtype=torch.int8)
    weight = torch.randint(-top, top, (n, k), dtype=torch.int8)
    if bits == 4:
        x, weight = kernels.pack_int4(x), kernels.pack_int4(weight)
    scale, pertoken = torch.rand(n) * 1e-3, torch.rand(m)
    ours = layer_of(weight, scale, pertoken=True, output_dtype=torch.float16)
    found: dict[str, Callable[[], object]] = {
        "the CPU kernel": lambda: kernels.quant_matmul(
            x, weight, scale, pertoken_scale=pertoken, output_dtype=torch.float16
        )
    }
    inputs = x.npu(), pertoken.npu()
    expected = ours(x, pertoken)
    for form in ("ND", "FRACTAL_NZ"):
        layer, vendor = copy.deepcopy(ours).npu(), Vendor(weight.npu(), scale.npu())
        if form == "FRACTAL_NZ":
            if bits == 4:
                continue  # neither keeps int4 weights in it
            lq_graph.use_internal_format_weight(layer)
            vendor.weight.data = torch_npu.npu_format_cast(vendor.weight.data, FRACTAL_NZ)
            assert torch_npu.get_npu_format(layer.weight) == FRACTAL_NZ
        for name, module in {"ours": layer, "vendor's": vendor}.items():
            graph = torch.compile(module, backend=torchair.get_npu_backend(), dynamic=False)
            for mode, call in {"eager": module, "graph": graph}.items():
                assert torch.equal(call(*inputs).cpu(), expected), (name, form, mode)
                found[f"{name}, {form}, {mode}"] = lambda call=call: call(*inputs)  # type: ignore[misc]
    return found


@torch.no_grad()
def layer() -> None:
    torch.npu.config.allow_internal_format = True
    torch._dynamo.config.recompile_limit = 256
    warnings.simplefilter("ignore")
    for m, k, n in SIZES:
        for bits in (8, 4):
            median = in_turns(calls(m, k, n, bits), ROUNDS)
            kernel = median["the CPU kernel"]
            print(f"\n({m}, {k}, {n}), int{bits}")
            for name, taken in median.items():
                line = (
                    f"   {name:30s} {taken * 1e6:9,.1f} us   it / the kernel {taken / kernel:6.2f}"
                )
                print(line, flush=True)


def main() -> None:
    parts = {"layer": layer, "decoder": decoder}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=(*parts, []), help="default: both")
    for name in parser.parse_args().parts or parts:
        parts[name]()


if __name__ == "__main__":
    main()
