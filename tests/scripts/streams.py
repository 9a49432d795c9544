"""Streams and events, now or late: `streams.py FUNCTION [ARGUMENTS]`."""

import sys
import threading
from dataclasses import replace

import torch


def forgotten_wait(waits: str) -> None:
    source = torch.ones(1 << 16).pin_memory()
    result = torch.zeros(1 << 16).pin_memory()
    x = torch.zeros(1 << 16, device="npu")
    torch.npu.synchronize()
    side, main = torch.npu.Stream(), torch.npu.current_stream()
    with torch.npu.stream(side):
        x.copy_(source, non_blocking=True)
    if waits == "True":
        main.wait_stream(side)
    result.copy_(x, non_blocking=True)
    before = int(result.sum())
    main.synchronize()
    print(before, int(result.sum()))


def events() -> None:
    first, last = (torch.npu.Event(enable_timing=True) for _ in range(2))
    stream = torch.npu.Stream()
    print(first.query())  # never recorded
    with torch.npu.stream(stream):
        first.record()
        x = torch.ones(256, 256, device="npu")
        y = (x @ x).sum()
        last.record()
    stream.wait_event(last)
    last.synchronize()
    stream.synchronize()
    print(last.query(), stream.query(), y.item(), first.elapsed_time(last) > 0)
    for _ in range(100):
        last.record(stream)
    while not last.query():  # asking gets there
        pass
    print("done")


def failure() -> None:
    """Work that fails after its launch."""
    from cann_host import aclnn

    x, y = torch.ones(4, device="npu"), torch.zeros(4, device="npu")
    stream = torch.npu.Stream()
    torch.npu.synchronize()
    copy = aclnn.OPERATORS["aclnnInplaceCopy"]

    def broken(*_: object) -> None:
        raise aclnn.RefusedError("broken on purpose")

    aclnn.OPERATORS["aclnnInplaceCopy"] = replace(copy, compute=broken)
    with torch.npu.stream(stream):
        y.copy_(x)
    print("launched")
    try:
        stream.synchronize()
    except RuntimeError:
        print("told")
    aclnn.OPERATORS["aclnnInplaceCopy"] = copy
    with torch.npu.stream(stream):
        y.copy_(x)
    stream.synchronize()
    print(y.tolist())


def threads() -> None:
    results = [0.0] * 8

    def work(i: int) -> None:
        stream = torch.npu.Stream()
        with torch.npu.stream(stream):
            x = torch.full((32, 32), float(i), device="npu")
            for _ in range(20):
                y = x.clone() + x
        stream.synchronize()
        results[i] = y.sum().item()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(results == [2.0 * i * 1024 for i in range(8)])


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
