"""merge: layers that read one tensor (q, k and v; gate and up) become one product."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backends.compat_npu import why_no_passes
from ..backends.npu import cast_format, format_of
from ..rules.tables import ND
from .linear_quant import LinearQuant
from .merge_report import LeftAlone, MergedGroup, MergeReport
from .merge_rules import Model, alike, kind_of, why_not, why_not_together
from .merged import MergedLinear, MergedPart
from .places import held_elsewhere, places_of, put
from .quantized_linear import QuantizedLinear, merged_of
from .runs import moved_to_model, running
from .split import SPLIT
from .transaction import all_or_nothing, keeps_grad_mode, one_at_a_time, uninterrupted

__all__ = ["merge", "merge_layers", "one_change_at_a_time"]

_ONE_AT_A_TIME = one_at_a_time()
_Group = list[tuple[str, QuantizedLinear]]


@contextmanager
def one_change_at_a_time() -> Iterator[ExitStack]:
    """A block that merges or prepares: all or nothing, see `all_or_nothing`; threads wait for each
    other, and Ctrl-C waits for the end, because it could leave the lock locked."""
    with (
        uninterrupted(), _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad(),
        all_or_nothing() as undo,
    ):  # fmt: skip
        yield undo


@keeps_grad_mode
def merge(model: nn.Module, *args: Any, **kwargs: Any) -> MergeReport:
    """Merge quantized layers that read one tensor, so that it is quantized once and multiplied
    once: q, k and v, or gate and up.

    The layers are found by a run of the model, not by name. The result of every layer is the same
    as before, bit for bit. Layers for which that is not so are left alone, and the report says why:
    static layers with other scales, one with a bias and one without, other dtypes, layers with
    hooks, split over devices on k, or with int8 output. Layers on the NPU are left alone if
    torchair is too old to run passes of other libraries: a graph would then compute the product for
    each layer.

    Layers that are split over devices on n are merged on each device. Call it on every rank.

    The merged weight is held once. State dicts and checkpoints have the layers as they were: the
    same names, shapes and dtypes, which load into models that are merged or not.
    `layer.weight` and `layer.linear.weight` are computed from it. load_checkpoint puts new layers
    into a model, which are not merged.

    `use_internal_format_weight(model, example=...)` merges and prepares in one call. By itself:
    after `quantize` or `load_checkpoint`, and before `prepare_for_cpu`, whose copies go with the
    separate weights, and torch.compile. Layers that `use_internal_format_weight` prepared are
    prepared afterwards too. On the CPU, and in graphs of Inductor, it serves as on the NPU.

    Without a graph, a product is kept until each layer has taken its part. In inference mode torch
    does not tell whether the input was written in between. On the CPU the input is compared with a
    copy; on the NPU, layers in ND compute their own rows, and layers in FRACTAL_NZ compute the
    whole product each. Other backends of torch.compile on the CPU compute each layer's rows.

    Idempotent and atomic: if a step fails, the model is unchanged. Ctrl-C waits for the end. It
    needs memory for one merged weight beside the model.

    torch.func.functional_call leaves its tensors in a merged model, as in each model that has a
    module under two names: copy the model for it.

    A model may be merged on the CPU and moved to the NPU. torch.compile warns there if torchair is
    too old.

    Args:
        model: with QuantizedLinear layers, on CPU or NPU. It runs once, in evaluation mode and
            without compiled graphs.
        args, kwargs: what to call the model with: a short example. Its tensors are moved to the
            model's device. Layers that the run does not call (experts without tokens) are left
            alone. A cache that is passed is filled.

    Returns:
        A MergeReport: a list with one `MergedGroup` for each group, and `left_alone`.

    Source: the merged projections of vLLM (QKVParallelLinear, MergedColumnParallelLinear).
    """
    with one_change_at_a_time() as undo:
        return merge_layers(model, args, kwargs, undo)


def merge_layers(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], undo: ExitStack
) -> MergeReport:
    """Do what `merge` does; before each step, `undo` gets the function that undoes it."""
    reads = _reads(model, *moved_to_model(model, (args, kwargs)))
    groups, alone = _grouped(model, reads)
    new = [group for group in groups if merged_of(group[0][1].linear) is None]
    apart = [group for group in new if not group[0][1].linear.weight.is_cpu]
    if apart and (why := why_no_passes()):
        why = f"{why}: each merged layer would compute the whole product"
        alone += [LeftAlone(name, why) for group in apart for name, _ in group]
        groups = [group for group in groups if group not in apart]
        new = [group for group in new if group not in apart]
    for group in new:
        _merge(group, undo)
    return MergeReport([_reported(group, changed=group in new) for group in groups], alone)


# ---- which tensors the layers read ----


class _Tensors:
    """Numbers of tensors: equal for one tensor, or for equal views of one memory, that was not
    written in between."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor."""
        place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        # outside inference mode, a tensor that was made in it cannot be written
        key = (*place, -1 if tensor.is_inference() else tensor._version)
        known = self._known.get(key)
        if known is None or known[0]() is None:  # the memory may be another tensor's now
            self._count += 1
            owner = tensor if tensor._base is None else tensor._base
            known = self._known[key] = weakref.ref(owner), self._count
        return known[1]


def _reads(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[nn.Module, list[int]]:
    """The numbers of the tensors that each linear layer reads in a run, one for each call; in the
    order of the first calls, and then the layers that are not called."""
    reads: dict[nn.Module, list[int]] = {}
    tensors = _Tensors()

    def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = given[0] if given else named.get("input")
        if isinstance(x, Tensor) and type(x) in (Tensor, nn.Parameter):
            number = tensors.number(x)
        else:
            number = -len(reads) - 1  # another kind (DTensor, ...) is like no other
        reads.setdefault(layer, []).append(number)

    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear | nn.Linear)]
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        with _int4_in_nd(model), running(model):
            model(*args, **kwargs)
    return {**reads, **{layer: [] for layer in layers if layer not in reads}}


@contextmanager
def _int4_in_nd(model: nn.Module) -> Iterator[None]:
    """A block in which int4 weights are ND: in FRACTAL_NZ they run in GE graphs only."""
    layers = [m for m in model.modules() if isinstance(m, LinearQuant)]
    int4 = [layer for layer in layers if layer.weight_dtype == torch.int32]
    formats = [(layer, format_of(layer.weight)) for layer in int4]
    try:
        for layer, _ in formats:
            _cast(layer, ND)
        yield
    finally:
        for layer, acl_format in formats:
            _cast(layer, acl_format)


# ---- which layers are merged ----


def _grouped(
    model: nn.Module, reads: dict[nn.Module, list[int]]
) -> tuple[list[_Group], list[LeftAlone]]:
    """The groups, merged already or not, and the layers that are left alone."""
    names = {module: name for name, module in model.named_modules()}
    facts = Model.of(model, places_of(model), held_elsewhere(model))
    by_tensors: dict[tuple[int, ...], list[nn.Module]] = {}
    readers: dict[int, list[nn.Module]] = {}
    alone = []
    for layer, numbers in reads.items():
        if numbers:
            by_tensors.setdefault(tuple(numbers), []).append(layer)
            for number in dict.fromkeys(numbers):
                readers.setdefault(number, []).append(layer)
        elif isinstance(layer, QuantizedLinear) and merged_of(layer.linear) is None:
            alone.append(LeftAlone(names[layer], "the run did not call it"))
    groups: list[_Group] = []
    for read, layers in by_tensors.items():
        if not any(isinstance(layer, QuantizedLinear) for layer in layers):
            continue
        others = [o for number in read for o in readers[number] if o not in layers]
        if len(layers) == 1:
            if others:
                why = f"it reads a tensor of {names[others[0]]}, but not in the same calls"
                alone.append(LeftAlone(names[layers[0]], why))
            continue
        found, left = _parted([(names[layer], layer) for layer in layers], facts)
        groups += found
        alone += left
    return groups, alone


def _parted(
    layers: list[tuple[str, nn.Module]], facts: Model
) -> tuple[list[_Group], list[LeftAlone]]:
    """Layers that read one tensor, in groups of those that are alike."""
    alone = []
    merged: dict[MergedLinear, _Group] = {}
    parts: dict[str, _Group] = {}
    for name, layer in layers:
        if isinstance(layer, QuantizedLinear) and (owner := merged_of(layer.linear)) is not None:
            merged.setdefault(owner, []).append((name, layer))
        elif why := why_not(layer, facts):
            alone.append(LeftAlone(name, why))
        else:
            quantized = cast(QuantizedLinear, layer)
            parts.setdefault(repr(alike(quantized)), []).append((name, quantized))
    groups = [*merged.values()]
    largest = max(parts.values(), key=len, default=[])
    for part in parts.values():
        why = why_not_together([layer for _, layer in part]) if len(part) > 1 else ""
        if len(part) > 1 and not why:
            groups.append(part)
            continue
        for name, layer in part:
            if not why and part is not largest:
                why = _difference(layer, *largest[0])
            elif not why and groups:
                why = f"{' and '.join(name for name, _ in groups[0])} are merged already"
            if why:
                alone.append(LeftAlone(name, why))
            elif len(layers) > 1:
                reasons = "the other layers that read its tensor cannot be merged"
                alone.append(LeftAlone(name, reasons))
    return groups, alone


def _difference(layer: QuantizedLinear, other_name: str, other: QuantizedLinear) -> str:
    own, others = alike(layer), alike(other)
    for name, value in own.items():
        if value != others.get(name):
            return f"its {name} is {value}, and that of {other_name} is {others.get(name)}"
    return f"it is static, and {other_name} is dynamic"


# ---- the change ----


def _merge(group: _Group, undo: ExitStack) -> None:
    layers = [layer for _, layer in group]
    olds = [layer.linear for layer in layers]
    internal = next((format_of(old.weight) for old in olds if format_of(old.weight) != ND), ND)
    undo.callback(_note_formats, olds)
    for old in olds:
        undo.callback(_cast, old, format_of(old.weight))
        _cast(old, ND)
    merged = MergedLinear(olds, _short([name for name, _ in group]))
    # from here on the old tensors are rows of the new ones: no second weight is in memory
    for i, old in enumerate(olds):
        for name in ("weight", "scale", "bias"):
            tensor = old._parameters[name]
            if tensor is not None:
                undo.callback(_take_back, old, name, merged, i)
                rows = merged.rows(i, name)
                assert rows is not None
                tensor.data = rows if internal == ND or name != "weight" else rows.new_empty(0)
    _cast(merged, internal)
    for i, (layer, old) in enumerate(zip(layers, olds, strict=True)):
        part = MergedPart(merged, i, cast("nn.Parameter | None", old.pertoken_scale))
        part.train(old.training)
        if (split := vars(old).get(SPLIT)) is not None:
            split.mark(part)
        undo.callback(put, layer, "linear", old)
        put(layer, "linear", part)


def _cast(layer: LinearQuant, acl_format: int) -> None:
    if format_of(layer.weight) == acl_format:
        return
    layer.weight.data = cast_format(layer.weight.data, acl_format)
    layer.note_weight_format()


def _note_formats(layers: list[LinearQuant]) -> None:
    for layer in layers:
        layer.note_weight_format()


def _take_back(old: LinearQuant, name: str, merged: MergedLinear, index: int) -> None:
    tensor, rows = old._parameters[name], merged.rows(index, name)
    assert tensor is not None and rows is not None
    tensor.data = rows.detach().clone()


def _short(names: list[str]) -> list[str]:
    """Names of layers without what they begin with in common."""
    parents = {name.rpartition(".")[0] for name in names}
    return names if len(parents) > 1 else [name.rpartition(".")[2] for name in names]


def _reported(group: _Group, changed: bool) -> MergedGroup:
    first = group[0][1]
    return MergedGroup(
        names=tuple(name for name, _ in group),
        kind=str(kind_of(first)),
        k=first.in_features,
        sizes=tuple(layer.out_features for _, layer in group),
        changed=changed,
    )
