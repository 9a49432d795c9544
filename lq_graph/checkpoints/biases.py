"""Biases in the files that the model's float modules do not have.

msmodelslim's smoothing subtracts a bias from the input of layers: it adds a bias to the norm before
them, and to each layer after it, also to the layers that stay float.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..rules.tables import dtype_name
from .base import Contents
from .files import Refusals, refuse
from .folder import CheckpointFiles
from .state import converted
from .tensors import bit_equal

__all__ = ["AddedBiases", "norm_with_bias"]

_ZEROS = "a bias of zeros, and the model's module has none"
# their forward adds self.bias if it is not None
_HAVE_BIAS = (nn.Linear, nn.LayerNorm)


class AddedBiases:
    """The biases that modules of the model get.

    A norm without a place for a bias gets a parameter `bias`, which a forward hook adds to its
    output.

    Args:
        model: the model to load into.
        files: of the checkpoint.
        contents: what the JSON says about them.
        refusals: a bias of another shape than its module.

    Attributes:
        names: of all these biases in the files.
        left_out: those that are zeros and are not added, with the reason.

    """

    def __init__(
        self,
        model: nn.Module,
        files: CheckpointFiles,
        contents: Contents,
        refusals: Refusals,
    ) -> None:
        self.names: set[str] = set()
        self.left_out: dict[str, str] = {}
        self._files = files
        self._modules: dict[str, nn.Module] = {}  # by the name of the bias
        self._new: dict[nn.Module, tuple[str, nn.Parameter]] = {}
        if not contents.format.adds_biases:
            return
        modules = dict(model.named_modules(remove_duplicate=False))
        for key in files:
            name, _, part = key.rpartition(".")
            module = modules.get(name)
            if part == "bias" and module is not None and name not in contents.kinds:
                with refusals.each():
                    self._add(key, module, files)

    def _add(self, key: str, module: nn.Module, files: CheckpointFiles) -> None:
        """Note a bias, if its module has none."""
        if getattr(module, "bias", None) is not None or not _can_have_bias(module, key):
            return  # check_rest loads it, or refuses it
        weight = module.weight
        assert isinstance(weight, Tensor)
        if type(weight.data) is not Tensor:
            return  # a DTensor, for example
        shape = tuple(weight.shape[:1])
        dtype, given = files.header(key)
        if given != shape or dtype is None or not dtype.is_floating_point:
            found = f"{'another dtype' if dtype is None else dtype_name(dtype)} {given}"
            todo = "make the model from the config.json that was saved with these weights"
            refuse(files.file_of(key), key, f"{dtype_name(weight.dtype)} {shape}", found, todo)
        self.names.add(key)
        self._modules[key] = module

    def read(self) -> None:
        """Read the biases.

        Raises:
            CheckpointError: a value that the model's dtype cannot hold; one module with two biases.
        """
        for key, module in self._modules.items():
            weight = module.weight
            assert isinstance(weight, Tensor)
            device = torch.device("cpu") if weight.is_meta else weight.device
            like = torch.empty(weight.shape[:1], dtype=weight.dtype, device=device)
            values = converted(self._files, key, like)
            new = nn.Parameter(values, requires_grad=weight.requires_grad)
            if module in self._new:
                other, bias = self._new[module]
                if not bit_equal(bias, new):
                    expected = f"the values of {other}, which is the same module in the model"
                    todo = "load in a model without ties"
                    refuse(self._files.file_of(key), key, expected, "others", todo)
            elif bool(new.any()):
                self._new[module] = key, new
            else:
                self.left_out[key] = _ZEROS

    @property
    def added(self) -> tuple[str, ...]:
        """Names of the biases that modules get."""
        return tuple(key for key, _ in self._new.values())

    def make(self, undo: ExitStack) -> None:
        """Add the biases; the stack removes them."""
        for module, (_, bias) in self._new.items():
            if not isinstance(module, _HAVE_BIAS):
                undo.callback(module.register_forward_hook(add_bias).remove)
            undo.callback(partial(_put_back, module, dict(module._parameters)))
            module.register_parameter("bias", bias)


def add_bias(module: nn.Module, args: object, output: Tensor) -> Tensor:  # noqa: ARG001
    """A forward hook: adds the bias that the module's own forward does not add."""
    return output + module.bias  # type: ignore[operator]


def norm_with_bias(model: nn.Module) -> str:
    """The name of the first norm of a model that got a bias; empty if there is none. Its class has
    none, so a reader that makes the model anew would leave the bias out."""
    hooks = ((name, module._forward_hooks) for name, module in model.named_modules())
    return next((name for name, held in hooks if add_bias in held.values()), "")


def _can_have_bias(module: nn.Module, key: str) -> bool:
    """Whether a module without a bias may get one: a linear layer, or a norm with one weight."""
    if isinstance(module, _HAVE_BIAS):
        return type(module).forward in [kind.forward for kind in _HAVE_BIAS]
    own: Mapping[str, Tensor | None] = module._parameters
    name = key.rpartition(".")[0].rpartition(".")[2]
    return (
        "norm" in f"{name} {type(module).__name__}".lower()
        and [part for part, tensor in own.items() if tensor is not None] == ["weight"]
        and own["weight"] is not None
        and own["weight"].dim() == 1
        and not module._modules
    )


def _put_back(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    module._parameters.clear()
    module._parameters.update(parameters)
