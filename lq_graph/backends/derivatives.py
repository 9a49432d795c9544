"""The operators have no derivative, because rounding has none. A caller who asks for one gets:

    backward             an input that requires grad: a warning; the output does not require grad
    forward mode (jvp)   an error
    torch.func           grad, vjp, jvp by an operator's input: an error; vmap: computed

The kernels check this themselves, which costs 0.1 us in a call under no_grad. An Autograd kernel in
Python would cost 2 us in every call. torch.func's kernels have their own dispatch key, which is
active only inside its transforms.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import LinearQuantTypeError
from .compat import (
    FuncTorchInterpreter,
    OpOverload,
    coerce_cinterpreter,
    forward_ad,
    functorch,
    pytree,
)

__all__ = ["asks_for_gradients", "check_gradients", "under_torch_func"]

_Transform = functorch.TransformType
# the float inputs of each operator, as the kernels pass them
_INPUTS = {
    "linear_quant": ("scale", "offset", "pertoken_scale", "bias"),
    "trans_quant_param": ("scale", "offset"),
    "dynamic_quant": ("x",),
    "static_quant": ("x", "scale_reciprocal", "offset"),
}


def asks_for_gradients(*inputs: Tensor | None) -> bool:
    """Whether `check_gradients` may warn or refuse."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def check_gradients(op: str, *inputs: Tensor | None) -> bool:
    """Warn or refuse if a derivative by one of the float inputs is asked for.

    Returns:
        True if an input requires grad and gradients are recorded. The kernel must then compute
        under no_grad; otherwise a part of the gradient would pass through the scales.

    Warns:
        UserWarning: an input requires grad, and gradients are recorded.

    Raises:
        LinearQuantTypeError: an input carries a tangent (forward mode).
    """
    grad_enabled, forward_mode = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if not (grad_enabled or forward_mode):
        return False
    for at, tensor in enumerate(inputs):
        if tensor is None:
            continue
        if forward_mode and _has_tangent(tensor):
            raise LinearQuantTypeError(
                _no_derivative(op, "an input carries a tangent (forward-mode derivative)")
            )
        if grad_enabled and tensor.requires_grad:
            warnings.warn(
                f"{op}: {_INPUTS[op][at]} requires grad, and no gradient passes through a "
                "quantized layer: the layers before it get no gradient. What to do: for "
                "inference, call the model under torch.no_grad() or torch.inference_mode(); to "
                "train, use the float model.",
                stacklevel=3,
            )
            return True
    return False


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _no_derivative(op: str, what: str) -> str:
    return (
        f"{op}: {what}; quantization has no derivative, and 0 would be wrong. What to do: "
        "differentiate the float model, or detach the input."
    )


def under_torch_func(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """The operator's kernel inside torch.func's transforms (FuncTorchDynamicLayerFrontMode)."""
    current = functorch.peek_interpreter_stack()
    assert current is not None
    interpreter = coerce_cinterpreter(current)
    transform = interpreter.key()
    args, kwargs = pytree.tree_map_only(Tensor, functorch.unwrap_if_dead, (tuple(args), kwargs))
    if transform == _Transform.Vmap:
        return _vmap(op, interpreter, args, kwargs)
    if transform == _Transform.Functionalize:
        return _functionalize(op, interpreter, args, kwargs)
    jvp = transform == _Transform.Jvp
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and (_has_tangent(leaf) if jvp else leaf.requires_grad):
            asked = "torch.func asks for its " + ("jvp" if jvp else "grad or vjp")
            raise LinearQuantTypeError(_no_derivative(op.name().split("::")[1], asked))
    with interpreter.lower():
        return op(*_unwrapped(args, interpreter), **_unwrapped(kwargs, interpreter))


def _unwrapped(values: Any, interpreter: FuncTorchInterpreter) -> Any:
    """The values without the wrapper of this level: nothing here is differentiated."""
    level = interpreter.level()
    return pytree.tree_map_only(Tensor, lambda t: functorch._unwrap_for_grad(t, level), values)


def _vmap(op: OpOverload, interpreter: FuncTorchInterpreter, args: Any, kwargs: Any) -> Any:
    """vmap: one call for each item of the batch."""
    level = interpreter.level()
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batched = [
        functorch._unwrap_batched(leaf, level) if isinstance(leaf, Tensor) else (leaf, None)
        for leaf in leaves
    ]
    with interpreter.lower():
        if all(dim is None for _, dim in batched):
            return op(*args, **kwargs)
        outs = []
        for index in range(interpreter.batch_size()):  # type: ignore[attr-defined]
            own = [leaf if dim is None else leaf.select(dim, index) for leaf, dim in batched]
            own_args, own_kwargs = pytree.tree_unflatten(own, spec)
            outs.append(op(*own_args, **own_kwargs))
        stacked = pytree.tree_map(lambda *each: torch.stack(each), outs[0], *outs[1:])
    return pytree.tree_map(lambda out: functorch._add_batch_dim(out, 0, level), stacked)


def _functionalize(
    op: OpOverload, interpreter: FuncTorchInterpreter, args: Any, kwargs: Any
) -> Any:
    """functionalize: the operators write nothing in place, so they are called as they are."""

    def inner(tensor: Tensor) -> Tensor:
        if not torch._is_functional_tensor(tensor):
            return tensor
        torch._sync(tensor)  # type: ignore[attr-defined]  # writes into its views
        found: Tensor = functorch._unwrap_functional_tensor(tensor, False)
        return found

    args, kwargs = pytree.tree_map_only(Tensor, inner, (args, kwargs))
    with interpreter.lower():
        out = op(*args, **kwargs)
    return pytree.tree_map(lambda t: functorch._wrap_functional_tensor(t, interpreter.level()), out)
