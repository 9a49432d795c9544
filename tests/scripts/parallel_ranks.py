"""One rank of a job of several: `parallel_ranks.py JOB FOLDER RANK RANKS [DEVICE]`.

What each check found goes to FOLDER/RANK.json: {name: "" or what was wrong}. test_parallel.py
starts the ranks and reads the files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import parallelize_module

import lq_graph
from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuant,
    QuantizedLinear,
    load_checkpoint,
    save_checkpoint,
)
from lq_graph.parallel import ColwiseLinearQuant, RowwiseLinearQuant
from support import cases
from support.cases import BF16, F16, I8, I32, ROW_CASES, Case

Check = Iterator[tuple[str, str]]
TENSORS = ("x1", "weight", "scale", "offset", "pertoken_scale", "bias")
M, K, N = 8, 64, 32  # split into 2 and 4 parts, int4 included


def sized(case: Case) -> Case:
    """A row of the table in a size that 4 devices can share."""
    return Case(**{**vars(case), "m": M, "k": K, "n": N})


def call(inputs: dict[str, Any]) -> Tensor:
    given = [inputs[name] for name in TENSORS]
    out: Tensor = lq_graph.ops._linear_quant(*given, output_dtype=inputs["output_dtype"])
    return out


def compared(got: Tensor, want: Tensor, *, exact: bool = True) -> str:
    got, want = got.cpu(), want.cpu()
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
    if exact:
        return "" if torch.equal(got, want) else f"{int((got != want).sum())} differ"
    step = {F16: 2.0**-10, BF16: 2.0**-7}[want.dtype]
    scale = want.float().abs().amax().item()
    worst = (got.float() - want.float()).abs().max().item()
    # each part and each sum is rounded once, in steps of the largest value at most
    limit = 2 * dist.get_world_size() * step * scale
    return "" if worst <= limit else f"off by {worst}, more than {limit}"


def refusal(action: Callable[[], Any], text: str) -> str:
    try:
        action()
    except Exception as error:
        return "" if text in str(error) else f"another text: {error}"
    return "not refused"


# ---- DTensor's rules for the operators ----


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
        wrong = refusal(lambda: split(whole), "the bias would be added on every device")
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


# ---- plans ----


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
                text = "no row of the table gives int32 accumulators of int4"
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


class Block(nn.Module):
    """Two quantized layers as they stand in a model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(K, 2 * N, dtype=dtype)
        self.down = nn.Linear(2 * N, K, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def block(device: str) -> Block:
    return Block(BF16).eval().to(device)


def quantized_block(config: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Block, Tensor]:
    model = Block(dtype).eval()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=g).to(dtype)
    calibration = None if "dynamic" in config else [x]
    lq_graph.quantize(model, CONFIGS[config], calibration=calibration)
    return model.to(device), x.to(device)


def plan(exact: bool) -> dict[str, Any]:
    return {"up": ColwiseLinearQuant(), "down": RowwiseLinearQuant(exact=exact)}


CONFIGS: dict[str, Any] = {
    "a8w8_dynamic": A8W8Dynamic(),
    "a8w8_static": A8W8Static(),
    "a4w4_dynamic": A4W4Dynamic(),
}


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
        text = f"dim 0 of ({ranks + 1}, {N}) is to be split over {ranks} devices"
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
    """One rank holds another layer: everybody is told, nobody is left waiting."""
    del folder
    last = mesh.get_local_rank() == mesh.size() - 1
    layer = LinearQuant(K * 2 if last else K, N, output_dtype=F16)
    before = [p.shape for p in layer.parameters()]
    text = f"the ranks hold different layers. Rank 0 has (in_features={K}"
    wrong = refusal(lambda: parallelize_module(layer, mesh, ColwiseLinearQuant()), text)
    yield "different layers", wrong
    same = before == [p.shape for p in layer.parameters()]
    yield "nothing was split", "" if same else "changed"


# ---- checkpoints ----


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
    text = "the ranks' checkpoints differ: rank 0 has ['down', 'dynamic'"
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


# ---- ranks that go wrong ----


def killed(mesh: DeviceMesh, folder: Path) -> Check:
    """The last rank dies between two calls; the others get an error, soon."""
    layer, x1, _ = layer_for(Case(output=F16), mesh.device_type)
    split = parallelize_module(layer, mesh, RowwiseLinearQuant(input_layouts=Replicate()))
    split(x1)
    if mesh.get_local_rank() == mesh.size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start, wrong = time.monotonic(), "no error"
    try:
        for _ in range(1000):
            split(x1)
            time.sleep(0.01)
    except RuntimeError:
        took = time.monotonic() - start
        wrong = "" if took < 20 else f"after {took} s"
    yield "error", wrong


def mismatched(mesh: DeviceMesh, folder: Path) -> Check:
    """One rank's input has another m: all are told, with gloo by TORCH_DISTRIBUTED_DEBUG=DETAIL."""
    layer, x1, _ = layer_for(Case(output=F16), mesh.device_type)
    split = parallelize_module(layer, mesh, RowwiseLinearQuant(input_layouts=Replicate()))
    mine = x1[:-1] if mesh.get_local_rank() == mesh.size() - 1 else x1
    text = "ismatch" if mesh.device_type == "cpu" else "[EI0005] the ranks' calls differ"
    yield "error", refusal(lambda: split(mine), text)


JOBS: dict[str, tuple[Callable[[DeviceMesh, Path], Check], ...]] = {
    "values": (rules, batches, activations, plans, models, edges, refusals, differing, checkpoints),
    "compiled": (compiled,),
    "killed": (killed,),
    "mismatched": (mismatched,),
}


def main(job: str, folder: Path, rank: int, ranks: int, device: str = "cpu") -> None:
    torch.set_num_threads(1)
    if device == "npu":
        torch.npu.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "hccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh(device, (ranks,))
    found: dict[str, str] = {}
    for check in JOBS[job]:
        for name, wrong in check(mesh, folder):
            key = f"{check.__name__}: {name}"
            assert key not in found or found[key] == wrong, key
            found[key] = wrong
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if job not in ("killed", "mismatched"):  # there the group cannot be left in order
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    job, folder, rank, ranks, *device = sys.argv[1:]
    main(job, Path(folder), int(rank), int(ranks), *device)
