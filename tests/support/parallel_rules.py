"""DTensor's rules for the operators, on every process of a mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import lq_graph
from support import cases
from support.cases import BF16, F16, I8, I32, ROW_CASES, Case
from support.parallel import TENSORS, Check, K, M, N, call, compared, refusal, sized


def place(mesh: DeviceMesh, inputs: dict[str, Any], **placements: Placement) -> dict[str, Any]:
    placed = dict(inputs)
    for name in TENSORS:
        if inputs[name] is not None:
            how = placements.get(name, Replicate())
            placed[name] = distribute_tensor(inputs[name], mesh, [how])
    return placed


def on_n(inputs: dict[str, Any]) -> dict[str, Placement]:
    weight = inputs["weight"]
    vectors = {
        name: Shard(inputs[name].dim() - 1)
        for name in ("scale", "offset", "bias")
        if inputs[name] is not None and inputs[name].shape[-1] != 1
    }
    return {"weight": Shard(weight.dim() - 2), **vectors}


def on_m(inputs: dict[str, Any]) -> dict[str, Placement]:
    found: dict[str, Placement] = {"x1": Shard(inputs["x1"].dim() - 2)}
    if inputs["pertoken_scale"] is not None:
        found["pertoken_scale"] = Shard(0)
    return found


def rules(mesh: DeviceMesh, folder: Path) -> Check:
    del folder
    extra = [
        Case(scalar_scale=True, offset=True, bias=I32),
        Case(scalar_scale=True, scalar_offset=True, offset=True),
        Case(output=BF16, scale=BF16, scalar_scale=True, pertoken=True),
    ]
    for case in [*ROW_CASES, *extra]:
        inputs = cases.on(mesh.device_type, cases.make(sized(case)))
        want = call(inputs)
        for kind, split, out in (("n", on_n, Shard(1)), ("m", on_m, Shard(0))):
            got = call(place(mesh, inputs, **split(inputs)))
            assert isinstance(got, DTensor)
            where = "" if got.placements == (out,) else f"output is {got.placements}"
            yield f"{case} on {kind}", where or compared(got.full_tensor(), want)
        yield f"{case} on k", rule_on_k(mesh, inputs, want)


def rule_on_k(mesh: DeviceMesh, inputs: dict[str, Any], want: Tensor) -> str:
    def split(bias: Tensor | None) -> DTensor:
        placed = place(mesh, {**inputs, "bias": None}, x1=Shard(1), weight=Shard(1))
        out = call({**placed, "bias": bias})
        assert isinstance(out, DTensor)
        return out

    output, bias = inputs["output_dtype"], inputs["bias"]
    if output == I8:
        return refusal(lambda: split(None), "int8 output cannot be summed over devices")
    if bias is not None:
        whole = distribute_tensor(bias, mesh, [Replicate()])
        wrong = refusal(lambda: split(whole), "every device would add the whole bias")
        if wrong:
            return wrong
        part = bias if mesh.get_local_rank() == 0 else torch.zeros_like(bias)
        bias = DTensor.from_local(part, mesh, [Partial()], run_check=False)
    out = split(bias)
    if out.placements != (Partial(),):
        return f"output is {out.placements}"
    return compared(out.full_tensor(), want, exact=output == I32)


def batches(mesh: DeviceMesh, folder: Path) -> Check:
    del folder
    for batch, weight_batch, output, bias in (
        ((4,), (), F16, False),
        ((4, 3), (3,), I8, False),
        ((4,), (4,), I8, True),
        ((), (4,), BF16, False),
        ((1, 2), (4, 1), I32, False),
    ):
        case = Case(
            batch=batch, weight_batch=weight_batch, output=output, bias=I32 if bias else None,
            batch_bias=bias, m=M, k=K, n=N,
        )  # fmt: skip
        inputs = cases.on(mesh.device_type, cases.make(case))
        dims = max(len(batch), len(weight_batch))
        split: dict[str, Placement] = {}
        for name, own in (("x1", batch), ("weight", weight_batch)):
            if len(own) == dims and own[0] != 1:
                split[name] = Shard(0)
        if bias:
            split["bias"] = Shard(0)
        got = call(place(mesh, inputs, **split))
        assert isinstance(got, DTensor)
        where = "" if got.placements == (Shard(0),) else f"output is {got.placements}"
        yield f"{case} on its batch", where or compared(got.full_tensor(), call(inputs))


def activations(mesh: DeviceMesh, folder: Path) -> Check:
    del folder
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(2, M, K, generator=g) * 3).half().to(mesh.device_type)
    for dtype in (I8, I32):
        values, scale = lq_graph.dynamic_quant(x, dtype=dtype)
        for dim in (0, 1):
            q, s = lq_graph.dynamic_quant(distribute_tensor(x, mesh, [Shard(dim)]), dtype=dtype)
            if dim and q.placements != (Shard(dim),):
                yield f"dynamic_quant {dtype} on dim {dim}", f"output is {q.placements}"
            same = compared(q.full_tensor(), values) or compared(s.full_tensor(), scale)
            yield f"dynamic_quant {dtype} on dim {dim}", same
    for size in (1, K):
        factor = torch.rand(size, generator=g).half().to(mesh.device_type) + 1
        offset = torch.zeros_like(factor) + 3
        want = lq_graph.static_quant(x, factor, offset)
        for dim in (1, 2):
            how = Shard(0) if dim == 2 and size > 1 else Replicate()
            vectors = (distribute_tensor(t, mesh, [how]) for t in (factor, offset))
            q = lq_graph.static_quant(distribute_tensor(x, mesh, [Shard(dim)]), *vectors)
            where = "" if q.placements == (Shard(dim),) else f"output is {q.placements}"
            yield f"static_quant {size} on dim {dim}", where or compared(q.full_tensor(), want)
    scale, offset = (torch.rand(N, generator=g).to(mesh.device_type) for _ in range(2))
    packed = lq_graph.trans_quant_param(
        distribute_tensor(scale, mesh, [Shard(0)]), distribute_tensor(offset, mesh, [Shard(0)])
    )
    where = "" if packed.placements == (Shard(0),) else f"output is {packed.placements}"
    want = lq_graph.trans_quant_param(scale, offset)
    yield "trans_quant_param on n", where or compared(packed.full_tensor(), want)
