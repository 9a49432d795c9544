"""The operators have no derivative: rounding has none. Whoever asks for one is told.

    backward             a warning when a tensor that requires grad comes in; what goes out does not
    forward mode (jvp)   an error
    torch.func           grad, vjp, jvp of what the operators take: an error; vmap: computed

A call under no_grad pays 0.1 us for this, the look at whether gradients are recorded: an Autograd
kernel in Python would add 2 us to each call, under no_grad too. torch.func has a dispatch key that
is active only inside its transforms; that is where its kernels are.
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

__all__ = ["tell_of_gradients", "under_torch_func"]

_Transform = functorch.TransformType


def tell_of_gradients(op: str, *inputs: Tensor | None) -> bool:
    """Say, where a derivative by one of the float inputs is wanted, that there is none.

    Returns:
        Whether one requires grad and gradients are recorded: what the operator computes with has to
        run under no_grad then, or a part of the gradient would pass, through the scales.

    Warns:
        UserWarning: one requires grad, and gradients are recorded.

    Raises:
        LinearQuantTypeError: one carries a tangent (forward mode).
    """
    records, forward_mode = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if not (records or forward_mode):
        return False
    for tensor in inputs:
        if tensor is None:
            continue
        if forward_mode and _has_tangent(tensor):
            raise LinearQuantTypeError(
                _sentence(op, "an input carries a tangent (forward-mode derivative)")
            )
        if records and tensor.requires_grad:
            warnings.warn(
                f"{op}: an input requires grad, and no gradient passes through a quantized layer: "
                "what comes before it gets none from here. What to do: for inference, call the "
                "model under torch.no_grad() or torch.inference_mode(); to train, use the float "
                "model.",
                stacklevel=3,
            )
            return True
    return False


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _sentence(op: str, what: str) -> str:
    return (
        f"{op}: {what}; quantization has no derivative, and 0 would be wrong. What to do: "
        "differentiate the float model, or detach what goes in."
    )


def under_torch_func(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """The operator's kernel inside torch.func's transforms (FuncTorchDynamicLayerFrontMode)."""
    current = functorch.peek_interpreter_stack()
    assert current is not None
    interpreter = coerce_cinterpreter(current)
    transform = interpreter.key()
    args, kwargs = pytree.tree_map_only(Tensor, functorch.unwrap_if_dead, (tuple(args), kwargs))
    if transform == _Transform.Vmap:
        return _each(op, interpreter, args, kwargs)
    if transform == _Transform.Functionalize:
        return _functional(op, interpreter, args, kwargs)
    jvp = transform == _Transform.Jvp
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and (_has_tangent(leaf) if jvp else leaf.requires_grad):
            asked = "torch.func asks for its " + ("jvp" if jvp else "grad or vjp")
            raise LinearQuantTypeError(_sentence(op.name().split("::")[1], asked))
    with interpreter.lower():
        return op(*_unwrapped(args, interpreter), **_unwrapped(kwargs, interpreter))


def _unwrapped(values: Any, interpreter: FuncTorchInterpreter) -> Any:
    """What is not differentiated needs no wrapping at this level."""
    level = interpreter.level()
    return pytree.tree_map_only(Tensor, lambda t: functorch._unwrap_for_grad(t, level), values)


def _each(op: OpOverload, interpreter: FuncTorchInterpreter, args: Any, kwargs: Any) -> Any:
    """vmap: one call for each of the batch."""
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


def _functional(op: OpOverload, interpreter: FuncTorchInterpreter, args: Any, kwargs: Any) -> Any:
    """functionalize: nothing is written in place here."""
    args, kwargs = pytree.tree_map_only(
        Tensor,
        lambda t: (
            functorch._unwrap_functional_tensor(t, False) if torch._is_functional_tensor(t) else t
        ),
        (args, kwargs),
    )
    with interpreter.lower():
        out = op(*args, **kwargs)
    return pytree.tree_map(lambda t: functorch._wrap_functional_tensor(t, interpreter.level()), out)
