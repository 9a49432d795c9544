"""How an operator runs: kernels on CPU and NPU, fake kernels, autocast, torch.func."""
