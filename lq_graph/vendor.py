"""The vendor's LinearQuant modules, and the way from them to ours and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .errors import LinearQuantTypeError, LinearQuantValueError
from .formats import STORAGE_DTYPES, dtype_name
from .module import PARAMETERS, LinearQuant

__all__ = ["convert", "vendor_layers"]

_TARGETS = ("lq_graph", "torch_npu")


def vendor_layers() -> tuple[type[nn.Module], ...]:
    """torch_npu's LinearQuant and LinearA8W8Quant; nothing where torch_npu is not imported, for a
    model can hold none there."""
    if sys.modules.get("torch_npu") is None:
        return ()
    from torch_npu.contrib.module import LinearA8W8Quant
    from torch_npu.contrib.module import LinearQuant as VendorLinearQuant

    return (VendorLinearQuant, LinearA8W8Quant)


def convert(model: nn.Module, to: str = "lq_graph") -> nn.Module:
    """Replace the vendor's LinearQuant and LinearA8W8Quant modules by ours, or ours by the
    vendor's LinearQuant, in place.

    The new modules hold the same Parameter objects, so nothing is copied and nothing moves. One
    exception: the vendor's module starts with a float32 weight, into which a state dict's int8
    values are cast; such a weight becomes int8 if it holds int8 values, and is refused if not.

    All or nothing: on an error the model is as before. Subclasses of the vendor's modules, whose
    forward may differ, are left alone. Hooks of a replaced module are not carried over.

    Args:
        model: any module. If it is itself a layer to be replaced, only the result is new.
        to: "lq_graph", or "torch_npu" for the way back.

    Returns:
        The model, or the new layer where the model is one.

    Raises:
        LinearQuantValueError: another `to`.
        LinearQuantTypeError: a float32 weight that holds other than int8 values.
    """
    if to not in _TARGETS:
        raise LinearQuantValueError(
            f"convert: to is {to!r}; allowed are {' and '.join(map(repr, _TARGETS))}."
        )
    kinds = vendor_layers() if to == "lq_graph" else (LinearQuant,)
    # every replacement is made before the first one is put in place
    new = {
        old: _ours(name, old) if to == "lq_graph" else _vendors(old)
        for name, old in model.named_modules()
        if type(old) in kinds
    }
    for parent, name, child in list(_children(model)):
        if child in new:
            setattr(parent, name, new[child])
    return new.get(model, model)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every place a module is held in, shared ones as often as they are held."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child


def _settings(old: nn.Module) -> dict[str, object]:
    """The constructor's arguments that all three classes share."""
    flags = {name: getattr(old, name) is not None for name in ("bias", "offset", "pertoken_scale")}
    return {**flags, "output_dtype": old.output_dtype}


def _ours(name: str, old: nn.Module) -> LinearQuant:
    weight = old.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in STORAGE_DTYPES:
        weight = nn.Parameter(_as_int8(name, weight.data), requires_grad=False)
    new = LinearQuant(
        # the vendor's in_features is not looked at again, and some count int32 words in it
        weight.shape[-1] * STORAGE_DTYPES[weight.dtype],
        weight.shape[-2],
        device="meta",  # no memory: the parameters are replaced
        dtype=weight.dtype,
        **_settings(old),  # type: ignore[arg-type]
    )
    _share(old, new)
    new.weight = weight
    return new


def _vendors(old: nn.Module) -> nn.Module:
    from torch_npu.contrib.module import LinearQuant as VendorLinearQuant

    # its parameters are replaced, so none of any size is made; torch.device("meta") would make none
    # either, but Ctrl-C could leave it set
    new: nn.Module = VendorLinearQuant(1, 1, **_settings(old))
    new.in_features, new.out_features = old.in_features, old.out_features
    _share(old, new)
    return new


def _share(old: nn.Module, new: nn.Module) -> None:
    for name in PARAMETERS:
        new.register_parameter(name, old._parameters[name])
    new.train(old.training)


def _as_int8(name: str, weight: Tensor) -> Tensor:
    """The int8 values a float weight holds."""
    values = weight.to(torch.int8)
    if weight.is_floating_point() and bool((values == weight).all()):
        return values
    raise LinearQuantTypeError(
        f"convert: {name or 'the model'}: weight is {dtype_name(weight.dtype)} and holds other "
        "than int8 values; allowed is int8, int32 carrying int4, or a float weight into which an "
        "int8 state dict was loaded. What to do: load the weights first, by "
        "`layer.weight.data = tensor`."
    )
