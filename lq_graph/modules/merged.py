"""Layers that read one tensor, as one product: the merged weight, and the parts that its layers
hold.

lq_graph.modules.merge finds such layers and makes these modules.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..backends.compat import is_transformed
from ..backends.compat_npu import why_no_passes
from ..backends.npu import cast_format, format_of
from ..errors import LinearQuantTypeError
from ..rules.products import get_product
from ..rules.tables import ND, dtype_name
from .float_view import FloatView
from .linear_quant import LinearQuant, describe

__all__ = ["MergedLinear", "MergedPart", "PartView"]

_linear_quant = torch.ops.lq_graph.linear_quant.default


class PartView(FloatView):
    """A tensor of one layer of a merged weight, computed when it is read."""

    refusal = (
        "MergedPart: a tensor was written to {how}, but its values are rows of a merged weight, "
        "which would not change. What to do: use load_state_dict, write into the parameters of "
        "layer.linear.merged, or write before lq_graph.merge."
    )


class _Remembered(NamedTuple):
    """The last product, for the parts that have not taken their rows of it.

    Attributes:
        input: the tensor that it was computed from.
        copy: of the input, if torch counts no versions of it.
        state: all else that it depends on, see `_state`.
        quantizers: the scale and the offset that quantized the input.
        waiting: by its index, (..., n) of each part that has not taken it.
    """

    input: weakref.ref[Tensor]
    copy: Tensor | None
    state: tuple[Any, ...]
    quantizers: tuple[Tensor | None, ...]
    waiting: dict[int, Tensor]


class MergedLinear(LinearQuant):
    """The weights of several layers that read one tensor, one below the other: (N, k).

    It is the one owner of weight, scale and bias. Each layer holds it in a MergedPart, so it is
    moved, prepared and copied as other modules. State dicts hold the tensors under the names of the
    layers.

    Args:
        layers: of one k, storage and output dtype, with per-channel scales, and with or without a
            bias; weights in ND. Their tensors are copied.
        names: of the layers, for `repr`.

    Attributes:
        sizes: n of each layer.
        names: of the layers.
    """

    def __init__(self, layers: list[LinearQuant], names: list[str]) -> None:
        first = layers[0]
        super().__init__(
            first.in_features,
            sum(layer.out_features for layer in layers),
            bias=first.bias is not None,
            pertoken_scale=first.pertoken_scale is not None,
            output_dtype=first.output_dtype,
            dtype=first.weight.dtype,
            device="meta",  # no memory: the parameters are replaced
        )
        self.x1_dtype, self.x2_dtype = first.x1_dtype, first.x2_dtype
        self.sizes = [layer.out_features for layer in layers]
        self.names = names
        self._remembered: _Remembered | None = None
        for name in ("weight", "scale", "bias"):
            if getattr(first, name) is not None:
                tensors = [getattr(layer, name).data for layer in layers]
                setattr(self, name, Parameter(torch.cat(tensors), False))
        if first.pertoken_scale is not None:
            self.pertoken_scale = Parameter(torch.ones_like(first.pertoken_scale), False)
        before = [layer._scale_before_folding() for layer in layers]
        if all(scale is not None for scale in before):
            self._float_scale = torch.cat(cast("list[Tensor]", before))

    def span(self, index: int) -> tuple[int, int]:
        """The rows of a layer: the first, and the one after the last."""
        start = sum(self.sizes[:index])
        return start, start + self.sizes[index]

    def rows(self, index: int, name: str) -> Tensor | None:
        """A layer's rows of a parameter: a view, or a copy if the weight is FRACTAL_NZ."""
        tensor = self._parameters[name]
        if tensor is None:
            return None
        start, end = self.span(index)
        if name == "weight" and not torch.compiler.is_compiling() and format_of(tensor) != ND:
            return cast_format(tensor.data, ND)[start:end]
        return tensor[start:end]

    def alone(self, index: int, pertoken_scale: Parameter | None) -> LinearQuant:
        """A LinearQuant with the rows of one layer, see `rows`."""
        start, end = self.span(index)
        layer = LinearQuant(
            self.in_features,
            end - start,
            bias=self.bias is not None,
            output_dtype=self.output_dtype,
            dtype=self.weight.dtype,
            device="meta",  # no memory: the parameters are replaced
        )
        layer.x1_dtype, layer.x2_dtype = self.x1_dtype, self.x2_dtype
        for name in ("weight", "scale", "bias"):
            tensor = self.rows(index, name)
            if tensor is not None:
                setattr(layer, name, Parameter(tensor, False))
        layer.register_parameter("pertoken_scale", pertoken_scale)
        if self._float_scale is not None:
            layer._float_scale = self._float_scale[start:end]
        return layer

    def write_back(self, index: int, layer: LinearQuant) -> None:
        """Write what was loaded into `alone(index)`, where that holds copies."""
        start, end = self.span(index)
        acl_format = format_of(self.weight)
        if acl_format != ND:
            data = cast_format(self.weight.data, ND)
            data[start:end] = layer.weight.data
            self.weight.data = cast_format(data, acl_format)
            self.note_weight_format()
        if self._float_scale is not None:
            # a scale that came packed has none: no packed scale is made of zeros
            kept = layer._float_scale
            self._float_scale[start:end] = 0 if kept is None else kept
        self.note_scale()
        self._remembered = None

    def part(
        self,
        index: int,
        input: Tensor,
        quantizers: tuple[Tensor | None, ...],
        compute: Callable[[Tensor, LinearQuant], Tensor],
    ) -> Tensor | None:
        """A layer's part (..., n) of the product of an input, eagerly. The product is computed for
        the first layer that asks, and kept until each layer has taken its part or the input is
        gone.

        Args:
            index: of the layer.
            input: a float tensor, or int8.
            quantizers: tensors with which the layer quantizes it.
            compute: computes the product of the input and this layer.

        Returns:
            Contiguous, because a model may call view(), in memory of its own, because a model may
            free or write it. None if it is unknown whether the input or the weight changes between
            the layers.
        """
        state = self._state(input)
        if state is None:
            return None
        known = self._remembered
        if (
            known is not None
            and known.input() is input
            and known.state == state
            and all(a is b for a, b in zip(known.quantizers, quantizers, strict=True))
            and (known.copy is None or torch.equal(known.copy, input))
            # None: a second call needs memory of its own
            and (rows := known.waiting.pop(index, None)) is not None
        ):
            if not known.waiting:
                self._remember(None)
            return rows.clone(memory_format=torch.contiguous_format)
        copy = input.clone() if input.is_inference() else None
        # unsafe: for torch the parts are no views, so a write into one is no write into the others
        parts = torch.unsafe_split_with_sizes(compute(input, self), self.sizes, -1)
        waiting = dict(enumerate(parts))
        rows = waiting.pop(index)
        own = weakref.ref(self)

        def forget(gone: weakref.ref[Tensor]) -> None:
            merged = own()
            if merged is not None and (held := merged._remembered) and held.input is gone:
                merged._remember(None)

        reference = weakref.ref(input, forget)
        self._remember(_Remembered(reference, copy, state, quantizers, waiting))
        return rows.clone(memory_format=torch.contiguous_format)

    def _remember(self, product: _Remembered | None) -> None:
        vars(self)["_remembered"] = product  # nn.Module.__setattr__ takes 2 us

    def _state(self, input: Tensor) -> tuple[Any, ...] | None:
        """All that a product depends on beside the values of its input and quantizers; None if it
        is unknown.

        torch counts no versions of a tensor that was made in inference mode. An input on the CPU is
        compared with a copy instead, which takes as long as to quantize it once more.
        """
        if is_transformed():  # memory of a tensor of torch.func may be that before a write
            return None
        on_cpu = input.is_cpu
        counted = not input.is_inference()
        if type(input) is not Tensor or input.is_meta or not (counted or on_cpu):
            return None
        held: dict[str, Any] = self._parameters  # but pertoken_scale, which a part passes
        device = "cpu" if on_cpu else input.device.type
        try:
            weight, scale, bias = held["weight"], held["scale"], held["bias"]
            return (
                input.data_ptr(),
                input.shape,
                input.stride(),
                counted and input._version,
                weight.data_ptr(),
                weight._version,
                scale.data_ptr(),
                scale._version,
                bias is None or (bias.data_ptr(), bias._version),
                # another stream would read the product before it is there
                None if on_cpu else getattr(torch, device).current_stream(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
                get_product(),
            )
        except (KeyError, RuntimeError):  # a parametrized tensor, or one without versions
            return None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_remembered": None}

    def _save_to_state_dict(self, *_: Any) -> None:
        """Nothing: the parts save."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing: the parts load."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, merged={' + '.join(self.names)}"


class MergedPart(nn.Module):
    """The rows of one layer in a MergedLinear; stands where the layer's LinearQuant was.

    It has the attributes of LinearQuant. `weight`, `scale` and `bias` are computed when they are
    read, and cannot be written. A state dict has the names, shapes and dtypes of a LinearQuant, and
    goes to and from models that are not merged.

    Args:
        merged: the owner of the tensors.
        index: of the layer in it.
        pertoken_scale: the layer's own; None for a static layer.
    """

    offset = None
    stands_for = LinearQuant

    def __init__(
        self, merged: MergedLinear, index: int, pertoken_scale: Parameter | None = None
    ) -> None:
        super().__init__()
        self.merged = merged
        self.index = index
        self.register_parameter("pertoken_scale", pertoken_scale)

    @property
    def in_features(self) -> int:
        """k."""
        return self.merged.in_features

    @property
    def out_features(self) -> int:
        """n."""
        return self.merged.sizes[self.index]

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the output."""
        return self.merged.output_dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """int8, or int32 that carries int4."""
        return self.merged.weight_dtype

    @property
    def _weight_format(self) -> int:
        return self.merged._weight_format

    @property
    def weight(self) -> Tensor:
        """The layer's rows of the weight."""
        return self._view("weight")

    @property
    def scale(self) -> Tensor:
        """The layer's rows of the scale."""
        return self._view("scale")

    @property
    def bias(self) -> Tensor | None:
        """The layer's rows of the bias, or None."""
        return None if self.merged.bias is None else self._view("bias")

    def _view(self, name: str) -> Tensor:
        def compute() -> Tensor:
            found = self.merged.rows(self.index, name)
            assert found is not None
            return found

        if torch.compiler.is_compiling():  # a graph drops values that nothing reads
            return compute()
        whole = getattr(self.merged, name)
        shape = (self.out_features, *whole.shape[1:])
        return PartView(compute, shape, whole.dtype, whole.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "scale", "offset", "bias", "output_dtype"):
            raise LinearQuantTypeError(
                f"MergedPart: {name} was assigned to, but its values are rows of a merged weight. "
                "What to do: use load_state_dict, write into the parameters of "
                "layer.linear.merged, or assign before lq_graph.merge."
            )
        super().__setattr__(name, value)

    def forward(self, x1: Tensor, pertoken_scale: Tensor | None = None) -> Tensor:
        """As LinearQuant: (..., m, k) to (..., m, n).

        In a graph for the NPU it is the whole product and a split. All parts say the same there, so
        a pass that merges equal nodes leaves one of each. Otherwise it is the product of its own
        rows, unless the blocks of FRACTAL_NZ keep it from that; in Inductor a pass of ours joins
        them.
        """
        merged = self.merged
        pertoken = self.pertoken_scale if pertoken_scale is None else pertoken_scale
        if torch.compiler.is_compiling():
            if x1.device.type != "cpu":
                if torch.compiler.is_dynamo_compiling():
                    _warn_of_old_torchair()
                out: Tensor = merged(x1, pertoken)
                parts: tuple[Tensor, ...] = torch.split(out, merged.sizes, -1)
                return parts[self.index]
        elif merged._weight_format != ND:
            return self.own_rows(merged(x1, pertoken))
        own: Tensor = _linear_quant(
            x1,
            cast(Tensor, merged.rows(self.index, "weight")),
            cast(Tensor, merged.rows(self.index, "scale")),
            None,
            pertoken,
            merged.rows(self.index, "bias"),
            output_dtype=merged.output_dtype,
        )
        return own

    def own_rows(self, out: Tensor) -> Tensor:
        """This layer's part (..., n) of the whole product (..., N). Contiguous, because a model
        may call view()."""
        start, end = self.merged.span(self.index)
        return out[..., start:end].contiguous()

    def _alone(self) -> LinearQuant:
        return self.merged.alone(self.index, cast("Parameter | None", self.pertoken_scale))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self._alone()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict, prefix, local_metadata, strict,
                missing_keys, unexpected_keys, error_msgs,
            )  # fmt: skip
        alone = self._alone()
        if refused := [
            f"{prefix}{name} is {dtype_name(given.dtype)} {tuple(given.shape)} in the state dict; "
            f"this layer is merged with {' and '.join(self._others())}, so allowed is "
            f"{dtype_name(own.dtype)} {tuple(own.shape)}. What to do: load it before "
            "lq_graph.merge."
            for name in ("weight", "scale", "bias")
            if isinstance(given := state_dict.get(prefix + name), Tensor)
            and (own := getattr(alone, name)) is not None
            and not _fits(name, given, own, alone._float_scale)
        ]:
            error_msgs.extend(refused)
            return
        # assign=True: the merged tensors stay, and get the values
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        lists = missing_keys, unexpected_keys, error_msgs
        alone._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self.merged.write_back(self.index, alone)

    def _others(self) -> list[str]:
        names = self.merged.names
        return [name for i, name in enumerate(names) if i != self.index]

    def extra_repr(self) -> str:
        start, end = self.merged.span(self.index)
        return f"{describe(self)}, rows={start}:{end} of {self.merged.out_features}"


@torch.compiler.assume_constant_result
def _warn_of_old_torchair() -> int:
    """While torch.compile traces for the NPU: each part computes the whole product if nothing
    merges equal nodes. `merge` leaves layers alone then, but these were merged on the CPU."""
    if why := why_no_passes():
        warnings.warn(
            f"merge: {why}, so a graph for the NPU computes the product of merged layers once for "
            "each layer. What to do: install a newer torch_npu, or do not merge; a state dict of "
            "this model loads into one that is not merged.",
            stacklevel=2,
        )
    return 0


def _fits(name: str, given: Tensor, own: Tensor, float_scale: Tensor | None) -> bool:
    """Whether a tensor of a state dict has the dtype and the shape of merged rows. A float32 scale
    is packed if that of the rows was."""
    packs = name == "scale" and float_scale is not None and given.dtype == torch.float32
    return given.shape == own.shape and (given.dtype == own.dtype or packs)
