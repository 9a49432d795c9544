"""Checkpoints of which each process of a mesh reads its part."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

import lq_graph
from lq_graph import A8W8Dynamic, QuantizedLinear, load_checkpoint, save_checkpoint
from lq_graph.parallel import ColwiseLinearQuant
from support.cases import BF16
from support.parallel import Check, K, M, N, block, compared, plan, quantized_block, refusal


def checkpoints(mesh: DeviceMesh, folder: Path) -> Check:
    rank, device = mesh.get_local_rank(), mesh.device_type
    for config, kind in (
        ("a8w8_static", "msmodelslim"),
        ("a8w8_dynamic", "msmodelslim"),
        ("a8w8_dynamic", "compressed-tensors"),
    ):
        files = folder / f"{config}-{kind}"
        model, x = quantized_block(config, BF16, device)
        if rank == 0:
            save_checkpoint(model, files, kind)
        dist.barrier()
        for exact in (False, True):
            whole, part = block(device), block(device)
            everything = load_checkpoint(whole, files).bytes_read
            report = load_checkpoint(part, files, mesh=mesh, plan=plan(exact))
            want = whole(x)
            name = f"{config} {kind} {'exact' if exact else 'summed'}"
            yield name, compared(part(x), want, exact=exact)
            weights = 2 * 2 * N * K
            least = weights - weights // mesh.size()
            saved = everything - report.bytes_read
            yield f"{name} bytes", "" if saved >= least else f"saved {saved} of {everything}"
            kinds = [type(m).__name__ for m in (part.up, part.down)]
            yield f"{name} kinds", "" if kinds == ["QuantizedLinear"] * 2 else str(kinds)

    wild = block(device)
    load_checkpoint(
        wild, files, mesh=mesh, plan={"*": ColwiseLinearQuant(output_layouts=Replicate())}
    )
    assert isinstance(wild.up, QuantizedLinear)
    assert isinstance(wild.down, QuantizedLinear)
    unsplit = tuple(wild.down.linear.weight.shape) == (K, 2 * N)
    yield "wildcard", "down is whole" if unsplit else ""

    # a layer with one output channel for each device
    few = folder / "few"
    torch.manual_seed(0)
    gate = nn.Sequential(nn.Linear(K, mesh.size(), dtype=BF16))
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    lq_graph.quantize(gate, A8W8Dynamic())
    if rank == 0:
        save_checkpoint(gate, few)
    dist.barrier()
    one = nn.Sequential(nn.Linear(K, mesh.size(), dtype=BF16)).to(device)
    column = ColwiseLinearQuant(output_layouts=Replicate())
    load_checkpoint(one, few, mesh=mesh, plan={"0": column})
    yield "one channel each", compared(one(x), gate.to(device)(x))
    full = gate.state_dict()
    state = {key: t.full_tensor() for key, t in one.state_dict().items() if key in full}
    bad = [key for key, t in state.items() if not torch.equal(t.cpu(), full[key].cpu())]
    yield "one channel each: state", str(bad) if bad else ""
    text = "0 is split over devices, and this process has a part of it"
    yield "saving a part", refusal(lambda: save_checkpoint(one, folder / "part"), text)

    # one rank has the files of another quantization
    last = rank == mesh.size() - 1
    files = folder / ("a8w8_static-msmodelslim" if last else "a8w8_dynamic-msmodelslim")
    text = "the ranks' checkpoints differ: rank 0 has ['down', 'A8W8 dynamic'"
    other = block(device)
    action = lambda: load_checkpoint(other, files, mesh=mesh, plan=plan(False))  # noqa: E731
    yield "another checkpoint", refusal(action, text)
    yield "model untouched by it", "" if isinstance(other.up, nn.Linear) else "changed"

    broken = folder / "broken"
    if rank == 0:
        save_checkpoint(model, broken, "compressed-tensors")
    dist.barrier()
    if rank == mesh.size() - 1:
        broken = folder / "not there"
    kept = block(device)
    text = "expected a folder or a safetensors file, found nothing"
    action = lambda: load_checkpoint(kept, broken, mesh=mesh, plan=plan(False))  # noqa: E731
    yield "one rank has no files", refusal(action, text)
    yield "model untouched", "" if isinstance(kept.up, nn.Linear) else "changed"
