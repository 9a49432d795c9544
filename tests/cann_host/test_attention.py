"""FusedInferAttentionScore, PromptFlashAttention and IncreFlashAttention beside the golden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from support import golden_attention as golden

torch_npu = pytest.importorskip("torch_npu")
torchair = pytest.importorskip("torchair")

F16, BF16, I8 = torch.float16, torch.bfloat16, torch.int8
TRIANGLE = torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1)
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
CASES = {
    **{layout: Case(layout) for layout in ("BNSD", "BSND", "BSH", "BNSD_BSND")},
    "NSD": Case("NSD", (5,), (7,)),
    "bfloat16": Case(dtype=BF16),
    "one head for each": Case(kv_heads=4),
    "lengths": Case("BSND", (5, 3), (7, 4), lengths=True),
    "lengths, BSH": Case("BSH", (2, 5), (1, 7), lengths=True, dtype=BF16),
    "no key": Case(queries=(5, 5), keys=(7, 0), lengths=True),
    "mode 0 with a mask": Case(mask=(5, 7)),
    "mode 0 with a mask of each batch": Case(mask=(2, 1, 5, 7), dtype=BF16),
    "mode 0 with a band": Case(mask=(5, 7), before=1, after=2),
    "mode 1": Case(mode=1, mask=(1, 6, 9)),
    "mode 2": Case(mode=2, mask=(2048, 2048)),
    "mode 2 of lengths": Case("BSH", (5, 3), (7, 2), lengths=True, mode=2, mask=(1, 2048, 2048)),
    "mode 3": Case(mode=3, mask=(1, 1, 2048, 2048)),
    "mode 3 with more queries": Case(queries=(7, 7), keys=(5, 5), mode=3, mask=(2048, 2048)),
    "mode 4": Case(mode=4, mask=(2048, 2048), before=2, after=1),
    "mode 4 with a negative bound": Case(mode=4, mask=(2048, 2048), before=4, after=-1),
    "TND": TND,
    "TND causal": TND._replace(mode=3, mask=(2048, 2048)),
    "TND band": TND._replace(mode=4, mask=(2048, 2048), before=2, after=0, head=128),
    "TND 192": TND._replace(heads=2, head=192),
    "NTD_TND": TND._replace(layout="NTD_TND", head=128),
    "TND paged": TND._replace(cache="BSH", keys=(130, 3, 256), mode=3, mask=(2048, 2048)),
    "TND paged, BNSD": TND._replace(cache="BNSD", keys=(130, 3, 9)),
    "TND paged, NZ": TND._replace(cache="NZ", keys=(130, 3, 9)),
    "BSH paged": Case("BSH", (5, 3), (130, 7), cache="BSH", lengths=True),
    "BNSD paged": Case("BNSD", (5, 3), (130, 7), cache="BNSD", lengths=True, dtype=BF16),
    "decode": DECODE,
    "decode, BSH": DECODE._replace(layout="BSH"),
    "decode, BSND": DECODE._replace(layout="BSND", dtype=BF16),
    "decode with a mask": DECODE._replace(mask=(2, 1, 1, 140)),
    "decode, causal": DECODE._replace(mode=3, mask=(2048, 2048)),
    "decode paged, BSH": DECODE._replace(layout="BSH", cache="BSH"),
    "decode paged, BNSD": DECODE._replace(cache="BNSD"),
    "decode of one length": DECODE._replace(keys=(40, 40), more={"one length": True}),
    "shift": Case(more={"pse_shift": (1, 4, 6, 8)}),
    "shift of a decode step": DECODE._replace(more={"pse_shift": (2, 4, 1, 144)}),
    "padding on the left": Case("BSH", (5, 3), (7, 4), lengths=True, more={"padding": (1, 2)}),
    "padding of a decode step": DECODE._replace(layout="BSND", more={"padding": (0, 3)}),
    "prefix": Case(more={"prefix": (6, 4)}),
    "prefix of a decode step": DECODE._replace(layout="BSH", more={"prefix": (6, 6)}),
    "int8 result": Case(more={"quant_scale2": "tensor"}),
    "int8 result for each channel": Case(
        "BSH", dtype=BF16, more={"quant_scale2": "channel", "quant_offset2": True}
    ),
    "int8 result of a decode step": DECODE._replace(more={"quant_scale2": "channel"}),
}


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


def close(given: Tensor, want: Any, dtype: torch.dtype) -> None:
    step = {F16: 2**-10, BF16: 2**-7}[dtype]
    np.testing.assert_allclose(given.float().numpy(), want, rtol=step, atol=2 * step)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_eager_is_golden(case: Case) -> None:
    call = Call(case)
    out, lse = call.eager()
    lengths = list(case.queries)
    outs = golden.taken(out, call.out_axes, lengths, case.heads)
    if "padding" in case.more:
        start = call.size - case.more["padding"][0]
        whole = golden.taken(out, call.out_axes, [call.size] * len(lengths), case.heads)
        outs = [part[:, start - n : start] for part, n in zip(whole, lengths, strict=True)]
    for batch, (want, sums) in enumerate(call.golden()):
        if "quant_scale2" in case.more:
            scale, offset = (
                None if t is None else t.numpy().reshape(-1, 1, case.head if t.numel() > 1 else 1)
                for t in (call.tensors["quant_scale2"], call.tensors.get("quant_offset2"))
            )
            assert scale is not None
            difference = outs[batch].numpy().astype(int) - golden.quantized(want, scale, offset)
            assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.02
            continue
        close(outs[batch], want, case.dtype)
        if "T" in case.layout or "padding" in case.more:
            continue
        mine = lse[batch, :, : lengths[batch], 0].numpy()
        np.testing.assert_allclose(mine, sums, rtol=1e-5, atol=1e-5)


def test_lse_of_packed_tokens() -> None:
    call = Call(TND)
    lse = call.eager()[1]
    want = np.concatenate([sums for _, sums in call.golden()], 1)
    assert lse.shape == (8, 4, 1)
    np.testing.assert_allclose(lse[..., 0].T.numpy(), want, rtol=1e-5, atol=1e-5)


def test_what_is_beyond_the_lengths_is_zero() -> None:
    call = Call(CASES["lengths"])
    out, lse = call.eager()
    assert not out[1, 3:].any() and torch.isinf(lse[1, :, 3:]).all()


GRAPHS = (
    "BNSD",
    "lengths",
    "no key",
    "mode 0 with a mask of each batch",
    "mode 3",
    "TND causal",
    "NTD_TND",
    "TND paged",
    "TND paged, NZ",
    "decode with a mask",
    "decode paged, BSH",
    "padding on the left",
    "prefix",
    "int8 result for each channel",
)


def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    torch._dynamo.reset()
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_eager(name: str, dynamic: bool) -> None:
    call = Call(CASES[name])

    def attention(**tensors: Tensor) -> Any:
        return torch.ops.npu.npu_fused_infer_attention_score(**tensors, **call.numbers)

    eager = call.eager()
    graph = compiled(attention, dynamic)(**call.on_device())
    for given, want in zip(graph, eager, strict=True):
        assert torch.equal(given.cpu(), want)


@pytest.mark.skipif(not hasattr(torchair, "ops"), reason="torchair has no ops here")
def test_graph_with_lengths_in_tensors() -> None:
    """torchair.ops: the lengths are inputs of the graph, which is not compiled again."""
    call = Call(CASES["TND paged"])
    names = ("actual_seq_lengths", "actual_seq_lengths_kv")
    numbers = {k: v for k, v in call.numbers.items() if k not in names}

    def attention(queries: Tensor, keys: Tensor, tensors: dict[str, Tensor]) -> Any:
        return torchair.ops.npu_fused_infer_attention_score(
            **tensors, **numbers, actual_seq_lengths=queries, actual_seq_lengths_kv=keys
        )

    graph = compiled(attention, False)
    for keys in ([130, 3, 256], [3, 130, 17]):
        call.numbers["actual_seq_lengths_kv"] = keys
        tensors = [torch.tensor(call.numbers[names[0]]).npu(), torch.tensor(keys).npu()]
        out = graph(*tensors, call.on_device())[0]
        assert torch.equal(out.cpu(), call.eager()[0])
