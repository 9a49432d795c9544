"""What `python -m cann_host launched.py` gives a program; exits with 7."""

import sys

import launched_beside
import torch

print(sys.argv[1:], __name__, launched_beside.ANSWER, torch.npu.get_device_name())
print((torch.ones(3, device="npu") + 1).tolist())
sys.exit(7)
