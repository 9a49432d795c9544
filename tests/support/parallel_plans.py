"""Layers and models split by plans, and what plans refuse, on every process of a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import lq_graph
from lq_graph import LinearQuant
from lq_graph.parallel import ColwiseLinearQuant, RowwiseLinearQuant
from support import cases
from support.cases import BF16, F16, I8, I32, ROW_CASES, Case
from support.parallel import (
    CONFIGS,
    Check,
    K,
    M,
    N,
    compared,
    plan,
    quantized_block,
    refusal,
    sized,
)


def layer_for(case: Case, device: str) -> tuple[LinearQuant, Tensor, Tensor | None]:
    inputs = cases.make(sized(case))
    made = LinearQuant(
        K,
        N,
        bias=case.bias is not None,
        offset=case.offset,
        pertoken_scale=case.pertoken,
        output_dtype=case.output,
        dtype=case.x,
    )
    for name in ("weight", "scale", "offset", "bias"):
        if inputs[name] is not None:
            getattr(made, name).data = inputs[name]
    pertoken = inputs["pertoken_scale"]
    x1 = inputs["x1"].to(device)
    return made.to(device), x1, None if pertoken is None else pertoken.to(device)


def plans(mesh: DeviceMesh, folder: Path) -> Check:
    del folder
    device = mesh.device_type
    for case in ROW_CASES:
        layer, x1, pertoken = layer_for(case, device)
        want = layer(x1, pertoken)
        names = {name: value.clone() for name, value in layer.state_dict().items()}

        split = parallelize_module(layer, mesh, ColwiseLinearQuant(output_layouts=Replicate()))
        yield f"{case} colwise", compared(split(x1, pertoken), want)
        state = {k: v.full_tensor() for k, v in split.state_dict().items()}
        same = all(torch.equal(state[name], names[name]) for name in names)
        yield f"{case} colwise state", "" if same and state.keys() == names.keys() else "changed"

        for exact in (False, True):
            layer, _, _ = layer_for(case, device)
            style = RowwiseLinearQuant(input_layouts=Replicate(), exact=exact)
            name = f"{case} rowwise {'exact' if exact else 'summed'}"
            if case.output == I8 and not exact:
                text = "int8 output cannot be summed over devices"
                yield name, refusal(lambda s=style, m=layer: parallelize_module(m, mesh, s), text)
            elif case.x == I32 and exact:
                text = "no row of the support table gives int32 accumulators of int4"
                yield name, refusal(lambda s=style, m=layer: parallelize_module(m, mesh, s), text)
            else:
                split = parallelize_module(layer, mesh, style)
                got = split(x1, pertoken)
                yield name, compared(got, want, exact=exact or case.output == I32)
                state = {k: v.full_tensor() for k, v in split.state_dict().items()}
                same = all(torch.equal(state[name], names[name]) for name in names)
                yield f"{name} state", "" if same else "changed"

    # reduce-scatter instead of all-reduce: the bias is there once as well
    case = Case(output=F16, bias=I32)
    for exact in (False, True):
        layer, x1, _ = layer_for(case, device)
        want = layer(x1)
        style = RowwiseLinearQuant(
            input_layouts=Replicate(), output_layouts=Shard(0), exact=exact, use_local_output=False
        )
        got = parallelize_module(layer, mesh, style)(x1)
        assert isinstance(got, DTensor)
        yield f"reduce-scatter exact={exact}", compared(got.full_tensor(), want, exact=exact)


def split_blocks(
    mesh: DeviceMesh, dtypes: tuple[torch.dtype, ...]
) -> Iterator[tuple[str, torch.dtype, bool, nn.Module, Tensor, Tensor]]:
    """Each block that can be split: its configuration, dtype, whether sums are exact, the block
    split, its input, and what it gave on one device."""
    for config in CONFIGS:
        for dtype in dtypes:
            for exact in (False, True):
                if exact and config == "a4w4_dynamic":
                    continue
                model, x = quantized_block(config, dtype, mesh.device_type)
                want = model(x)
                yield config, dtype, exact, parallelize_module(model, mesh, plan(exact)), x, want


def models(mesh: DeviceMesh, folder: Path) -> Check:
    del folder
    for config, dtype, exact, split, x, want in split_blocks(mesh, (F16, BF16)):
        name = f"{config} {dtype} {'exact' if exact else 'summed'}"
        yield name, compared(split(x), want, exact=exact)


def compiled(mesh: DeviceMesh, folder: Path) -> Check:
    del folder
    ways = on_torchair if mesh.device_type == "npu" else on_cpu
    for config, _, exact, split, x, want in split_blocks(mesh, (BF16,)):
        for way, got in ways(split, x):
            wrong = got if isinstance(got, str) else compared(got, want, exact=exact)
            yield f"{config} exact={exact} {way}", wrong


def on_cpu(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor | str]]:
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        yield backend, torch.compile(model, backend=backend, fullgraph=True)(x)


def on_torchair(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor | str]]:
    """The sums are GE nodes of the one graph, not calls between two graphs."""
    import torchair

    from lq_graph.converters import graph

    for way in ("static", "dynamic", "prepared"):
        torch._dynamo.reset()
        if way == "prepared":
            lq_graph.use_internal_format_weight(model)
        config = torchair.CompilerConfig()
        backend = torchair.get_npu_backend(compiler_config=config)
        with graph.capture(config) as graphs:
            run = torch.compile(model, backend=backend, fullgraph=True, dynamic=way == "dynamic")
            yield way, run(x)
        sums = str(graphs[0]).count("HcomAllReduce")
        yield f"{way} graph", "" if len(graphs) == 1 and sums else f"{sums} HcomAllReduce"


def edges(mesh: DeviceMesh, folder: Path) -> Check:
    """NaN and infinity in the part of one device; an output that does not split evenly."""
    del folder
    ranks, device = mesh.size(), mesh.device_type
    for config in ("a8w8_dynamic", "a4w4_dynamic"):
        for value in (float("nan"), float("inf")):
            for column in (0, K - 1):
                model, x = quantized_block(config, BF16, device)
                x[1, column] = value
                want = model.up(x)
                split = parallelize_module(
                    model.up, mesh, RowwiseLinearQuant(input_layouts=Replicate())
                )
                got = split(x)
                kept = [i for i in range(M) if i != 1]
                same = torch.equal(got.isnan().cpu(), want.isnan().cpu())
                wrong = "" if same and bool(got[1].isnan().all()) else "NaN is elsewhere"
                name = f"{config} {value} in column {column}"
                yield name, wrong or compared(got[kept], want[kept], exact=False)
    for exact in (False, True):
        layer, x1, _ = layer_for(Case(output=F16), device)
        style = RowwiseLinearQuant(input_layouts=Replicate(), output_layouts=Shard(0), exact=exact)
        parallelize_module(layer, mesh, style)
        text = f"dim 0 of ({ranks + 1}, {N}) cannot be split into {ranks} equal parts"
        rows = x1[:1].repeat(ranks + 1, 1)
        yield f"uneven rows exact={exact}", refusal(lambda m=layer, r=rows: m(r), text)


def refusals(mesh: DeviceMesh, folder: Path) -> Check:
    del folder
    ranks = mesh.size()
    column, row = ColwiseLinearQuant(), RowwiseLinearQuant()

    def fresh(k: int = K, n: int = N, **given: Any) -> LinearQuant:
        return LinearQuant(k, n, **{"output_dtype": F16, **given})

    batched = fresh()
    batched.weight.data = torch.zeros(2, N, K, dtype=I8)
    split = parallelize_module(fresh(), mesh, ColwiseLinearQuant())
    table: list[tuple[str, nn.Module, Any, str]] = [
        ("n", fresh(n=ranks * 8 + 1), column, f"out_features (n) is {ranks * 8 + 1} and there are"),
        ("k", fresh(k=ranks * 8 + 1), row, f"in_features (k) is {ranks * 8 + 1} and there are"),
        ("int4 n", fresh(n=8, dtype=I32), column, "a multiple of 8 for int4"),
        ("int4 k", fresh(k=8, dtype=I32), row, "a multiple of 8 for int4"),
        ("batch", batched, column, "weight has 3 dims; a plan splits (n, k)"),
        ("twice", split, column, "the layer is split already"),
        ("float", nn.Linear(K, N), column, "the module is Linear; allowed are LinearQuant"),
    ]
    for name, module, style, text in table:
        if name in ("n", "k") and ranks == 1:
            continue
        wrong = refusal(lambda m=module, s=style: parallelize_module(m, mesh, s), text)
        yield name, wrong
    square = init_device_mesh(mesh.device_type, (ranks, 1), mesh_dim_names=("tp", "dp"))
    text = (
        'the mesh has 2 dims; a plan takes one. What to do: pass a part of it, such as mesh["tp"]'
    )
    yield "mesh", refusal(lambda: column._apply(fresh(), square), text)


def differing(mesh: DeviceMesh, folder: Path) -> Check:
    """One rank holds another layer: every rank gets an error, and none keeps waiting."""
    del folder
    last = mesh.get_local_rank() == mesh.size() - 1
    layer = LinearQuant(K * 2 if last else K, N, output_dtype=F16)
    before = [p.shape for p in layer.parameters()]
    text = f"the ranks hold different layers. Rank 0 has (in_features={K}"
    wrong = refusal(lambda: parallelize_module(layer, mesh, ColwiseLinearQuant()), text)
    yield "different layers", wrong
    same = before == [p.shape for p in layer.parameters()]
    yield "nothing was split", "" if same else "changed"
