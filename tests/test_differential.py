"""Random calls, ours beside the vendor's own code: its meta kernel says what is legal, its eager
path and the golden say what comes out."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import NamedTuple

import cases
import pytest
import torch
import torch_npu
from cases import I8, I32, I64
from table import FIELDS, LEGAL

import lq_graph
from lq_graph import LinearQuantError

SEED = 20260
SETS = 6000
LEGAL_HERE = sorted(LEGAL[cases.PRODUCT], key=str)
TENSORS = ("x1", "weight", "scale", "offset", "pertoken_scale", "bias")


class Call(NamedTuple):
    """dtype and shape of each tensor, by name; and the output asked for."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    output_dtype: torch.dtype | None

    def meta(self) -> cases.Inputs:
        made = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in self.tensors.items()
        }
        return {**dict.fromkeys(TENSORS), **made, "output_dtype": self.output_dtype}


def legal_call(rng: random.Random) -> Call:
    """A random legal call: a combination of the table in a random shape."""
    c = rng.choice(LEGAL_HERE)
    int4 = c.x == I32
    m, n, k = rng.choice([1, 2, 5, 16, 33]), rng.choice([8, 16, 24, 40]), rng.choice([8, 64, 96])
    if not int4:
        n, k = n + rng.choice([0, 0, -7, 3]), k + rng.choice([0, 0, -7, 1])
    words = k // 8 if int4 else k
    batch = tuple(rng.choice([1, 2, 3]) for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 4])))
    weight_batch: tuple[int, ...] = ()
    if not int4 and rng.random() < 0.4:
        weight_batch = tuple(rng.choice([size, 1]) for size in batch)[rng.randint(0, 1) :]
    tensors = {"x1": (c.x, (*batch, m, words)), "weight": (c.x, (*weight_batch, n, words))}
    tensors["scale"] = (c.scale, (rng.choice([1, n]),))
    if c.offset:
        tensors["offset"] = (c.offset, (rng.choice([1, n]),))
    if c.pertoken_scale:
        tensors["pertoken_scale"] = (c.pertoken_scale, (m,))
    if c.bias:
        full = torch.broadcast_shapes(batch, weight_batch)
        batched = len(full) == 1 and not int4 and rng.random() < 0.5
        tensors["bias"] = (c.bias, (*full, 1, n) if batched else (n,))
    output = None if c.output_dtype == I8 and rng.random() < 0.5 else c.output_dtype
    return Call(tensors, output)


def mutated(call: Call, rng: random.Random) -> Call:
    """One thing changed: a dtype, a size, a number of dims, a tensor added or dropped."""
    tensors, output = dict(call.tensors), call.output_dtype
    kind = rng.choice(["dtype", "size", "dims", "presence", "output", "k"])
    name = rng.choice(list(tensors))
    dtype, shape = tensors[name]
    if kind == "output":
        output = rng.choice(FIELDS["output_dtype"])
    elif kind == "dtype":
        dtype = rng.choice([d for d in FIELDS["bias"] if d])
        if name in ("x1", "weight") and rng.random() < 0.5:
            tensors = {n: (dtype, s) if n in ("x1", "weight") else (d, s)
                       for n, (d, s) in tensors.items()}  # fmt: skip
        tensors[name] = (dtype, shape)
    elif kind == "size" and shape:
        at = rng.randrange(len(shape))
        sizes = [0, 1, 2, 3, 8, 65536, shape[at] + 1, shape[at] * 2]
        tensors[name] = (dtype, (*shape[:at], rng.choice(sizes), *shape[at + 1 :]))
    elif kind == "k":
        k = rng.choice([1, 8, 65535, 65536])
        for both in ("x1", "weight"):
            dtype, shape = tensors[both]
            tensors[both] = (dtype, (*shape[:-1], k))
    elif kind == "dims":
        changed = rng.choice([shape[1:], (1, *shape), (2, *shape), (1,) * 5 + shape, shape[::-1]])
        tensors[name] = (dtype, changed)
    elif kind == "presence":
        optional = rng.choice(["offset", "pertoken_scale", "bias"])
        if tensors.pop(optional, None) is None:
            m, n = tensors["x1"][1][-2:-1], tensors["weight"][1][-2:-1]
            size = m if optional == "pertoken_scale" else n
            tensors[optional] = (rng.choice(FIELDS["scale"]), size)
    return Call(tensors, output)


def random_calls() -> list[Call]:
    rng = random.Random(SEED)
    calls = []
    for _ in range(SETS):
        call = legal_call(rng)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            call = mutated(call, rng)
        calls.append(call)
    return calls


def vendor(inputs: cases.Inputs) -> torch.Tensor:
    """npu_quant_matmul as the vendor's module calls it."""
    x1, weight, scale = (inputs[name] for name in ("x1", "weight", "scale"))
    rest = {n: inputs[n] for n in ("offset", "pertoken_scale", "bias", "output_dtype")}
    return torch_npu.npu_quant_matmul(x1, weight.transpose(-1, -2), scale, **rest)


_CHECKER = "quant_matmul_checker.cpp (hicann/ops-nn), "
_DOC = "aclnnQuantMatmulV4.md (hicann/ops-nn), "
# why we refuse what the vendor's meta kernel lets through: our sentence, and who says so
STRICTER = {
    "x1 dtype": (r"x1 is \w+; .* allows", _CHECKER + "CheckDtype"),
    "weight dtype": (r"weight is \w+ and x1 is", _DOC + "table of dtypes"),
    "output dtype": (r"output_dtype is", _CHECKER + "CheckDtypeOnlyL0c2out"),
    "scale dtype": (r": scale is", _CHECKER + "CheckL0c2outAndL0c2ubPertensorPerchannel"),
    "offset": (
        r": offset is",
        _CHECKER + "CheckFloat16OutBiasAndOffset; table of the module's page",
    ),
    "pertoken_scale dtype": (r": pertoken_scale is", _CHECKER + "CheckOnlyL0c2outPertoken"),
    "bias dtype": (
        r": bias is",
        _CHECKER + "CheckFloat16OutBiasAndOffset and the rest of CheckDtype",
    ),
    "pertoken_scale size": (r"pertoken_scale has shape", _DOC + "pertokenScaleOptional is (m,)"),
    "empty": (r"takes no empty", _CHECKER + "CheckEmptyTensor"),
    "int4 multiples of 8": (r"has n = \d+ rows", "the page of torch_npu's LinearQuant: n and k"),
    # the vendor guesses which way an int4 x2 lies from its sizes, and may guess the other way
    "int4 stored (k, n/8)": (
        r"differ in k",
        "the page of torch_npu's LinearQuant: weight is (n, k/8)",
    ),
    "k over 65535": (r"k is \d+; the last dim", _DOC + "limits of x1 and x2"),
}


def why_stricter(text: str) -> str | None:
    return next((reason for reason, (match, _) in STRICTER.items() if re.search(match, text)), None)


def test_legality_beside_the_vendors_meta_kernel(tally) -> None:
    reasons: Counter[str] = Counter()
    for call in random_calls():
        inputs = call.meta()
        try:
            theirs = vendor(inputs)
        except (RuntimeError, IndexError, TypeError, ValueError):
            theirs = None
        try:
            ours = lq_graph.linear_quant(**inputs)
        except LinearQuantError as error:
            ours, text = None, str(error)
        if ours is not None:
            assert theirs is not None, f"the vendor refuses what we take: {call}"
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), call
            tally("random calls, both accept, shape and dtype agree")
        elif theirs is None:
            tally("random calls, both refuse")
        else:
            reason = why_stricter(text)
            assert reason, f"only we refuse, for no written reason: {text}"
            reasons[reason] += 1
            tally("random calls, only we refuse, for a written reason")
    assert set(reasons) == set(STRICTER), "a reason nothing meets any more"


# ---- results ----

ACCEPTED = 400


def with_data(call: Call, seed: int) -> cases.Inputs:
    """The call with random values."""
    g = torch.Generator().manual_seed(seed)
    inputs: cases.Inputs = {**dict.fromkeys(TENSORS), "output_dtype": call.output_dtype or I8}
    for name, (dtype, shape) in call.tensors.items():
        if name in ("x1", "weight"):
            info = torch.iinfo(dtype)
            inputs[name] = torch.randint(info.min, info.max, shape, dtype=dtype, generator=g)
        elif name == "bias" and dtype == I32:
            inputs[name] = torch.randint(-5000, 5000, shape, dtype=dtype, generator=g)
        elif name == "offset":
            inputs[name] = torch.randn(shape, generator=g) * 150
        elif name == "bias":
            inputs[name] = (torch.randn(shape, generator=g) * 30).to(dtype)
        else:
            inputs[name] = torch.rand(shape, generator=g) * 0.02 - 0.005
    scale_dtype = call.tensors["scale"][0]
    if scale_dtype == I64:
        inputs["scale"] = lq_graph.trans_quant_param(inputs["scale"], inputs["offset"])
    else:
        inputs["scale"] = inputs["scale"].to(scale_dtype)
    return inputs


def test_results_beside_the_vendors_eager_path(tally) -> None:
    """Also: the vendor's C++ and cann_host's own rules take everything we take."""
    rng = random.Random(SEED + 1)
    for seed in range(ACCEPTED):
        inputs = with_data(legal_call(rng), seed)
        cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)
        on_npu = cases.on("npu", inputs)
        ours, theirs = lq_graph.linear_quant(**on_npu).cpu(), vendor(on_npu).cpu()
        cases.assert_equal(ours, inputs)
        cases.assert_equal(theirs, inputs)
        tally("random results equal: CPU, NPU, npu_quant_matmul, golden")


def test_what_the_vendors_eager_path_refuses_we_refuse(tally) -> None:
    """torch_npu's C++ over CANN's rules, as cann_host has them, beside plan()."""
    rng = random.Random(SEED + 2)
    for seed in range(2 * ACCEPTED):
        call = mutated(legal_call(rng), rng)
        if max(size for _, shape in call.tensors.values() for size in (0, *shape)) > 1000:
            continue
        inputs = call.meta()
        try:
            lq_graph.linear_quant(**inputs)
        except LinearQuantError:
            continue
        given = cases.on("npu", with_data(call, seed))
        vendor(given)
        tally("random changed calls we take, taken by the vendor's eager path too")


@pytest.mark.parametrize("reason", STRICTER)
def test_reasons_have_a_source(reason: str) -> None:
    assert re.search(r"hicann/ops-nn|page", STRICTER[reason][1])
