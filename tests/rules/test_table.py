"""Every row of every product accepted; every single change that leaves the table refused, with a
message whose advice is true."""

from __future__ import annotations

import re

import pytest
import torch

from lq_graph import LinearQuantTypeError, plan
from lq_graph.rules.plan import Spec
from lq_graph.rules.tables import ROWS, dtype_name, product_by_name
from support.table import (
    FIELDS,
    I32,
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
        for field, changed in mutations(combination):
            if changed in legal:
                continue
            with pytest.raises(LinearQuantTypeError) as caught:
                ask(changed, product)
            check_message(str(caught.value), changed, field, product)
            tally("single changes refused, message checked")


def check_message(text: str, given: Combination, field: str, product: str) -> None:
    """The blamed tensor is as it was given, and each dtype said to be allowed for it is."""
    assert text.startswith("linear_quant: ") and text.endswith(WHAT_ACLNN_DOES)
    found = re.match(r"linear_quant: (\w+) is (\w+)[;,]? .*?(allows|takes no) ([\w, ]+)", text)
    assert found, text
    blamed, value, verb, allowed = found.groups()
    assert str(product_by_name(product)) in text and "What to do: " in text, text
    if field == "x":
        if blamed == "x1":
            assert value == dtype_name(given.x), text
            return
        # x1 and weight moved together to the other storage dtype: any column may be in the way
        assert given.x in (torch.int8, torch.int32), text
    if blamed != "x1":
        assert value == (dtype_name(getattr(given, blamed)) if getattr(given, blamed) else "absent")
    choices = re.findall(r"\w+", allowed.replace(" or ", " ")) if verb == "allows" else ["absent"]
    if " and " in text.split(";")[0]:
        return  # several are blamed: no single change would do
    assert choices, text
    for name in choices:
        dtype = None if name == "absent" else getattr(torch, name)
        assert given._replace(**{blamed: dtype}) in LEGAL[product], (text, name)


@pytest.mark.parametrize("product", PRODUCTS)
def test_weight_of_another_dtype_is_refused(product: str) -> None:
    for combination in LEGAL[product]:
        for dtype in set(FIELDS["x"]) - {combination.x}:
            with pytest.raises(LinearQuantTypeError, match=f"weight is {dtype_name(dtype)} and x1"):
                ask(combination, product, weight=dtype)


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
