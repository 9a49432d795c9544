"""One rank of a job on cann_host's HCCL: `hccl_ranks.py JOB FOLDER RANK RANKS npu`.

What each check found goes to FOLDER/RANK.json, as in parallel_ranks.py. The expected values are
plain numpy, computed by every rank from the seed that made everybody's inputs.
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

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

Check = Iterator[tuple[str, str]]
SIZE = 37
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
OPS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


# ---- inputs and expected values ----


def bits(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, half to even: its upper 16 bits."""
    raw = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widened(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32)


def inputs(dtype: torch.dtype, ranks: int, size: int) -> list[Tensor]:
    """The inputs of all ranks: the whole range; for floats also infinity, NaN and the smallest
    numbers."""
    g = torch.Generator().manual_seed(size)
    if dtype in INTEGERS:
        info = torch.iinfo(dtype)
        top = min(info.max, 1 << 62)
        return [torch.randint(-top - 1, top, (size,), generator=g).to(dtype) for _ in range(ranks)]
    made = [(torch.randn(size, generator=g) * 30).to(dtype) for _ in range(ranks)]
    floats = torch.finfo(dtype)
    for index, value in enumerate((floats.max, floats.smallest_normal / 4, float("inf"))):
        made[0][index] = made[-1][index] = value
    made[0][3], made[-1][4] = float("nan"), float("nan")
    made[0][5], made[-1][5] = float("inf"), float("-inf")
    return made


def as_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return widened(tensor.view(torch.int16).numpy().view(np.uint16))
    return tensor.numpy()


def reduced(tensors: list[Tensor], op: str) -> np.ndarray:
    """In the order of the ranks, each step rounded to the dtype."""
    combine = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}[op]
    total = as_numpy(tensors[0]).copy()
    with np.errstate(all="ignore"):
        for tensor in tensors[1:]:
            total = combine(total, as_numpy(tensor))
            if tensor.dtype == torch.bfloat16:
                total = widened(bits(total))
    return total


def differs(got: Tensor, want: np.ndarray) -> str:
    values = as_numpy(got.cpu())
    if values.dtype != want.dtype or values.shape != want.shape:
        return f"{values.dtype}{values.shape}, not {want.dtype}{want.shape}"
    wrong = int((~((values == want) | ((values != values) & (want != want)))).sum())
    return f"{wrong} of {want.size} differ" if wrong else ""


def refusal(action: Callable[[], object], text: str) -> str:
    try:
        action()
        torch.npu.synchronize()
    except RuntimeError as error:
        return "" if text in str(error) else f"another text: {error}"
    return "not refused"


# ---- every collective, every dtype ----


def reductions(rank: int, ranks: int) -> Check:
    for dtype in (*INTEGERS, *FLOATS):
        for op, code in OPS.items():
            name = f"{op} {dtype}"
            everybody = inputs(dtype, ranks, SIZE * ranks)
            mine = everybody[rank].npu()
            if op == "prod" and dtype in (torch.int16, torch.bfloat16):
                text = f"does not reduce {str(dtype).removeprefix('torch.')} by prod"
                yield name, refusal(lambda m=mine, c=code: dist.all_reduce(m, op=c), text)
                continue
            want = reduced(everybody, op)
            part = want[rank * SIZE : (rank + 1) * SIZE]
            together = mine.clone()
            dist.all_reduce(together, op=code)
            yield f"all_reduce {name}", differs(together, want)
            own = torch.empty(SIZE, dtype=dtype, device="npu")
            dist.reduce_scatter_tensor(own, mine, op=code)
            yield f"reduce_scatter {name}", differs(own, part)
            dist.reduce_scatter(own.zero_(), list(mine.chunk(ranks)), op=code)
            yield f"reduce_scatter of a list {name}", differs(own, part)
            at_root = mine.clone()
            dist.reduce(at_root, dst=ranks - 1, op=code)
            if rank == ranks - 1:
                yield f"reduce {name}", differs(at_root, want)


def moves(rank: int, ranks: int) -> Check:
    for dtype in (*INTEGERS, torch.uint8, torch.bool, *FLOATS, torch.float64):
        made = inputs(torch.int64, ranks, SIZE * ranks)
        everybody = [(t % 200).to(dtype) for t in made]
        mine, root = everybody[rank].npu(), ranks - 1
        whole = np.concatenate([as_numpy(t) for t in everybody])

        out = torch.empty(SIZE * ranks * ranks, dtype=dtype, device="npu")
        dist.all_gather_into_tensor(out, mine)
        yield f"all_gather {dtype}", differs(out, whole)
        parts = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(parts, mine)
        yield f"all_gather of a list {dtype}", differs(torch.cat(parts), whole)
        same = mine.clone()
        dist.broadcast(same, src=root)
        yield f"broadcast {dtype}", differs(same, as_numpy(everybody[root]))
        own = torch.empty(SIZE, dtype=dtype, device="npu")
        dist.scatter(own, list(mine.chunk(ranks)) if rank == root else None, src=root)
        mine_of_root = everybody[root].chunk(ranks)[rank]
        yield f"scatter {dtype}", differs(own, as_numpy(mine_of_root))
        turned = torch.empty_like(mine)
        dist.all_to_all_single(turned, mine)
        column = torch.cat([t.chunk(ranks)[rank] for t in everybody])
        yield f"all_to_all {dtype}", differs(turned, as_numpy(column))

    # parts of other sizes: rank r gives s + 1 elements to rank s
    mine = (torch.arange(ranks * (ranks + 1) // 2) + 100 * rank).npu()
    got = torch.empty(ranks * (rank + 1), dtype=torch.int64, device="npu")
    dist.all_to_all_single(got, mine, [rank + 1] * ranks, list(range(1, ranks + 1)))
    first = rank * (rank + 1) // 2
    want = np.array([100 * r + first + i for r in range(ranks) for i in range(rank + 1)])
    yield "all_to_all uneven", differs(got, want)
    uneven = [torch.empty(r + 1, device="npu") for r in range(ranks)]
    dist.all_gather(uneven, torch.full((rank + 1,), float(rank), device="npu"))
    want = np.repeat(np.arange(ranks, dtype=np.float32), np.arange(1, ranks + 1))
    yield "all_gather uneven", differs(torch.cat(uneven), want)

    other = torch.zeros(3, device="npu")
    if rank == 0:
        dist.send(torch.arange(3.0).npu(), dst=1)
        dist.recv(other, src=1)
    elif rank == 1:
        dist.recv(other, src=0)
        dist.send(other + 1, dst=0)
    if rank < 2:
        yield "send and recv", differs(other, np.arange(3, dtype=np.float32) + (rank == 0))
    objects = [None] * ranks
    dist.all_gather_object(objects, {"rank": rank})
    yield "objects", "" if objects == [{"rank": r} for r in range(ranks)] else str(objects)


def groups(rank: int, ranks: int) -> Check:
    """Communicators of some of the ranks, of one rank, two at a time, and made again."""
    for _ in range(2):
        low, high = dist.new_group([0]), dist.new_group(list(range(1, ranks)))
        x = torch.ones(4, device="npu") * (rank + 1)
        dist.all_reduce(x, group=low if rank == 0 else high)
        want = 1 if rank == 0 else sum(range(2, ranks + 1))
        yield "subgroups", differs(x, np.full(4, want, dtype=np.float32))
        dist.destroy_process_group(low)
        dist.destroy_process_group(high)
    x = torch.ones(1 << 20, device="npu")  # more than a socket holds
    for _ in range(3):
        dist.all_reduce(x)
    yield "4 MiB", differs(x, np.full(1 << 20, float(ranks) ** 3, dtype=np.float32))


def order(rank: int, ranks: int) -> Check:
    """A collective waits for the work of its input, and a reader of its output waits for it."""
    x = torch.full((1000,), float(rank), device="npu")
    total = ranks * (ranks - 1) / 2
    for step in range(10):
        y = x + step
        work = dist.all_reduce(y, async_op=True)
        work.wait()
        z = y * 2
        yield "async", differs(z, np.full(1000, 2 * (total + ranks * step), dtype=np.float32))
    side = torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        y = x + 1
        dist.all_reduce(y)
    torch.npu.current_stream().wait_stream(side)
    yield "another stream", differs(y, np.full(1000, total + ranks, dtype=np.float32))
    x = torch.ones(8, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        dist.all_reduce(x)
    yield "captured", differs(x, np.ones(8, dtype=np.float32))
    for _ in range(3):
        graph.replay()
    yield "replayed", differs(x, np.full(8, float(ranks) ** 3, dtype=np.float32))
    if ranks != 4:
        return
    # two groups launched in one order by all, and waited for in orders that would go in a circle
    mesh = init_device_mesh("npu", (2, 2), mesh_dim_names=("dp", "tp"))
    for step in range(5):
        x = torch.full((64,), float(rank + step), device="npu")
        y = x + 1
        works = [
            dist.all_reduce(t, group=mesh[name].get_group(), async_op=True)
            for t, name in ((x, "tp"), (y, "dp"))
        ]
        for work in works if rank in (0, 3) else works[::-1]:
            work.wait()
            torch.npu.synchronize()
        want = (rank + (rank ^ 1) + 2 * step) * 1000 + rank + (rank ^ 2) + 2 * step + 2
        yield "two groups", differs(x * 1000 + y, np.full(64, want, dtype=np.float32))


# ---- in torchair's graphs ----


def on_torchair(function: Callable[[Tensor], Any], x: Tensor, **options: Any) -> tuple[Any, str]:
    """The results, and the GE operators of the graph."""
    import torchair

    from lq_graph.converters import graph

    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    backend = torchair.get_npu_backend(compiler_config=config)
    with graph.capture(config) as graphs:
        got = torch.compile(function, backend=backend, fullgraph=True, **options)(x)
    return got, " ".join(op for one in graphs for op in one.ops())


def graphs(rank: int, ranks: int) -> Check:
    """Each functional collective: the GE operator it becomes, and its values."""
    group = dist.group.WORLD
    assert group is not None
    table: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[list[Tensor]], Any]]] = {
        "sum": (
            "HcomAllReduce",
            lambda x: collectives.all_reduce(x, "sum", group),
            lambda every: reduced(every, "sum"),
        ),
        "max": (
            "HcomAllReduce",
            lambda x: collectives.all_reduce(x, "max", group),
            lambda every: reduced(every, "max"),
        ),
        "gather": (
            "HcomAllGather",
            lambda x: collectives.all_gather_tensor(x, 0, group),
            lambda every: np.concatenate([as_numpy(t) for t in every]),
        ),
        "gather columns": (
            "HcomAllGather",
            lambda x: collectives.all_gather_tensor(x, 1, group),
            lambda every: np.concatenate([as_numpy(t) for t in every], axis=1),
        ),
        "scatter": (
            "HcomReduceScatter",
            lambda x: collectives.reduce_scatter_tensor(x, "sum", 0, group),
            lambda every: np.split(reduced(every, "sum"), ranks)[rank],
        ),
        "broadcast": (
            "HcomBroadcast",
            lambda x: collectives.broadcast(x, ranks - 1, group),
            lambda every: as_numpy(every[-1]),
        ),
    }
    for dtype in (torch.int8, torch.int32, *FLOATS):
        everybody = [t.view(ranks * 2, 6) for t in inputs(dtype, ranks, ranks * 12)]
        for name, (op, function, expected) in table.items():
            for dynamic in (False, True):
                got, ops = on_torchair(function, everybody[rank].npu(), dynamic=dynamic)
                wrong = "" if op in ops.split() else f"became {ops}"
                label = f"{name} {dtype} {'dynamic' if dynamic else 'static'}"
                yield label, wrong or differs(got, expected(everybody))
    # a constant is not summed while the graph is compiled, and nobody else's sum is either
    got, _ = on_torchair(
        lambda x: collectives.all_reduce(torch.ones(3, device="npu"), "sum", group) + x[:3, 0],
        torch.zeros(4, 4, device="npu"),
    )
    yield "a constant", differs(got, np.full(3, ranks, dtype=np.float32))


def graph_mismatch(rank: int, ranks: int) -> Check:
    """The last rank compiles a graph for another shape."""
    x = torch.ones(8 + (rank == ranks - 1), device="npu")
    group = dist.group.WORLD
    assert group is not None
    run = lambda: on_torchair(lambda t: collectives.all_reduce(t, "sum", group), x)  # noqa: E731
    yield "told", told(run, "[EI0005] the ranks' calls differ", within=60)


# ---- ranks that fail: the error of each rank, and its time limit ----


def told(action: Callable[[], object], *texts: str, within: float = 10) -> str:
    start = time.monotonic()
    try:
        action()
        torch.npu.synchronize()
    except RuntimeError as error:
        took = time.monotonic() - start
        if took > within:
            return f"after {took:.1f} s"
        return "" if all(text in str(error) for text in texts) else f"another text: {error}"
    return "no error"


def mismatch(kind: str) -> Callable[[int, int], Check]:
    def check(rank: int, ranks: int) -> Check:
        last = rank == ranks - 1
        x = torch.ones(8, device="npu")

        def mine() -> object:
            return dist.all_reduce(x)

        theirs: Callable[[], object] = {
            "count": lambda: dist.all_reduce(torch.ones(9, device="npu")),
            "dtype": lambda: dist.all_reduce(torch.ones(8, device="npu", dtype=torch.int32)),
            "op": lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX),
            "kind": lambda: dist.broadcast(x, src=0),
        }[kind]
        dist.all_reduce(x)
        texts = ("[EI0005] the ranks' calls differ", "rank 0 calls HcclAllReduce(8 float32, sum)")
        yield "told", told(theirs if last else mine, *texts)
        time.sleep(2)  # torch_npu's watchdog leaves the process alone
        yield "told again", told(mine, "has failed before: [EI0005]")

    return check


def late(rank: int, ranks: int) -> Check:
    """HCCL_EXEC_TIMEOUT is 2 s, and the last rank comes after 4."""
    x = torch.ones(8, device="npu")
    dist.all_reduce(x)
    last = rank == ranks - 1
    if last:
        time.sleep(4)
    wrong = told(lambda: dist.all_reduce(x), "[EI0002] HcclAllReduce(8 float32, sum): ", within=3.5)
    yield "told", wrong


def gone(rank: int, ranks: int) -> Check:
    """A rank is killed while the others wait for it."""
    x = torch.ones(8, device="npu")
    dist.all_reduce(x)
    victim = int(os.environ["VICTIM"])
    del ranks
    if rank == victim:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    wrong = told(lambda: dist.all_reduce(x), f"rank {victim} is gone", within=3)
    yield "told", wrong


def fault(rank: int, ranks: int) -> Check:
    """A call fails on one rank, on demand; the others wait for it no longer than allowed."""
    import cann_host

    del ranks
    x = torch.ones(8, device="npu")
    dist.all_reduce(x)
    if rank == 0:
        with cann_host.faults("HcclAllReduce:4"):
            yield "fails", told(lambda: dist.all_reduce(x), "this fault was asked for")
    else:
        yield "waits", told(lambda: dist.all_reduce(x), "[EI0002]", within=5)


JOBS: dict[str, tuple[Callable[[int, int], Check], ...]] = {
    "values": (reductions, moves, groups, order),
    "order": (order, groups),
    "graphs": (graphs, graph_mismatch),
    "late": (late,),
    "gone": (gone,),
    "fault": (fault,),
    **{f"other {kind}": (mismatch(kind),) for kind in ("count", "dtype", "op", "kind")},
}


def main(job: str, folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.npu.set_device(rank)
    dist.init_process_group(
        "hccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    found: dict[str, str] = {}
    for check in JOBS[job]:
        for name, wrong in check(rank, ranks):
            found[f"{check.__name__}: {name}"] = wrong
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if job in ("values", "order"):
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    job, folder, rank, ranks, _ = sys.argv[1:]
    main(job, Path(folder), int(rank), int(ranks))
