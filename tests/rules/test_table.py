"""Every row of every product accepted; every single change that leaves the table refused, with a
message whose advice is true."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from lq_graph import LinearQuantTypeError, plan
from lq_graph.rules.plan import Spec
from lq_graph.rules.refusal import Fix, Refusal
from lq_graph.rules.tables import ROWS, dtype_name, product_by_name, storage_name
from support.table import (
    F32,
    FIELDS,
    I8,
    I32,
    I64,
    LEGAL,
    PRODUCTS,
    TABLE,
    WHAT_ACLNN_DOES,
    Combination,
    Row,
    mutations,
)

M, K, N = 4, 64, 16
ROWS_OF = [(key, row) for key in PRODUCTS for row in TABLE if key in row.products.split()]
IDS = [f"{key}-row{TABLE.index(row) + 1}" for key, row in ROWS_OF]


def ask(combination: Combination, product: str, **changes: torch.dtype):
    c = combination
    k = K // 8 if c.x == I32 else K
    tensors = {
        "x1": Spec(c.x, (M, k)),
        "weight": Spec(changes.get("weight", c.x), (N, k)),
        "scale": Spec(c.scale, (N,)),
        "offset": c.offset and Spec(c.offset, (N,)),
        "bias": c.bias and Spec(c.bias, (N,)),
        "pertoken_scale": c.pertoken_scale and Spec(c.pertoken_scale, (M,)),
    }
    return plan(**tensors, output_dtype=c.output_dtype, product=product_by_name(product))


@pytest.mark.parametrize(("product", "row"), ROWS_OF, ids=IDS)
def test_row_is_accepted(product: str, row: Row, tally) -> None:
    for combination in row.combinations():
        p = ask(combination, product)
        assert (p.output_dtype, p.output_shape) == (row.output_dtype, (M, N))
        assert p.product.key == product
        # the int64 form is asked for exactly where a float32 scale stands for it
        packed = torch.int64 in row.scale
        assert p.fold_scale == (packed and combination.scale == torch.float32)
        tally("table rows accepted, combinations of dtypes")


@pytest.mark.parametrize(("product", "row"), ROWS_OF, ids=IDS)
def test_every_single_change_that_leaves_the_table_is_refused(
    product: str, row: Row, tally
) -> None:
    legal = LEGAL[product]
    for combination in row.combinations():
        for _, changed in mutations(combination):
            if changed in legal:
                continue
            with pytest.raises(LinearQuantTypeError) as caught:
                ask(changed, product)
            check_refusal(caught.value, changed, product)
            tally("single changes refused, message checked")


def check_refusal(error: LinearQuantTypeError, given: Combination, product: str) -> None:
    """What is said of the call is so, and each advice leads to a call that is accepted."""
    refusal, legal = error.refusal, LEGAL[product]
    text = str(error)
    assert refusal is not None and text == str(refusal)
    assert text.startswith("linear_quant: ") and text.endswith(WHAT_ACLNN_DOES), text
    assert refusal.product is product_by_name(product)
    assert [other.key for other in refusal.takers] == [
        key for key in PRODUCTS if key != product and given in LEGAL[key] and refusal.choices
    ], text
    if refusal.arguments == ("x1",):
        storages = {c.x for c in legal}
        assert given.x not in storages and refusal.given == f"x1 is {dtype_name(given.x)}"
        assert refusal.allowed == " or ".join(storage_name(d) for d in (I8, I32) if d in storages)
    else:
        check_columns(refusal, given, legal)
        check_why(refusal, given, legal)
    assert refusal.fixes, text
    kept = [not fix.numbers for fix in refusal.fixes]
    assert kept == sorted(kept, reverse=True), text  # what keeps the numbers comes first
    for fix in refusal.fixes:
        check_fix(fix, given, product)
        assert str(fix) in text and ("changes the numbers" in str(fix)) == bool(fix.numbers)


def check_columns(refusal: Refusal, given: Combination, legal: set[Combination]) -> None:
    """What is blamed is as it was given; whatever is allowed for it is accepted; nothing is left
    out."""
    columns = [column for column, _ in refusal.choices]
    assert tuple(columns) == refusal.arguments
    for column in columns:
        value = getattr(given, column)
        assert f"{column} is {dtype_name(value) if value else 'absent'}" in refusal.given
    allowed = set(itertools.product(*(dtypes for _, dtypes in refusal.choices)))
    for values in allowed:
        assert given._replace(**dict(zip(columns, values, strict=True))) in legal, str(refusal)
    if len(columns) == 1:
        (column,) = columns
        every = {
            c for c in legal if c._replace(**{column: None}) == given._replace(**{column: None})
        }
        assert {value for (value,) in allowed} == {getattr(c, column) for c in every}, str(refusal)
    else:  # no change of one column would do
        for c in legal:
            differ = sum(a != b for a, b in zip(c, given, strict=True))
            assert differ > 1 or c.x != given.x, str(refusal)


def check_why(refusal: Refusal, given: Combination, legal: set[Combination]) -> None:
    """If a refusal says that another output or other dtypes take a dtype, they do."""
    if len(refusal.choices) > 1 or not refusal.why:
        return
    ((column, allowed),) = refusal.choices
    value = getattr(given, column)
    takers = [
        c
        for c in legal
        if c.x == given.x
        and (getattr(c, column) is not None if allowed == (None,) else getattr(c, column) == value)
    ]
    word = "one" if allowed == (None,) else dtype_name(value)
    why, *meaning = refusal.why.split("; ")
    if found := re.fullmatch(rf"only ([\w, ]+) outputs? takes? {word}", why):
        outputs = {dtype_name(c.output_dtype) for c in takers}
        assert set(found[1].replace(" and ", ", ").split(", ")) == outputs, str(refusal)
    elif found := re.fullmatch(rf"(\w+) output takes {word} with (.*)", why):
        same = [c for c in takers if dtype_name(c.output_dtype) == found[1]]
        assert found[1] == dtype_name(given.output_dtype) and same, str(refusal)
        for condition in found[2].split(" and "):
            other, names = condition.split(" ", 1)
            dtypes = {dtype_name(getattr(c, other)) for c in same}
            wanted = set(names.replace(" or ", ", ").replace("absent", "-").split(", "))
            assert dtypes == wanted, str(refusal)
    elif why == "no output takes one":
        assert not takers, str(refusal)
    else:
        meaning.append(why)
    assert set(meaning) <= MEANINGS


MEANINGS = {
    "an int32 bias is added before the scale, a float bias after it",
    "int64 is the packed form of lq_graph.trans_quant_param",
}


def check_fix(fix: Fix, given: Combination, product: str) -> None:
    """The call is accepted once the advice is followed, and it is the least that has to change."""
    changes = dict(fix.changes)
    dtypes = fix.apply({**given._asdict(), "x1": given.x, "weight": given.x})
    x1, weight = dtypes.pop("x1"), dtypes.pop("weight")
    assert x1 == weight and changes, fix
    followed = Combination(**{**dtypes, "x": x1})
    assert followed in LEGAL[product], (fix, given)
    ask(followed, product)
    for name, dtype in changes.items():
        assert dtype != (given.x if name in ("x1", "weight") else getattr(given, name)), fix
        # a cast that is said to keep the numbers holds every value
        if len(changes) == 1 and (
            found := re.search(rf"{name}\.(float|int)\(\)(?!, if)", fix.text)
        ):
            exact = EXACT[getattr(given, name), found[1]]
            assert bool(fix.numbers) != exact, fix


def _holds(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast there and back keeps every value; by trying all of the small dtypes."""
    if source in (I64, torch.float64) or (source, target) == (I32, F32):
        return False
    if source.itemsize > 2:
        return source == target
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = (bits if source.itemsize == 2 else bits.to(torch.int8)).view(source)
    return torch.equal(values.to(target).to(source).nan_to_num(), values.nan_to_num())


EXACT = {
    (source, name): _holds(source, target)
    for source in {*FIELDS["scale"], torch.uint8} - {None}
    for name, target in (("float", F32), ("int", I32))
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_weight_of_another_dtype_is_refused(product: str) -> None:
    for combination in LEGAL[product]:
        for dtype in set(FIELDS["x"]) - {combination.x}:
            with pytest.raises(LinearQuantTypeError) as caught:
                ask(combination, product, weight=dtype)
            refusal = caught.value.refusal
            assert refusal.arguments == ("weight",)
            assert refusal.given.startswith(f"weight is {dtype_name(dtype)} and x1")
            for fix in refusal.fixes:
                after = fix.apply({"x1": combination.x, "weight": dtype})
                assert after["x1"] == after["weight"]
                assert combination._replace(x=after["x1"]) in LEGAL[product], fix


def test_the_data_has_no_row_the_table_lacks() -> None:
    for product in PRODUCTS:
        ours = {
            Combination(row.storage, scale, offset, bias, pertoken, row.output)
            for row in ROWS
            if product in [p.key for p in row.products]
            for scale in row.scale
            for offset in row.offset
            for bias in row.bias
            for pertoken in row.pertoken_scale
        }
        assert ours == LEGAL[product]
    assert all(row.source for row in ROWS)
