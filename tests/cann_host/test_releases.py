"""With an older CANN reported, what a newer one brought is absent."""

from __future__ import annotations

import os

import pytest

from cann_host import releases
from support.processes import python

pytestmark = pytest.mark.skipif(
    os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="of the stand-in"
)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("8.1.RC1", "8.2.RC1"),
        ("8.2.RC1.alpha003", "8.2.RC1"),
        ("8.3.RC1", "8.3.0"),
        ("8.5.0", "9.0.0"),
        ("9.0.0", "9.1.0"),
    ],
)
def test_order(older: str, newer: str) -> None:
    assert releases._key(older) < releases._key(newer)


LOOKS = """
import ctypes, sys, torch, cann_host
from cann_host import _native
library = ctypes.CDLL(str(_native.library_directory() / "libopapi.so"))
listed = {symbol for _, symbol, _ in cann_host.entries()}
for symbol in sys.argv[1:]:
    assert hasattr(library, symbol) == (symbol in listed), symbol
    print(symbol, hasattr(library, symbol))
print((torch.ones(3).npu() + 1).cpu().tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "found"),
    [("9.1.0", [True, True]), ("9.0.0", [False, True]), ("8.2.RC1", [False, False])],
)
def test_functions(version: str, found: list[bool], tmp_path) -> None:
    script = tmp_path / "looks.py"
    script.write_text(LOOKS)
    names = ["aclnnDynamicQuantV4GetWorkspaceSize", "aclrtPointerGetAttributes"]
    done = python("-m", "cann_host", "--cann-version", version, str(script), *names)
    assert done.returncode == 0, done.stderr
    lines = [f"{name} {here}" for name, here in zip(names, found, strict=True)]
    assert done.stdout.splitlines()[-3:] == [*lines, "[2.0, 2.0, 2.0]"]
