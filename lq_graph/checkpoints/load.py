"""load_checkpoint: a W8A8 checkpoint into a model.

Everything is checked against the files' headers, the scales' values and the model first, then read;
only then is the model changed, all or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..modules.linear_quant import LinearQuant
from ..modules.places import places_of, put
from ..modules.transaction import all_or_nothing, keeps_grad_mode, one_at_a_time
from ..reports import table
from ..rules.tables import dtype_name
from .build import new_layer
from .check_layer import check_layer
from .files import CheckpointError, expanded
from .folder import CheckpointFiles, is_file, old_or_new
from .formats import (
    schemes_of,
)
from .layers import layers_to_load
from .state import RestOfModel, StateChanges, check_rest
from .tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["LoadReport", "Loaded", "check_model", "load_checkpoint"]

_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
# one load at a time: one model may be loaded from several threads, and from a signal handler
_LOCK = one_at_a_time()


@dataclass(frozen=True)
class Loaded:
    """One quantized layer that was loaded: qualified name, scheme, sizes, bytes of its weight."""

    name: str
    scheme: str
    n: int
    k: int
    output_dtype: torch.dtype

    def row(self) -> list[object]:
        """A line of the report."""
        return [
            self.name,
            self.scheme,
            self.n,
            self.k,
            dtype_name(self.output_dtype),
            self.n * self.k,
        ]


class LoadReport(list[Loaded]):
    """What load_checkpoint loaded; prints as a table.

    Attributes:
        bytes_read: of tensors, out of the files, by this process.
    """

    bytes_read = 0

    def __str__(self) -> str:
        if not self:
            return "no quantized layer in these files"
        head = ["module", "scheme", "n", "k", "output", "bytes"]
        return "\n".join(table([head, *(layer.row() for layer in self)]))


@keeps_grad_mode
def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, ParallelStyle] | None = None,
    mmap: bool = False,
) -> LoadReport:
    """Load a W8A8 checkpoint into a model.

    Each quantized layer of the files has to be an nn.Linear of that name in the model, with nothing
    that quantize() would leave it float for; a `QuantizedLinear` replaces it, or replaces one that
    is there already. Every other tensor is loaded by name, into the memory it has.

    All or nothing: files, sizes, dtypes, scales and the model are checked first, and the last
    step, for which Ctrl-C waits, is taken back if it fails. While another process saves into the
    folder, the old checkpoint or the new one is loaded. Threads load one after another. Until
    everything is read, what the model had is kept; make the model under torch.device("meta") to
    have none. Tied weights stay tied.
    Buffers that files do not hold (register_buffer(persistent=False), as the inv_freq of rotary
    embeddings) have to be real before: make the modules that have them anew, outside
    torch.device("meta").

    Args:
        model: with the float layers the checkpoint was made of.
        path: a folder, or one safetensors file with its json beside it; ~ is the home folder.
        dtype: float16 or bfloat16, what the quantized layers take and give; default that of the
            layer's own weight. A static layer of msmodelslim says its own, and has to agree: int64
            deq_scale float16, float32 deq_scale bfloat16.
        mesh, plan: to split quantized layers over devices: a mesh of one dim, and for names of
            layers (`*` for any part between two dots) a ColwiseLinearQuant or RowwiseLinearQuant of
            `lq_graph.parallel`. Each process keeps its part of those layers' tensors, and reads no
            more of the weights; scales and biases are checked whole. The plan
            is applied: leave these layers out of parallelize_module.
        mmap: tensors on the CPU are the mapped files, read when they are used, instead of memory
            of their own. Then nobody may write to the files or shorten them as long as the model
            is there: the model would change with them, or the process end with SIGBUS. Replacing
            them, as save_checkpoint does, is no harm.

    Returns:
        A report, one `Loaded` for each quantized layer.

    Raises:
        CheckpointError: anything missing, truncated, of another dtype or size, beyond the range of
            the model's dtype, or not finite where it is a scale; a layer that must not be replaced;
            tensors left on meta; layers the product in force has no row for. With a mesh, on every
            rank if it is so on one.
        LinearQuantError: a layer that the plan cannot split.

    Source: see checkpoint_format.py.
    """
    if (mesh is None) != (plan is None):
        raise CheckpointError("load_checkpoint: mesh and plan go together; give both or neither.")
    if dtype not in (None, _F16, _BF16):
        given = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise CheckpointError(
            f"load_checkpoint: dtype is {given}; allowed are torch.float16 and torch.bfloat16."
        )
    check_model("load_checkpoint", model)
    shares = None if mesh is None or plan is None else TensorParallel(mesh, plan)
    try:
        path = expanded(path)
    except TypeError as error:
        raise CheckpointError(f"load_checkpoint: path: {error}.") from None

    def load(waits: Path | None) -> tuple[LoadReport, Callable[[], None]]:
        with ExitStack() as stack:
            files = CheckpointFiles(path, stack, waits, mapped=mmap)
            return _load(model, path, files, dtype, shares)

    # parameters made in inference mode could not be used outside
    with torch.inference_mode(False), torch.no_grad():
        if shares is None:
            with _LOCK:
                report, swap = old_or_new(path, load)
                swap()
            return report
        with shares.agreeing() as found:  # nothing is changed on any rank unless all can go on
            report, swap = old_or_new(path, load)
            found += [str(layer.row()) for layer in report]
        swap()
    return report


def check_model(function: str, model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{function}: model is a {type(model).__name__}, not an nn.Module.")


def _load(
    model: nn.Module,
    path: Path,
    files: CheckpointFiles,
    dtype: torch.dtype | None,
    shares: TensorParallel | None,
) -> tuple[LoadReport, Callable[[], None]]:
    """Check and read everything; the function that is returned puts it into the model."""
    kind, schemes = schemes_of(path.parent if is_file(path) else path, files)
    places = places_of(model)
    layers = layers_to_load(model, path, files, kind, schemes)
    for layer in layers:
        check_layer(files, path, kind, layer, dtype)
        if shares is not None and (style := shares.style(layer.name)) is not None:
            whole = LinearQuant(
                layer.k,
                layer.n,
                bias="bias" in layer.parts or "quant_bias" in layer.parts,
                pertoken_scale=layer.dynamic,
                output_dtype=layer.output,
                device="meta",
            )
            style.check(layer.name, whole, shares.ranks)
            layer.style = style
    held = RestOfModel(model, {layer.module for layer in layers})
    used = {key for layer in layers for key in layer.keys.values()}
    rest = check_rest(held, files, path, used)

    weights: dict[str, nn.Parameter] = {}
    new = {layer.module: new_layer(files, kind, layer, shares, weights) for layer in layers}
    changes = StateChanges(held, files, rest)
    files.check_unchanged()

    report = LoadReport(
        Loaded(x.name, "dynamic" if x.dynamic else "static", x.n, x.k, x.output) for x in layers
    )
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

    return report, swap
