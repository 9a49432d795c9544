"""What torchair's versions lack, and how the converters do without."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import pytest
import torch
from torchair.ge import DataType
from torchair.ge._ge_graph import ProtoDataType, _ge_dtype_to_ge_proto_dtype

import lq_graph
from lq_graph import LinearQuantError
from lq_graph.backends import compat_npu
from lq_graph.converters import _torchair, linear_quant
from support import cases, has
from support.cases import BF16, I32, Case
from support.layers import module_for
from support.lowering import MATMUL, lower

NAMES = [name for name in vars(DataType) if name in ProtoDataType.keys()]  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_of_the_graph_are_torchairs(name: str) -> None:
    number = getattr(DataType, name)
    ours = _torchair.ge_dtype_to_proto(number)
    assert ours == ProtoDataType.Value(name)
    try:
        theirs = _ge_dtype_to_ge_proto_dtype(number)
    except ValueError:  # int4 before torchair 26.1, and what no operator of ours has
        return
    assert ours == theirs


@pytest.mark.parametrize(
    "case",
    [Case(output=BF16, pertoken=True), Case(offset=True), Case(x=I32, output=BF16, pertoken=True)],
    ids=str,
)
def test_ascend_950_without_v4_is_lowered_to_v3(case: Case, monkeypatch) -> None:
    """The vendor's torchair without V4 lowers every product to V3; so do we."""
    monkeypatch.setattr(linear_quant, "HAS_QUANT_BATCH_MATMUL_V4", False)
    assert hasattr(_torchair.ge, "QuantBatchMatmulV4") == has.HAS_V4
    inputs = cases.make(case)
    layer, x1 = module_for(inputs).npu(), inputs["x1"].npu()
    lq_graph.set_product("950")
    try:
        out, graph = lower(layer, x1)
    finally:
        lq_graph.set_product(None)
    assert graph.ops()[-1] == MATMUL
    cases.assert_equal(out, inputs)


def test_the_overloads_take_numbers_for_dtypes() -> None:
    """`int? output_dtype` and `ScalarType? output_dtype`: backends/npu.py passes numbers."""
    inputs = cases.on("npu", cases.make(Case()))
    x1, weight, scale = (inputs[name] for name in ("x1", "weight", "scale"))
    overload = torch.ops.npu.npu_quant_matmul.default
    for dtype, number in {torch.int8: 1, torch.float16: 5, torch.bfloat16: 15}.items():
        out = overload(x1, weight.mT, scale, output_dtype=number)
        assert out.dtype == dtype
        assert torch.equal(out, overload(x1, weight.mT, scale, output_dtype=dtype))


def import_torchair(handling: bool) -> None:
    """Import it, on request while the program handles another exception."""
    try:
        if handling:
            raise KeyError("another")
        compat_npu.import_torchair()
    except KeyError:
        compat_npu.import_torchair()


def raise_in_turn(errors: Sequence[Exception]) -> None:
    """Raise the first, and while it is handled the next."""
    try:
        raise errors[0]
    except Exception:
        if errors[1:]:
            raise_in_turn(errors[1:])
        raise


@pytest.mark.parametrize("handling", [False, True], ids=["", "in an except block"])
@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (
            [ModuleNotFoundError("", name="pkg_resources"), ImportError("asynchronous")],
            r'pkg_resources, which setuptools 82 no longer has. What to do: .*"setuptools<81"',
        ),
        ([ModuleNotFoundError("", name="google")], "imports google, .* What to do: install google"),
        ([OSError("libge.so"), ImportError("x")], "cannot be imported: libge.so. What to"),
    ],
    ids=["pkg_resources", "module", "library"],
)
def test_a_torchair_that_cannot_be_imported_is_one_sentence(
    errors: list[Exception], said: str, handling: bool, monkeypatch
) -> None:
    class Absent:
        def __getattr__(self, name: str) -> None:
            raise_in_turn(errors)

    monkeypatch.setitem(sys.modules, "torchair", Absent())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(LinearQuantError, match=said) as caught:
        import_torchair(handling)
    assert str(caught.value).startswith(f"torchair of {has.INSTALLED} cannot be imported: ")
    assert signal.getsignal(signal.SIGINT) is handler
