"""Gradients that torch_npu has as operators of their own and PyTorch has not."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["GRADIENTS"]


def _matmul_backward(
    grad: Tensor, x: Tensor, y: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of torch.matmul: what a graph that torch.compile made of a training step calls."""
    left = x.unsqueeze(0) if x.dim() == 1 else x
    right = y.unsqueeze(1) if y.dim() == 1 else y
    if x.dim() == 1:
        grad = grad.unsqueeze(-1 if y.dim() == 1 else -2)
    if y.dim() == 1:
        grad = grad.unsqueeze(-1)
    x_grad = (grad @ right.mT).sum_to_size(left.shape).view_as(x) if mask[0] else None
    if not mask[1]:
        return x_grad, None
    if right.dim() == 2:  # one product of all rows, as in eager mode
        left, grad = left.reshape(-1, left.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return x_grad, (left.mT @ grad).sum_to_size(right.shape).view_as(y)


# name: its kernel, of npu tensors
GRADIENTS: dict[str, Callable[..., tuple[Tensor | None, ...]]] = {
    "aten::matmul_backward": _matmul_backward
}
