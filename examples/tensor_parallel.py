"""A quantized MLP split over the processes that torchrun starts, compared with one device.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 torchrun --nproc-per-node 2 examples/tensor_parallel.py

runs on the CPU with gloo, with or without torch_npu. On NPUs, with HCCL, leave the variable out; on
cann_host, with its HCCL:

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 torchrun --nproc-per-node 2 --no-python \\
        python -m cann_host --devices 2 examples/tensor_parallel.py
"""

from __future__ import annotations

import lq_graph  # first: if CANN is missing, its error says what to do

# isort: split
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lq_graph.parallel import ColwiseLinearQuant, RowwiseLinearQuant

HIDDEN, INNER, ROWS = 512, 1024, 16


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER, dtype=torch.bfloat16)
        self.down = nn.Linear(INNER, HIDDEN, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.nn.functional.gelu(self.up(x)))
        return out


def quantized() -> MLP:
    torch.manual_seed(0)
    model = MLP().eval()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    return model


def connect() -> DeviceMesh:
    """A mesh of all processes that torchrun started: NPUs, or CPUs."""
    if "RANK" not in os.environ:
        raise SystemExit(f"tensor_parallel.py is started by torchrun:\n{__doc__}")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_npu = hasattr(torch, "npu") and torch.npu.is_available()
    if on_npu:
        torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    # the longest time that the others wait for a rank that died
    dist.init_process_group("hccl" if on_npu else "gloo", timeout=timedelta(seconds=60))
    assert rank == dist.get_rank()
    return init_device_mesh("npu" if on_npu else "cpu", (ranks,))


def from_checkpoint(
    mesh: DeviceMesh, x: Tensor, want: Tensor, plan: dict[str, ParallelStyle], own: str
) -> bool:
    """Load a checkpoint, each process its parts. Returns whether the result equals one device's."""
    folder = [own if mesh.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    path = Path(str(folder[0])) / "model"
    if mesh.get_rank() == 0:
        lq_graph.save_checkpoint(quantized(), path)
    dist.barrier()
    model = MLP().eval().to(mesh.device_type)
    report = lq_graph.load_checkpoint(model, path, mesh=mesh, plan=plan)
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    differ = int((model(x) != want).sum())
    if mesh.get_rank() == 0:
        read = f"rank 0 read {report.bytes_read:,}"
        print(f"\ncheckpoint of {total:,} bytes: {read}, {differ} of {want.numel():,} differ")
    dist.barrier()  # rank 0 removes the files after this
    return differ == 0


def main() -> None:
    mesh = connect()
    rank, ranks, device = mesh.get_rank(), mesh.size(), mesh.device_type

    def say(text: str) -> None:
        if rank == 0:
            print(text)

    one = quantized().to(device)
    x = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    want = one(x)
    say(f"{ranks} processes on {device}, {dist.get_backend()}\n")
    say(f"   {'row-wise sum':24s} {'bytes a rank of weights':>24s} {'differ from one device':>24s}")
    wrong = False
    for exact in (False, True):
        plan = {"up": ColwiseLinearQuant(), "down": RowwiseLinearQuant(exact=exact)}
        model = parallelize_module(quantized().to(device), mesh, plan)
        got = model(x)
        held = sum(p.nbytes for p in model.parameters())
        differ = int((got != want).sum())
        wrong |= exact and differ > 0
        name = "int32, then the scale" if exact else "of bfloat16 outputs"
        say(f"   {name:24s} {held:>24,} {differ:>15,} of {got.numel():,}")

    # a checkpoint: each process reads its parts
    with tempfile.TemporaryDirectory() as own:
        wrong |= not from_checkpoint(mesh, x, want, plan, own)
    dist.destroy_process_group()
    if wrong:
        raise SystemExit("the exact sum is not one device's")


if __name__ == "__main__":
    main()
