"""FlashAttentionScore, its gradient, and scaled_dot_product_attention, which calls it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from cann_host.aclnn import RefusedError
from cann_host.rules import INVALID
from support import golden_attention as golden
from support.attention import TRIANGLE, close, compiled
from support.fused import compute
from support.has import need_operator

torch_npu = pytest.importorskip("torch_npu")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SCALE = 0.3
HAS_V3 = hasattr(torch_npu, "npu_fusion_attention_v3")


class Case(NamedTuple):
    """A call; the names are those of test_attention.Case."""

    layout: str = "BNSD"
    queries: tuple[int, ...] = (5, 5)
    keys: tuple[int, ...] = (7, 7)
    kv_heads: int = 2
    head: int = 32
    value_head: int = 32
    dtype: torch.dtype = F16
    mode: int = 0
    before: int = 2147483647
    after: int = 2147483647
    mask: tuple[int, ...] = ()
    shift: tuple[int, ...] = ()


HEADS = 4
CASES = {
    **{layout: Case(layout) for layout in ("BNSD", "BSND", "BSH", "SBH")},
    "TND": Case("TND", (3, 1, 4), (6, 1, 9)),
    "bfloat16": Case(dtype=BF16),
    "float32": Case(dtype=F32),
    "a value of a smaller head": Case("BSND", value_head=16),
    "one head for all": Case(kv_heads=1),
    "mask": Case(mask=(5, 7)),
    "mask of each batch": Case(mask=(2, 1, 5, 7), dtype=BF16),
    "mask of each head": Case("BSH", mask=(2, 4, 5, 7), dtype=F32),
    "mask with a band": Case(mask=(5, 7), before=3, after=2),
    "mode 1": Case(mode=1, mask=(1, 1, 5, 7)),
    "mode 2": Case("SBH", mode=2, mask=(2048, 2048)),
    "mode 3": Case(mode=3, mask=(2048, 2048), dtype=F32),
    "mode 3 with more queries": Case(queries=(7, 7), keys=(5, 5), mode=3, mask=(2048, 2048)),
    "mode 4": Case(mode=4, mask=(2048, 2048), before=4, after=0),
    "TND causal": Case("TND", (3, 1, 4), (6, 1, 9), mode=3, mask=(2048, 2048), dtype=F32),
    "shift": Case(shift=(1, 4, 5, 7)),
    "shift of all queries": Case(shift=(2, 4, 1, 7), dtype=F32),
}


class Call:
    """The tensors and arguments of a case, and its golden."""

    def __init__(self, case: Case) -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(1)
        self.q = [self.random(HEADS, n, case.head) for n in case.queries]
        self.k = [self.random(case.kv_heads, n, case.head) for n in case.keys]
        self.v = [self.random(case.kv_heads, n, case.value_head) for n in case.keys]
        self.axes = "SBND"[:2] + "H" if case.layout == "SBH" else case.layout
        self.tensors = {
            name: golden.place(parts, self.axes)
            for name, parts in (("query", self.q), ("key", self.k), ("value", self.v))
        }
        self.mask: Tensor | None = None
        if case.mask[-2:] == (2048, 2048):
            self.tensors["atten_mask"] = TRIANGLE
        elif case.mask:
            self.mask = torch.rand(case.mask, generator=self.generator) < 0.4
            self.mask[..., 2] = False  # no query is blind, with the band too
            self.tensors["atten_mask"] = self.mask
        if case.shift:
            self.tensors["pse"] = self.random(*case.shift)
        self.numbers: dict[str, Any] = {
            "head_num": HEADS,
            "input_layout": case.layout,
            "scale": SCALE,
            "sparse_mode": case.mode,
            "pre_tockens": case.before,
            "next_tockens": case.after,
        }
        if case.layout == "TND":
            self.numbers["actual_seq_qlen"] = np.cumsum(case.queries).tolist()
            self.numbers["actual_seq_kvlen"] = np.cumsum(case.keys).tolist()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.case.dtype)

    def seen(self, batch: int, head: int) -> Any:
        case = self.case
        mask = None
        if self.mask is not None:
            mask = self.mask.numpy()
            if mask.ndim == 4:
                mask = mask[batch % len(mask), head % mask.shape[1]]
        elif not case.mask:
            return None
        sizes = self.q[batch].shape[1], self.k[batch].shape[1]
        return golden.visible(case.mode, *sizes, before=case.before, after=case.after, mask=mask)

    def golden(self) -> list[tuple[Any, Any]]:
        """One head at a time, because a mask may be of a head."""
        results = []
        for batch, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True)):
            heads = []
            for head in range(HEADS):
                mine = head * self.case.kv_heads // HEADS
                shift = self.tensors.get("pse")
                if shift is not None:  # it is added before the scores are scaled
                    part = shift[batch % len(shift), head].float().numpy() * SCALE
                    shift = np.broadcast_to(part, (1, q.shape[1], k.shape[1]))
                one = slice(mine, mine + 1)
                heads.append(
                    golden.attention(
                        q[head : head + 1],
                        k[one],
                        v[one],
                        SCALE,
                        visible=self.seen(batch, head),
                        shift=shift,
                    )
                )
            results.append(tuple(np.concatenate(parts) for parts in zip(*heads, strict=True)))
        return results

    def on_device(self) -> dict[str, Tensor]:
        return {name: tensor.npu() for name, tensor in self.tensors.items()}

    def eager(self) -> tuple[Tensor, ...]:
        results = torch_npu.npu_fusion_attention(**self.on_device(), **self.numbers)
        return tuple(result.cpu() for result in results[:3])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_eager_is_golden(case: Case) -> None:
    call = Call(case)
    out, most, total = call.eager()
    wants = call.golden()
    outs = golden.taken(out, call.axes, list(case.queries), HEADS)
    at = 0
    for batch, (want, sums) in enumerate(wants):
        close(outs[batch], want, case.dtype)
        if case.layout == "TND":  # head after head of each sequence
            rows = HEADS * case.queries[batch]
            lse = (most + total.log()).view(-1, 8)[at : at + rows, 0].view(HEADS, -1)
            at += rows
        else:
            lse = (most[batch] + total[batch].log())[..., 0]
        finite = np.isfinite(sums)
        np.testing.assert_allclose(lse.numpy()[finite], sums[finite], rtol=1e-5, atol=1e-5)
    assert torch.equal(most[..., :1].expand_as(most), most)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("BSH", False), ("mask of each batch", False), ("mode 3", False), ("BNSD", True)],
)
def test_graph_is_eager(name: str, dynamic: bool) -> None:
    call = Call(CASES[name])

    def attention(**tensors: Tensor) -> Any:
        return torch_npu.npu_fusion_attention(**tensors, **call.numbers)[:3]

    with torch.no_grad():
        graph = compiled(attention, dynamic)(**call.on_device())
    for given, want in zip(graph, call.eager(), strict=True):
        assert torch.equal(given.cpu(), want)


GRADIENTS = ("BNSD", "SBH", "TND", "float32", "mask of each batch", "mode 3", "TND causal")


@pytest.mark.parametrize(
    ("name", "softmax_layout"), [*((name, "") for name in GRADIENTS), ("TND causal", "TND")]
)
def test_gradient_is_golden(name: str, softmax_layout: str) -> None:
    case = CASES[name]
    call = Call(case)
    if softmax_layout:  # aclnnFlashAttentionUnpaddingScoreGradV4
        need_operator("npu_fusion_attention", "softmax_layout")
        call.numbers["softmax_layout"] = softmax_layout
    tensors = {
        n: t.requires_grad_(n in ("query", "key", "value")) for n, t in call.on_device().items()
    }
    out = torch_npu.npu_fusion_attention(**tensors, **call.numbers)[0]
    dys = [call.random(HEADS, n, case.value_head) for n in case.queries]
    out.backward(golden.place(dys, call.axes).npu())
    places = {"query": (case.queries, HEADS), "key": (case.keys, case.kv_heads)}
    places["value"] = places["key"]
    for batch, dy in enumerate(dys):
        wants = golden.gradient(
            call.q[batch], call.k[batch], call.v[batch], dy, SCALE, visible=call.seen(batch, 0)
        )
        for (tensor, (lengths, heads)), want in zip(places.items(), wants, strict=True):
            grad = tensors[tensor].grad
            assert grad is not None
            part = golden.taken(grad.cpu(), call.axes, list(lengths), heads)[batch]
            step = {F16: 2**-8, BF16: 2**-5, F32: 2**-18}[case.dtype]
            np.testing.assert_allclose(part.float().numpy(), want, rtol=step, atol=step)


# ---- scaled_dot_product_attention ----


MASK = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(2)) < 0.5
MASK[..., 0] = True
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": MASK},
    "scale": {"scale": 0.2},
}


def qkv(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((4, 5), (2, 7), (2, 7))
    return [torch.randn(2, n, s, 32, generator=generator).to(dtype) for n, s in sizes]


def sdpa(*tensors: Tensor, **more: Any) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*tensors, **more, enable_gqa=True)


def moved(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.npu() if isinstance(v, Tensor) else v for k, v in values.items()}


@pytest.mark.parametrize("more", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_sdpa_and_its_gradient(dtype: torch.dtype, more: dict[str, Any]) -> None:
    host = [t.float().requires_grad_() for t in qkv(dtype)]
    device = [t.npu().requires_grad_() for t in qkv(dtype)]
    want, given = sdpa(*host, **more), sdpa(*device, **moved(more))
    close(given.detach().cpu(), want.detach().numpy(), dtype)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    want.backward(dy.float())
    given.backward(dy.npu())
    step = {F16: 2**-8, BF16: 2**-5, F32: 2**-18}[dtype]
    for one, other in zip(host, device, strict=True):
        assert one.grad is not None and other.grad is not None
        grad = other.grad.cpu().float()
        np.testing.assert_allclose(grad.numpy(), one.grad.numpy(), rtol=step, atol=step)


@pytest.mark.skipif(not HAS_V3, reason="torch_npu traces sdpa otherwise here")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["causal", "mask"])
def test_sdpa_in_a_graph(kind: str, dynamic: bool) -> None:
    tensors, more = [t.npu() for t in qkv(F16)], moved(KINDS[kind])
    with torch.no_grad():
        want = sdpa(*tensors, **more)
        given = compiled(sdpa, dynamic)(*tensors, **more)
    assert torch.equal(given.cpu(), want.cpu())


def test_sdpa_with_dropout_is_decomposed() -> None:
    torch.manual_seed(0)
    out = sdpa(*(t.npu() for t in qkv(F32)), dropout_p=0.5)
    assert out.isfinite().all() and not torch.equal(out.cpu(), sdpa(*qkv(F32)))


# ---- refusals ----

REFUSED: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "dtypes": ({"key": BF16}, 161002, "query is float16, key bfloat16"),
    "head_num": ({"head_num": 3}, 561002, "query has 4 heads and head_num is 3"),
    "layout": ({"input_layout": "BSH"}, 161002, "4 dims"),
    "mask": ({"atten_mask": torch.ones(5, 6).bool()}, 561002, r"\(5, 6\).*\(5, 7\)"),
    "mask of floats": ({"atten_mask": torch.ones(5, 7)}, 561002, "atten_mask is float32"),
    "no triangle": (
        {"atten_mask": torch.zeros(2048, 2048).bool(), "sparse_mode": 2},
        None,
        "not the triangle",
    ),
    "small triangle": (
        {"atten_mask": torch.ones(5, 7).bool(), "sparse_mode": 3},
        561002,
        r"must be \(2048, 2048\)",
    ),
    "band": (
        {"atten_mask": torch.zeros(5, 7).bool(), "pre_tockens": -9, "next_tockens": 3},
        561002,
        "no key would be left",
    ),
    "shift": ({"pse": torch.zeros(2, 4, 5, 6).half()}, 561002, "real_shift has shape"),
    "prefix": (
        {"atten_mask": torch.zeros(5, 7).bool(), "sparse_mode": 5, "prefix": [1, 1]},
        None,
        "cann_host does not compute sparse_mode 5",
    ),
}


@pytest.mark.parametrize(("change", "code", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(change: dict[str, Any], code: int | None, text: str) -> None:
    call = Call(Case())
    for name, value in change.items():
        if isinstance(value, torch.dtype):
            call.tensors[name] = call.tensors[name].to(value)
        elif isinstance(value, Tensor):
            call.tensors[name] = value
        else:
            call.numbers[name] = value
    with pytest.raises(RuntimeError, match=text) as error:
        call.eager()
    assert (
        f"CANN error {code}" in str(error.value) if code else "CANN error" not in str(error.value)
    )


def test_a_blind_query() -> None:
    """Its keys are all masked: the mean of the values, or with inner_precise 2 nothing."""
    call = Call(Case(mask=(5, 7)))
    call.tensors["atten_mask"][3] = True
    with pytest.warns(RuntimeWarning, match="cann_host's caution"):
        out, _, _ = call.eager()
    mean = call.v[0].float().mean(1).numpy()
    close(out[0, :, 3], mean[[0, 0, 1, 1]], F16)
    call.numbers["inner_precise"] = 2
    out, most, total = call.eager()
    assert not out[:, :, 3].any() and torch.isfinite(total).all() and (most[:, :, 3] < -3e38).all()


def test_gradient_of_packed_tokens_refuses_other_layouts() -> None:
    tokens, wide = torch.zeros(5, 4, 32), torch.zeros(5, 4, 8)
    numbers = (0.5, 1.0, 2147483647, 2147483647, 4)
    before = (*[tokens] * 4, *[None] * 4, wide, wide, None, tokens, None, (2, 5), (2, 5), *numbers)
    after = (0, 0, *[torch.zeros_like(tokens) for _ in range(3)], None)
    name = "aclnnFlashAttentionUnpaddingScoreGradV4"
    compute(name, *before, "TND", *after, "same_as_input")
    with pytest.raises(RefusedError, match="softmax_layout is TND") as refusal:
        compute(name, *before, "TND", *after, "TND")
    assert refusal.value.code == INVALID
    with pytest.raises(RefusedError, match="input_layout is BSND; TND is allowed"):
        compute(name, *before, "BSND", *after, "")
