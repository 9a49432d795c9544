"""What the attentions refuse."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support.attention import DECODE, TND, TRIANGLE, Call, Case, close, compiled

torch_npu = pytest.importorskip("torch_npu")
torchair = pytest.importorskip("torchair")

F16, BF16 = torch.float16, torch.bfloat16
LENGTHS = Case("BSND", (5, 3), (7, 4), lengths=True)
PAGED = DECODE._replace(cache="BNSD")


TILING, INVALID = 561002, 161002


class Refused(NamedTuple):
    """A call that is refused: the change of a call that is not, the code, and what the text says.

    Attributes:
        case: the call.
        change: other tensors, numbers, or None for a tensor or number that is left out.
        code: CANN's, or None for a refusal of cann_host's own.
        text: a pattern.
    """

    case: Case
    change: dict[str, Any]
    code: int | None
    text: str


def nearly_a_triangle(query: int = 3, key: int = 1) -> Tensor:
    """One that also hides a key from a query, or the other way round."""
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    mask[query, key].logical_not_()
    return mask


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


PROMPT, TND_PAGED = Case(), TND._replace(cache="BNSD", keys=(130, 3, 9))
REFUSED = {
    "dtypes of key and value": Refused(PROMPT, {"value": BF16}, TILING, "value bfloat16"),
    "dtype of key": Refused(
        PROMPT, {"key": BF16, "value": BF16}, INVALID, "float16 or int4 or int8"
    ),
    "int4 in int32": Refused(
        Case(),
        {
            "key": torch.zeros(2, 2, 7, 4, dtype=torch.int32),
            "value": torch.zeros(2, 2, 7, 4, dtype=torch.int32),
        },
        None,
        "cann_host does not compute attention with an int4 key and value",
    ),
    "float32": Refused(
        PROMPT, dict.fromkeys(("query", "key", "value"), torch.float32), INVALID, "query is float32"
    ),
    "head dim": Refused(Case(head=24), {}, TILING, "24; multiples of 16"),
    "heads": Refused(PROMPT, {"num_heads": 3}, TILING, "num_heads is 3"),
    "kv heads": Refused(PROMPT, {"num_key_value_heads": 4}, TILING, "key has 2 heads"),
    "groups": Refused(Case(heads=130, kv_heads=1, head=16), {}, TILING, "at most 64 times"),
    "BNSD_BSND of one token": Refused(
        Case("BNSD_BSND", (1, 1), (7, 7)), {}, TILING, "BNSD_BSND and query has one token"
    ),
    "sparse_mode": Refused(PROMPT, {"sparse_mode": 5}, TILING, "sparse_mode is 5; 0 to 4"),
    "no mask": Refused(PROMPT, {"sparse_mode": 3}, TILING, "3 and atten_mask is not given"),
    "small triangle": Refused(
        PROMPT, {"sparse_mode": 2, "atten_mask": ones(5, 7)}, TILING, r"must be \(2048, 2048\)"
    ),
    "nearly a triangle": Refused(
        PROMPT, {"sparse_mode": 2, "atten_mask": nearly_a_triangle()}, None, "not the triangle"
    ),
    "a triangle as far as there are queries": Refused(
        PROMPT, {"sparse_mode": 3, "atten_mask": nearly_a_triangle(1000, 900)}, None, "not the tri"
    ),
    "no triangle": Refused(
        PROMPT, {"sparse_mode": 2, "atten_mask": ones(2048, 2048)}, None, "not the triangle"
    ),
    "small mask": Refused(PROMPT, {"atten_mask": ones(5, 6)}, TILING, "must cover 5 queries and 7"),
    "mask of floats": Refused(
        PROMPT, {"atten_mask": torch.ones(5, 7)}, TILING, "bool or int8 or uint8"
    ),
    "band": Refused(
        PROMPT,
        {"atten_mask": ones(5, 7), "pre_tokens": -2, "next_tokens": -1},
        TILING,
        "no key would be left",
    ),
    "length": Refused(
        Case("BSND", (5, 3), (7, 4), lengths=True),
        {"actual_seq_lengths_kv": [7, 11]},
        TILING,
        r"\[1\] is 11; 0 to 10",
    ),
    "inner_precise": Refused(PROMPT, {"inner_precise": 5}, TILING, "inner_precise is 5"),
    "antiquant_mode": Refused(PROMPT, {"antiquant_mode": 1}, TILING, "antiquant_mode is 1"),
    "shift": Refused(PROMPT, {"pse_shift": torch.ones(1, 4, 5, 6).half()}, TILING, "pse_shift has"),
    "dtype of the shift": Refused(
        PROMPT, {"pse_shift": torch.ones(1, 4, 5, 7).bfloat16()}, TILING, "pse_shift is bfloat16"
    ),
    "TND of float16": Refused(TND._replace(dtype=F16), {}, TILING, "query is float16; bfloat16"),
    "TND head dim": Refused(TND._replace(head=32), {}, TILING, r"\(32, 32, 32\)"),
    "TND without lengths": Refused(
        TND, {"actual_seq_lengths": None}, TILING, "actual_seq_lengths is not given"
    ),
    "TND tokens": Refused(
        TND, {"actual_seq_lengths": [3, 4, 7]}, TILING, "ends with 7; the tensor has 8"
    ),
    "TND not cumulative": Refused(TND, {"actual_seq_lengths": [3, 1, 8]}, TILING, "cumulative"),
    "TND with a mask": Refused(TND, {"atten_mask": TRIANGLE}, TILING, "takes no atten_mask"),
    "TND mode 2": Refused(
        TND, {"atten_mask": TRIANGLE, "sparse_mode": 2}, TILING, "TND allows 0, 3 or 4"
    ),
    "TND, more queries": Refused(
        TND._replace(keys=(2, 1, 9), mode=3, mask=(2048, 2048)), {}, TILING, "3 queries and 2 keys"
    ),
    "block_size": Refused(TND_PAGED, {"block_size": 64}, TILING, "multiples of 128 to 1024"),
    "block_size of the cache": Refused(TND_PAGED, {"block_size": 256}, TILING, "block_size is 256"),
    "table": Refused(
        TND_PAGED, {"block_table": torch.zeros(2, 3).int()}, TILING, r"must be \(3, ...\)"
    ),
    "short table": Refused(
        TND_PAGED, {"block_table": torch.zeros(3, 1).int()}, TILING, "2 blocks are needed"
    ),
    "outside the cache": Refused(
        TND_PAGED, {"block_table": torch.full((3, 3), 99).int()}, None, "block 99"
    ),
    "negative block": Refused(
        TND_PAGED, {"block_table": torch.full((3, 3), -1).int()}, None, "block -1"
    ),
    "cache of 4 dims": Refused(
        Case("BSH", (5, 3), (130, 7), cache="BNSD", lengths=True),
        {},
        TILING,
        "the cache has 4 dims",
    ),
    "paged without lengths": Refused(
        PAGED, {"actual_seq_lengths_kv": None}, TILING, "actual_seq_lengths_kv is not"
    ),
    "decode, block_size": Refused(PAGED, {"block_size": 24}, TILING, "multiples of 16 to 512"),
    "decode, small block": Refused(PAGED, {"block_size": 64}, None, "reads outside"),
    "decode, NBSD": Refused(
        DECODE._replace(layout="BSND"), {"input_layout": "BSND_NBSD"}, TILING, "BSH or BSND or BNSD"
    ),
    "decode, mask": Refused(DECODE, {"atten_mask": ones(1, 140)}, TILING, "first dim must be 2"),
    "decode, short mask": Refused(DECODE, {"atten_mask": ones(2, 40)}, TILING, "cover 130 keys"),
    "decode, inner_precise": Refused(DECODE, {"inner_precise": 2}, TILING, "0 or 1 is allowed"),
    "decode, a scale": Refused(
        DECODE,
        {"antiquant_scale": torch.ones(2).half()},
        TILING,
        "antiquant_scale is given and key",
    ),
    "int8 result": Refused(
        PROMPT, {"quant_scale2": torch.ones(3), "softmax_lse_flag": False}, TILING, "1 or 128"
    ),
    "padding": Refused(
        PROMPT, {"kv_padding_size": torch.tensor([1])}, TILING, "the actual lengths are not"
    ),
    "MLA": Refused(
        PROMPT,
        {"query_rope": torch.ones(2, 4, 5, 64).half(), "key_rope": torch.ones(2, 2, 7, 64).half()},
        None,
        r"query_rope \(MLA\)",
    ),
}


@pytest.mark.parametrize("one", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(one: Refused) -> None:
    call = Call(one.case)
    for name, value in one.change.items():
        if isinstance(value, torch.dtype):
            call.tensors[name] = call.tensors[name].to(value)
        elif isinstance(value, Tensor):
            call.tensors[name] = value
        elif value is None:
            del call.numbers[name]
        else:
            call.numbers[name] = value
    with pytest.raises(RuntimeError, match=one.text) as error:
        call.eager()
    assert (f"CANN error {one.code or ''}" in str(error.value)) == (one.code is not None)


def test_a_mask_that_was_a_triangle_is_looked_at_again() -> None:
    call = Call(PROMPT)
    call.numbers["sparse_mode"] = 3
    call.tensors["atten_mask"] = nearly_a_triangle(5, 5).npu()
    with pytest.raises(RuntimeError, match="not the triangle"):
        call.eager()
    call.tensors["atten_mask"][5, 5] = False
    out = call.eager()[0]
    assert torch.equal(call.eager()[0], out)
    call.tensors["atten_mask"][1700, 3] = True
    with pytest.raises(RuntimeError, match="not the triangle"):
        call.eager()


def test_a_refusal_in_a_graph() -> None:
    call = Call(PROMPT._replace(head=24))

    def attention(**tensors: Tensor) -> Any:
        return torch.ops.npu.npu_fused_infer_attention_score(**tensors, **call.numbers)[0]

    with pytest.raises(Exception, match=r"FusedInferAttentionScore.*multiples of 16.*561002"):
        compiled(attention, False)(**call.on_device())


def test_a_blind_query() -> None:
    """Its keys are all masked: the mean of the values, or with inner_precise 2 nothing."""
    call = Call(Case(mask=(5, 7)))
    call.tensors["atten_mask"][3] = True
    with pytest.warns(RuntimeWarning, match="cann_host's caution"):
        out, _ = call.eager()
    mean = call.v[0].float().mean(1).numpy()
    close(out[0, :, 3], mean[[0, 0, 1, 1]], F16)
    call.numbers["inner_precise"] = 2
    out, lse = call.eager()
    assert not out[:, :, 3].any() and torch.isinf(lse[:, :, 3]).all()
