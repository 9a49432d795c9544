"""The product lq_graph takes for a device it knows no table for."""

import torch

import lq_graph

torch.npu.get_device_name = lambda *_: "Ascend910A"  # cann_host has no such chip
print(lq_graph.get_product().key)
