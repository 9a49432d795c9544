"""cann_host beside a torch that has torch_npu's allocator keys: `... FUNCTION [ARGUMENTS]`."""

import ctypes
import multiprocessing
import os
import sys

import cann_host

KEYS = (
    b"of_cuda_alone",
    b"pinned_reserve_segment_size_mb",
    b"base_addr_aligned_kb",
    b"max_split_size_mb",
    b"nobody",
)


def add(_: object = None) -> list[float]:
    import torch

    added: list[float] = (torch.ones(2).npu() + 1).cpu().tolist()
    return added


def imported(library: str, autoload: str) -> None:
    """Prints which keys are registered; the environment and the import system are left alone."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = autoload
    cann_host.activate()
    finders = {getattr(finder, "__module__", "") for finder in sys.meta_path}
    assert "cann_host.allocator_keys" not in finders
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == autoload
    print(add())
    cuda = ctypes.CDLL(library)
    print(*(cuda.has(key) for key in KEYS))


def workers() -> None:
    cann_host.activate()
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, pool.map(add, [1]))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
