"""Loads the tensors of the files outside the quantized layers: checks them, then sets them,
atomically."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..backends.npu import cast_format, format_of
from ..rules.tables import ND, dtype_name
from .choose import patterns_for, some, weight_with
from .experts import check_experts
from .files import CheckpointError, Refusals, refuse, shown
from .folder import CheckpointFiles
from .tensors import bit_equal, memory_of

__all__ = ["RestOfModel", "StateChanges", "check_meta", "check_rest", "converted"]

_PLAIN = "load before the model is quantized, split or compressed by another tool"
_SAME_MODEL = "make the model that these files were saved from: compare its config.json"
_EXTRA = "_extra_state"  # how the name of an extra state ends in a state dict


@dataclass(frozen=True)
class _Place:
    """The place of a tensor, or of an extra state (nn.Module.get_extra_state), in the model."""

    module: nn.Module
    name: str
    tensor: Any  # a Tensor, unless it is an extra state

    @property
    def is_extra(self) -> bool:
        """Whether it is an extra state, not a parameter or buffer."""
        return self.name == _EXTRA


class RestOfModel:
    """The tensors and extra states of a model outside the layers that are replaced.

    Args:
        model: the model to load into.
        replaced: the layers that are replaced.

    Attributes:
        model: the model.
        places: the places that a state dict has, by name; one tensor may have several names.
        others: names of tensors on meta that a state dict does not have.

    Raises:
        CheckpointError: the model's state dict has other names than its modules.
    """

    def __init__(self, model: nn.Module, replaced: set[nn.Module]) -> None:
        self.model = model
        self.places: dict[str, _Place] = {}
        self.others: list[str] = []
        gone = {inner for module in replaced for inner in module.modules()}
        names = [(n, m) for n, m in model.named_modules(remove_duplicate=False)]
        prefixes = tuple(f"{name}." for name, module in names if module in gone)
        state = {k: v for k, v in model.state_dict().items() if not k.startswith(prefixes)}
        for prefix, module in names:
            if module in gone:
                continue
            dot = f"{prefix}." if prefix else ""
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                if name not in module._non_persistent_buffers_set:
                    self.places[dot + name] = _Place(module, name, tensor)
                elif tensor.is_meta:
                    self.others.append(dot + name)
            if (key := dot + _EXTRA) in state:
                self.places[key] = _Place(module, _EXTRA, state[key])
            self.others += [
                dot + name
                for name, value in vars(module).items()
                if isinstance(value, Tensor) and value.is_meta
            ]
        if different := sorted(set(state) ^ set(self.places), key=str):
            raise CheckpointError(
                f"load_checkpoint: {shown(different[0])}: model.state_dict() and the model's "
                "modules give different names to tensors, so it is unknown which tensor of the "
                "files is which. What to do: remove the hooks that rename them, and load again."
            )


def check_rest(
    held: RestOfModel,
    files: CheckpointFiles,
    used: set[str],
    left_out: Mapping[str, str],
    refusals: Refusals,
) -> Iterable[str]:
    """The keys of the files that are loaded by name. No tensor is read.

    Args:
        held: the model's places.
        files: of the checkpoint.
        used: keys of the quantized layers, and of tensors that are not loaded.
        left_out: tensors that are not loaded, with the reason.
        refusals: a key that the model does not have, or has with another shape or kind of dtype; a
            tensor of the model that the files do not have.
    """
    rest = {key: None for key in files if key not in used}  # in the order of the files
    unknown = [key for key in rest if key not in held.places]
    # files hold tied parameters once
    given = {memory_of(held.places[key].tensor) for key in rest if key in held.places}
    missing = [
        key
        for key, place in sorted(held.places.items())
        if key not in rest
        and not (isinstance(place.tensor, Tensor) and memory_of(place.tensor) in given)
    ]
    if unknown:
        with refusals.each():
            _refuse_unknown(held, files, unknown, missing)
    for key in rest:
        if key in held.places:
            with refusals.each():
                _check_key(held.places[key], files, key)
    if missing:
        with refusals.each():
            _refuse_missing(files, missing, left_out)
    return rest


def check_meta(held: RestOfModel) -> None:
    """Refuse a model of which tensors would stay on meta, because no file holds them."""
    if held.others:
        more = "" if len(held.others) == 1 else f" and {len(held.others) - 1} more"
        raise CheckpointError(
            f"load_checkpoint: {held.others[0]}{more} would stay on meta: files do not hold what a "
            "module computes in its constructor (non-persistent buffers, plain attributes). What "
            "to do: make the modules that have them again, outside torch.device('meta'), and set "
            "them in the model before loading; or make the model with "
            "accelerate.init_empty_weights(include_buffers=False)."
        )


def _refuse_unknown(
    held: RestOfModel, files: CheckpointFiles, unknown: list[str], missing: list[str]
) -> NoReturn:
    """Refuse tensors that the model has not."""
    tensors = {key: place.tensor for key, place in held.places.items()}
    for key in {key.partition(".experts.")[0]: key for key in reversed(unknown)}.values():
        check_experts(files.file_of(key), key, tensors)
    # tensors that cannot be ignored first: ignoring the others would not help
    of_layers = [key for key in unknown if weight_with(key, files)]
    unknown = of_layers + [key for key in unknown if key not in set(of_layers)]
    names = [files.name_of(key) for key in unknown]
    found = "no such parameter in the model"
    if others := names[1:]:
        found += f", nor {some(others)}"
    modules = dict(held.model.named_modules(remove_duplicate=False))
    if of_layers and of_layers[0].rpartition(".")[0] in modules:
        floats = of_layers[0].endswith(".bias")
        said = "use the JSON that was saved with these weights: it says how the layer is quantized"
        todo = _SAME_MODEL if floats else said
    elif missing:
        todo = f"{_SAME_MODEL}. It has {some(missing)}, which the files have not"
    else:
        patterns = patterns_for(names, held.model, map(files.name_of, files))
        todo = f"if the model needs none of them, pass ignore=[{patterns}]"
    refuse(files.file_of(unknown[0]), names[0], "a tensor the model has", found, todo)


def _refuse_missing(
    files: CheckpointFiles, missing: list[str], left_out: Mapping[str, str]
) -> NoReturn:
    """Refuse a model with tensors that would keep values of their own."""
    expected = "a tensor for every parameter of the model"
    found = "no such tensor"
    if others := missing[1:]:
        found += f", nor {some(others)}"
    todo = _SAME_MODEL
    if why := next((left_out[key] for key in missing if key in left_out), ""):
        found, todo = f"{found}: {why}", "ignore only what the model has not"
    refuse(files.path, missing[0], expected, found, todo)


def _check_key(place: _Place, files: CheckpointFiles, key: str) -> None:
    """Refuse a tensor of another shape or kind of dtype than the model's."""
    dtype, shape = files.header(key)
    wanted = place.tensor
    if why := _why_not_loadable(place):
        refuse(files.file_of(key), key, "a plain tensor in the model", why, _PLAIN)
    float_pair = (
        dtype is not None
        and dtype.is_floating_point == wanted.dtype.is_floating_point
        and dtype.is_complex == wanted.dtype.is_complex
    )
    if shape != tuple(wanted.shape) or not float_pair:
        expected = f"{dtype_name(wanted.dtype)} {tuple(wanted.shape)}"
        found = f"{dtype and dtype_name(dtype)} {shape}"
        refuse(files.file_of(key), key, expected, found, _SAME_MODEL)


def _why_not_loadable(place: _Place) -> str:
    """Why a tensor of the model cannot be loaded from the files; empty if it can."""
    tensor = place.tensor
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    if is_lazy(tensor):
        return "a lazy tensor, without a size: run the model once, or make it with sizes"
    plain = type(tensor) in (Tensor, nn.Parameter) or (
        isinstance(tensor, nn.Parameter) and type(tensor.data) is Tensor and not tensor.is_meta
    )
    if not plain:
        return f"a {type(tensor).__name__}"
    if tensor.is_quantized:
        return f"one of {dtype_name(tensor.dtype)}"
    return "" if tensor.layout == torch.strided else f"one of layout {tensor.layout}"


def converted(files: CheckpointFiles, key: str, wanted: Tensor) -> Tensor:
    """A tensor of the files, converted to the dtype, device and format of the model's tensor.

    Raises:
        CheckpointError: it holds a value that the dtype cannot hold.
    """
    tensor = files.read(key)
    dtype = wanted.dtype
    if tensor.dtype != dtype:
        new = tensor.to(dtype)
        if dtype.is_floating_point or dtype.is_complex:
            back = new.float() if dtype.itemsize == 1 else new
            lost = tensor.isfinite() & ~back.isfinite()
            if not bool(back.any()):  # all values became 0
                lost = lost | (tensor != 0)
        else:  # an integer is lost if the conversion back gives another one
            lost = new.to(tensor.dtype) != tensor
        if bool(lost.any()):
            value = tensor[lost].reshape(-1)[0].item()
            refuse(
                files.file_of(key),
                key,
                f"values that {dtype_name(dtype)} holds, the dtype of the model's tensor",
                str(value),
                f"make the model in {dtype_name(tensor.dtype)}",
            )
        tensor = new
    if wanted.is_meta:
        return tensor
    tensor = tensor.to(wanted.device)
    return tensor if format_of(wanted) == ND else cast_format(tensor, format_of(wanted))


class StateChanges:
    """New values of parameters, buffers and extra states, with how to undo each change.

    A tensor keeps its memory, which other tensors may share, as with load_state_dict.

    Args:
        held: the model's places.
        files: of the checkpoint.
        keys: the keys to read, see `check_rest`.
    """

    def __init__(self, held: RestOfModel, files: CheckpointFiles, keys: Iterable[str]) -> None:
        self._copies: list[tuple[str, Tensor, Tensor, Tensor]] = []
        self._others: list[tuple[Callable[[], object], Callable[[], object]]] = []
        self._by_tensor: dict[int, tuple[str, Tensor]] = {}
        self._storages: dict[object, int] = {}
        places: dict[int, list[_Place]] = {}
        for place in held.places.values():
            places.setdefault(id(place.tensor), []).append(place)
        for key in keys:
            place = held.places[key]
            tensor: Tensor = place.tensor
            new = converted(files, key, tensor)
            if (other := self._by_tensor.get(id(tensor))) and not place.is_extra:
                if not bit_equal(other[1], new):
                    expected = f"the values of {other[0]}, which is the same tensor in the model"
                    todo = "make the model with a tensor for each, or correct the files"
                    refuse(files.file_of(key), key, expected, "others", todo)
                continue
            self._by_tensor[id(tensor)] = key, new
            if place.is_extra:
                self._others.append(
                    (
                        partial(place.module.set_extra_state, new),
                        partial(place.module.set_extra_state, tensor),
                    )
                )
            elif tensor.is_meta:
                fresh = _like(tensor, new)
                for at in places[id(tensor)]:
                    self._others.append((partial(_put, at, fresh), partial(_put, at, tensor)))
            elif tensor.is_inference() or format_of(tensor) != ND or _overlaps_itself(tensor):
                # these cannot be written in place
                self._others.append(
                    (partial(_set, tensor, new), partial(_set, tensor, tensor.data))
                )
            else:
                self._copies.append((key, tensor, new, tensor.detach().clone()))
                storage = (tensor.device, tensor.untyped_storage().data_ptr())
                self._storages[storage] = self._storages.get(storage, 0) + 1

    def make(self, undo: ExitStack) -> None:
        """Make all changes; the stack undoes them."""
        for change, back in self._others:
            undo.callback(back)
            change()
        for _, tensor, new, old in self._copies:
            undo.callback(tensor.data.copy_, old)
            tensor.data.copy_(new)
        for key, tensor, new, _ in self._copies:
            storage = (tensor.device, tensor.untyped_storage().data_ptr())
            if self._storages[storage] > 1 and not bit_equal(tensor, new):
                raise CheckpointError(
                    f"load_checkpoint: {key} shares memory with another tensor of the model, for "
                    "which the files have other values. What to do: make the model with memory for "
                    "each tensor, or the files with one value for both."
                )


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    """A new tensor that replaces a tensor on meta."""
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    vars(new).update(vars(tensor))
    return new


def _put(place: _Place, tensor: Tensor) -> None:
    held = place.module._parameters if place.name in place.module._parameters else None
    (place.module._buffers if held is None else held)[place.name] = cast(nn.Parameter, tensor)


def _set(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor share one place in memory, as in an expanded tensor."""
    sizes = sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    )
    reach = 0
    for stride, size in sizes:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
