"""use_internal_format_weight: prepare the quantized linear layers of a model for the NPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backends.compat_npu import import_torchair, installed, why_no_int4_nz
from ..backends.npu import cast_format, format_of
from ..errors import LinearQuantError, LinearQuantValueError
from ..ops import trans_quant_param
from ..reports import counted, folded, table
from ..rules.cann import check_int4_nz
from ..rules.plan import check_finite
from ..rules.products import get_product, get_target
from ..rules.tables import FRACTAL_NZ, ND, Product, dtype_name, storage_name
from .linear_quant import LinearQuant
from .merge import merge_layers, one_change_at_a_time
from .merge_report import MergeReport
from .merge_rules import memory
from .runs import arguments_of
from .supported import plan_of_layer
from .transaction import keeps_grad_mode
from .vendor import vendor_layers

__all__ = ["Prepared", "Report", "use_internal_format_weight"]

_PROGRESS_FROM = 16  # layers; with fewer, the work is done before a bar can be read
_FORMATS = {ND: "ND", FRACTAL_NZ: "FRACTAL_NZ"}


@dataclass(frozen=True)
class Prepared:
    """What use_internal_format_weight did to one layer.

    Attributes:
        name: the module's qualified name.
        before, after: dtype and format of the weight, and dtype of the scale if it has one.
        bytes: size of the weight's storage, padding included.
        note: what was not done, and why; empty if everything was done.
    """

    name: str
    before: str
    after: str
    bytes: int
    note: str

    @property
    def changed(self) -> bool:
        """Whether the layer was changed."""
        return self.before != self.after


class Report(list[Prepared]):
    """What use_internal_format_weight did, one line for each layer; prints as a table,
    layers that are equal but for numbers in their names on one line.

    Attributes:
        merged: which layers were merged, and why others were not; None without an example.
    """

    merged: MergeReport | None = None

    def __str__(self) -> str:
        merged = [] if self.merged is None else [str(self.merged)]
        return "\n".join([*merged, self._prepared()])

    def _prepared(self) -> str:
        if not self:
            return "no LinearQuant in this model"
        rows: list[list[object]] = [["module", "before", "after", "bytes", ""]]
        for group in folded(self, lambda r: r.name, lambda r: (r.before, r.after, r.note)):
            r, name = group[0], counted([r.name for r in group]) or "(model)"
            after = r.after if r.changed else "as it was"
            rows.append([name, r.before, after, sum(r.bytes for r in group), r.note])
        changed = sum(r.changed for r in self)
        total = sum(r.bytes for r in self)
        summary = f"{len(self)} layers, {changed} changed, {total:,} bytes of weights"
        return "\n".join([*table(rows), summary])


@keeps_grad_mode
def use_internal_format_weight(
    model: nn.Module, *, example: Any = None, int4_nz: bool = False
) -> Report:
    """Prepare every LinearQuant of a model for the NPU.

    With an example of the model's inputs, first merges layers that read one tensor, as `merge`
    does: q, k and v, or gate and up, become one product. Then, with or without it,
    folds a float32 scale, with the offset, into the packed int64 scale if the layer's row of the
    support table reads it, and casts int8 weights to FRACTAL_NZ. The layers are lq_graph's and
    the vendor's LinearQuant and LinearA8W8Quant. Everything else (Linear, Conv2d, ...) goes to
    torchair's function of the same name, except a Linear whose weight another kind of layer reads
    too, such as a head that is tied to the embedding: an Embedding cannot read FRACTAL_NZ.

    Idempotent and atomic: if a step fails, the model is unchanged. Ctrl-C waits for the end, and
    threads wait for each other. Layers are merged and prepared one after the other, so it needs
    memory for one weight, merged or not, beside the model.

    Prepare before the first call of a compiled model. A graph is compiled for the format that its
    weights have then, and a device does not check it again. If a weight is prepared, moved
    (`.cpu().npu()`) or replaced (`weight.data = tensor`) afterwards, the graph reads it in the old
    format and the output is garbage, without an error. The same holds for a packed scale that is
    replaced by `scale.data = tensor`: a graph may read its values, which are kept beside it.

    torch.compile compiles lq_graph's layers again when the format of their weight changes, except
    by `weight.data = tensor`. Nothing notices the change in other layers, in cache_compile, and in
    captured graphs after their first run. cann_host refuses a run in another format.

    If forward gets pertoken_scale as an argument, make the layer with pertoken_scale=True.
    Otherwise a layer with float16 output counts as a layer without pertoken_scale, and its scale is
    packed.

    Args:
        model: on the NPU.
        example: what to call the model with, once, to see which layers read one tensor: a mapping
            by keyword, a tuple or list by position, a tensor as the only argument. A short one will
            do. Its tensors are moved to the model's device. None merges nothing.
        int4_nz: cast int4 weights to FRACTAL_NZ too. CANN has kernels for that from 9.0.0 on, for
            Atlas A2 and A3; no public release has them for Ascend 950. Some versions of torch_npu
            cannot cast them. A cast layer runs in GE graphs only: eagerly, npu_quant_matmul calls
            aclnnQuantMatmulV5, which takes int4 as ND. So by default int4 weights stay ND, or are
            cast back to ND.

    Warns:
        UserWarning: weights stay ND, because torch.npu.config.allow_internal_format is off; the
            format of another library's layer changed after torch.compile had made graphs.

    Returns:
        A Report: a list with one `Prepared` for each layer, in the order of `named_modules`, then
        one for each Linear that was left.

    Raises:
        LinearQuantValueError: the model is not on the NPU, a scale holds NaN or infinity, or
            int4_nz with a CANN that has no kernels for it, or with a torch_npu that cannot cast
            int4 weights.
        LinearQuantTypeError: a layer has no row in the product's table, or a newer CANN brought it;
            an example that a model cannot be called with.
        LinearQuantError: torchair cannot be imported.

    Source: torchair's use_internal_format_weight.
    """
    with one_change_at_a_time() as undo:
        merged = None
        if example is not None:
            args, kwargs = arguments_of(example, _EXAMPLE_IS)
            _checked_layers(model, int4_nz)  # before the model runs
            merged = merge_layers(model, args, kwargs, undo)
        report, others_changed = _prepare_all(model, int4_nz, undo)
        report.merged = merged
    if any(_OFF in prepared.note for prepared in report):
        warnings.warn(
            "use_internal_format_weight: weights stay ND, because "
            "torch.npu.config.allow_internal_format is off. What to do: set it to True first.",
            stacklevel=3,
        )
    if others_changed and _has_compiled():
        warnings.warn(
            "use_internal_format_weight: formats of weights changed after torch.compile had made "
            "graphs in this process. torch.compile compiles lq_graph's layers again. For other "
            f"layers ({others_changed}) it does not notice the change: a graph that was made for "
            "ND reads FRACTAL_NZ as ND. What to do: prepare before the first call, or call "
            "torch._dynamo.reset() now.",
            stacklevel=3,
        )
    return report


def _kinds() -> tuple[type[nn.Module], ...]:
    return (LinearQuant, *vendor_layers())


def _checked_layers(
    model: nn.Module, int4_nz: bool
) -> tuple[list[tuple[str, LinearQuant]], list[bool]]:
    """The layers with their names, and whether to fold the scale of each; refuses a layer that
    cannot be prepared."""
    kinds = _kinds()
    # cast: the vendor's modules have the attributes of ours
    layers = [
        (name, cast(LinearQuant, m)) for name, m in model.named_modules() if isinstance(m, kinds)
    ]
    folds = [_check(name or "the model", layer, int4_nz) for name, layer in layers]
    if int4_nz:
        _check_int4_nz(layers)
    return layers, folds


def _prepare_all(model: nn.Module, int4_nz: bool, undo: ExitStack) -> tuple[Report, str]:
    """The report, and the name of a module whose new format torch.compile does not notice; empty if
    there is none."""
    layers, folds = _checked_layers(model, int4_nz)
    kept_float = _scales_read_otherwise(layers, folds)

    from tqdm import tqdm

    torchair = import_torchair()
    report = Report()
    others_changed = ""
    holders: dict[Tensor, list[LinearQuant]] = {}  # our layers that hold each scale
    for _, layer in layers:
        if isinstance(layer, LinearQuant):
            holders.setdefault(layer.scale, []).append(layer)
    # None: no progress bar if the output is not a terminal
    bar = tqdm(layers, "preparing weights", disable=None if len(layers) >= _PROGRESS_FROM else True)
    for _, layer in layers:  # undone last, because layers may share a weight
        if isinstance(layer, LinearQuant):
            undo.callback(layer.note_weight_format)
            undo.callback(layer.note_scale)
    for (name, layer), fold in zip(bar, folds, strict=True):
        was = format_of(layer.weight)
        why_float = kept_float.get(layer.scale, "")
        sharing = holders.get(layer.scale, [])
        report.append(_prepare(name, layer, fold, why_float, int4_nz, sharing, undo))
        if format_of(layer.weight) != was and not isinstance(layer, LinearQuant):
            others_changed = others_changed or name or type(layer).__name__
    tied = _tied(model)
    report += tied.values()
    for rest in _others(model, _kinds(), tied):
        before = {parameter: format_of(parameter) for parameter in rest.parameters()}
        for parameter, acl_format in before.items():
            # torchair casts weights and folds scales, which are short enough to keep
            scale = parameter.data if parameter.dim() < 2 else None
            undo.callback(_restore, parameter, acl_format, scale)
        torchair.use_internal_format_weight(rest)
        if any(format_of(parameter) != was for parameter, was in before.items()):
            others_changed = others_changed or type(rest).__name__
    return report, others_changed


def _has_compiled() -> bool:
    """Whether torch.compile has made graphs in this process."""
    compiler = sys.modules.get("torch._dynamo.convert_frame")
    return compiler is not None and bool(compiler.input_codes.seen)


def _scales_read_otherwise(
    layers: list[tuple[str, LinearQuant]], folds: list[bool]
) -> dict[Tensor, str]:
    """Scales that several layers share and read differently: to fold such a scale for one layer
    would be wrong for another. Each with the reason."""
    first: dict[Tensor, tuple[str, LinearQuant, bool]] = {}
    kept: dict[Tensor, str] = {}
    for (name, layer), fold in zip(layers, folds, strict=True):
        other_name, other, other_folds = first.setdefault(layer.scale, (name, layer, fold))
        if fold != other_folds or not _equal(layer.offset, other.offset):
            kept[layer.scale] = (
                f"scale stays float32: {other_name} and {name} share it and read it differently"
            )
    return kept


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)


_OFF = "allow_internal_format is off"
_EXAMPLE_IS = "use_internal_format_weight: example is"


def _check(name: str, layer: LinearQuant, int4_nz: bool) -> bool:
    """Whether to fold a layer's scale; refuses a layer that cannot be prepared."""
    if layer.weight.device.type != "npu":
        raise LinearQuantValueError(
            f"use_internal_format_weight: {name} is on {layer.weight.device}; FRACTAL_NZ exists on "
            "the NPU only. What to do: call model.npu() first."
        )
    try:
        fold = plan_of_layer(layer).fold_scale
        if int4_nz and layer.weight.dtype == torch.int32:
            check_int4_nz(get_target())
        if fold:
            check_finite(layer.scale, layer.offset)
        return fold
    except LinearQuantError as error:
        raise error.in_layer("use_internal_format_weight", name) from None


def _check_int4_nz(layers: list[tuple[str, LinearQuant]]) -> None:
    """Refuses int4_nz where torch_npu cannot cast such a weight."""
    product = get_product()
    for name, layer in layers:
        weight = layer.weight
        if weight.dtype != torch.int32 or _why_nd(weight, product, int4_nz=True):
            continue
        if why := why_no_int4_nz():
            raise LinearQuantValueError(
                f"use_internal_format_weight: {name or 'the model'}: int4_nz=True; {installed()} "
                f"cannot cast int4 weights to FRACTAL_NZ here ({why}); the model is unchanged. "
                "What to do: leave int4_nz out: int4 weights stay ND, and the results are the "
                "same. Or install CANN 9.1 and torch_npu 2.7.1.post11, 2.9.0.post9, 2.10.0.post7, "
                "or 2.11 or later."
            )
        return


def _prepare(
    name: str,
    layer: LinearQuant,
    fold: bool,
    why_float: str,
    int4_nz: bool,
    sharing: list[LinearQuant],
    undo: ExitStack,
) -> Prepared:
    """Fold and cast one layer; before each step, `undo` gets the function that undoes it."""
    weight = layer.weight
    before = _describe(layer)
    if fold and not why_float:
        _fold(layer, sharing, undo)
    why_nd = _why_nd(weight, get_product(), int4_nz)
    wanted = ND if why_nd else FRACTAL_NZ
    if (was := format_of(weight)) != wanted:
        undo.callback(_cast, weight, was)
        _cast(weight, wanted)
        if format_of(weight) != wanted:
            why_nd = f"weight stays ND: torch.npu.config.{_OFF}"
    if isinstance(layer, LinearQuant):
        layer.note_weight_format()
        layer.note_scale()
    note = "; ".join(why for why in (why_float, why_nd) if why)
    return Prepared(name, before, _describe(layer), weight.untyped_storage().nbytes(), note)


def _fold(layer: LinearQuant, sharing: list[LinearQuant], undo: ExitStack) -> None:
    """Fold a float32 scale, unless an earlier layer that shares it has already folded it.

    Args:
        layer: whose scale it is.
        sharing: our layers that hold the scale. Each stores the float32 values for state dicts
            before the scale is packed, because another thread may be making a state dict.
        undo: gets the functions that undo the steps.
    """
    scale = layer.scale
    if scale.dtype != torch.float32:
        return
    for one in sharing:
        undo.callback(setattr, one, "_float_scale", one._float_scale)
        one._float_scale = scale.data
    undo.callback(_restore, scale, ND, scale.data)
    scale.data = trans_quant_param(scale.data, layer.offset)


def _describe(layer: LinearQuant) -> str:
    return f"{_describe_weight(layer.weight)}, scale {dtype_name(layer.scale.dtype)}"


def _describe_weight(weight: Tensor) -> str:
    acl_format = format_of(weight)
    return f"{storage_name(weight.dtype)} {_FORMATS.get(acl_format, f'format {acl_format}')}"


def _cast(parameter: Tensor, acl_format: int) -> None:
    parameter.data = cast_format(parameter.data, acl_format)


def _restore(parameter: Tensor, acl_format: int, scale: Tensor | None) -> None:
    """Undo a fold or a cast. Casting back undoes a cast, so no second weight is in memory."""
    if scale is not None and parameter.dtype != scale.dtype:
        parameter.data = scale
    elif format_of(parameter) != acl_format:
        _cast(parameter, acl_format)


def _why_nd(weight: Tensor, product: Product, int4_nz: bool) -> str:
    """Why a weight stays ND; empty if it becomes FRACTAL_NZ."""
    if weight.dtype not in product.nz_storage and not int4_nz:
        return "weight stays ND: int4_nz=True casts it, where the CANN version has the kernels"
    if 1 in weight.shape[-2:]:
        # quant_matmul_checker.cpp (hicann/ops-nn) refuses FRACTAL_NZ there
        return "weight stays ND: n or k is 1"
    return ""


def _others(
    module: nn.Module, kinds: tuple[type, ...], left: Container[nn.Module]
) -> Iterator[nn.Module]:
    """The largest parts of a model without a layer of `kinds` or in `left`, for torchair's own
    function."""
    if not any(isinstance(m, kinds) or m in left for m in module.modules()):
        yield module
    elif not isinstance(module, kinds):
        for child in module.children():
            yield from _others(child, kinds, left)


def _tied(model: nn.Module) -> dict[nn.Module, Prepared]:
    """Every Linear whose weight a module of another kind holds too. That reads ND: in FRACTAL_NZ,
    each step of a graph would cast the whole weight back."""
    holders: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                holders.setdefault(memory(parameter), name)
    found: dict[nn.Module, Prepared] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (holder := holders.get(memory(module.weight))):
            is_now, size = _describe_weight(module.weight), module.weight.untyped_storage().nbytes()
            note = f"left: {holder}, no Linear, reads the weight too"
            found[module] = Prepared(name, is_now, is_now, size, note)
    return found
