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
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

from lq_graph.parallel import RowwiseLinearQuant
from support.cases import F16, Case
from support.parallel import Check, refusal
from support.parallel_checkpoints import checkpoints
from support.parallel_compressed import compressed
from support.parallel_merged import merged
from support.parallel_plans import compiled, differing, edges, layer_for, models, plans, refusals
from support.parallel_rules import activations, batches, rules


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
    """One rank's input has another m: all ranks get an error, with gloo if
    TORCH_DISTRIBUTED_DEBUG=DETAIL."""
    layer, x1, _ = layer_for(Case(output=F16), mesh.device_type)
    split = parallelize_module(layer, mesh, RowwiseLinearQuant(input_layouts=Replicate()))
    mine = x1[:-1] if mesh.get_local_rank() == mesh.size() - 1 else x1
    text = "ismatch" if mesh.device_type == "cpu" else "[EI0005] the ranks' calls differ"
    yield "error", refusal(lambda: split(mine), text)


JOBS: dict[str, tuple[Callable[[DeviceMesh, Path], Check], ...]] = {
    "values": (
        rules,
        batches,
        activations,
        plans,
        models,
        edges,
        refusals,
        differing,
        checkpoints,
        compressed,
    ),
    "compiled": (compiled,),
    "killed": (killed,),
    "mismatched": (mismatched,),
    "merged": (merged,),
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
