"""Ordinary aten operators on npu tensors: `kernels` computes them on the CPU, `captured` keeps them
for the replays of a captured graph."""
