"""torch_npu's expandable segments: a segment grows, is full, shrinks, and a child has a copy."""

from __future__ import annotations

import os

import torch
import torch_npu  # noqa: F401

MIB = 1 << 18  # float32 elements


def main() -> None:
    torch.set_num_threads(1)  # OpenMP's threads are not in a child, and it would wait for them
    one = torch.ones(10 * MIB, device="npu")
    two = torch.full((30 * MIB,), 2.0, device="npu")
    apart = two.data_ptr() - one.data_ptr()
    assert 10 << 20 <= apart < 20 << 20, "the second tensor begins in the first one's 20 MiB"
    assert (one.sum() + two.sum()).item() == 70 * MIB
    print("grown")
    try:
        torch.empty(300 * MIB, device="npu")
    except torch.OutOfMemoryError:
        print("out of memory")
    del two
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    assert total - free < 50 << 20, (free, total)
    assert one.sum().item() == 10 * MIB
    print("smaller", flush=True)
    child = os.fork()
    if child == 0:
        one.fill_(3.0)
        assert one.sum().item() == 30 * MIB
        print("child", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    assert one.sum().item() == 10 * MIB
    print("parent")


main()
