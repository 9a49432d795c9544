"""CANN versions: their order, the one in force, and rows that a newer CANN brought."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lq_graph
from lq_graph import (
    LinearQuantError,
    LinearQuantTypeError,
    LinearQuantValueError,
    check,
    command_line,
    plan,
)
from lq_graph.rules import products
from lq_graph.rules.activations import plan_dynamic_quant, plan_static_quant
from lq_graph.rules.cann import CannVersion, read_cann_version, target_of
from lq_graph.rules.plan import Spec
from lq_graph.rules.tables import product_by_name
from support.processes import start
from support.table import (
    BF16,
    CANN,
    F16,
    F32,
    I8,
    I32,
    I64,
    LEGAL,
    PRODUCTS,
    QUANT_SINCE,
    Combination,
    mutations,
    since,
)

M, K, N = 4, 64, 16


@pytest.fixture(autouse=True)
def back() -> Iterator[None]:
    yield
    lq_graph.set_product(None)
    lq_graph.set_cann_version(None)


def version(text: str) -> CannVersion:
    found = read_cann_version(text)
    assert found is not None, text
    return found


# ---- versions ----

ORDER = (
    *("7.0.RC1", "7.0.0", "8.0.RC1", "8.0.RC2.alpha001", "8.0.RC2", "8.0.RC2.2", "8.0.RC3"),
    *("8.0.0.alpha001", "8.0.0.beta1", "8.0.0", "8.1.RC1.alpha002", "8.1.RC1.beta1", "8.1.RC1"),
    *("8.2.RC1", "8.3.RC1", "8.5.0-beta.1", "8.5.0", "8.5.1", "9.0.0-beta.1", "9.0.0-beta.2"),
    *("9.0.0-rc.1", "9.0.0", "9.0.1", "9.1.0-beta.1", "9.1.0", "10.0.0"),
)


def test_versions_are_in_order() -> None:
    versions = [version(text) for text in ORDER]
    assert all(one < later for one, later in pairwise(versions))
    assert tuple(map(str, versions)) == ORDER
    assert [text for text in CANN if text in ORDER] == list(CANN)


numbers = st.integers(0, 99)
parts = st.tuples(
    numbers,
    numbers,
    st.sampled_from(["RC", ""]),
    numbers,
    st.sampled_from([None, "alpha", "beta", "rc", "patch"]),
    st.integers(1, 99),
)


def written(major: int, minor: int, candidate: str, number: int, stage: str | None, n: int) -> str:
    end = {None: "", "patch": f".{n}"}.get(stage, f"-{stage}.{n}")
    return f"{major}.{minor}.{candidate}{number}{end}"


@given(parts, parts)
def test_order_is_that_of_the_parts(one, other) -> None:
    def key(part):
        stages = ["alpha", "beta", "rc", None, "patch"]
        n = part[5] if part[4] else 0
        return (*part[:2], part[2] != "RC", part[3], stages.index(part[4]), n)

    a, b = version(written(*one)), version(written(*other))
    assert (a < b) == (key(one) < key(other)) and (a == b) == (key(one) == key(other))
    # what a release brought is in it, in its test versions and in all that is later
    release = written(*other[:4], None, 0)
    assert a.has(release) == (key(one)[:4] >= key(other)[:4])


@pytest.mark.parametrize("text", ["", "9", "9.1", "RC1", "8.5.T7.0.B123", "9.1.0x", "v9.1.0"])
def test_what_is_not_a_version(text: str) -> None:
    assert read_cann_version(text) is None
    with pytest.raises(LinearQuantValueError, match=r"set_cann_version: .* is not a version of"):
        lq_graph.set_cann_version(text)


# ---- in force ----


@pytest.mark.parametrize("value", [8.1, 9, torch.int8])
def test_what_is_no_text_is_refused(value) -> None:
    with pytest.raises(LinearQuantValueError, match=f"set_cann_version: {value} is not a version"):
        lq_graph.set_cann_version(value)
    with pytest.raises(LinearQuantValueError, match=f"set_product: {value} is not a product"):
        lq_graph.set_product(value)


def test_a_thread_that_asks_meanwhile_keeps_no_old_version(monkeypatch) -> None:
    """It has read the old version, and the new one is set before it has its answer."""

    def asks_slowly(product, cann):
        monkeypatch.undo()
        lq_graph.set_cann_version("9.0.0")
        return target_of(product, cann)

    monkeypatch.setattr(products, "target_of", asks_slowly)
    lq_graph.set_cann_version("8.0.0")
    assert str(lq_graph.get_cann_version()) == "8.0.0"
    assert str(lq_graph.get_cann_version()) == "9.0.0"


def test_in_force(monkeypatch) -> None:
    found = lq_graph.get_cann_version()
    monkeypatch.setenv("LQ_GRAPH_CANN", "8.2.RC1")
    lq_graph.set_cann_version(None)
    assert str(lq_graph.get_cann_version()) == "8.2.RC1"
    lq_graph.set_cann_version("8.5.0")
    assert str(lq_graph.get_cann_version()) == "8.5.0"
    monkeypatch.setenv("LQ_GRAPH_CANN", "none")
    assert str(lq_graph.get_cann_version()) == "8.5.0"
    lq_graph.set_cann_version(None)
    with pytest.raises(LinearQuantValueError, match="LQ_GRAPH_CANN: 'none' is not a version"):
        lq_graph.get_cann_version()
    with pytest.raises(LinearQuantValueError, match=r"^LQ_GRAPH_CANN: 'none' .* your CANN"):
        lq_graph.quantize(nn.Sequential(nn.Linear(64, 64).half()), lq_graph.A8W8Dynamic())
    monkeypatch.delenv("LQ_GRAPH_CANN")
    lq_graph.set_cann_version(None)
    assert lq_graph.get_cann_version() == found


def test_a_plan_follows_the_version_in_force() -> None:
    call = Spec(I8, (M, K)), Spec(I8, (N, K)), Spec(F32, (N,))
    lq_graph.set_product("A2")
    for _ in range(2):  # cached plans too
        lq_graph.set_cann_version("8.0.0")
        with pytest.raises(LinearQuantTypeError):
            plan(*call, output_dtype=I32)
        lq_graph.set_cann_version("8.1.RC1")
        assert plan(*call, output_dtype=I32).since == "8.1.RC1"


# ---- the tables ----


def ask(c: Combination, product: str, cann: str):
    k = K // 8 if c.x == I32 else K
    tensors = {
        "x1": Spec(c.x, (M, k)),
        "weight": Spec(c.x, (N, k)),
        "scale": Spec(c.scale, (N,)),
        "offset": c.offset and Spec(c.offset, (N,)),
        "bias": c.bias and Spec(c.bias, (N,)),
        "pertoken_scale": c.pertoken_scale and Spec(c.pertoken_scale, (M,)),
    }
    return plan(
        **tensors,
        output_dtype=c.output_dtype,
        product=product_by_name(product),
        cann=version(cann),
    )


def followed(fix, c: Combination) -> Combination:
    dtypes = fix.apply({**c._asdict(), "x1": c.x, "weight": c.x})
    x1, weight = dtypes.pop("x1"), dtypes.pop("weight")
    assert x1 == weight
    return Combination(**{**dtypes, "x": x1})


@pytest.mark.parametrize("cann", CANN)
@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_come_with_their_release(product: str, cann: str, tally) -> None:
    for c in LEGAL[product]:
        needed = since(c, product)
        if CANN.index(cann) >= CANN.index(needed):
            assert ask(c, product, cann).since == needed, c
            continue
        with pytest.raises(LinearQuantTypeError) as caught:
            ask(c, product, cann)
        refusal = caught.value.refusal
        assert refusal is not None and refusal.since == needed, c
        text = str(caught.value)
        assert f"allows this from CANN {needed} on (this is CANN {cann})" in text
        assert "\n" not in text and "aclnn" not in text
        upgrade, *others = refusal.fixes
        assert str(upgrade) == f"upgrade CANN to {needed} or later" and not upgrade.changes
        assert ask(c, product, needed)
        for fix in others:
            assert not fix.numbers and ask(followed(fix, c), product, cann), fix
        tally("rows of a newer CANN refused")


@pytest.mark.parametrize(
    ("product", "cann"), [("A2", "8.0.RC1"), ("A2", "8.0.RC3"), ("A3", "8.0.0"), ("950", "9.0.0")]
)
def test_advice_leads_to_what_the_version_has(product: str, cann: str) -> None:
    asked = 0
    for c in sorted(LEGAL[product], key=str)[::6]:
        for _, changed in mutations(c):
            if changed in LEGAL[product]:
                continue
            with pytest.raises(LinearQuantTypeError) as caught:
                ask(changed, product, cann)
            assert caught.value.refusal is not None
            for fix in caught.value.refusal.fixes:
                assert ask(followed(fix, changed), product, cann), (fix, changed)
                asked += 1
    assert asked > 100


def test_int8_in_place_of_int4() -> None:
    """The advice that keeps the numbers: the same values in int8."""
    c = Combination(I32, F32, None, None, F32, BF16)
    with pytest.raises(LinearQuantTypeError) as caught:
        ask(c, "950", "9.0.0")
    assert str(caught.value) == (
        "linear_quant: x1 and weight are int32 (int4) with scale float32, pertoken_scale float32 "
        "and bfloat16 output; Ascend 950 allows this from CANN 9.1.0 on (this is CANN 9.0.0). What "
        "to do: upgrade CANN to 9.1.0 or later, or unpack x1 and weight with lq_graph.unpack_int4."
    )


@pytest.mark.parametrize("cann", CANN)
@pytest.mark.parametrize(("op", "output", "product"), [
    (op, output, product) for (op, output), of in QUANT_SINCE.items() for product in of
])  # fmt: skip
def test_quantizing_operators(op: str, output, product: str, cann: str) -> None:
    lq_graph.set_product(product)
    lq_graph.set_cann_version(cann)
    needed = QUANT_SINCE[op, output][product]
    x, one = Spec(F16, (M, K)), Spec(F16, (1,))
    call = (
        (lambda: plan_dynamic_quant(x, output))
        if op == "dynamic_quant"
        else (lambda: plan_static_quant(x, one, None))
    )
    if CANN.index(cann) >= CANN.index(needed):
        assert call().row.output_dtype == output
        return
    with pytest.raises(
        LinearQuantTypeError, match=f"from CANN {needed} on .this is CANN"
    ) as caught:
        call()
    assert caught.value.refusal is not None and caught.value.refusal.since == needed


def test_an_operator_that_a_newer_cann_brought() -> None:
    lq_graph.set_product("A2")
    lq_graph.set_cann_version("8.0.RC1")
    with pytest.raises(LinearQuantTypeError, match=r"takes no dynamic_quant before CANN 8\.0\.RC2"):
        plan_dynamic_quant(Spec(F32, (M, K)), None)


@pytest.mark.parametrize(("cann", "legal_on"), [("9.0.1", "950"), ("9.1.0", "A2 A3 950")])
def test_long_k(cann: str, legal_on: str) -> None:
    answer = check((I8, (4, 70000)), pertoken_scale=F32, output_dtype=BF16, cann=cann)
    assert [p.key for p in answer.legal_on] == legal_on.split()
    if cann == "9.0.1":
        assert "(more from CANN 9.1.0 on; this is CANN 9.0.1). What to do: upgrade" in " ".join(
            str(answer).split()
        )
        # without pertoken_scale the newest refuses it too, and ones would not help here
        without = check((I8, (4, 70000)), output_dtype=BF16, product="A2", cann=cann)
        assert "ones" not in str(without) and "upgrade" not in str(without)


def test_round_mode() -> None:
    scale = torch.rand(4)
    lq_graph.set_cann_version("8.1.RC1")
    lq_graph.trans_quant_param(scale)
    with pytest.raises(LinearQuantValueError, match=r"round_mode is 1; .* from CANN 8\.2\.RC1 on"):
        lq_graph.trans_quant_param(scale, round_mode=1)
    lq_graph.set_cann_version("8.2.RC1")
    lq_graph.trans_quant_param(scale, round_mode=1)


# ---- check ----


def test_check_shows_the_release() -> None:
    text = str(check(I32, pertoken_scale=F32, output_dtype=BF16, cann="9.1.0"))
    assert "; CANN 9.1.0 no " in " ".join(text.split())
    assert "since CANN" in text and "8.1.RC1 (A2, A3), 9.1.0 (950)" in text
    nearest = check(offset=F32, output_dtype=F16, product="950", cann="9.0.0").nearest()
    assert nearest and all(row.storage == I8 for row in nearest)
    assert check(scale=I64, output_dtype=BF16, cann="8.3.RC1").nearest()  # of the other products


@pytest.mark.parametrize(
    ("cann", "status", "shown"),
    [
        ("9.0.0", 1, "allows this from CANN 9.1.0 on"),
        ("9.1.0-beta.1", 0, "yes Ascend 950: float16"),
    ],
)
def test_check_command(cann: str, status: int, shown: str, capsys) -> None:
    arguments = ["check", "--x1", "int4", "--output", "float16", "--product", "950"]
    assert command_line.main([*arguments, "--cann", cann]) == status
    assert shown in " ".join(capsys.readouterr().out.split())


def test_check_command_mistake(capsys) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["check", "--cann", "new"])
    assert "'new' is not a version of CANN" in capsys.readouterr().err


# ---- preparation, calls, graphs ----


def int4_layer(output: torch.dtype = F16) -> lq_graph.LinearQuant:
    layer = lq_graph.LinearQuant(
        K, N, bias=False, output_dtype=output, x1_dtype=I32, x2_dtype=I32, pertoken_scale=False
    )
    assert layer.weight.dtype == I32
    return layer


def test_preparation_refuses_before_it_changes_anything() -> None:
    int8 = lq_graph.LinearQuant(K, N, output_dtype=F16)
    model = nn.Sequential(int8, int4_layer()).npu()
    lq_graph.set_product("A2")
    lq_graph.set_cann_version("8.5.0")
    message = (
        r"^use_internal_format_weight: 1: linear_quant: weight is int32 \(int4\) in FRACTAL_NZ; "
        r"Atlas A2 allows this from CANN 9\.0\.0 on \(this is CANN 8\.5\.0\)\. What to do: upgrade "
        r"CANN to 9\.0\.0 or later, or leave int4_nz False: the weight stays ND\.$"
    )
    with pytest.raises(LinearQuantValueError, match=message):
        lq_graph.use_internal_format_weight(model, int4_nz=True)
    assert int8.scale.dtype == F32  # not packed
    lq_graph.set_product("950")
    with pytest.raises(LinearQuantTypeError, match=r"weight: 1: linear_quant: .* CANN 9\.1\.0 on"):
        lq_graph.use_internal_format_weight(model)
    assert int8.scale.dtype == F32
    lq_graph.set_cann_version("9.1.0")
    lq_graph.use_internal_format_weight(model)
    assert int8.scale.dtype == I64


def test_convert_refuses_before_it_changes_anything() -> None:
    model = nn.Sequential(int4_layer())
    lq_graph.set_product("950")
    lq_graph.set_cann_version("9.0.0")
    with pytest.raises(
        LinearQuantTypeError, match=r"^convert: 0: linear_quant: .* CANN 9\.1\.0 on"
    ):
        lq_graph.convert(model, to="torch_npu")
    assert type(model[0]) is lq_graph.LinearQuant
    vendors = lq_graph.LinearQuant(K, N, output_dtype=F16)
    lq_graph.set_cann_version("8.3.RC1")
    with pytest.raises(LinearQuantTypeError, match=r"^convert: the model: .* CANN 8\.5\.0 on"):
        lq_graph.convert(vendors, to="torch_npu")


def test_quantize_refuses_what_the_version_lacks() -> None:
    model = nn.Sequential(nn.Linear(K, N)).to(BF16)
    lq_graph.set_product("950")
    lq_graph.set_cann_version("9.0.0")
    with pytest.raises(LinearQuantError, match=r"from CANN 9\.1\.0 on .* 950 runs A8W8 dynamic in"):
        lq_graph.quantize(model, lq_graph.A4W4Dynamic())
    assert type(model[0]) is nn.Linear


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="a machine has one CANN")
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--soc Ascend950PR --cann-version 9.0.0", "9.0.0 950: 9.1.0 9.1.0 9.1.0 9.1.0 taken"),
        ("--soc Ascend950PR", "9.1.0 950: taken taken taken taken taken"),
        ("--cann-version 8.1.RC1", "8.1.RC1 A2: taken taken taken 9.0.0 8.2.RC1"),
        ("", "9.1.0 A2: taken taken taken taken taken"),
    ],
)
def test_the_version_that_torch_npu_finds(options: str, found: str) -> None:
    """Eagerly, in a graph, by check, by preparation, and round_mode 1."""
    done = start("older_cann.py", *options.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == found
