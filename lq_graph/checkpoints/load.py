"""load_checkpoint: loads a quantized checkpoint into a model.

In this order: check the headers of the files, the values of the scales and the model; read
everything; change the model, atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..modules.linear_quant import LinearQuant
from ..modules.places import places_of, put
from ..modules.transaction import all_or_nothing, keeps_grad_mode, one_at_a_time
from ..reports import counted, folded, table
from ..rules.tables import dtype_name
from .check_layer import check_values, check_without_effect
from .choose import NamePattern, lines_of_left_out, patterns_in, some
from .files import CheckpointError, Refusals, check_model, expanded
from .find import check_options, find
from .folder import CheckpointFiles, old_or_new
from .layers import LayerToLoad, check_twins, new_layer
from .msmodelslim_words import Prefer
from .state import StateChanges, check_meta
from .tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle
else:
    DeviceMesh = ParallelStyle = object  # for typing.get_type_hints; importing them takes 0.6 s

__all__ = ["LoadReport", "Loaded", "load_checkpoint"]

_F16, _BF16 = torch.float16, torch.bfloat16
# One load at a time: several threads, or a signal handler, may load into one model.
_LOCK = one_at_a_time()


@dataclass(frozen=True)
class Loaded:
    """One quantized layer that was loaded.

    Attributes:
        name: qualified name.
        scheme: "A8W8 dynamic", "A8W8 static" or "A4W4 dynamic".
        n, k: its sizes.
        output_dtype: the float dtype that it takes and returns.
        bytes: size of its weight in memory.
    """

    name: str
    scheme: str
    n: int
    k: int
    output_dtype: torch.dtype
    bytes: int

    def row(self) -> list[object]:
        """A line of the report."""
        output = dtype_name(self.output_dtype)
        return [self.name, self.scheme, self.n, self.k, output, self.bytes]


class LoadReport(list[Loaded]):
    """What load_checkpoint loaded, one line for each quantized layer; prints as a table.

    Attributes:
        bytes_read: bytes of tensors that this process read from the files.
        left_out: tensors of the files that were not loaded, with the reason.
        bytes_left_out: their sizes in the files.
        added: biases of the files that norms and float layers got, whose classes have none.
        renamed: the names in the model of the tensors that have another name in the files, by that.
    """

    bytes_read = 0
    left_out: Mapping[str, str] = MappingProxyType({})
    bytes_left_out: Mapping[str, int] = MappingProxyType({})
    added: tuple[str, ...] = ()
    renamed: Mapping[str, str] = MappingProxyType({})

    def __str__(self) -> str:
        lines = ["no quantized layer in these files"]
        if self:
            rows: list[list[object]] = [["module", "scheme", "n", "k", "output", "bytes"]]
            for group in folded(
                self, lambda layer: layer.name, lambda layer: tuple(layer.row()[1:])
            ):
                name = counted([layer.name for layer in group])
                rows.append([name, *group[0].row()[1:-1], sum(layer.bytes for layer in group)])
            lines = table(rows)
        lines += lines_of_left_out(self.left_out, self.bytes_left_out)
        if self.added:
            lines.append(f"biases that the model had not: {len(self.added):,}, {some(self.added)}")
        for name, new in [*self.renamed.items()][:1]:
            lines.append(f"another name in the files: {len(self.renamed):,}, {name} is {new} here")
        return "\n".join(lines)


@keeps_grad_mode
def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    ignore: Iterable[str] = (),
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, ParallelStyle] | None = None,
    mmap: bool = False,
    prefer: Prefer = "dynamic",
) -> LoadReport:
    """Load a quantized checkpoint of msmodelslim or compressed-tensors into a model.

    For each quantized layer of the files the model needs an nn.Linear of that name, or a
    QuantizedLinear. A `QuantizedLinear` replaces the nn.Linear, which must be one that `quantize`
    would quantize. Every other tensor is loaded by name, into the memory that it has. Tied weights
    stay tied. A norm, or a layer that stays float, gets the bias that msmodelslim's smoothing gave
    it, as a parameter that the norm adds by a forward hook.

    Atomic: if a step fails, the model is unchanged. Files and model are checked first, everything
    is read second, and the model is changed last; Ctrl-C waits for that step. If another process
    saves into the folder meanwhile, the old checkpoint or the new one is loaded. Threads load one
    after another.

    The old tensors stay in memory until everything is read. To avoid this, make the model under
    torch.device("meta"). Files do not hold non-persistent buffers (the inv_freq of rotary
    embeddings, for example), so before loading, make the modules that have such buffers again,
    outside torch.device("meta").

    Args:
        model: the float model that was quantized.
        path: a folder, or one safetensors file with its JSON beside it; ~ is the home folder.
        dtype: torch.float16 or torch.bfloat16, the dtype of the quantized layers' input and output;
            default the dtype of each layer's own weight. A static layer of msmodelslim has its own
            dtype, which must agree: float16 for an int64 deq_scale, bfloat16 for a float32 one.
        ignore: patterns of tensors, by their names in the files, that are not loaded because the
            model has not what they belong to: `model.layers.61.*`, `visual.*`, `*.k_scale`. `*`
            spans dots; a pattern that matches a module takes everything in it; after "re:" it is a
            regular expression that matches from the beginning. Left out without a pattern is what
            the model computes itself (inv_freq) and what its transformers class does not need.
        mesh: a mesh of one dim, to split layers over devices; with `plan` only.
        plan: how to split layers: a mapping from a name (`*` stands for any part between two dots)
            to a ColwiseLinearQuant or RowwiseLinearQuant of `lq_graph.parallel`. Each process reads
            and keeps only its part of the weights; scales and biases are read whole, to check them.
            Leave these layers out of parallelize_module.
        mmap: map the files instead of reading them; tensors on the CPU are then read when they are
            used. As long as the model exists, do not write to the files or shorten them: the
            model's values would change, or the process would end with SIGBUS. To replace the files,
            as save_checkpoint does, is safe.
        prefer: "dynamic" or "static": how layers are loaded that the files have in both ways
            (msmodelslim's W8A8_MIX).

    Returns:
        A LoadReport: a list with one `Loaded` for each quantized layer.

    Raises:
        CheckpointError: a file or tensor that is missing, cut off, or of another dtype or shape; a
            scale that is not finite and above 0; a value that the model's dtype cannot hold; a
            layer that cannot be replaced or that the product in force cannot run; a tensor that
            would stay on meta; a pattern that matches nothing, or that ignores what the model has.
            With a mesh, an error of one rank is raised on all ranks.
        LinearQuantError: a layer that the plan cannot split.

    Source: vllm-project/vllm-ascend for msmodelslim's format, vllm-project/compressed-tensors for
    the other.
    """
    path = _check_arguments(model, path, dtype, mesh, plan, prefer)
    patterns = patterns_in(ignore)
    parallel = None if mesh is None or plan is None else TensorParallel(mesh, plan)

    def load() -> tuple[LoadReport, Callable[[], None]]:
        with ExitStack() as stack:
            files = CheckpointFiles(path, stack, mapped=mmap)
            return _load(model, files, dtype, patterns, parallel, prefer)

    # parameters made in inference mode could not be used outside
    with torch.inference_mode(False), torch.no_grad():
        if parallel is None:
            with _LOCK:
                report, swap = old_or_new(path, load)
                swap()
            return report
        with parallel.agreeing() as found:  # a rank changes its model only if all ranks can
            report, swap = old_or_new(path, load)
            found += [str(layer.row()) for layer in report]
        swap()
    return report


def _check_arguments(
    model: object, path: str | Path, dtype: object, mesh: object, plan: object, prefer: object
) -> Path:
    """Refuse arguments that do not fit; returns the path with the home folder for ~."""
    if (mesh is None) != (plan is None):
        raise CheckpointError(
            "load_checkpoint: one of mesh and plan. What to do: give both or neither."
        )
    check_options("load_checkpoint", dtype, prefer)
    check_model("load_checkpoint", model)
    try:
        return expanded(path)
    except TypeError as error:
        raise CheckpointError(f"load_checkpoint: path: {error}. What to do: pass a str.") from None


def _load(
    model: nn.Module,
    files: CheckpointFiles,
    dtype: torch.dtype | None,
    ignore: Sequence[NamePattern],
    parallel: TensorParallel | None,
    prefer: Prefer,
) -> tuple[LoadReport, Callable[[], None]]:
    """Check and read everything. Returns the report, and the function that changes the model."""
    places = places_of(model)
    found = find(model, files, dtype, ignore, prefer, Refusals())
    check_meta(found.rest_of_model)
    check_without_effect(found.layers, found.contents.must_be)
    for layer in found.layers:
        check_values(layer)
        check_twins(layer)
        if parallel is not None:
            _plan_split(layer, parallel)
    found.biases.read()

    weights: dict[str, nn.Parameter] = {}
    new = {layer.module: new_layer(layer, parallel, weights) for layer in found.layers}
    changes = StateChanges(found.rest_of_model, files, found.rest)
    files.check_unchanged()

    report = LoadReport(
        Loaded(x.name, str(x.kind), x.n, x.k, x.output, x.bytes) for x in found.layers
    )
    report.left_out = found.left_out | found.biases.left_out
    report.bytes_left_out = found.bytes_left_out | {
        key: files.bytes_of(key) for key in found.biases.left_out
    }
    report.added = found.biases.added
    report.renamed = found.contents.names
    report.bytes_read = files.bytes_read

    def swap() -> None:
        with _LOCK, all_or_nothing() as undo:
            for old, layer in new.items():
                held = places.get(old, [])
                if not held or any(parent._modules.get(name) is not old for parent, name in held):
                    raise CheckpointError(
                        "load_checkpoint: the model was changed by something else while it was "
                        "loaded, a signal handler for example. What to do: load again."
                    )
                for parent, name in held:
                    undo.callback(put, parent, name, old)
                    put(parent, name, layer)
            changes.make(undo)
            found.biases.make(undo)

    return report, swap


def _plan_split(layer: LayerToLoad, parallel: TensorParallel) -> None:
    """Note how a layer is split; refuse one that cannot be."""
    if (style := parallel.style(layer.name)) is None:
        return
    whole = LinearQuant(
        layer.k,
        layer.n,
        bias=any(part in layer for part in ("bias", "quant_bias", "input_zero_point")),
        pertoken_scale=not layer.kind.static,
        output_dtype=layer.output,
        dtype=layer.kind.storage,
        device="meta",
    )
    style.check(layer.name, whole, parallel.ranks)
    layer.style = style
