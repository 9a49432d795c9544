"""Fixtures of the tests of cann_host."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cann_host import _native

# ---- hostile calls ----


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    folder = _native.library_directory()
    assert folder is not None
    torch.zeros(1, device="npu")  # a device is chosen
    return _native.load(folder)
