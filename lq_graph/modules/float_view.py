"""FloatView: a tensor that is computed from other tensors when it is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import LinearQuantTypeError

__all__ = ["FloatView"]


class FloatView(Tensor):
    """A tensor whose values are computed for each operator that reads it.

    Its dtype, shape and device are known without computing. Models read the dtype of a linear
    layer's weight at every call, and some multiply by the weight themselves. Writing to it, or to a
    view of it, is refused, because the quantized tensors would not change.

    Args:
        compute: returns the values.
        shape, dtype, device, strides: of the values; strides None for a contiguous tensor.

    Raises:
        LinearQuantTypeError: it is written into.
    """

    refusal = (
        "QuantizedLinear: its weight or bias was written to {how}, but they are computed from the "
        "quantized tensors, which would not change. What to do: change the float model and "
        "quantize it afterwards, or assign to the parameters of layer.linear."
    )
    _compute: Callable[[], Tensor]
    _is_param = True  # isinstance(layer.weight, nn.Parameter), as of nn.Linear
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        compute: Callable[[], Tensor],
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        strides: tuple[int, ...] | None = None,
    ) -> FloatView:
        out: FloatView = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        out._compute = compute
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        given = [*zip(schema.arguments, args, strict=False)]
        given += [(argument, kwargs.get(argument.name)) for argument in schema.arguments]
        for argument, value in given:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written:
                for leaf in tree_leaves(value):
                    if isinstance(leaf, FloatView):
                        leaf._refuse(f"by {func}")
        kinds = [type(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FloatView)]
        args, kwargs = tree_map_only(FloatView, lambda view: view._compute(), (args, kwargs))
        out = func(*args, **kwargs)
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        )
        return tree_map_only(Tensor, partial(_view_of, kinds[0]), out) if is_view else out

    @property
    def data(self) -> Tensor:
        """Itself, because it has no gradient."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        del value
        self._refuse("by an assignment to its data")

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse("by index")

    def _refuse(self, how: str) -> NoReturn:
        raise LinearQuantTypeError(self.refusal.format(how=how))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._compute().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._compute().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return repr(self._compute())

    def numpy(self, *, force: bool = False) -> Any:
        """A numpy array of the values."""
        return self._compute().numpy(force=force)

    def tolist(self) -> Any:
        """The values as Python numbers."""
        return self._compute().tolist()


def _view_of(kind: type[FloatView], values: Tensor) -> FloatView:
    return kind(lambda: values, values.shape, values.dtype, values.device, values.stride())
