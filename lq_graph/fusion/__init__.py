"""Fewer kernels for a model that nobody has rewritten."""
