"""A rank of torchrun: prints a sum over the ranks."""

import torch
import torch.distributed as dist

dist.init_process_group("hccl")
torch.npu.set_device(dist.get_rank())
x = torch.full((2,), dist.get_rank() + 1.0, device="npu")
dist.all_reduce(x)
print(f"rank {dist.get_rank()}: {x.tolist()}", flush=True)
dist.destroy_process_group()
