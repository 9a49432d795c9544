"""Attention with an int8 cache beside the golden."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from support import golden_attention as golden
from support.attention import BLOCK, DECODE, SCALE, Call, Case, close, compiled

torch_npu = pytest.importorskip("torch_npu")
torchair = pytest.importorskip("torchair")

F16, BF16, I8 = torch.float16, torch.bfloat16, torch.int8


class Antiquant(NamedTuple):
    """Scales of a cache.

    Attributes:
        case: the call; its key and value become int8.
        names: the tensors: {name of a scale: its shape}; the offsets have the same shapes.
        modes: key_antiquant_mode and value_antiquant_mode, or antiquant_mode alone.
        offset: whether there are offsets.
    """

    case: Case
    names: dict[str, tuple[int, ...]]
    modes: tuple[int, ...]
    offset: bool = True


BOTH = ("key_antiquant", "value_antiquant")
PAGED = DECODE._replace(cache="BNSD")
ANTIQUANT = {
    "joint, per-tensor": Antiquant(DECODE, {"antiquant": (2,)}, (0,)),
    "joint, per-channel": Antiquant(DECODE, {"antiquant": (2, 2, 1, 32)}, (0,)),
    "joint, per-channel of H": Antiquant(
        DECODE._replace(layout="BSH", dtype=BF16), {"antiquant": (2, 64)}, (0,), offset=False
    ),
    "joint, per-token": Antiquant(DECODE, {"antiquant": (2, 2, 140)}, (1,)),
    "per-tensor": Antiquant(DECODE, dict.fromkeys(BOTH, (1,)), (0, 0)),
    "per-channel": Antiquant(
        DECODE._replace(dtype=BF16), dict.fromkeys(BOTH, (1, 2, 1, 32)), (0, 0)
    ),
    "per-token": Antiquant(DECODE, dict.fromkeys(BOTH, (1, 2, 140)), (1, 1), offset=False),
    "per-tensor and head": Antiquant(DECODE, dict.fromkeys(BOTH, (2,)), (2, 2)),
    "per-token and head": Antiquant(DECODE, dict.fromkeys(BOTH, (2, 2, 140)), (3, 3)),
    "per-channel and per-token": Antiquant(
        DECODE, {"key_antiquant": (1, 2, 32), "value_antiquant": (1, 2, 140)}, (0, 1)
    ),
    "per-token, paged": Antiquant(PAGED, dict.fromkeys(BOTH, (1, 2, 384)), (1, 1)),
    "scales in blocks": Antiquant(PAGED, dict.fromkeys(BOTH, (6, 128)), (4, 4)),
    "scales in blocks and heads": Antiquant(PAGED, dict.fromkeys(BOTH, (6, 2, 128)), (5, 5)),
    "many queries": Antiquant(Case("BSH"), {"antiquant": (2, 64)}, (0,)),
}


class Cache(Call):
    """A call with an int8 key and value."""

    def __init__(self, one: Antiquant) -> None:
        self.one = one
        super().__init__(one.case)
        for name, shape in one.names.items():
            mode = self.modes()[BOTH.index(name)] if name in BOTH else one.modes[0]
            dtype = torch.float32 if mode in (1, 3, 4, 5) else one.case.dtype
            for what in ("scale", "offset")[: 1 + one.offset]:
                numbers = torch.rand(shape, generator=self.generator)
                numbers = numbers / 8 + 0.02 if what == "scale" else numbers * 4
                self.tensors[f"{name}_{what}"] = numbers.to(dtype)
        if one.names.keys() == set(BOTH):
            self.numbers |= dict(zip((f"{n}_mode" for n in BOTH), one.modes, strict=True))
        else:
            self.numbers["antiquant_mode"] = one.modes[0]

    def modes(self) -> tuple[int, int]:
        return (self.one.modes * 2)[0], (self.one.modes * 2)[1]

    def place_keys(self, axes: str, size: int, right: int | None) -> None:
        for parts in (self.k, self.v):
            parts[:] = [(part.float() * 40).clamp(-128, 127).to(I8) for part in parts]
        super().place_keys(axes, size, right)

    def spread(self, name: str, what: str, batch: int, rows: Tensor) -> Any:
        """A scale or offset for each value of (kv heads, keys, head dim), by its mode."""
        own = f"{name}_antiquant_{what}"
        whole = self.tensors.get(own, self.tensors.get(f"antiquant_{what}"))
        mode = self.modes()[int(name == "value")]
        if whole is None:
            return 0.0 if what == "offset" else 1.0
        if own not in self.tensors:
            whole = whole[int(name == "value")]
        numbers, (heads, keys, head) = whole.float().numpy(), rows.shape
        given = np.zeros((heads, keys, head), np.float32)
        for n in range(heads):
            for s in range(keys):
                if mode == 0:
                    flat = numbers.reshape(-1)
                    given[n, s] = flat if flat.size == 1 else flat.reshape(heads, head)[n]
                elif mode == 1:
                    given[n, s] = numbers.reshape(-1, numbers.shape[-1])[batch, s]
                elif mode == 2:
                    given[n, s] = numbers[n]
                elif mode == 3:
                    given[n, s] = numbers[batch, n, s]
                else:
                    block = int(self.tensors["block_table"][batch, s // BLOCK])
                    at = (block, s % BLOCK) if mode == 4 else (block, n, s % BLOCK)
                    given[n, s] = numbers[at]
        return given

    def golden(self) -> list[tuple[Any, Any]]:
        results = []
        for batch, q in enumerate(self.q):
            floats = []
            for name, parts in (("key", self.k), ("value", self.v)):
                rows = parts[batch]
                scale, offset = (self.spread(name, w, batch, rows) for w in ("scale", "offset"))
                values = (rows.float().numpy() + offset) * scale
                if q.shape[1] > 1:  # the kernel stores them as float16
                    values = golden.rounded(values, F16)
                floats.append(torch.from_numpy(np.asarray(values, np.float32)))
            results.append(golden.attention(q, *floats, SCALE, visible=self.seen(batch)))
        return results


@pytest.mark.parametrize("one", ANTIQUANT.values(), ids=ANTIQUANT.keys())
def test_an_int8_cache_is_golden(one: Antiquant) -> None:
    call = Cache(one)
    out, _ = call.eager()
    parts = golden.taken(out, call.out_axes, list(one.case.queries), one.case.heads)
    for part, (want, _) in zip(parts, call.golden(), strict=True):
        close(part / 8, want / 8, one.case.dtype)  # the values are about 8


@pytest.mark.parametrize("name", ["joint, per-channel of H", "scales in blocks and heads"])
def test_an_int8_cache_in_a_graph(name: str) -> None:
    call = Cache(ANTIQUANT[name])

    def attention(**tensors: Tensor) -> Any:
        return torch.ops.npu.npu_fused_infer_attention_score(**tensors, **call.numbers)[0]

    graph = compiled(attention, False)(**call.on_device())
    assert torch.equal(graph.cpu(), call.eager()[0])
