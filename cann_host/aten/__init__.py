"""Ordinary aten operators on npu tensors: `kernels` computes them on the CPU, `captured` records
them for the replays of a captured graph."""
