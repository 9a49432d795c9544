"""inspect: what a checkpoint holds and whether load_checkpoint would take it, from the JSON and the
headers of the files: no tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ..rules.tables import PRODUCTS, Product, dtype_name
from .agreement import notes_of
from .base import Contents
from .check_layer import check_headers, outputs_of, scale_and_bias, why_no_row
from .choose import NamePattern, ignored_tensors, patterns_in
from .files import CheckpointError, Refusals, check_model, expanded, refuse
from .find import check_options, find
from .folder import CheckpointFiles, is_file, old_or_new
from .formats import contents_of, words_of
from .inspection import InspectedLayer, InspectedTensor, Inspection
from .layers import LayerToLoad, layer_of_files
from .msmodelslim_words import Prefer

__all__ = ["inspect"]

_F16, _BF16 = torch.float16, torch.bfloat16


def inspect(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
    ignore: Iterable[str] = (),
    prefer: Prefer = "dynamic",
) -> Inspection:
    """Say what a quantized checkpoint holds, and what load_checkpoint would refuse: everything, and
    not the first only.

    Reads the JSON and the headers of the files and no tensor, so it is quick for files of any size.
    What depends on values (a scale of NaN, a zero point of a weight) only load_checkpoint finds.

    Args:
        path: a folder, or one safetensors file with its JSON beside it.
        model: the float model to load into, which may be on meta; then what it lacks and what the
            files lack is told too.
        dtype, ignore, prefer: as for `load_checkpoint`.

    Returns:
        An Inspection; true if nothing is refused. It prints as a table.

    Raises:
        CheckpointError: arguments that do not fit. What is wrong with the files is in the
            Inspection.
    """
    check_options("inspect", dtype, prefer)
    if model is not None:
        check_model("inspect", model)
    try:
        place = expanded(path)
    except TypeError as error:
        raise CheckpointError(f"inspect: path: {error}. What to do: pass a str.") from None
    patterns = patterns_in(ignore)

    def look() -> Inspection:
        with ExitStack() as stack:
            files = CheckpointFiles(place, stack, mapped=False)
            return _inspect(files, model, dtype, patterns, prefer)

    try:
        return old_or_new(place, look)
    except CheckpointError as error:
        return Inspection(str(place), problems=(str(error),))


def _inspect(
    files: CheckpointFiles,
    model: nn.Module | None,
    dtype: torch.dtype | None,
    patterns: Sequence[NamePattern],
    prefer: Prefer,
) -> Inspection:
    folder = files.path.parent if is_file(files.path) else files.path
    in_files = {key: _tensor(files, key) for key in files}
    problems: list[CheckpointError] = []
    refusals = Refusals(problems)
    layers: list[LayerToLoad] = []
    left_out: dict[str, str] = {}
    with refusals.each():
        if model is not None:
            found = find(model, files, dtype, patterns, prefer, refusals)
            contents, layers, left_out = found.contents, found.layers, found.left_out
        else:
            left_out = ignored_tensors(patterns, files)
            files.leave_out(left_out)
            contents = contents_of(folder, files, prefer=prefer, left_out=left_out)
            files.check_one_save()
            files.rename(contents.names)
            layers = list(_layers_alone(files, contents, dtype, refusals))
            left_out |= contents.not_loaded()
            _check_floats(files, layers, left_out, refusals)
    used = {files.name_of(key) for one in layers for key in _keys(one) if key in files}
    names = {files.name_of(key) if key in files else key: why for key, why in left_out.items()}
    matrices = [key for key, one in in_files.items() if len(one.shape) == 2]
    format, words, notes = "", "", []
    with suppress(CheckpointError):  # JSON that cannot be read, which is among the problems
        format, words = words_of(folder)
        notes = list(notes_of(folder, matrices))
    verdicts = _Verdicts()
    return Inspection(
        str(files.path),
        format=format,
        words=words,
        files=files.sizes(),
        layers=tuple(map(verdicts.of, layers)),
        tensors=tuple(t for key, t in in_files.items() if key not in used and key not in names),
        left_out=names,
        bytes_left_out={k: in_files[k].bytes for k in names if k in in_files},
        problems=tuple(str(error) for error in problems),
        notes=tuple(notes),
        model="" if model is None else type(model).__name__,
    )


def _keys(layer: LayerToLoad) -> Iterator[str]:
    for one in (layer, *layer.twins):
        yield from one.keys.values()


def _tensor(files: CheckpointFiles, key: str) -> InspectedTensor:
    dtype, shape = files.header(key)
    return InspectedTensor(key, dtype, shape, files.bytes_of(key))


def _layers_alone(
    files: CheckpointFiles, contents: Contents, dtype: torch.dtype | None, refusals: Refusals
) -> Iterator[LayerToLoad]:
    """The quantized layers, where no model is known: in the sizes that the files have."""
    usual = dtype or _usual_dtype(files)

    @cache  # a model may have 60,000 experts
    def stand_in(n: int, k: int) -> nn.Linear:
        return nn.Linear(k, n, bias=False, device="meta", dtype=usual)

    for name in contents.kinds:
        with refusals.each():
            weight = f"{name}.weight"
            if weight not in files:
                todo = (
                    "use the JSON that was saved with these weights; if another layer has the same "
                    "weight, inspect with the model"
                )
                refuse(files.path, weight, "the weight of a quantized layer", "no tensor", todo)
            _, shape = files.header(weight)
            if len(shape) != 2 or not all(shape):
                todo = "use the JSON that was saved with these weights"
                refuse(files.file_of(weight), weight, "a weight (n, k)", str(shape), todo)
            layer = layer_of_files(files, contents, name, stand_in(*shape))
            outputs = outputs_of(layer)
            if dtype is None and usual not in outputs:  # the files say which
                layer.module = nn.Linear(1, 1, bias=False, device="meta", dtype=outputs[0])
            yield layer
            check_headers(layer, dtype)


def _usual_dtype(files: CheckpointFiles) -> torch.dtype:
    """float16 or bfloat16, whichever more float tensors of the files have."""
    dtypes = [files.header(key)[0] for key in files]
    return _F16 if dtypes.count(_F16) > dtypes.count(_BF16) else _BF16


def _check_floats(
    files: CheckpointFiles,
    layers: Iterable[LayerToLoad],
    left_out: dict[str, str],
    refusals: Refusals,
) -> None:
    """Refuse weights of integers that no quantized layer has."""
    used = {key for layer in layers for key in layer.keys.values()}
    for key in files:
        dtype, _ = files.header(key)
        integers = dtype is not None and not dtype.is_floating_point and not dtype.is_complex
        if key.endswith(".weight") and integers and key not in used and key not in left_out:
            with refusals.each():
                refuse(
                    files.file_of(key),
                    key,
                    "a float weight, because the JSON does not say that it is quantized",
                    dtype_name(dtype),
                    "use the JSON that was saved with these weights",
                )


class _Verdicts:
    """What layers are and which products run them; layers of the same sizes have one verdict."""

    def __init__(self) -> None:
        self._found: dict[object, dict[str, str]] = {}

    def of(self, layer: LayerToLoad) -> InspectedLayer:
        """A layer, with its verdicts."""
        outputs = outputs_of(layer)
        rows = {output: scale_and_bias(layer, output) for output in outputs}
        key = (layer.kind, layer.n, layer.k, tuple(rows.items()))
        if key not in self._found:
            self._found[key] = {
                product.key: self._verdict(layer, outputs, product) for product in PRODUCTS
            }
        output = layer.output if layer.output in rows else outputs[0]
        scale, bias = rows[output]
        return InspectedLayer(
            layer.name,
            str(layer.kind),
            layer.n,
            layer.k,
            layer.bytes,
            output,
            scale,
            bias,
            self._found[key],
        )

    @staticmethod
    def _verdict(layer: LayerToLoad, outputs: Sequence[torch.dtype], product: Product) -> str:
        """ "yes: float16, bfloat16", or why the product runs none."""
        why = {output: why_no_row(layer, output, product)[0] for output in outputs}
        runs = [dtype_name(output) for output, no in why.items() if not no]
        return f"yes: {', '.join(runs)}" if runs else why[outputs[0]]
