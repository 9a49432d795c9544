"""FusedInferAttentionScore, PromptFlashAttention and IncreFlashAttention beside the golden."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import golden_attention as golden
from support.attention import DECODE, SCALE, TND, Call, Case, close, compiled

torch_npu = pytest.importorskip("torch_npu")
torchair = pytest.importorskip("torchair")

F16, BF16 = torch.float16, torch.bfloat16
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


def test_captured() -> None:
    """A replay computes again, from the memory as it is then."""
    call = Call(DECODE)
    tensors = call.on_device()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = torch_npu.npu_fused_infer_attention_score(**tensors, **call.numbers)[0]
    tensors["query"].mul_(-1)
    call.tensors["query"] = -call.tensors["query"]
    graph.replay()
    assert torch.equal(out.cpu(), call.eager()[0])


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


# as dynamic graphs too
DYNAMIC = ("BNSD", "lengths", "mode 3", "TND paged", "decode paged, BSH")


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((n, False) for n in GRAPHS), *((n, True) for n in DYNAMIC)]
)
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


# ---- the other operators ----


V2 = getattr(torch.ops.npu, "npu_fused_infer_attention_score_v2", None)
HAS_SINK = V2 is not None and "learnable_sink" in str(V2.default._schema)


@pytest.mark.skipif(not HAS_SINK, reason="torch_npu has no learnable_sink here")
def test_a_sink() -> None:
    call = Call(TND)
    sink = torch.randn(4, generator=call.generator).to(BF16)
    numbers = {
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "softmax_scale": SCALE,
        "input_layout": "TND",
        "actual_seq_qlen": call.numbers["actual_seq_lengths"],
        "actual_seq_kvlen": call.numbers["actual_seq_lengths_kv"],
        "learnable_sink": sink.npu(),
    }
    out = torch_npu.npu_fused_infer_attention_score_v2(**call.on_device(), **numbers)[0]
    parts = golden.taken(out.cpu(), "TND", list(TND.queries), 4)
    for part, q, k, v in zip(parts, call.q, call.k, call.v, strict=True):
        want, _ = golden.attention(q, k, v, SCALE, sink=sink.float().numpy())
        close(part, want, BF16)


OTHERS: dict[str, tuple[str, Case, dict[str, str]]] = {
    "prompt": (
        "npu_prompt_flash_attention",
        Case("BSH", (5, 3), (7, 4), lengths=True, mode=3, mask=(2048, 2048)),
        {"scale": "scale_value"},
    ),
    "incre": (
        "npu_incre_flash_attention",
        DECODE._replace(layout="BSH", mask=(2, 1, 1, 140)),
        {"scale": "scale_value", "actual_seq_lengths_kv": "actual_seq_lengths"},
    ),
    "incre paged": (
        "npu_incre_flash_attention",
        DECODE._replace(cache="BNSD"),
        {"scale": "scale_value", "actual_seq_lengths_kv": "actual_seq_lengths"},
    ),
}
_NOT_OF_INCRE = ("sparse_mode", "pre_tokens", "next_tokens", "softmax_lse_flag")


@pytest.mark.parametrize("name", OTHERS)
def test_prompt_and_incre(name: str) -> None:
    function, case, names = OTHERS[name]
    call = Call(case)
    numbers = dict(call.numbers)
    if "incre" in name:
        for left_out in (*_NOT_OF_INCRE, "actual_seq_lengths"):
            numbers.pop(left_out, None)
    numbers.pop("softmax_lse_flag", None)
    numbers = {names.get(name, name): value for name, value in numbers.items()}

    def attention(**tensors: Tensor) -> Any:
        return getattr(torch_npu, function)(**tensors, **numbers)

    out = attention(**call.on_device()).cpu()
    parts = golden.taken(out, call.out_axes, list(case.queries), case.heads)
    for part, (want, _) in zip(parts, call.golden(), strict=True):
        close(part, want, case.dtype)
    graph = compiled(attention, False)(**call.on_device())
    assert torch.equal(graph.cpu(), out)
