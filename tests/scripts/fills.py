"""Prints what is in device memory that nothing wrote: `python -m cann_host --fill nan fills.py`."""

import torch
import torch_npu

for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64):
    (value,) = set(map(str, torch.empty(1000, dtype=dtype, device="npu").tolist()))
    print(dtype, value)

size = 1 << 18
ones = torch.ones(size, device="npu")
torch_npu.npu.synchronize()
del ones  # torch_npu would give its memory to the next tensor of this size
(value,) = set(map(str, torch.empty(size, device="npu").tolist()))
print("after ones", value)

print("written", (torch.ones(3, device="npu") + 1).tolist())

result = torch.empty(4, dtype=torch.float16, device="npu")  # of an operator that forgets a half
result[:2] = 1
print("left out", result.tolist())
