"""--fill: what new device memory holds before anything is written."""

from __future__ import annotations

import pytest
import torch

import cann_host
from cann_host.options import CannHostError, Options
from support.processes import run

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


@pytest.mark.parametrize(
    ("text", "byte"),
    [("", -1), ("nan", 255), ("zero", 0), ("0xAB", 171), ("0Xf", 15), ("7", 7), ("255", 255)],
)
def test_the_byte(text: str, byte: int) -> None:
    assert Options.of(fill=text).fill_byte == byte


@pytest.mark.parametrize("text", ["256", "-1", "0x100", "0x", "ones", "1.0", "NaN"])
def test_no_byte(text: str) -> None:
    with pytest.raises(CannHostError, match="it must be nan, zero, or a byte, such as 0xAB or 171"):
        Options.of(fill=text)


def every(dtype: torch.dtype, byte: int) -> str:
    """The first element of a tensor of this dtype whose bytes are all equal."""
    value = torch.full((dtype.itemsize,), byte, dtype=torch.uint8).view(dtype)
    return str(value.tolist()[0])


@pytest.mark.slow
@pytest.mark.parametrize(("text", "byte"), [("nan", 0xFF), ("0xAB", 0xAB), ("zero", 0)])
def test_memory_that_nothing_wrote(text: str, byte: int) -> None:
    """New tensors, tensors in memory that another one had, results, the part that an operator
    leaves out, graph outputs."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64]
    empty = "".join(f"{dtype} {every(dtype, byte)}\n" for dtype in dtypes)
    left = every(torch.float16, byte)
    assert run("fills.py", "--fill", text) == (
        f"{empty}after ones {every(torch.float32, byte)}\n"
        f"written [2.0, 2.0, 2.0]\nleft out [1.0, 1.0, {left}, {left}]\n"
    )
