"""The CPU kernel on what is not finite, empty, or not there."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import lq_graph
from lq_graph import LinearQuantValueError, kernels
from support import cases, golden
from support.native import by_torch, values

pytestmark = pytest.mark.native
I8, I32, F16, BF16, F32 = torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32


# ---- what is not finite, empty, or not there ----

_SPECIAL = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F802000, 0xFFFFFFFF, 0x00000001, 0x807FFFFF,
            0x7F7FFFFF, 0x80000000, 0x3F800000]  # fmt: skip


def answer(call: Callable[[], np.ndarray]) -> np.ndarray | str:
    """A result, or what is said instead of one."""
    try:
        return call()
    except ValueError as error:
        return "holds NaN or infinity" if "holds NaN or infinity" in str(error) else str(error)


@pytest.mark.parametrize("output", [I8, F16, BF16, I32])
@pytest.mark.parametrize("m", [3, 40])
def test_every_pattern_of_a_packed_scale(m: int, output: torch.dtype) -> None:
    """Any 64 bits: the kernel, torch and the golden give one result, or all refuse."""
    random = np.random.default_rng(m)
    words = random.integers(0, 2**64, 2000, dtype=np.uint64)
    words[::4] &= np.uint64(0xFFFF_FFFF_FF7F_FFFF)  # fewer exponents of all ones
    special = np.array([low | high << 37 for low in _SPECIAL for high in (0, 0x1FF, 0x100, 0x2AB)])
    words = np.concatenate([words, special.astype(np.uint64)]).view(np.int64)
    x, weight = values(m, 17), values(8, 17, seed=1)
    refused = 0
    for start in range(0, len(words), 8 if m == 3 else 40):
        some = torch.from_numpy(words[start : start + 8])
        some = some if len(some) == 8 else some[:1]
        name = str(output).removeprefix("torch.")
        want = answer(
            lambda s=some, n=name: golden.linear_quant(
                x.numpy(), weight.numpy(), s.numpy(), output_dtype=n, packed=True
            )
        )
        for compute in (kernels.quant_matmul, by_torch):
            got = answer(
                lambda s=some, c=compute: cases.as_numpy(c(x, weight, s, output_dtype=output))
            )
            np.testing.assert_array_equal(got, want)
        refused += isinstance(want, str)
    assert (refused > 0) == (output != I32)  # which reads no scale


@pytest.mark.parametrize("pertoken", [False, True])
@pytest.mark.parametrize("output", [F16, BF16])
def test_every_pattern_of_a_float_scale(output: torch.dtype, pertoken: bool) -> None:
    """Float rows follow IEEE: infinity and NaN go through."""
    if output == F16 and not pertoken:
        pytest.skip("the row packs its scale")
    random = np.random.default_rng(0)
    bits = np.concatenate([random.integers(0, 2**32, 390), _SPECIAL]).astype(np.uint32)
    x, weight = values(5, 17), values(8, 17, seed=1)
    for start in range(0, len(bits), 8):
        scale = torch.from_numpy(bits[start : start + 8].view(np.float32))
        row = torch.rand(5) if pertoken else None
        with np.errstate(all="ignore"):
            want = golden.linear_quant(
                x.numpy(), weight.numpy(), scale.numpy(), None,
                None if row is None else row.numpy(),
                output_dtype=str(output).removeprefix("torch."),
            )  # fmt: skip
        for compute in (kernels.quant_matmul, by_torch):
            got = compute(x, weight, scale, pertoken_scale=row, output_dtype=output)
            np.testing.assert_array_equal(cases.as_numpy(got), want)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("int4", [False, True])
def test_sizes_of_zero(int4: bool, kernel: bool) -> None:
    compute = kernels.quant_matmul if kernel else by_torch
    for m, k, n in itertools.product((0, 1, 40), (0, 8, 64), (0, 1, 64)):
        x, weight = torch.ones(m, k, dtype=I8), torch.ones(n, k, dtype=I8)
        if int4:
            x, weight = kernels.pack_int4(x), kernels.pack_int4(weight)
            assert kernels.unpack_int4(x).shape == (m, k)
        for output in (I32, BF16):
            out = compute(x, weight, torch.ones(1), output_dtype=output)
            assert out.shape == (m, n) and bool((out == k).all())
        blocks = kernels.nd_to_nz(weight, 32 // weight.element_size())
        assert torch.equal(kernels.nz_to_nd(blocks, *weight.shape), weight)
        out = compute(x, kernels.NzWeight(blocks, *weight.shape), torch.ones(1), output_dtype=I32)
        assert out.shape == (m, n) and bool((out == k).all())
    for shape in ((0, 5, 16), (2, 0, 16), (2, 5, 0)):
        out = compute(torch.ones(shape, dtype=I8), torch.ones(3, shape[-1], dtype=I8),
                      torch.ones(1), output_dtype=I32)  # fmt: skip
        assert out.shape == (*shape[:-1], 3)


def shortened(tensor: Tensor, count: int) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(count)
    return tensor


@pytest.mark.parametrize("left", [0, 1, 7])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", ["x1", "weight", "scale", "bias", "pertoken_scale"])
def test_a_shortened_storage_is_not_read(name: str, kernel: bool, left: int) -> None:
    """FSDP frees parameters so; a kernel would read beyond their end."""
    compute = kernels.quant_matmul if kernel else by_torch
    given = {
        "x1": values(4, 64), "weight": values(8, 64), "scale": torch.rand(8),
        "bias": torch.rand(8), "pertoken_scale": torch.rand(4),
    }  # fmt: skip
    given[name] = shortened(given[name], left)
    text = rf"^{name} has shape .* its storage holds {left}. What to do: make it whole"
    with pytest.raises(kernels.ShortStorageError, match=text):
        compute(
            given["x1"], given["weight"], given["scale"], bias=given["bias"],
            pertoken_scale=given["pertoken_scale"], output_dtype=BF16,
        )  # fmt: skip


@pytest.mark.parametrize("kernel", [True, False])
def test_a_view_beyond_a_shortened_storage_is_not_read(kernel: bool) -> None:
    """As many bytes as the view has are left, but not where it is; and rows that lie apart."""
    compute = kernels.quant_matmul if kernel else by_torch
    for big, view in (
        (values(16, 64), lambda t: t[8:]),
        (values(8, 128), lambda t: t[:, :64]),
    ):
        weight = view(big)
        big.untyped_storage().resize_(8 * 64)
        with pytest.raises(kernels.ShortStorageError, match="weight has shape"):
            compute(values(4, 64), weight, torch.rand(8), output_dtype=BF16)
    # what has less memory than it has values is whole all the same
    weight = values(1, 64).expand(8, 64)
    compute(values(4, 64), weight, torch.rand(1).expand(8), output_dtype=BF16)


@pytest.mark.parametrize(
    "call",
    [
        lambda: lq_graph.trans_quant_param(shortened(torch.rand(8), 4)),
        lambda: lq_graph.dynamic_quant(shortened(torch.rand(4, 64).half(), 4)),
        lambda: lq_graph.static_quant(shortened(torch.rand(4, 64), 4), torch.ones(1)),
        lambda: lq_graph.pack_int4(shortened(values(4, 64, int4=True), 4)),
        lambda: lq_graph.unpack_int4(shortened(values(4, 64).view(I32), 4)),
        lambda: lq_graph.to_fractal_nz(shortened(values(4, 64), 4)),
        lambda: lq_graph.from_fractal_nz(shortened(values(2, 1, 16, 32), 4), 4, 64),
    ],
)
def test_nor_by_the_other_functions(call: Callable[[], object]) -> None:
    with pytest.raises(LinearQuantValueError, match=r"its storage holds 4\. What to do"):
        call()
