"""Random calls, ours beside the vendor's own code: its meta kernel says what is legal, its eager
path and the golden say what comes out."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch_npu

import lq_graph
from lq_graph import LinearQuantError
from support import cases
from support.cases import BF16, F16, F32, I8, I32, I64
from support.table import FIELDS, LEGAL, PRODUCTS

SEED = 20260
CHANGED, RANDOM = 4000, 2000
LEGAL_HERE = sorted(LEGAL[cases.PRODUCT], key=str)
TENSORS = ("x1", "weight", "scale", "offset", "pertoken_scale", "bias")


@dataclass(frozen=True)
class Call:
    """dtype and shape of each tensor, by name; the output asked for; and the tensors whose last
    two dims lie in memory the other way round."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    output_dtype: torch.dtype | None
    swapped: frozenset[str] = frozenset()

    def meta(self) -> cases.Inputs:
        made = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in self.tensors.items()
        }
        return self.laid_out({**dict.fromkeys(TENSORS), **made, "output_dtype": self.output_dtype})

    def laid_out(self, inputs: cases.Inputs) -> cases.Inputs:
        """The same values with the strides of this call."""
        return {name: swap(t) if name in self.swapped else t for name, t in inputs.items()}

    def size(self, name: str, dim: int) -> int:
        return self.tensors[name][1][dim]


def swap(t: torch.Tensor) -> torch.Tensor:
    """The same values, the last two dims the other way round in memory."""
    return t.mT.clone(memory_format=torch.contiguous_format).mT if t.dim() > 1 else t


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
    swapped = [name for name in ("x1", "weight") if not int4 and rng.random() < 0.2]
    return Call(tensors, output, frozenset(swapped))


def mutated(call: Call, rng: random.Random) -> Call:
    """One thing changed: a dtype, a size, a number of dims, strides, a tensor added or dropped."""
    tensors, output, swapped = dict(call.tensors), call.output_dtype, call.swapped
    kinds = ["dtype", "size", "dims", "presence", "output", "k", "strides", "packing"]
    kind = rng.choice(kinds)
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
    elif kind == "packing" and tensors["weight"][0] == I32 and len(tensors["weight"][1]) == 2:
        n, words = tensors["weight"][1]  # as if int4 were packed along n, or n free
        tensors["weight"] = (I32, rng.choice([(n // 8, words * 8), (n - 1, words)]))
    elif kind == "strides":
        swapped ^= {rng.choice(["x1", "weight"])}
    elif kind == "presence":
        optional = rng.choice(["offset", "pertoken_scale", "bias"])
        if tensors.pop(optional, None) is None:
            m, n = tensors["x1"][1][-2:-1], tensors["weight"][1][-2:-1]
            size = m if optional == "pertoken_scale" else n
            tensors[optional] = (rng.choice(FIELDS["scale"]), size)
    return Call(tensors, output, swapped)


def random_call(rng: random.Random) -> Call:
    """A call no table was asked about: any dtypes, in shapes that mostly fit each other."""
    m, k, n = rng.choice([1, 2, 8]), rng.choice([1, 2, 8, 16]), rng.choice([1, 8, 16])
    batch = [rng.choice([1, 2, 3]) for _ in range(rng.choice([0, 0, 1, 2, 5]))]

    def shape(*sizes: int) -> tuple[int, ...]:
        odd = [0, 1, 2, 8, 16, 65536]
        return tuple(rng.choice(odd) if rng.random() < 0.03 else size for size in sizes)

    x = rng.choice([I8, I8, I32, I32, *FIELDS["x"]])
    tensors = {
        "x1": (x, shape(*batch, m, k)),
        "weight": (rng.choice([x, x, x, *FIELDS["x"]]), shape(*rng.choice([batch, []]), n, k)),
        "scale": (rng.choice([F32, I64, BF16, *FIELDS["scale"]]), shape(rng.choice([1, n]))),
    }
    for name, size in (("offset", n), ("pertoken_scale", m), ("bias", n)):
        dtype = rng.choice([None, None, None, F32, F32, *FIELDS[name]])
        if dtype:
            tensors[name] = (dtype, shape(size))
    output = rng.choice([None, I8, F16, BF16, I32, *FIELDS["output_dtype"]])
    return Call(tensors, output, frozenset(["weight"] if rng.random() < 0.1 else []))


def random_calls() -> list[Call]:
    rng = random.Random(SEED)
    calls = [random_call(rng) for _ in range(RANDOM)]
    for _ in range(CHANGED):
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


class Reason(NamedTuple):
    """Why we refuse what the vendor's meta kernel lets through.

    text: our sentence. source: where it is documented. true_of: a check that it is true, for
    a reason in shapes. cann: CANN's own checks refuse it too; else it is the module's page.
    """

    text: str
    source: str
    true_of: Callable[[Call], bool] = lambda call: True
    cann: bool = True


def empty(call: Call) -> bool:
    return any(0 in call.tensors[name][1] for name in ("x1", "weight"))


_CHECKER = "quant_matmul_checker.cpp (hicann/ops-nn), "
_DOC = "aclnnQuantMatmulV4.md (hicann/ops-nn), "
_PAGE = "the page of torch_npu's LinearQuant, "
STRICTER = {
    "x1 dtype": Reason(r": x1 is \w+; .* allows", _CHECKER + "CheckDtype"),
    "weight dtype": Reason(r"weight is \w+ and x1 is", _DOC + "table of dtypes"),
    "output dtype": Reason(r"output_dtype is", _CHECKER + "CheckDtypeOnlyL0c2out"),
    "scale dtype": Reason(r": scale is", _CHECKER + "CheckL0c2outAndL0c2ubPertensorPerchannel"),
    # aclnnQuantMatmulV5 takes one it does not read: with pertoken_scale, int4 or int32 output
    "offset": Reason(r": offset is", _PAGE + "table", cann=False),
    "pertoken_scale dtype": Reason(r": pertoken_scale is", _CHECKER + "CheckOnlyL0c2outPertoken"),
    "bias dtype": Reason(
        r": bias is", _CHECKER + "CheckFloat16OutBiasAndOffset and the rest of CheckDtype"
    ),
    "pertoken_scale size": Reason(
        r"pertoken_scale has shape",
        _DOC + "pertokenScaleOptional is (m,)",
        lambda call: call.tensors["pertoken_scale"][1] != (call.size("x1", -2),),
    ),
    "empty": Reason(r"takes no empty", _CHECKER + "CheckEmptyTensor", empty),
    "int4 multiples of 8": Reason(
        r"has n = \d+ rows",
        _PAGE + "n and k",
        lambda call: call.size("weight", -2) % 8 != 0,
        cann=False,
    ),
    # the vendor guesses which way an int4 x2 lies from its sizes, and may guess the other way
    "int4 stored (k, n/8)": Reason(
        r"differ in k: .* int4 values",
        _PAGE + "weight is (n, k/8)",
        lambda call: call.size("x1", -1) != call.size("weight", -1),
        cann=False,
    ),
    "int4 contiguous": Reason(
        r"contiguous memory for int32 \(int4\)",
        "aclnn_quant_matmul_v4.cpp (hicann/ops-nn), CheckShapeInt4: no transposed x1",
        lambda call: bool(call.swapped) and not empty(call),
    ),
    "k over 65535": Reason(
        r"k is \d+; .*as the last dim",
        _DOC + "limits of x1 and x2",
        lambda call: call.size("x1", -1) * (8 if call.tensors["x1"][0] == I32 else 1) > 65535,
    ),
}


def why_stricter(text: str, call: Call) -> str:
    found = (name for name, reason in STRICTER.items() if re.search(reason.text, text))
    name = next(found, None)
    assert name, f"only we refuse, for no written reason: {text} {call}"
    assert STRICTER[name].true_of(call), f"what we say is not so: {text} {call}"
    return name


def answer_of(inputs: cases.Inputs) -> object:
    """Shape and dtype of the vendor's result, or None for a refusal."""
    try:
        out = vendor(inputs)
    except (RuntimeError, IndexError):
        return None
    return tuple(out.shape), out.dtype


def refusal_of(inputs: cases.Inputs) -> str | None:
    """What we say of a call we refuse, or None."""
    try:
        lq_graph.linear_quant(**inputs)
    except LinearQuantError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_legality_beside_the_vendors_meta_kernel(tally) -> None:
    """On every product: the vendor's meta kernel knows none, so it is the most lenient of all."""
    met: Counter[str] = Counter()
    made = [(call, call.meta()) for call in random_calls()]
    answers = [answer_of(inputs) for _, inputs in made]
    assert sum(answer is not None for answer in answers) > len(made) // 3
    try:
        for product in PRODUCTS:
            lq_graph.set_product(product)
            for (call, inputs), theirs in zip(made, answers, strict=True):
                text = refusal_of(inputs)
                if text is None:
                    out = lq_graph.linear_quant(**inputs)
                    assert theirs, f"the vendor refuses what we take on {product}: {call}"
                    assert (tuple(out.shape), out.dtype) == theirs, call
                    what = "both accept, shape and dtype agree"
                elif theirs:
                    met[why_stricter(text, call)] += 1
                    what = "only we refuse, for a written reason"
                else:
                    what = "both refuse"
                tally(f"random calls on {product}, {what}")
    finally:
        lq_graph.set_product(None)
    assert set(met) == set(STRICTER), "a reason nothing meets any more"


@pytest.mark.slow
def test_cann_refuses_too_where_we_are_stricter(tally) -> None:
    """A reason is no excuse: cann_host's rules, written apart from plan(), must agree."""
    met = set()
    for call in random_calls():
        inputs = call.meta()
        if empty(call) or not small(call) or answer_of(inputs) is None:
            continue
        text = refusal_of(inputs)
        name = text and why_stricter(text, call)
        if name and STRICTER[name].cann:
            met.add(name)
            zeros = {k: torch.zeros(t.shape, dtype=t.dtype) if torch.is_tensor(t) else t
                     for k, t in inputs.items()}  # fmt: skip
            assert answer_of(call.laid_out(cases.on("npu", zeros))) is None, (
                f"CANN takes it: {text} {call}"
            )
            tally("random calls only our plan and CANN's own checks refuse")
    assert met >= {name for name in STRICTER if name.endswith("dtype")} | {"int4 contiguous"}


# ---- results ----

ACCEPTED = 400


def small(call: Call) -> bool:
    return max(size for _, shape in call.tensors.values() for size in (0, *shape)) <= 1000


def with_data(call: Call, seed: int) -> cases.Inputs:
    """The call with random values, of magnitudes that fill the outputs and that overflow them."""
    g = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** torch.randint(-3, 3, (), generator=g).item()
    inputs: cases.Inputs = {**dict.fromkeys(TENSORS), "output_dtype": call.output_dtype or I8}
    for name, (dtype, shape) in call.tensors.items():
        if name in ("x1", "weight"):
            info = torch.iinfo(dtype)
            inputs[name] = torch.randint(info.min, info.max + 1, shape, dtype=dtype, generator=g)
        elif name == "bias" and dtype == I32:
            inputs[name] = torch.randint(-5000, 5000, shape, dtype=dtype, generator=g)
        elif name == "offset":
            inputs[name] = torch.randn(shape, generator=g) * 150
        elif name == "bias":
            inputs[name] = (torch.randn(shape, generator=g) * 30).to(dtype)
        else:
            inputs[name] = (torch.rand(shape, generator=g) * 2 - 0.5) * magnitude
    scale_dtype = call.tensors["scale"][0]
    if scale_dtype == I64:
        inputs["scale"] = lq_graph.trans_quant_param(inputs["scale"], inputs["offset"])
    else:
        inputs["scale"] = inputs["scale"].to(scale_dtype)
    return call.laid_out(inputs)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().view({1: I8, 2: torch.int16, 4: I32}[t.element_size()])


def test_results_beside_the_vendors_eager_path(tally) -> None:
    """Also: the vendor's C++ and cann_host's own rules take everything we take."""
    rng = random.Random(SEED + 1)
    for seed in range(ACCEPTED):
        call = legal_call(rng)
        inputs = with_data(call, seed)
        on_cpu = lq_graph.linear_quant(**inputs)
        cases.assert_equal(on_cpu, inputs)
        on_npu = call.laid_out(cases.on("npu", inputs))
        for other in (lq_graph.linear_quant(**on_npu), vendor(on_npu)):
            assert torch.equal(bits(other), bits(on_cpu)), call
        tally("random results equal: CPU, NPU, npu_quant_matmul, golden")


@pytest.mark.slow
def test_the_vendors_eager_call_takes_every_call_that_we_take(tally) -> None:
    """torch_npu's C++ over CANN's rules, as cann_host has them, beside plan()."""
    rng = random.Random(SEED + 2)
    for seed in range(4 * ACCEPTED):
        call = mutated(legal_call(rng), rng)
        if not small(call):
            continue
        if refusal_of(call.meta()):
            continue
        inputs = with_data(call, seed)
        given = call.laid_out(cases.on("npu", inputs))
        cases.assert_equal(lq_graph.linear_quant(**given), inputs)
        vendor(cases.on("npu", with_data(replace(call, swapped=frozenset()), seed)))
        tally("random changed calls we take, taken by the vendor's eager path too")


LONG = 65536


@pytest.mark.parametrize("swapped", ["", "x1", "weight"])
@pytest.mark.parametrize("long", ["m", "n"])
def test_a_long_m_or_n_is_computed_or_refused(long: str, swapped: str) -> None:
    """aclnn limits the last dim in memory: of an x1 stored (k, m) that is m, of a weight (k, n)
    n (aclnnQuantMatmulV4.md, limits of x1 and x2). Refused with our sentence, or computed."""
    m, n = (LONG, 2) if long == "m" else (2, LONG)
    tensors = {"x1": (I8, (m, 8)), "weight": (I8, (n, 8)), "scale": (F32, (1,))}
    call = Call(tensors, F16, frozenset([swapped]) if swapped else frozenset())
    inputs = with_data(call, 0)
    text = refusal_of(call.meta())
    if text:
        assert swapped and "65535" in text
        return
    cases.assert_equal(lq_graph.linear_quant(**call.laid_out(cases.on("npu", inputs))), inputs)


@pytest.mark.parametrize("reason", STRICTER)
def test_reasons_have_a_source(reason: str) -> None:
    assert re.search(r"hicann/ops-nn|page", STRICTER[reason].source)
