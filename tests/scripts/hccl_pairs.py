"""Ranks of HCCL made by fork, called through ctypes: `hccl_pairs.py FUNCTION [ARGUMENTS]`."""

import ctypes
import os
import resource
import sys
import time

import torch

from cann_host import runtime

lib = runtime.current().library
torch.zeros(1, device="npu")
root, comm = ctypes.create_string_buffer(4108), ctypes.c_void_p()
lib.HcclGetRootInfo(root)
lib.cann_host_recent_error.restype = ctypes.c_char_p


def connect(rank: int, ranks: int = 2) -> int:
    code: int = lib.HcclCommInitRootInfo(ranks, root, rank, ctypes.byref(comm))
    return code


def tell(code: int, begin: float) -> None:
    """A code, whether it came in time, and the text."""
    print(code, time.monotonic() - begin < 5, lib.cann_host_recent_error().decode(), flush=True)


def dead_rank(dies: str) -> None:
    """A rank that dies while its child, which has its sockets, lives."""
    mine, its = os.pipe()
    if not os.fork():
        connect(int(dies))
        lib.HcclBarrier(comm, None)
        if os.fork():
            os.kill(os.getpid(), 9)
        os.close(its)
        print(lib.HcclBarrier(comm, None), lib.cann_host_recent_error().decode(), flush=True)
        os.read(mine, 1)  # until the test ends
        os._exit(0)
    connect(1 - int(dies))
    lib.HcclBarrier(comm, None)
    begin = time.monotonic()
    tell(lib.HcclBarrier(comm, None), begin)


def no_descriptors() -> None:
    if not os.fork():
        connect(1)
        os._exit(0)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))  # for its own socket
    begin = time.monotonic()
    tell(connect(0), begin)
    lib.HcclGetRootInfo(root)
    os.dup(0)
    tell(connect(0), begin)
    tell(connect(1), begin)


def no_memory() -> None:
    connect(0, 1)
    x = torch.ones(1 << 26, device="npu")
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 26), resource.RLIM_INFINITY))
    p, begin = ctypes.c_void_p(x.data_ptr()), time.monotonic()
    tell(lib.HcclAllReduce(p, p, ctypes.c_uint64(1 << 26), 4, 0, comm, None), begin)


def dtypes() -> None:
    """For each reduction, the dtypes this chip takes."""
    connect(0, 1)
    x = torch.zeros(8, dtype=torch.int64).npu()
    p = ctypes.c_void_p(x.data_ptr())
    names = (
        *("int8", "int16", "int32", "fp16", "fp32", "int64", "uint64"),
        *("uint8", "uint16", "uint32", "fp64", "bf16"),
    )
    for op in range(4):
        codes = [
            lib.HcclAllReduce(p, p, ctypes.c_uint64(1), i, op, comm, None)
            for i in range(len(names))
        ]
        print(*(name for name, code in zip(names, codes, strict=True) if code == 0))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
