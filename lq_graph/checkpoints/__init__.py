"""Checkpoints of quantized models: how files are read and written."""
