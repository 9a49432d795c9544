"""The C++ compiler of this machine, and torch_npu's headers."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def torch_npu_include() -> Path:
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs torch_npu's headers")
    return Path(next(iter(spec.submodule_search_locations))) / "include"
