"""Forks: while threads are in the library, and while another does work: `forks.py FUNCTION ...`."""

import ctypes
import os
import select
import sys
import threading
from dataclasses import replace
from typing import Any

import torch

import cann_host


def busy(turns: str, queue: str) -> None:
    """A child while threads are in the library all the time, without the interpreter lock.

    Args:
        turns: turns.cpp, built: keeps such a thread.
        queue: torch_npu's task queue; "0" is none.
    """
    lib = cann_host.runtime.current().library
    threads = ctypes.CDLL(turns)
    x = torch.ones(64, 64, device="npu")
    if queue != "0":
        x.clone()  # starts the queue
    pairs = [
        (lib.aclrtMalloc, lib.aclrtFree),
        (lib.aclrtCreateStream, lib.aclrtDestroyStream),
        (lib.aclrtCreateEventWithFlag, lib.aclrtDestroyEvent),
    ]
    stop = ctypes.c_int()
    for make, end in pairs:
        threads.begin(make, end, ctypes.byref(stop))
    outcomes = []
    for _ in range(12):
        mine, its = os.pipe()
        child = os.fork()
        if not child:
            try:
                for make, end in pairs:
                    made = ctypes.c_void_p()
                    make(ctypes.byref(made), ctypes.c_size_t(64), 0)
                    end(made)
                text = str(((x.clone() + 1) @ x).sum().item())
            except RuntimeError as error:
                text = str(error)
            os.write(its, text.encode())
            os._exit(0)
        os.close(its)
        if not select.select([mine], [], [], 30)[0]:
            os.kill(child, 9)
            outcomes.append("hangs")
        else:
            outcomes.append(os.read(mine, 999).decode())
        os.waitpid(child, 0)
        os.close(mine)
    stop.value = 1
    print(set(outcomes), flush=True)
    os._exit(0)


def unfinished() -> None:
    """A child while another thread does a stream's late work; in the child it stays undone."""
    from cann_host import aclnn

    x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
    torch.npu.synchronize()
    begun, forked = threading.Event(), threading.Event()
    copy = aclnn.OPERATORS["aclnnInplaceCopy"]

    def slow(*arguments: Any) -> None:
        begun.set()
        forked.wait()
        copy.compute(*arguments)

    aclnn.OPERATORS["aclnnInplaceCopy"] = replace(copy, compute=slow)
    y.copy_(x)
    worker = threading.Thread(target=torch.npu.synchronize)
    worker.start()
    begun.wait()
    if not os.fork():
        for _ in range(2):
            try:
                print("right" if y.sum().item() == 8 else "wrong")
            except RuntimeError:
                print("told", flush=True)
        print(torch.ones(8, device="npu").sum().item(), flush=True)
        os._exit(0)
    os.wait()
    forked.set()
    worker.join()
    print(y.sum().item())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
