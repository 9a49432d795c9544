"""Calls an operator that cann_host does not have."""

import torch
import torch_npu

torch_npu.npu_gelu(torch.ones(3).npu())
