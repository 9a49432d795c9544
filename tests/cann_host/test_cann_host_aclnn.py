"""The records of cann_host's aclnn operators, and how one refuses."""

from __future__ import annotations

import re
import struct

import pytest

from cann_host.aclnn import ACL_DTYPES, OPERATORS, ROUND_MODES, AclTensor, RefusedError
from cann_host.aclnn.tensors import read_arguments, tensors_of
from cann_host.rules import QUANT_MODES
from support.aclnn_sources import SOURCES, declared

# what each ...GetWorkspaceSize sends: name of the operator, its arguments
SENT = declared() | {
    name: [word.strip() for word in arguments.split(",")]
    for name, arguments in re.findall(
        r'Prepare\("(aclnn\w+)", workspace_size, executor,\s*([^;]*)\);', SOURCES
    )
}


def test_the_library_and_the_table_have_the_same_operators() -> None:
    assert set(OPERATORS) == set(SENT)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_record_is_complete(name: str) -> None:
    operator = OPERATORS[name]
    assert operator.name == name
    assert callable(operator.check) and callable(operator.compute)
    values = [1.0 for _ in SENT[name]]
    operator.arguments(*values)
    for others in (values[1:], [*values, 1.0]):
        with pytest.raises((TypeError, ValueError)):
            operator.arguments(*others)


def test_texts_are_numbered_as_the_library_numbers_them() -> None:
    for texts in (QUANT_MODES, ROUND_MODES):
        listed = r",\s*".join(f'"{text}"' for text in texts)
        assert re.search(r"PlaceOf\(\w+, \{" + listed + r"\}\)", SOURCES)


def test_words_become_arguments() -> None:
    tensor = [1, 4096, 2, 29, 3, 2, 5, 7, 7, 1, 4, 1, 1, 16, 32]
    half = 0x3FE0000000000000  # 0.5
    text = [5, 10, *struct.unpack("<2q", b"TND_packed".ljust(16, b"\0"))]
    tensors = [6, 3, *tensor, 0, *tensor]
    read = AclTensor(4096, 2, 29, 3, (5, 7), (7, 1), (1, 1, 16, 32))
    words = [0, *tensor, 2, -8, 3, half, 4, 2, 6, 9, *text, *tensors, 5, 0, 6, 0, 4, 0]
    expected = [None, read, -8, 0.5, (6, 9), "TND_packed", (read, None, read), "", (), ()]
    assert read_arguments(words) == expected
    assert list(tensors_of(expected)) == [read] * 3


@pytest.mark.parametrize(
    ("strides", "is_transposed", "stored"),
    [((7, 1), False, (5, 7)), ((1, 5), True, (7, 5)), ((1, 6), False, (5, 7))],
)
def test_transposition_is_read_from_the_strides(strides, is_transposed, stored) -> None:
    tensor = AclTensor(0, 2, 2, 0, (5, 7), strides, (35,))
    assert tensor.is_transposed == is_transposed
    assert tensor.stored_shape == stored


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RefusedError("x is no"), 161002, "x is no (CANN error 161002, invalid parameter)"),
        (RefusedError("x is null", 161001), 161001, "x is null (CANN error 161001, null pointer)"),
        # a code must be returned; the text says that it is not CANN's refusal
        (RefusedError("cann_host has it not", None), 161002, "cann_host has it not"),
    ],
    ids=["parameter", "null", "cann_host's own"],
)
def test_a_refusal_has_a_code_and_a_text(error: RefusedError, code: int, text: str) -> None:
    assert (error.code, str(error)) == (code, text)


def test_a_dtype_without_a_torch_dtype_is_refused_in_cann_hosts_name() -> None:
    assert 34 not in ACL_DTYPES  # HiFloat8
    with pytest.raises(RefusedError, match=r"cann_host does not know aclDataType 34$"):
        _ = AclTensor(0, 34, 2, 0, (1,), (1,), (1,)).dtype
