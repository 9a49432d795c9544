"""One small decoder layer in the vendor's fused operators: its cache is in blocks and is written in
place. For `soak.py` and for the graphs of tests/fuzz."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch_npu
from torch import Tensor, nn
from torch._functorch import config as functorch

__all__ = ["BATCH", "PagedLayer", "QuantLinear", "Sizes", "step_inputs"]

BATCH, BLOCK, BLOCKS = 2, 128, 4
EPSILON = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of a layer."""

    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    inner: int = 128
    batch: int = BATCH

    @property
    def width(self) -> int:
        return self.heads * self.head

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head


SMALL = Sizes()

# npu_apply_rotary_pos_emb returns the tensors it writes into, and its schema does not say so.
# torch warns; where the environment has CI, it refuses.
if hasattr(functorch, "error_on_custom_op_aliasing"):
    functorch.error_on_custom_op_aliasing = False


class QuantLinear(nn.Module):
    """Per-token x1, per-channel weight. The weight is (k, n), as the recipes keep it: a transpose
    of it would be a kernel."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        weight = torch.randint(-128, 128, (k, n), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.rand(n) * 0.01, requires_grad=False)

    def forward(
        self, x: Tensor, pertoken: Tensor | None, dtype: torch.dtype = torch.float16
    ) -> Tensor:
        return torch_npu.npu_quant_matmul(
            x, self.weight, self.scale, pertoken_scale=pertoken, output_dtype=dtype
        )


class PagedLayer(nn.Module):
    """Attention and MLP of one decode step."""

    def __init__(self, sizes: Sizes = SMALL) -> None:
        super().__init__()
        self.sizes, width, kv_width = sizes, sizes.width, sizes.kv_width
        self.qkv = QuantLinear(width, width + 2 * kv_width)
        self.out = QuantLinear(width, width)
        self.up = QuantLinear(width, 2 * sizes.inner)
        self.down = QuantLinear(sizes.inner, width)
        self.first, self.second = (nn.Parameter(torch.ones(width).half()) for _ in range(2))
        for name in ("keys", "values"):
            cache = torch.zeros(BLOCKS, BLOCK, kv_width, dtype=torch.float16)
            self.register_buffer(name, cache)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
        table: Tensor,
        lengths: Tensor | list[int],
    ) -> tuple[Tensor, Tensor]:
        """x, residual (batch, width); slots (batch, 1): a row of the cache for each sequence."""
        z, batch = self.sizes, self.sizes.batch
        normed = torch_npu.npu_add_rms_norm_dynamic_quant(x, residual, self.first, epsilon=EPSILON)
        quantized, _, residual, scale, _ = normed
        fused = self.qkv(quantized, scale)
        query, key, value = fused.split((z.width, z.kv_width, z.kv_width), -1)
        query, key = torch_npu.npu_apply_rotary_pos_emb(
            query.reshape(batch, 1, z.heads, z.head),
            key.reshape(batch, 1, z.kv_heads, z.head),
            *rotary,
        )
        for cache, rows in ((self.keys, key), (self.values, value)):
            torch_npu.npu_scatter_nd_update_(
                cache.view(-1, z.kv_width), slots, rows.reshape(batch, z.kv_width)
            )
        attended, _ = torch_npu.npu_fused_infer_attention_score(
            query.reshape(batch, 1, z.width),
            self.keys,
            self.values,
            actual_seq_lengths_kv=lengths,
            block_table=table,
            block_size=BLOCK,
            num_heads=z.heads,
            num_key_value_heads=z.kv_heads,
            input_layout="BSH",
            scale=z.head**-0.5,
        )
        projected = self.out(*torch_npu.npu_dynamic_quant(attended.view(batch, z.width)))
        quantized, _, residual, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(
            projected, residual, self.second, epsilon=EPSILON
        )
        gate = torch_npu.npu_dequant_swiglu_quant(
            self.up(quantized, None, torch.int32),
            weight_scale=self.up.scale,
            activation_scale=scale,
            activate_left=True,
            quant_mode=1,
        )
        return self.down(*gate), residual


def step_inputs(position: int, device: str = "npu", sizes: Sizes = SMALL) -> list[Any]:
    """The arguments of a step at a position below the block size."""
    batch, shape = sizes.batch, (sizes.batch, sizes.width)
    x, residual = (torch.ones(shape, dtype=torch.float16, device=device) for _ in range(2))
    angle = torch.full((batch, 1, 1, sizes.head), float(position))
    rotary = tuple(values.half().to(device) for values in (angle.cos(), angle.sin()))
    table = torch.arange(BLOCKS, dtype=torch.int32).view(batch, -1)
    slots = table[:, :1] * BLOCK + position
    return [x, residual, rotary, slots.to(device), table.to(device), [position + 1] * batch]
