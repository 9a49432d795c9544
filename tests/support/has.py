"""What the installed torch_npu and torchair have, for tests that need to know.

Each is a look at the wheel, not at its version number. A skip gives the reason with the text here.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import pytest
import torch
import torch_npu
import torchair
from torchair._ge_concrete_graph import ge_apis

INSTALLED = f"torch_npu {torch_npu.__version__}"

# torchair's raw operator, to which its own converter lowers on Ascend 950
HAS_V4 = hasattr(ge_apis, "QuantBatchMatmulV4")


# what fusions and merge need
HAS_PASSES = hasattr(torchair, "register_replacement")


def need_operator(name: str, *arguments: str) -> None:
    """Skip a test of an operator of torch_npu that this one does not have, or not with these
    arguments."""
    packet = getattr(torch.ops.npu, name, None)
    if packet is None:
        pytest.skip(f"{INSTALLED} has no {name}")
    taken = {argument.name for argument in packet.default._schema.arguments}
    if missing := set(arguments) - taken:
        pytest.skip(f"{INSTALLED}: {name} takes no {', '.join(sorted(missing))}")


@cache
def _why_no_inductor() -> str:
    if find_spec("triton") is not None:
        return ""
    try:
        torch.compile(torch.neg, backend="inductor")(torch.ones(2))
    except Exception as error:  # torch._dynamo wraps it
        if "triton" not in str(error):
            raise
        return f"{INSTALLED} imports triton, absent here, for any compilation by Inductor"
    return ""


def need_inductor(backend: str = "inductor") -> None:
    """Skip a test of Inductor on the CPU where torch_npu does not let it run."""
    if backend == "inductor" and (why := _why_no_inductor()):
        pytest.skip(why)


def int4_nz() -> str:
    """Why npu_format_cast makes no int4 blocks of 64 values here; empty if it does.

    Without lq_graph: the size that CANN's description of FRACTAL_NZ gives.
    """
    torch.npu.config.allow_internal_format = True
    weight = torch.zeros(16, 8, dtype=torch.int32).npu()
    try:
        cast = torch_npu.npu_format_cast(weight, 29, customize_dtype=3)
    except RuntimeError as error:
        return f"{INSTALLED}: {str(error).splitlines()[0]}"
    values = cast.untyped_storage().nbytes() * 2
    return "" if values == 16 * 64 else f"{INSTALLED}: blocks of {values // 16} values"


def need_converter(name: str) -> None:
    """Skip a test of an operator of torch_npu that torchair does not convert."""
    if find_spec(f"torchair._ge_concrete_graph.ge_converter.custom.{name}") is None:
        pytest.skip(f"torchair of {INSTALLED} does not convert {name}")
