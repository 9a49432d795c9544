"""LinearQuant eagerly: on the CPU, and on the NPU if there is one (or cann_host).

Plain CPU, no torch_npu needed:   python examples/eager.py
With an NPU and CANN:             python examples/eager.py
Without, on the real torch_npu:   python -m cann_host examples/eager.py
"""

from __future__ import annotations

import lq_graph  # first: if CANN is missing, its error says what to do

# isort: split
import torch


def a8w8(device: str) -> torch.Tensor:
    """int8 in, int8 out, with offset and bias."""
    torch.manual_seed(0)
    layer = lq_graph.LinearQuant(512, 128, bias=True, offset=True)
    layer.weight.data = torch.randint(-128, 128, (128, 512), dtype=torch.int8)
    layer.scale.data = torch.rand(128) * 5e-4
    layer.offset.data = torch.randn(128) * 10
    layer.bias.data = torch.randint(-1000, 1000, (128,), dtype=torch.int32)
    x = torch.randint(-128, 128, (4, 512), dtype=torch.int8)
    return layer.to(device)(x.to(device)).cpu()


def a4w4(device: str) -> torch.Tensor:
    """int4 in int32, float16 out."""
    torch.manual_seed(0)
    layer = lq_graph.LinearQuant(
        512, 128, bias=False, dtype=torch.int32, output_dtype=torch.float16
    )
    layer.weight.data = lq_graph.pack_int4(torch.randint(-8, 8, (128, 512)))
    layer.scale.data = torch.rand(128) * 1e-2
    x = lq_graph.pack_int4(torch.randint(-8, 8, (4, 512)))
    return layer.to(device)(x.to(device)).cpu()


def main() -> None:
    npu = hasattr(torch, "npu") and torch.npu.is_available()
    for run in (a8w8, a4w4):
        out = run("cpu")
        print(f"{run.__name__} on cpu  {tuple(out.shape)} {out.dtype}  {out[0, :6].tolist()}")
        if npu:
            same = torch.equal(out, run("npu"))
            print(f"{run.__name__} on npu  {'equal to cpu' if same else 'DIFFERS FROM CPU'}")
            if not same:
                raise SystemExit(1)

    print("\nand a mistake, before any kernel sees it:")
    try:
        lq_graph.LinearQuant(512, 128, offset=True, output_dtype=torch.float16)(
            torch.zeros(4, 512, dtype=torch.int8)
        )
    except lq_graph.LinearQuantError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
