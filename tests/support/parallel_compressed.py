"""Files of compressed-tensors, of which each process of a mesh reads its part."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh

from lq_graph import load_checkpoint
from support.compressed import (
    ASYMMETRIC,
    CHANNEL,
    CHANNEL4,
    STATIC,
    TENSOR,
    TOKEN4,
    config,
    group,
    layer,
)
from support.parallel import Check, K, M, N, block, compared, plan

KINDS = {
    "zero point": (CHANNEL, ASYMMETRIC),
    "zero point, one scale": (TENSOR, ASYMMETRIC),
    "a scale for each channel": (CHANNEL, STATIC),
    "one scale": (TENSOR, STATIC),
    "int4": (CHANNEL4, TOKEN4),
}


def compressed(mesh: DeviceMesh, folder: Path) -> Check:
    """Layers that only files make: a zero point in the bias, one scale for a weight, int4."""
    device = mesh.device_type
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    for (name, (weights, inputs)), bias in product(KINDS.items(), (True, False)):
        files = folder / f"{name} {bias}"
        if mesh.get_local_rank() == 0:
            files.mkdir()
            tensors: dict[str, torch.Tensor] = {}
            for layer_name, (n, k) in {"up": (2 * N, K), "down": (K, 2 * N)}.items():
                parts = layer(weights, inputs, n, k, bias=bias, zero_point=-37)
                tensors |= {f"{layer_name}.{part}": value for part, value in parts.items()}
            save_file(tensors, files / "model.safetensors")
            about = config(group(weights, inputs), ignore=[])
            (files / "config.json").write_text(json.dumps({"quantization_config": about}))
        dist.barrier()
        for exact in (False, True):
            if exact and name == "int4":
                continue  # no row has int32 accumulators of int4
            whole, part = block(device), block(device)
            if not bias:
                for model in (whole, part):
                    model.up.register_parameter("bias", None)
                    model.down.register_parameter("bias", None)
            load_checkpoint(whole, files)
            load_checkpoint(part, files, mesh=mesh, plan=plan(exact))
            got = f"{name} {'with' if bias else 'without'} bias, {'exact' if exact else 'summed'}"
            yield got, compared(part(x), whole(x), exact=exact)
