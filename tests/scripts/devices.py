"""Devices, memory, random numbers: `devices.py FUNCTION`."""

import multiprocessing
import sys
from typing import Any

import torch

GiB = 1 << 30


def several() -> None:
    print(torch.npu.device_count())
    a = torch.full((3,), 2.0, device="npu:1")
    b = a.to("npu:0")
    print(a.device, (a * a).device, b.device, torch.equal(a.cpu(), b.cpu()))
    with torch.npu.device(1):
        print(torch.ones(1, device="npu").device, torch.ones(1).npu().device)
    torch.npu.set_device(2)
    print(torch.zeros(1, device="npu").device, torch.npu.current_stream().device)
    print([torch.npu.memory_allocated(i) > 0 for i in range(3)])
    try:
        torch.ones(1, device="npu:3")
    except RuntimeError:
        print("no npu:3")


def memory_limit() -> None:
    def allocate(size: int, device: str = "npu:0") -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    print(torch.npu.get_device_properties(0).total_memory == 4 * GiB)
    held = allocate(3 * GiB)
    free, total = torch.npu.mem_get_info()
    print(total == 4 * GiB, free <= GiB, torch.npu.memory_allocated() >= 3 * GiB)
    try:
        allocate(2 * GiB)
    except torch.OutOfMemoryError as error:
        print("Tried to allocate 2.00 GiB" in str(error), "4.00 GiB total" in str(error))
    other = allocate(3 * GiB, "npu:1")  # each device has its own
    del held
    print(allocate(3 * GiB).numel() == 3 * GiB)  # what was freed can be had again
    print(torch.npu.max_memory_allocated() < 4 * GiB)
    del other


def pinned_memory() -> None:
    x = torch.arange(8.0).pin_memory()
    y = x.to("npu", non_blocking=True)
    torch.npu.synchronize()
    print(x.is_pinned(), torch.ones(1).is_pinned(), torch.equal(y.cpu(), x))


def seeds() -> None:
    def draw() -> list[Any]:
        d = "npu"
        one = torch.ones(8, device=d)
        return [
            t.tolist()
            for t in (
                torch.randn(2, device=d),
                torch.rand(2, device=d),
                torch.randperm(5, device=d),
                torch.randint(9, (2,), device=d),
                torch.bernoulli(one / 2),
                one.clone().normal_(),
                torch.nn.functional.dropout(one),
                torch.multinomial(one, 3),
            )
        ]

    torch.npu.manual_seed(3)
    first, second = draw(), draw()
    torch.npu.manual_seed(3)
    again = draw()
    before = torch.random.get_rng_state()
    draw()
    after = torch.random.get_rng_state()
    print(first == again, first != second, torch.equal(before, after))


def child(queue: Any) -> None:
    import cann_host

    there = torch.ones(2).npu().tolist()
    queue.put((cann_host.info()["soc"], torch.npu.device_count(), there))


def spawned() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
    print(process.exitcode)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
