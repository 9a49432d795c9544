"""What the tests of attention share: calls of FusedInferAttentionScore and their golden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_npu
import torchair
from torch import Tensor

from support import golden_attention as golden

__all__ = ["BLOCK", "DECODE", "SCALE", "TND", "TRIANGLE", "Call", "Case", "close", "compiled"]

F16, BF16 = torch.float16, torch.bfloat16

# the mask of sparse_mode 2, 3 and 4
TRIANGLE = torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1)
_STEPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}


def close(given: Tensor, want: Any, dtype: torch.dtype) -> None:
    """Compare with values that are not rounded: one step of the dtype, as one probability may be
    rounded to the other side."""
    step = _STEPS[dtype]
    np.testing.assert_allclose(given.float().numpy(), want, rtol=step, atol=2 * step)


def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """A function in a GE graph."""
    torch._dynamo.reset()
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)


# ---- calls ----

SCALE = 0.3
BLOCK = 128


class Case(NamedTuple):
    """A call.

    Attributes:
        layout: input_layout.
        queries, keys: lengths of the sequences.
        heads, kv_heads, head: sizes.
        dtype: of query, key and value.
        cache: kind of a paged cache, or "".
        lengths: whether the actual lengths are given; else the sequences fill the tensors.
        mode, before, after: sparse_mode, pre_tokens and next_tokens.
        mask: shape of a random mask, or the triangle if it is (2048, 2048).
        more: other arguments: Python values by their names in FusedInferAttentionScore.
    """

    layout: str = "BNSD"
    queries: tuple[int, ...] = (5, 5)
    keys: tuple[int, ...] = (7, 7)
    heads: int = 4
    kv_heads: int = 2
    head: int = 32
    dtype: torch.dtype = F16
    cache: str = ""
    lengths: bool = False
    mode: int = 0
    before: int = 2147483647
    after: int = 2147483647
    mask: tuple[int, ...] = ()
    more: Mapping[str, Any] = MappingProxyType({})


OUT = {
    "BNSD_BSND": "BSND",
    "NTD_TND": "TND",
}
TND = Case("TND", (3, 1, 4), (6, 1, 9), head=64, dtype=BF16)
DECODE = Case(queries=(1, 1), keys=(130, 40), lengths=True)


class Call:
    """The tensors and arguments of a case, and its golden."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(seed)
        heads, kv, head = case.heads, case.kv_heads, case.head
        self.q = [self.random(heads, n, head) for n in case.queries]
        self.k, self.v = ([self.random(kv, n, head) for n in case.keys] for _ in range(2))
        more = case.more
        axes = case.layout.split("_")[0]
        self.axes, self.out_axes = axes, OUT.get(case.layout, axes)
        padding = more.get("padding", (None, None))
        extra = 3 if case.lengths else 0
        longest = max(case.queries), max(case.keys)
        room = [n + extra if n > 1 else n for n in longest]
        self.size = room[0]
        self.tensors: dict[str, Tensor] = {
            "query": golden.place(self.q, axes, room[0], right=padding[0])
        }
        self.numbers: dict[str, Any] = {
            "num_heads": heads,
            "num_key_value_heads": kv,
            "scale": SCALE,
            "input_layout": case.layout,
            "sparse_mode": case.mode,
            "pre_tokens": case.before,
            "next_tokens": case.after,
            "softmax_lse_flag": "quant_scale2" not in more,
        }
        self.place_keys(axes, room[1], padding[1])
        self.give_lengths()
        self.give_mask()
        self.give_others()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.case.dtype)

    def place_keys(self, axes: str, size: int, right: int | None) -> None:
        case = self.case
        for name, parts in (("key", self.k), ("value", self.v)):
            if not case.cache:
                self.tensors[name] = golden.place(parts, axes, size, right=right)
                continue
            wide = -(-max(case.keys) // BLOCK) + 1
            table = torch.arange(wide * len(parts)).flip(0).view(len(parts), wide).int()
            blocks = wide * len(parts)
            self.tensors["block_table"] = table
            self.tensors[name] = golden.cached(parts, case.cache, BLOCK, table, blocks)
            self.numbers["block_size"] = BLOCK

    def give_lengths(self) -> None:
        case = self.case
        packed = "T" in case.layout
        if not (packed or case.lengths):
            return
        queries, keys = list(case.queries), list(case.keys)
        if packed:
            queries = np.cumsum(queries).tolist()
            keys = keys if case.cache else np.cumsum(keys).tolist()
        if "one length" in case.more:
            keys = keys[:1]
        self.numbers |= {"actual_seq_lengths": queries, "actual_seq_lengths_kv": keys}

    def give_mask(self) -> None:
        shape = self.case.mask
        self.mask: Tensor | None = None
        if shape[-2:] == (2048, 2048):
            self.tensors["atten_mask"] = TRIANGLE.view(shape)
        elif shape:
            mask = torch.rand(shape, generator=self.generator) < 0.4
            mask[..., 0] = False  # no query is blind
            self.tensors["atten_mask"] = self.mask = mask

    def give_others(self) -> None:
        more, dtype = self.case.more, self.case.dtype
        if "pse_shift" in more:
            self.tensors["pse_shift"] = self.random(*more["pse_shift"])
        if "padding" in more:
            for name, size in zip(("query", "kv"), more["padding"], strict=True):
                self.tensors[f"{name}_padding_size"] = torch.tensor([size])
        if "prefix" in more:
            size, length = more["prefix"]
            for name in ("key", "value"):
                part = self.random(self.case.kv_heads, size, self.case.head)
                self.tensors[f"{name}_shared_prefix"] = golden.place([part], self.axes)
                parts = self.k if name == "key" else self.v
                parts[:] = [torch.cat((part[:, :length], one), 1) for one in parts]
            if length != size:
                self.numbers["actual_shared_prefix_len"] = [length]
        if "quant_scale2" in more:
            count = 1 if more["quant_scale2"] == "tensor" else self.case.heads * self.case.head
            self.tensors["quant_scale2"] = 20 * torch.rand(count, generator=self.generator) + 5
            if dtype == F16:
                self.tensors["quant_scale2"] = self.tensors["quant_scale2"].float()
        if "quant_offset2" in more:
            scale = self.tensors["quant_scale2"]
            self.tensors["quant_offset2"] = torch.rand(scale.shape, generator=self.generator) * 9

    def seen(self, batch: int) -> Any:
        case, one = self.case, self.q[batch].shape[1] == 1 and "T" not in self.case.layout
        queries, keys = self.q[batch].shape[1], self.k[batch].shape[1]
        mask = None
        if self.mask is not None:
            mask = self.mask.reshape(-1, *self.mask.shape[-2:]).numpy()
            mask = mask[batch if len(mask) > 1 else 0]
        if one and mask is None:
            return None
        return golden.visible(
            case.mode, queries, keys, before=case.before, after=case.after, mask=mask
        )

    def golden(self) -> list[tuple[Any, Any]]:
        shift = self.tensors.get("pse_shift")
        results = []
        for batch, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True)):
            mine = None
            if shift is not None:
                mine = shift[batch if len(shift) > 1 else 0].float().numpy()
            results.append(golden.attention(q, k, v, SCALE, visible=self.seen(batch), shift=mine))
        return results

    def on_device(self) -> dict[str, Tensor]:
        return {name: tensor.npu() for name, tensor in self.tensors.items()}

    def eager(self) -> tuple[Tensor, Tensor]:
        out, lse = torch_npu.npu_fused_infer_attention_score(**self.on_device(), **self.numbers)
        return out.cpu(), lse.cpu()
