"""Layouts: int4 packing and FRACTAL_NZ, exact inverses, against the golden, the formula and
torch_npu."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
import torch_npu

import cann_host
import lq_graph
from lq_graph import LinearQuantTypeError, LinearQuantValueError, kernels
from support import golden, has


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(8,), (3, 16), (2, 5, 24), (0, 8)])
def test_pack_and_unpack_are_inverses(shape, dtype) -> None:
    values = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = lq_graph.pack_int4(values)
    assert packed.dtype == torch.int32 and packed.shape == (*shape[:-1], shape[-1] // 8)
    np.testing.assert_array_equal(packed.numpy(), golden.pack_int4(values.numpy()))
    unpacked = lq_graph.unpack_int4(packed)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, values.to(torch.int8))


def test_unpack_then_pack_is_the_identity_on_any_word() -> None:
    info = torch.iinfo(torch.int32)
    g = torch.Generator().manual_seed(0)
    words = torch.randint(info.min, info.max, (64, 4), generator=g, dtype=torch.int32)
    words[0] = torch.tensor([info.min, info.max, -1, 0])
    assert torch.equal(lq_graph.pack_int4(lq_graph.unpack_int4(words)), words)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0], 0x1),
        ([0, 1, 0, 0, 0, 0, 0, 0], 0x10),
        ([0, 0, 0, 0, 0, 0, 0, 7], 0x70000000),
        ([-1] * 8, -1),
        ([-8, 7, 0, 0, 0, 0, 0, 0], 0x78),
        ([0, 0, 0, 0, 0, 0, 0, -8], -0x80000000),
    ],
)
def test_value_i_sits_in_bits_4i(values: list[int], word: int) -> None:
    assert lq_graph.pack_int4(torch.tensor(values)).item() == word


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        (torch.zeros(8), LinearQuantTypeError, "values is float32; allowed are int8"),
        (torch.zeros(8, dtype=torch.uint8), LinearQuantTypeError, "values is uint8"),
        (torch.zeros(12, dtype=torch.int8), LinearQuantValueError, r"\(12,\); .*multiple of 8"),
        (torch.tensor(3), LinearQuantValueError, r"shape \(\); the last dim"),
        (torch.tensor([8] * 8), LinearQuantValueError, r"range over 8\.\.8; int4 holds -8\.\.7"),
        (torch.tensor([-9] * 8), LinearQuantValueError, r"range over -9\.\.-9"),
    ],
)
def test_pack_refuses(values, error, match) -> None:
    with pytest.raises(error, match=match):
        lq_graph.pack_int4(values)


@pytest.mark.parametrize(
    ("packed", "error", "match"),
    [
        (torch.zeros(8, dtype=torch.int8), LinearQuantTypeError, "packed is int8; allowed is int3"),
        (torch.tensor(3, dtype=torch.int32), LinearQuantValueError, "packed has no dims"),
    ],
)
def test_unpack_refuses(packed, error, match) -> None:
    with pytest.raises(error, match=match):
        lq_graph.unpack_int4(packed)


@pytest.mark.parametrize("c0", [32, 64])
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (40, 130), (2, 3, 18, 70)])
def test_fractal_nz_puts_each_element_where_the_formula_says(shape, c0: int) -> None:
    x = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.int32).view(shape)
    *_, rows, cols = shape
    r1 = -(-rows // 16)
    flat = kernels.nd_to_nz(x, c0).reshape(-1, -(-cols // c0) * r1 * 16 * c0)
    for batch, matrix in enumerate(x.reshape(-1, rows, cols)):
        for r in range(rows):
            for c in range(cols):
                index = ((c // c0 * r1 + r // 16) * 16 + r % 16) * c0 + c % c0
                assert flat[batch, index] == matrix[r, c]
        assert (flat[batch] != 0).sum() == rows * cols  # padding is zero
    assert torch.equal(kernels.nz_to_nd(kernels.nd_to_nz(x, c0), rows, cols), x)


def nz_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of an npu tensor's storage; cann_host's device memory is host memory."""
    torch.npu.synchronize()
    size = tensor.untyped_storage().nbytes()
    raw = (ctypes.c_char * size).from_address(tensor.data_ptr())
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@pytest.mark.skipif(not cann_host.is_active(), reason="reads device memory")
@pytest.mark.parametrize("shape", [(16, 32), (17, 40), (48, 64), (3, 512), (2, 24, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32], ids=str)
def test_fractal_nz_is_bit_equal_to_torch_npus(shape, dtype) -> None:
    if dtype == torch.int32 and (why := has.int4_nz()):
        pytest.skip(why)
    torch.npu.config.allow_internal_format = True
    g = torch.Generator().manual_seed(0)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    weight = torch.randint(low, high, shape, dtype=dtype, generator=g)
    customize = {"customize_dtype": 3} if dtype == torch.int32 else {}
    theirs = torch_npu.npu_format_cast(weight.npu(), 29, **customize)
    assert torch_npu.get_npu_format(theirs) == 29
    ours = lq_graph.to_fractal_nz(weight)
    assert torch.equal(ours.flatten().view(torch.uint8), nz_bytes(theirs))
    k = shape[-1] * (8 if dtype == torch.int32 else 1)
    assert torch.equal(lq_graph.from_fractal_nz(ours, shape[-2], k), weight)
    assert torch.equal(theirs.cpu(), weight)


def test_layout_of_a_slice_that_is_not_aligned() -> None:
    flat = torch.arange(4 * 33 + 3, dtype=torch.int8)
    weight = flat[3:].view(4, 33)[:, 1:]
    assert torch.equal(lq_graph.from_fractal_nz(lq_graph.to_fractal_nz(weight), 4, 32), weight)
    values = (flat[3 : 3 + 64] % 8).view(2, 32)
    assert torch.equal(lq_graph.unpack_int4(lq_graph.pack_int4(values)), values)


INT8 = torch.int8


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: lq_graph.to_fractal_nz(torch.zeros(4, 4)), LinearQuantTypeError, "is float32; al"),
        (
            lambda: lq_graph.to_fractal_nz(torch.zeros(4, dtype=INT8)),
            LinearQuantValueError,
            r"\(4,",
        ),
        (
            lambda: lq_graph.to_fractal_nz(torch.zeros(0, 4, dtype=INT8)),
            LinearQuantValueError,
            "emp",
        ),
        (
            lambda: lq_graph.from_fractal_nz(torch.zeros(1, 1, 16, 32, dtype=INT8), 17, 32),
            LinearQuantValueError,
            r"for n = 17 and k = 32 of int8 it must end in \(1, 2, 16, 32\)",
        ),
        (
            lambda: lq_graph.from_fractal_nz(torch.zeros(1, 1, 16, 32, dtype=INT8), 16, -1),
            LinearQuantValueError,
            "k = -1",
        ),
        (
            lambda: lq_graph.from_fractal_nz(torch.zeros(1, 1, 16, 8, dtype=torch.int32), 16, 60),
            LinearQuantValueError,
            r"k is 60; an int32 holds 8 int4 values, so k must be a multiple of 8\. What to do",
        ),
    ],
)
def test_fractal_nz_refuses(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()
