"""Writes the graphs of example layers into corpus/: `python tests/fuzz/record.py`.

Weights are small, and constants in memory point to the blocks of graphs.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cann_host

cann_host.activate()

import torch  # noqa: E402
import torch_npu  # noqa: E402
import torchair  # noqa: E402
from torch import nn  # noqa: E402
from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef  # noqa: E402

import lq_graph  # noqa: E402
import lq_graph.converters  # noqa: E402 - registers ours
from cann_host.graph import compiler  # noqa: E402

CORPUS = Path(__file__).parent / "corpus"
sys.path.insert(0, str(CORPUS.parents[2] / "benchmarks"))
import vendor_layer  # type: ignore[import-not-found]  # noqa: E402 # isort: skip


class Vendor(nn.Module):
    """npu_quant_matmul on a transposed weight, as the vendor's module has it."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.rand(weight.shape[0]) * 0.01, requires_grad=False)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale
        if self.dtype == torch.float16:
            scale = torch_npu.npu_trans_quant_param(scale)
        return torch_npu.npu_quant_matmul(x, self.weight.t(), scale, output_dtype=self.dtype)


def ours(out: torch.dtype, **options: Any) -> nn.Module:
    layer = lq_graph.LinearQuant(64, 32, output_dtype=out, **options)
    layer.weight.data = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    layer.scale.data = torch.rand(32) * 0.01
    return layer


def recorded(name: str, function: Callable[..., Any], *inputs: Any) -> None:
    """Write the graph of a call: its Data nodes stand for the inputs."""
    found: list[bytes] = []
    compile_graph = compiler.compile_graph

    def noted(model: bytes) -> Any:
        found.append(model)
        return compile_graph(model)

    compiler.compile_graph = noted
    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    config.experimental_config.frozen_parameter = False
    backend = torchair.get_npu_backend(compiler_config=config)
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*inputs)
    compiler.compile_graph = compile_graph
    for number, model in enumerate(found):
        path = CORPUS / f"graph_{name}{number or ''}.pb"
        parsed = ModelDef.FromString(model)
        path.write_bytes(parsed.SerializeToString(deterministic=True))
        print(f"{path.name}: {len(parsed.graph[0].op)} nodes, {path.stat().st_size:,} bytes")


def npu(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="npu")


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Indices."""
    return torch.zeros(shape, dtype=dtype, device="npu")


def attention() -> None:
    """The attentions of inference, of a prompt and of a step."""
    q, kv = npu(1, 2, 3, 32), npu(1, 2, 5, 32)
    options = {"num_heads": 2, "input_layout": "BNSD", "scale_value": 0.2}
    recorded(
        "flash", lambda q, k, v: torch_npu.npu_fusion_attention(q, k, v, 2, "BNSD")[0], q, kv, kv
    )
    recorded(
        "prompt",
        lambda q, k, v: torch_npu.npu_prompt_flash_attention(q, k, v, **options),
        q,
        kv,
        kv,
    )
    recorded(
        "incre",
        lambda q, k, v: torch_npu.npu_incre_flash_attention(q, k, v, **options),
        q[:, :, :1],
        kv,
        kv,
    )
    packed, ends = npu(4, 2, 64, dtype=torch.bfloat16), [1, 4]
    recorded(
        "attention_packed",
        lambda q, k, v: torch_npu.npu_fused_infer_attention_score(
            q,
            k,
            v,
            num_heads=2,
            input_layout="TND",
            actual_seq_lengths=ends,
            actual_seq_lengths_kv=ends,
            softmax_lse_flag=True,
        ),
        packed,
        packed,
        packed,
    )


def caches() -> None:
    """Rotary embeddings and cache updates."""
    x, cos = npu(1, 3, 2, 64), npu(1, 3, 1, 64)
    recorded("rotary", torch_npu.npu_rotary_mul, x, cos, cos)
    recorded(
        "interleave_rope",
        torch_npu.npu_interleave_rope,
        npu(1, 2, 3, 64),
        npu(1, 1, 3, 64),
        npu(1, 1, 3, 64),
    )
    recorded(
        "scatter",
        lambda c, i, u: torch_npu.scatter_update(c, i, u, -2),
        npu(2, 3, 8, 4),
        zeros(2),
        npu(2, 3, 1, 4),
    )
    recorded(
        "scatter_pa",
        torch_npu.npu_scatter_pa_kv_cache,
        npu(2, 1, 16),
        npu(2, 1, 16),
        npu(2, 1, 4, 16),
        npu(2, 1, 4, 16),
        zeros(2),
    )
    recorded(
        "kv_norm_rope",
        lambda *a: torch_npu.npu_kv_rmsnorm_rope_cache(*a, cache_mode="PA"),
        npu(1, 1, 1, 576),
        npu(512),
        npu(1, 1, 1, 64),
        npu(1, 1, 1, 64),
        zeros(1),
        npu(2, 4, 1, 64),
        npu(2, 4, 1, 512),
    )


def fused() -> None:
    """A norm with a cast, and SwiGlu."""
    x, gamma = npu(2, 64), npu(64)
    recorded("norm_cast", lambda x, g: torch_npu.npu_add_rms_norm_cast(x, x, g), x, gamma)
    recorded("swiglu", torch_npu.npu_swiglu, x)


def decoders() -> None:
    recorded("decoder", vendor_layer.PagedLayer().npu(), *vendor_layer.step_inputs(3))
    for family in (attention, caches, fused):
        family()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("linear", "decoder"))
    only = parser.parse_args().only
    if only != "linear":
        decoders()
    if only != "decoder":
        linear()


def linear() -> None:
    i8, f16, bf16 = torch.int8, torch.float16, torch.bfloat16
    x = torch.randint(-128, 128, (4, 64), dtype=i8)
    int4 = torch.randint(-(2**31), 2**31 - 1, (32, 8), dtype=torch.int32)
    block = nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4), nn.Softmax(-1)
    )
    mixed = [  # name, module, input, dynamic, frozen
        ("ours_int8", ours(i8, bias=False), x, False, False),
        ("ours_bfloat16", ours(bf16, bias=False), x, False, False),
        ("ours_dynamic", ours(f16, bias=False), x, True, False),
        ("ours_frozen", ours(f16, bias=False), x, False, True),
        ("vendor_int8", Vendor(x[:1].repeat(32, 1), bf16), x, False, False),
        ("vendor_int4", Vendor(int4, f16), int4[:4].contiguous(), False, False),
        ("vendor_int4_dynamic", Vendor(int4, f16), int4[:4].contiguous(), True, False),
        ("floats", block, torch.randn(2, 8), False, False),
    ]  # fmt: skip
    CORPUS.mkdir(exist_ok=True)
    compile_graph = compiler.compile_graph
    for name, module, inputs, dynamic, frozen in mixed:
        found: list[bytes] = []
        compiler.compile_graph = lambda model, found=found: (
            found.append(model) or compile_graph(model)
        )
        torch._dynamo.reset()
        config = torchair.CompilerConfig()
        config.experimental_config.frozen_parameter = frozen
        module = module.npu()
        if name == "ours_int8":
            torch.npu.config.allow_internal_format = True
            lq_graph.use_internal_format_weight(module)
        backend = torchair.get_npu_backend(compiler_config=config)
        with torch.no_grad():
            torch.compile(module, backend=backend, dynamic=dynamic)(inputs.npu())
        for number, model in enumerate(found):
            parsed = ModelDef.FromString(model)
            blocks = 0
            for node in parsed.graph[0].op:
                if node.type == "ConstPlaceHolder":
                    node.attr["addr"].i = blocks
                    blocks += 1
            path = CORPUS / f"graph_{name}{number or ''}.pb"
            path.write_bytes(parsed.SerializeToString(deterministic=True))
            print(f"{path.name}: {len(parsed.graph[0].op)} nodes, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
