"""Processes in which cann_host cannot be activated: `activation.py FUNCTION`."""

import contextlib
import ctypes
import importlib.util
import os
import sys

import cann_host
import cann_host._native as native


def torch_first() -> None:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    import torch  # noqa: F401

    cann_host.activate()


def no_libraries() -> None:
    native.library_directory = lambda: None
    cann_host.activate()


def no_torch_npu() -> None:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (
        None if name == "torch_npu" else find(name, package)
    )
    cann_host.activate()


def another_platform() -> None:
    sys.platform = "darwin"
    cann_host.activate()


def a_cann_is_loaded() -> None:
    folder = native.library_directory()
    assert folder is not None
    for name in ("libcann_host.so", "libascendcl.so"):
        ctypes.CDLL(str(folder / name))
    cann_host.activate()


def keys_kept() -> None:
    """Beside a torch that has torch_npu's allocator keys, and without setting them aside."""
    import cann_host.allocator_keys as keys

    keys.set_aside = lambda library: contextlib.nullcontext([])  # type: ignore[return-value, assignment]
    cann_host.activate()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
