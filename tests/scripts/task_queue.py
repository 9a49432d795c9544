"""torch_npu's task queue, which runs our Python on its own thread: `task_queue.py FUNCTION ...`."""

import io
import sys
from dataclasses import replace

import torch
import torch_npu

import cann_host


def no_interpreter_lock() -> None:
    """torch_npu waits for its queue with the lock held, in torch.load onto the device say."""
    x = torch.randn(64, 64).npu()
    saved = io.BytesIO()
    torch.save({i: torch.full((32, 32), float(i)) for i in range(9)}, saved)
    right = []
    for _ in range(3):
        for _ in range(200):
            y = x.clone()  # waits in the queue
        saved.seek(0)
        loaded = torch.load(saved, map_location="npu")
        right += [loaded[i].sum().item() == 1024 * i for i in range(9)]
        for _ in range(200):
            y.copy_(x)
        storage = torch.UntypedStorage(64, device="npu")
        storage.copy_(torch.UntypedStorage(64))
        right.append(torch.equal(y.cpu(), x.cpu()))
    late = torch.empty(64, 64).pin_memory()
    late.copy_(x.clone(), non_blocking=True)
    torch.npu.synchronize()
    print(all(right), torch.equal(late, x.cpu()), torch.equal((x @ x).cpu(), x.cpu() @ x.cpu()))


def failure(fault: str) -> None:
    x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
    torch.npu.synchronize()
    told, read = [], []
    with cann_host.faults(fault):
        for i in range(30):
            try:
                y.copy_(x * (i + 1))
                read.append(y.cpu()[0].item() == i + 1)
            except RuntimeError as error:
                told.append(str(error))
    print(all(read), len(told) > 0, len(read) + len(told), told[0].replace("\n", " "))
    print("do not trust any results" in told[-1])


def refusal() -> None:
    from cann_host import aclnn

    x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
    copy = aclnn.OPERATORS["aclnnInplaceCopy"]

    def broken(*_: object) -> None:
        raise aclnn.RefusedError("broken on purpose")

    for broken_one in (replace(copy, check=broken), replace(copy, compute=broken)):
        torch.npu.synchronize()
        aclnn.OPERATORS["aclnnInplaceCopy"] = broken_one
        try:
            y.copy_(x)
            torch.npu.synchronize()
        except RuntimeError as error:
            print("broken on purpose (CANN error 161002, invalid parameter)" in str(error))
        aclnn.OPERATORS["aclnnInplaceCopy"] = copy
        y.zero_().copy_(x)
        print(y.sum().item())


if __name__ == "__main__":
    if sys.argv[1] != "exit":
        globals()[sys.argv[1]](*sys.argv[2:])
    else:  # while launches wait in the queue; at the top, for locals are gone before the process
        x = torch.ones(64, 64, dtype=torch.int8, device="npu")
        s = torch_npu.npu_trans_quant_param(torch.ones(64, device="npu"))
        for _ in range(300):
            y = torch_npu.npu_quant_matmul(x, x.t(), s, output_dtype=torch.int8)
        print(y.sum().item())
        for _ in range(300):
            y = torch_npu.npu_quant_matmul(x, x.t(), s, output_dtype=torch.int8)
