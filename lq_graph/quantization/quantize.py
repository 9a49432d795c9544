"""quantize(): replaces the nn.Linear layers of a float model by quantized layers, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..modules.places import places_of
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import why_not_replaceable
from ..modules.supported import A8W8_DYNAMIC, runs_in
from ..modules.transaction import keeps_grad_mode, one_at_a_time, uninterrupted
from ..rules.products import get_target
from ..rules.tables import dtype_name
from .activation_scales import affine, why_no_range
from .calibrate import Seen, check_batches, observe
from .choose import Choice, Schemes, choose, schemes_in
from .int8_between import connect, sequentials
from .layer import LayerToQuantize, SharedWeights
from .report import Quantized, QuantizeReport, bytes_of, stays_float
from .schemes import SCHEMES, A8W8Static, Scheme
from .select import FilterFn, Places, check_finite, keep_tied, not_refused, survey

__all__ = ["quantize"]

_LOCK = one_at_a_time()  # two threads may quantize one model


@keeps_grad_mode
def quantize(
    model: nn.Module,
    scheme: Schemes,
    calibration: Iterable[Any] | None = None,
    *,
    ignore: Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    example_inputs: Iterable[Any] | None = None,
) -> QuantizeReport:
    """Replace the nn.Linear layers of a model by `QuantizedLinear` layers, in place.

    A layer that cannot be quantized stays float, and the report says why: for example, the product
    in force has no row for it, it does more than nn.Linear does (a subclass, hooks, adapters), its
    weight is shared with something else, or calibration never called it. The report also lists the
    other float tensors that hold most of the bytes. Layers that are already quantized are left
    alone.

    Patterns are globs over a layer's whole qualified name, in which `*` spans dots too, or regular
    expressions after `re:`. The first pattern that matches decides; a layer that none matches stays
    float. Output layers (lm_head, and what get_output_embeddings() of a transformers model returns)
    stay float, unless the pattern spells the last part of their name: "lm_head" does, "*" does not.

    A model may read the weight of a layer itself. With example_inputs or calibration such layers
    are found and stay float. Otherwise such a layer is quantized, and computes a float weight at
    each read.

    Atomic: if a step fails, the model is unchanged. Every layer is built once as a test before the
    first layer is replaced. The largest layer is replaced first, so a lack of memory shows before
    anything has changed. Ctrl-C waits for the end of that step. Beside the model it needs memory
    for one quantized layer. Parts that torch.compile has compiled are compiled again.

    Args:
        model: float16 or bfloat16, on CPU or NPU.
        scheme: A8W8Dynamic(), A8W8Static() or A4W4Dynamic(), for all layers; or a mapping of
            patterns to schemes, in order, with None for layers that stay float:
            {"*.down_proj": A8W8Dynamic(), "model.layers.0.*": None, "*": A4W4Dynamic()}.
        calibration: if a layer's scheme is A8W8Static: an iterable of inputs of the model, each a
            tensor, a tuple of positional arguments or a mapping of keyword arguments. Pass a few
            dozen that look like the real ones. Tensors are moved to the model's device, and float
            tensors are cast to its dtype.
        ignore: patterns of layers that stay float; they come before those of `scheme`.
        filter_fn: a function of a module and its qualified name that returns whether to quantize
            it; default: all.
        example_inputs: an iterable of inputs, as for calibration, for any scheme. A layer whose
            weight something else reads, or that is never called, stays float.

    Returns:
        A QuantizeReport: a list with one `Quantized` for each nn.Linear.

    Raises:
        LinearQuantTypeError: another scheme; inputs of another type; a layer with an attribute
            whose name QuantizedLinear uses itself.
        LinearQuantValueError: a pattern that decides about no layer; NaN or infinity in a weight or
            an activation; a value that output_dtype cannot hold; calibration that is missing, empty
            or not needed; no layer can be quantized; LQ_GRAPH_PRODUCT or LQ_GRAPH_CANN has a wrong
            value.

    Source: torchao's ``quantize_`` for the interface, aclnnQuantMatmulV4.md (hicann/ops-nn) for
    what the layers compute.
    """
    get_target()  # a wrong LQ_GRAPH_PRODUCT or LQ_GRAPH_CANN is no reason to leave a layer float
    for name, batches in (("calibration", calibration), ("example_inputs", example_inputs)):
        if batches is not None:
            check_batches("quantize", name, batches)
    # parameters made in inference mode could not be used outside
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        chosen = choose(model, scheme, ignore)
        if calibration is not None:
            _check_needed(schemes_in(scheme))
        return _quantize(model, chosen, calibration, filter_fn, example_inputs)


def _quantize(
    model: nn.Module,
    chosen: Mapping[str, Choice],
    calibration: Iterable[Any] | None,
    filter_fn: FilterFn | None,
    example_inputs: Iterable[Any] | None,
) -> QuantizeReport:
    bytes_before = bytes_of(model)
    layers = _layers(model, chosen, calibration, filter_fn, example_inputs)
    todo = not_refused(layers)
    if layers and not todo:
        reasons = Counter(layer.refusal for layer in layers)
        common = reasons.most_common()
        listed = "; ".join(f"{count} x {str(why).rstrip('.')}" for why, count in common)
        raise LinearQuantValueError(
            f"quantize: none of the {len(layers)} nn.Linear layers can be quantized: {listed}."
        )
    for layer in todo:
        layer.tied_with = [other for other in todo if other.shared_as == layer.shared_as]

    # None: no progress bar if the output is not a terminal
    for layer in tqdm(todo, "checking layers", disable=None):
        try:
            _check_range(layer, layer.build({}))
        except LinearQuantTypeError as error:
            raise error.in_layer("quantize", layer.name) from None
    _put_in_place(todo)
    report = QuantizeReport(map(_result, layers))
    report.stays_float = stays_float(model, bytes_before)
    return report


def _layers(
    model: nn.Module,
    chosen: Mapping[str, Choice],
    calibration: Iterable[Any] | None,
    filter_fn: FilterFn | None,
    example_inputs: Iterable[Any] | None,
) -> list[LayerToQuantize]:
    """Every nn.Linear, with its data. Nothing else holds the float layers afterwards, so their
    memory is freed when they are replaced."""
    places = places_of(model)
    layers = survey(model, chosen, filter_fn, places)
    keep_tied(model, layers)
    for layer in not_refused(layers):
        check_finite(layer)
    _observe(model, layers, places, calibration, example_inputs)
    return layers


def _put_in_place(todo: list[LayerToQuantize]) -> None:
    """The last step. It frees the float weights one by one, so it cannot be undone. It is completed
    instead: a layer that fails, for example for lack of memory, is tried again."""
    shared: SharedWeights = {}
    failed: BaseException | None = None
    bar = tqdm(total=len(todo), desc="quantizing", disable=None)
    with uninterrupted():
        # the largest first: if it fits, the others fit
        for layer in sorted(todo, key=lambda layer: -layer.bytes_before):
            try:
                layer.put_in_place(shared)
            except BaseException as error:
                failed = None if isinstance(error, Exception) else error
                layer.put_in_place(shared)
            with suppress(Exception):  # a terminal that is gone
                bar.update()
    with suppress(Exception):
        bar.close()
    if failed is not None:
        raise failed


def _check_needed(schemes: list[Scheme]) -> None:
    """Refuse calibration that no scheme needs."""
    if not any(isinstance(scheme, A8W8Static) for scheme in schemes):
        given = " and ".join(dict.fromkeys(str(SCHEMES[type(scheme)]) for scheme in schemes))
        raise LinearQuantValueError(
            f"quantize: calibration is given; {given or 'None'} needs none. What to do: leave it "
            "out, pass it as example_inputs, or use A8W8Static."
        )


def _check_range(layer: LayerToQuantize, new: QuantizedLinear) -> None:
    """Refuse an output dtype that cannot hold the layer's bias or weight scale."""
    if not layer.output_dtype.is_floating_point:
        return
    most = torch.finfo(layer.output_dtype).max
    weight_scale = new.weight_scale if layer.static else new.linear.scale
    for name, tensor in (("bias", layer.source.bias), ("weight's scale", weight_scale)):
        if tensor is not None and (peak := float(tensor.detach().abs().max())) > most:
            given = dtype_name(layer.output_dtype)
            raise LinearQuantValueError(
                f"quantize: {layer.name}: output_dtype is {given}, which holds values up to "
                f"{most:.5g}, and the {name} has {peak:.3g}; the model is unchanged. What to do: "
                f"leave output_dtype out, or leave the layer float: ignore=['{layer.name}']."
            )


def _observe(
    model: nn.Module,
    layers: list[LayerToQuantize],
    places: Places,
    calibration: Iterable[Any] | None,
    example_inputs: Iterable[Any] | None,
) -> None:
    """Run the model on the given inputs, and record what only a run shows."""
    if example_inputs is not None and not_refused(layers):
        modules = [layer.source for layer in not_refused(layers)]
        seen = observe(model, "example_inputs", example_inputs, modules)
        _leave_unusual(model, layers, seen, "example_inputs", only_static=False)
    if any(layer.static for layer in not_refused(layers)):
        if calibration is None:
            raise LinearQuantValueError(
                "quantize: calibration is absent; A8W8Static needs the ranges of the activations. "
                "What to do: pass calibration=[...], a few dozen inputs of the model, or use "
                "A8W8Dynamic."
            )
        modules = [layer.source for layer in not_refused(layers)]
        plain = sequentials(model)
        held = dict.fromkeys(child for parent in plain for child in parent)
        relus = [m for m in held if not why_not_replaceable(m, nn.ReLU)]
        seen = observe(model, "calibration", calibration, modules, [*plain, *relus])
        _leave_unusual(model, layers, seen, "calibration", only_static=True)
        _calibrate(not_refused(layers), seen)
        keep_tied(model, layers)
        connect(plain, not_refused(layers), places, seen.calls)


def _leave_unusual(
    model: nn.Module, layers: list[LayerToQuantize], seen: Seen, inputs: str, *, only_static: bool
) -> None:
    """Leave float what a run shows.

    Args:
        inputs: the argument that holds the inputs, for the message.
        only_static: whether a dynamic layer may be one that the run never reached.
    """
    for layer in not_refused(layers):
        if layer.source in seen.read:
            by = seen.read[layer.source]
            layer.refusal = f"the model reads its weight outside its forward, by {by}"
        elif not seen.ranges[layer.source].batches and (layer.static or not only_static):
            layer.refusal = f"{inputs} never reached it"
    keep_tied(model, layers)


def _calibrate(layers: list[LayerToQuantize], seen: Seen) -> None:
    """Scale and zero point of the inputs of the static layers."""
    for layer in layers:
        if not isinstance(layer.scheme, A8W8Static):
            continue
        found = seen.ranges[layer.source]
        if not found.finite:
            raise LinearQuantValueError(
                f"quantize: the input of {layer.name} holds NaN or infinity during calibration; "
                f"the model is unchanged. What to do: check the inputs{_wider(layer)}, or leave "
                f"the layer float: ignore=['{layer.name}']."
            )
        activations = (found.low, found.high, layer.input_dtype, layer.scheme.symmetric)
        if why := why_no_range(*activations):
            dynamic = layer.input_dtype in runs_in(A8W8_DYNAMIC, layer.k, layer.n)
            layer.refusal = f"{why}. What to do: use A8W8Dynamic for it." if dynamic else why
        else:
            layer.input_scale, layer.input_offset = affine(*activations)


def _wider(layer: LayerToQuantize) -> str:
    """The advice for values that float16 does not hold, if the product in force runs the other."""
    runs = torch.bfloat16 in runs_in(layer.kind, layer.k, layer.n)
    return ", call model.bfloat16() first" if layer.input_dtype == torch.float16 and runs else ""


def _result(layer: LayerToQuantize) -> Quantized:
    scheme, output, note = "", "", layer.refusal
    if not layer.refusal:
        scheme, output = str(layer.kind), dtype_name(layer.output_dtype)
    if layer.next:
        note = f"feeds {layer.next.name} in int8"
        if layer.fused_relu:
            note += "; the int8 range of its output replaces the ReLU between them"
    size = layer.bytes if layer.bytes is not None else layer.bytes_before
    return Quantized(layer.name, scheme, layer.k, layer.n, output, layer.bytes_before, size, note)
