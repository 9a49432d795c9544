"""Generates with a small decoder of the vendor's operators: `vendor_decoder.py MODE ...`.

A mode is eager, ge_graph or npugraph_ex. The prompt is computed eagerly, as in the recipes.
recipes. Prints a line of tokens for each mode."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_npu
import torchair
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import decoder
from support.decoder import BLOCK, EPSILON, HEAD_DIM, HEADS, KV_HEADS, SCALE, Linear

FRACTAL_NZ = 29


def linear(x: Tensor, scale: Tensor | None, to: Linear, dtype: torch.dtype) -> Tensor:
    return torch_npu.npu_quant_matmul(
        x, to.weight, to.scale, pertoken_scale=scale, output_dtype=dtype
    )


class OnNpu(torch.nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        made = decoder.weights()
        self.layers = made.layers
        for layer in made.layers:
            layer.norm, layer.mlp_norm = layer.norm.npu(), layer.mlp_norm.npu()
            for one in (layer.qkv, layer.out, layer.gate_up, layer.down):
                one.weight, one.scale = one.weight.npu(), one.scale.npu()
                if mode != "npugraph_ex":
                    one.weight = torch_npu.npu_format_cast(one.weight, FRACTAL_NZ)
        self.embedding, self.norm, self.head, self.cos, self.sin = (
            t.npu() for t in (made.embedding, made.norm, made.head, made.cos, made.sin)
        )
        shape = (decoder.BLOCKS, BLOCK, KV_HEADS, HEAD_DIM)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=torch.bfloat16, device="npu") for _ in made.layers]
            for _ in range(2)
        )
        self.mask = ~torch.tril(torch.ones(2048, 2048, dtype=torch.bool)).npu()
        self.table = torch.tensor([decoder.TABLE], dtype=torch.int32).npu()

    def forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, attend: Callable[..., Tensor]
    ) -> Tensor:
        x = self.embedding[tokens]
        residual = torch.zeros_like(x)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            h, _, residual, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(
                x, residual, layer.norm, epsilon=EPSILON
            )
            qkv = linear(h, scale, layer.qkv, torch.bfloat16).view(-1, HEADS + 2, HEAD_DIM)
            q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
            q, k = torch_npu.npu_apply_rotary_pos_emb(
                q.contiguous(), k.contiguous(), cos, sin, layout="TND"
            )
            for cache, new in ((keys, k), (values, v)):
                torch_npu.npu_scatter_nd_update_(cache.view(-1, KV_HEADS, HEAD_DIM), slots, new)
            mixed = attend(q, keys.view(-1, BLOCK, HEAD_DIM), values.view(-1, BLOCK, HEAD_DIM))
            h, scale = torch_npu.npu_dynamic_quant(mixed.reshape(-1, HEADS * HEAD_DIM))
            x = linear(h, scale, layer.out, torch.bfloat16)
            h, _, residual, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(
                x, residual, layer.mlp_norm, epsilon=EPSILON
            )
            h, scale = torch_npu.npu_dequant_swiglu_quant(
                linear(h, None, layer.gate_up, torch.int32),
                weight_scale=layer.gate_up.scale,
                activation_scale=scale,
                activate_left=True,
                quant_mode=1,
            )
            x = linear(h, scale, layer.down, torch.bfloat16)
        h, _, _ = torch_npu.npu_add_rms_norm(x, residual, self.norm, EPSILON)
        return (h[-1:] @ self.head).float()

    def eager(self, tokens: Tensor, positions: Tensor, slots: Tensor, q: Any, kv: Any) -> Tensor:
        """q and kv: how many tokens have a query and a key, as a list or as a tensor."""
        return self.forward(tokens, positions, slots, self.attention(torch.ops.npu, q, kv))

    def in_graph(self, tokens: Tensor, positions: Tensor, slots: Tensor, q: Any, kv: Any) -> Tensor:
        return self.forward(tokens, positions, slots, self.attention(torchair.ops, q, kv))

    def attention(self, ops: Any, queries: Any, keys: Any) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mixed: Tensor = ops.npu_fused_infer_attention_score_v2(
                q,
                k,
                v,
                num_query_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                softmax_scale=SCALE,
                input_layout="TND",
                sparse_mode=3,
                atten_mask=self.mask,
                actual_seq_qlen=queries,
                actual_seq_kvlen=keys,
                block_table=self.table,
                block_size=BLOCK,
            )[0]
            return mixed

        return attend


def generate(mode: str) -> list[int]:
    torch._dynamo.reset()
    model = OnNpu(mode)
    step: Callable[..., Tensor] = model.eager
    lengths: Callable[[int], Any] = lambda count: [count]  # noqa: E731
    if mode == "ge_graph":
        config = torchair.CompilerConfig()
        config.experimental_config.frozen_parameter = True
        backend = torchair.get_npu_backend(compiler_config=config)
        step = torch.compile(model.in_graph, backend=backend, dynamic=False, fullgraph=True)
        lengths = lambda count: torch.tensor([count]).npu()  # noqa: E731
    elif mode == "npugraph_ex":
        step = torch.compile(model.eager, backend="npugraph_ex", dynamic=True, fullgraph=True)
    tokens, positions = decoder.prompt(), torch.arange(decoder.PROMPT)
    said: list[int] = []
    for _ in range(decoder.TOKENS):
        here = tokens.npu(), positions.npu(), decoder.slots(positions)[:, None].npu()
        end = int(positions[-1]) + 1
        decode = (step, lengths(1), lengths(end))
        run, queries, keys = decode if said else (model.eager, [end], [end])
        logits = run(*here, queries, keys)
        said.append(int(logits.argmax()))
        tokens, positions = torch.tensor([said[-1]]), positions[-1:] + 1
    return said


torch.npu.config.allow_internal_format = True
with torch.no_grad():
    for mode in sys.argv[1:]:
        print(*generate(mode), flush=True)
