"""The advice of a refusal keeps the numbers if it says so, and leads to a legal call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import lq_graph
from lq_graph import LinearQuantError, LinearQuantTypeError, LinearQuantValueError, plan
from lq_graph.rules.activations import plan_dynamic_quant, plan_static_quant
from lq_graph.rules.advice import is_exact
from lq_graph.rules.plan import Spec
from lq_graph.rules.refusal import Fix, Refusal
from lq_graph.rules.tables import QUANT_ROWS, product_by_name
from support import golden
from support.table import BF16, F16, F32, FIELDS, I8, I32, I64, LEGAL, Combination, mutations

M, K, N = 4, 64, 16
F64 = torch.float64


@pytest.fixture
def set_product() -> Iterator[None]:
    yield lq_graph.set_product
    lq_graph.set_product(None)


def refusal_of(call, *args, **kwargs) -> Refusal:
    with pytest.raises(LinearQuantError) as caught:
        call(*args, **kwargs)
    assert caught.value.refusal is not None
    return caught.value.refusal


# ---- numbers ----


def make(c: Combination, g: torch.Generator) -> dict[str, torch.Tensor | None]:
    """A call of these dtypes, legal or not; x1 and weight hold int4 values."""

    def of(dtype: torch.dtype | None, size: int, low: float, high: float) -> torch.Tensor | None:
        if dtype is None:
            return None
        if dtype.is_floating_point:
            return (torch.rand(size, generator=g) * (high - low) + low).to(dtype)
        return torch.randint(1, 5, (size,), generator=g).to(dtype)

    x1 = torch.randint(-8, 8, (M, K), generator=g)
    weight = torch.randint(-8, 8, (N, K), generator=g)
    scale = of(F32 if c.scale == I64 else c.scale, N, 0.01, 0.05)
    assert scale is not None
    pack = lq_graph.pack_int4 if c.x == I32 else lambda values: values.to(I8)
    return {
        "x1": pack(x1.to(I8)),
        "weight": pack(weight.to(I8)),
        "scale": lq_graph.trans_quant_param(scale) if c.scale == I64 else scale,
        "offset": of(c.offset, N, -9, 9),
        "pertoken_scale": of(c.pertoken_scale, M, 0.3, 3),
        "bias": of(c.bias, N, -3, 3),
    }


def meant(c: Combination, inputs: dict[str, torch.Tensor | None]) -> np.ndarray:
    """What a call would give if every dtype were taken, in float64 and not yet rounded."""

    def array(name: str) -> np.ndarray:
        return inputs[name].double().numpy()  # type: ignore[union-attr]

    x1, weight = (inputs[name].numpy() for name in ("x1", "weight"))  # type: ignore[union-attr]
    if c.x == I32:
        x1, weight = golden.unpack_int4(x1), golden.unpack_int4(weight)
    value = x1.astype(np.float64) @ weight.astype(np.float64).T
    if c.bias is not None and not c.bias.is_floating_point:
        value = value + array("bias")
    if c.output_dtype in (I32, I64):
        return value  # the sums, before every scale
    if c.scale == I64:
        word = inputs["scale"].numpy()  # type: ignore[union-attr]
        value = value * (word & 0xFFFFE000).astype(np.uint32).view(np.float32)
    else:
        value = value * array("scale")
    if c.pertoken_scale is not None:
        value = value * array("pertoken_scale")[:, None]
    if c.bias is not None and c.bias.is_floating_point:
        value = value + array("bias")
    # elsewhere CANN does not read one
    if c.offset is not None and c.output_dtype == I8 and c.scale != I64:
        value = value + array("offset")
    return np.clip(value, -128, 127) if c.output_dtype == I8 else value


def follow(fix: Fix, inputs: dict[str, torch.Tensor | None], wanted: torch.dtype) -> np.ndarray:
    """The result once the advice is followed."""
    call = {**inputs}
    for name, dtype in fix.changes:
        given = inputs.get(name)
        if name in ("x1", "weight"):
            call[name] = lq_graph.unpack_int4(given)
        elif name == "pertoken_scale" and given is None:
            call[name] = torch.ones(M)
        elif name != "output_dtype":
            call[name] = None if dtype is None else given.to(dtype)
    output = dict(fix.changes).get("output_dtype", wanted)
    out = lq_graph.linear_quant(**call, output_dtype=output).double()
    if output == I32 and wanted.is_floating_point:  # "the sums, and multiply them by scale"
        out = out * call["scale"].double()
    return out.numpy()


TOLERANCE = {F16: 2**-9, BF16: 2**-7, F32: 2**-20, F64: 2**-20}


@pytest.mark.parametrize("product", ["310P", "A2"])
def test_advice_that_keeps_the_numbers_keeps_them(product: str, set_product, tally) -> None:
    set_product(product)
    g = torch.Generator().manual_seed(0)
    seen = set()
    for legal in sorted(LEGAL[product], key=str):
        for field, c in mutations(legal):
            if c in LEGAL[product] or c in seen or (field == "x" and c.x not in (I8, I32)):
                continue
            seen.add(c)
            inputs = make(c, g)
            refusal = refusal_of(lq_graph.linear_quant, **inputs, output_dtype=c.output_dtype)
            for fix in refusal.fixes:
                if fix.numbers:
                    continue
                got, want = follow(fix, inputs, c.output_dtype), meant(c, inputs)
                near = TOLERANCE.get(c.output_dtype, 0) * np.abs(want).max()
                # int8: the scale has 19 bits there, and a half may fall to either side
                near = 1 if c.output_dtype == I8 else near
                assert np.abs(got - want).max() <= near, (str(fix), c)
                tally("advice followed, the numbers kept")


def test_a_cast_that_is_exact_holds_every_value() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for source in (F16, BF16, I8, torch.uint8):
        values = (bits if source.itemsize == 2 else bits.to(I8)).view(source)
        values = values[values.double().isfinite()]
        for target in (F16, BF16, F32, F64, I8, I32, I64):
            if not values.is_floating_point() or target.is_floating_point:
                held = torch.equal(values.double(), values.to(target).double())
                assert is_exact(source, target) == held, (source, target)
    assert not any(is_exact(source, F32) for source in (F64, I32, I64))


# ---- shapes ----


@pytest.mark.parametrize(
    ("product", "c", "kept"),
    [
        ("A2", Combination(I8, F32, None, None, None, F16), True),
        ("A2", Combination(I8, BF16, None, None, None, BF16), True),
        ("A2", Combination(I8, I64, None, None, None, F16), False),
        ("A2", Combination(I8, F32, None, None, None, I32), True),
        ("A2", Combination(I32, F32, None, None, F32, BF16), False),
        ("310P", Combination(I8, F32, None, None, None, F16), False),
        ("310P", Combination(I8, F32, None, None, None, I8), False),
    ],
)
def test_k_beyond_the_limit(product: str, c: Combination, kept: bool, set_product) -> None:
    words = 65536 // (8 if c.x == I32 else 1)
    call = {
        "x1": Spec(c.x, (M, words)),
        "weight": Spec(c.x, (N, words)),
        "scale": Spec(c.scale, (N,)),
        "pertoken_scale": c.pertoken_scale and Spec(c.pertoken_scale, (M,)),
    }
    options = {"output_dtype": c.output_dtype, "product": product_by_name(product)}
    refusal = refusal_of(plan, **call, **options)
    assert refusal.given == "k is 65536" and refusal.code == 561002
    assert (not refusal.fixes[0].numbers) == kept
    for fix in refusal.fixes:
        if fix.changes:
            sizes = {"scale": (N,), "pertoken_scale": (M,)}
            changed = {name: Spec(dtype, sizes[name]) for name, dtype in fix.changes}
            plan(**{**call, **changed}, **options)


# ---- activations ----


@pytest.mark.parametrize("product", ["310P", "A2", "A3", "950"])
def test_activations(product: str, set_product) -> None:
    set_product(product)
    k = 64

    def call(op: str, dtypes: dict[str, torch.dtype | None]) -> None:
        x = Spec(dtypes["x"], (M, k))
        if op == "dynamic_quant":
            plan_dynamic_quant(x, dtypes["dtype"])
        else:
            spec = Spec(dtypes["scale_reciprocal"], (k,))
            plan_static_quant(x, spec, dtypes["offset"] and Spec(dtypes["offset"], (k,)))

    refused = 0
    rows = [row for row in QUANT_ROWS if product in (p.key for p in row.products)]
    for row in rows:
        for dtype in row.x:
            legal = {"x": dtype, "dtype": row.output_dtype}
            if row.op == "static_quant":
                legal = {"x": dtype, "scale_reciprocal": dtype, "offset": dtype}
            call(row.op, legal)
            for name in legal:
                for value in set(FIELDS["scale"]) - {legal[name]}:
                    given = {**legal, name: value}
                    try:
                        call(row.op, given)
                    except LinearQuantTypeError as error:
                        refusal = error.refusal
                    else:
                        continue
                    refused += 1
                    assert refusal.fixes
                    for fix in refusal.fixes:
                        after = fix.apply(given)
                        call(row.op, after)  # is taken
                        # casting x, scale or offset keeps the numbers if every value is held
                        casts = [n for n in given if n != "dtype" and after[n] != given[n]]
                        exact = all(is_exact(given[n], after[n]) for n in casts)
                        assert bool(fix.numbers) == (not exact or "dtype" in dict(fix.changes))
    assert refused > 20


# ---- operator, function and layer in an error ----


def test_a_model_names_the_layer() -> None:
    layer = lq_graph.LinearQuant(16, 8, output_dtype=F32)
    model = torch.nn.ModuleDict({"up": layer}).to("npu")
    with pytest.raises(LinearQuantTypeError) as caught:
        lq_graph.use_internal_format_weight(model)
    refusal = caught.value.refusal
    assert (refusal.caller, refusal.layer) == ("use_internal_format_weight", "up")
    assert (refusal.operator, refusal.arguments) == ("linear_quant", ("output_dtype",))
    assert str(caught.value).startswith("use_internal_format_weight: up: linear_quant: output_dty")


@pytest.mark.parametrize(
    ("call", "error", "argument", "code"),
    [
        (lambda: lq_graph.check("int8"), LinearQuantTypeError, "x1", None),
        (lambda: lq_graph.check(product="H100"), LinearQuantValueError, "product", None),
        (lambda: lq_graph.set_product("H100"), LinearQuantValueError, "product", None),
        (
            lambda: lq_graph.trans_quant_param(torch.ones(4).half()),
            LinearQuantTypeError,
            "scale",
            161002,
        ),
        (
            lambda: lq_graph.trans_quant_param(torch.tensor([float("nan")])),
            LinearQuantValueError,
            "scale",
            None,
        ),
        (
            lambda: lq_graph.static_quant(torch.ones(2, 8), torch.ones(8, device="meta")),
            LinearQuantValueError,
            "scale_reciprocal",
            None,
        ),
        (
            lambda: lq_graph.dynamic_quant(torch.ones(8, dtype=F16)),
            LinearQuantValueError,
            "x",
            161002,
        ),
    ],
)
def test_every_rule_raises_a_record(call, error, argument: str, code: int | None) -> None:
    with pytest.raises(error) as caught:
        call()
    refusal = caught.value.refusal
    assert refusal.arguments == (argument,) and refusal.code == code
    assert refusal.given and refusal.allowed and refusal.fixes
    assert str(caught.value) == str(refusal)
    assert ("aclnn" in str(refusal)) == (code is not None)


def test_check_tells_of_no_product_by_name() -> None:
    answer = lq_graph.check(scale=F16)
    assert len({v.error.refusal.sentence("the product") for v in answer.verdicts}) == 1
    assert str(answer).count("no   ") == 1


# ---- what the rules load ----

LIGHT = """
import importlib.util, pkgutil, sys, types
import torch
before = set(sys.modules)
found = importlib.util.find_spec("lq_graph")  # without lq_graph/__init__.py
package = types.ModuleType("lq_graph")
package.__path__ = list(found.submodule_search_locations)
sys.modules["lq_graph"] = package
rules = importlib.import_module("lq_graph.rules")
for module in pkgutil.iter_modules(rules.__path__, "lq_graph.rules."):
    importlib.import_module(module.name)
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("lq_graph")))
"""


@pytest.mark.slow
def test_the_rules_load_nothing_but_torch(tmp_path: Path) -> None:
    """sympy takes 0.3 s, and torch._dynamo more."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        check=True,
    )
    slow = {"sympy", "networkx", "torch._dynamo", "torch.distributed", "torch_npu", "torchair"}
    assert not slow & set(done.stdout.split()), done.stdout
