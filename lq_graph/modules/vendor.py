"""The vendor's LinearQuant modules, and their conversion to ours and back."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor, nn

from ..errors import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
from ..rules.tables import STORAGE_DTYPES, dtype_name
from .linear_quant import PARAMETERS, LinearQuant
from .places import Place, places_of, put
from .quantized_linear import QuantizedLinear
from .replaceable import carry_over, why_not_replaceable
from .stated_dtypes import check_whole_words
from .supported import plan_of_layer
from .transaction import all_or_nothing, keeps_grad_mode

__all__ = ["convert", "vendor_layers"]

_TARGETS = ("lq_graph", "torch_npu")


def vendor_layers() -> tuple[type[nn.Module], ...]:
    """torch_npu's LinearQuant and LinearA8W8Quant; empty if torch_npu is not imported, because then
    a model cannot hold them."""
    if sys.modules.get("torch_npu") is None:
        return ()
    from torch_npu.contrib.module import LinearA8W8Quant
    from torch_npu.contrib.module import LinearQuant as VendorLinearQuant

    return (VendorLinearQuant, LinearA8W8Quant)


@keeps_grad_mode
def convert(model: nn.Module, to: str = "lq_graph") -> nn.Module:
    """Replace the vendor's LinearQuant and LinearA8W8Quant modules by ours, or ours by the
    vendor's LinearQuant, in place.

    The new modules hold the same Parameter objects, so nothing is copied and nothing moves. One
    exception: the vendor's module is made with a float32 weight, and load_state_dict casts int8
    values to it. Such a weight becomes int8 again.

    Atomic: if a step fails, the model is unchanged; Ctrl-C waits for the end. Subclasses are left
    alone, because their forward may differ, and a warning names them. Plain attributes of a module
    are copied to the new module; a module with hooks or its own forward is refused.

    Args:
        model: any module. If it is itself such a layer, it is unchanged and the new one is
            returned.
        to: "lq_graph", or "torch_npu" for the way back.

    Returns:
        The model, or the new layer if the model is itself such a layer.

    Raises:
        LinearQuantValueError: another `to`.
        LinearQuantTypeError: a float32 weight with values that are not int8; a layer whose row of
            the support table a newer CANN brought; a module that does more than its class does;
            with to="torch_npu", the layer in a dynamic QuantizedLinear, which passes it a
            pertoken_scale with each call.

    Warns:
        UserWarning: a subclass is left alone.

    Source: torch_npu.contrib.module.LinearQuant and LinearA8W8Quant.
    """
    if to not in _TARGETS:
        raise LinearQuantValueError(
            f"convert: to is {to!r}; allowed are {' and '.join(map(repr, _TARGETS))}."
        )
    kinds = vendor_layers() if to == "lq_graph" else (LinearQuant,)
    places = places_of(model)
    # All replacements are made before the first one is put in place. Parameters made in inference
    # mode could not be used outside it.
    new: dict[nn.Module, nn.Module] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, old in model.named_modules():
            if isinstance(old, kinds) and _is_convertible(name, old, places.get(old, []), kinds):
                new[old] = _ours(name, old) if to == "lq_graph" else _vendors(old)
                _check_cann(name, new[old] if to == "lq_graph" else old)
                carry_over(old, new[old])
    with all_or_nothing() as undo:
        for old, replacement in new.items():
            for parent, name in places.get(old, []):
                undo.callback(put, parent, name, old)
                put(parent, name, replacement)
    return new.get(model, model)


def _check_cann(name: str, layer: nn.Module) -> None:
    """Refuse a layer of ours whose row a newer CANN brought. Other rules are for its calls."""
    assert isinstance(layer, LinearQuant)
    try:
        plan_of_layer(layer)
    except LinearQuantError as error:
        if error.refusal is not None and error.refusal.since:
            raise error.in_layer("convert", name or "the model") from None


def _is_convertible(
    name: str,
    old: nn.Module,
    places: list[Place],
    kinds: tuple[type[nn.Module], ...],
) -> bool:
    """Whether to replace a module; refuses a module that does more than its class does."""
    what = f"convert: {name or 'the model'}"
    if type(old) not in kinds:
        why = why_not_replaceable(old, kinds[0])
        warnings.warn(f"{what} is left alone: {why}.", stacklevel=4)  # past the decorator
        return False
    why = why_not_replaceable(old, type(old), places)
    if any(isinstance(parent, QuantizedLinear) and parent.dynamic for parent, _ in places):
        why = (
            "its QuantizedLinear gives it a pertoken_scale with each call, and the vendor's module "
            "takes none"
        )
    if why:
        raise LinearQuantTypeError(
            f"{what}: {why}; the model is unchanged. What to do: remove that first, or convert "
            "the other parts of the model."
        )
    return True


def _settings(old: nn.Module) -> dict[str, object]:
    """The constructor's arguments that all three classes share."""
    flags = {name: getattr(old, name) is not None for name in ("bias", "offset", "pertoken_scale")}
    return {**flags, "output_dtype": old.output_dtype}


def _ours(name: str, old: nn.Module) -> LinearQuant:
    weight = old.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in STORAGE_DTYPES:
        weight = nn.Parameter(_as_int8(name, weight.data), requires_grad=False)
    if isinstance(old.in_features, int):
        check_whole_words(f"convert: {name or 'the model'}", old.in_features, weight)
    new = LinearQuant(
        # not the vendor's in_features, which may count int32 words
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

    # size 1: its parameters are replaced. Not in torch.device("meta"): Ctrl-C could leave it set.
    new: nn.Module = VendorLinearQuant(1, 1, **_settings(old))
    new.in_features, new.out_features = old.in_features, old.out_features
    _share(old, new)
    return new


def _share(old: nn.Module, new: nn.Module) -> None:
    for name in PARAMETERS:
        new.register_parameter(name, old._parameters[name])


def _as_int8(name: str, weight: Tensor) -> Tensor:
    """The int8 values that a float weight holds."""
    values = weight.to(torch.int8)
    if weight.is_floating_point() and bool((values == weight).all()):
        return values
    raise LinearQuantTypeError(
        f"convert: {name or 'the model'}: weight is {dtype_name(weight.dtype)} and holds values "
        "that are not int8; allowed is int8, int32 carrying int4, or a float weight into which "
        "an int8 state dict was loaded. What to do: load the weights first, with "
        "`layer.weight.data = tensor`."
    )
