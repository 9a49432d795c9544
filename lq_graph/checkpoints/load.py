"""load_checkpoint: a W8A8 checkpoint into a model. checkpoint_write.py goes the other way,
checkpoint_format.py has the formats.

Everything is checked against the files' headers, the scales' values and the model first, then read;
only then is the model changed, all or nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..backends.npu import cast_format, format_of
from ..errors import LinearQuantTypeError
from ..modules.linear_quant import LinearQuant, layer_of
from ..modules.places import held_elsewhere, places_of, put
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import carry_over, why_not_replaceable
from ..modules.transaction import all_or_nothing, keeps_grad_mode, one_at_a_time
from ..quantization.layer import no_row
from ..reports import table
from ..rules.tables import ND, dtype_name
from .files import CheckpointError, TensorFile, expanded, read_json, refuse, shown
from .formats import (
    INDEX,
    PARTS,
    Part,
    list_folder,
    schemes_of,
    temporary,
    waiting,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ParallelStyle

    from ..parallel.styles import LinearQuantStyle

__all__ = [
    "CheckpointError",
    "LoadReport",
    "Loaded",
    "build",
    "check_model",
    "fits",
    "load_checkpoint",
    "memory_of",
]

_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_TRIES = 20  # of a folder that changes while it is read
_EXTRA = "_extra_state"  # how nn.Module ends the name of what get_extra_state gives
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


# ---- files ----


class _Files:
    """Tensors of one or many safetensors files, read one at a time."""

    def __init__(self, path: Path, stack: ExitStack, waits: Path | None, *, mapped: bool) -> None:
        self._files: list[TensorFile] = []
        self._of: dict[str, TensorFile] = {}
        index, paths = _files_of(path) if waits is None else (None, [waits])
        for file in paths:
            opened = TensorFile(file, mapped=mapped)
            stack.callback(opened.close)
            self._files.append(opened)
            for key in opened.entries:
                if key in self._of:
                    refuse(file, key, "one place", f"also in {self._of[key].file.name}")
                self._of[key] = opened
        if index is not None:
            self._check_index(*index)

    def _check_index(self, index: Path, names: dict[str, str]) -> None:
        """An index is of these files, and not of others that were here before."""
        for key, name in names.items():
            if key not in self._of or self._of[key].file.name != name:
                refuse(index, key, f"a tensor in {name}", "no such tensor")
        for key, opened in self._of.items():
            if key not in names:
                refuse(opened.file, key, f"a tensor that {index.name} has", "no such key there")
        others = {name for name in list_folder(index.parent) if name.endswith(".safetensors")}
        for name in sorted(others - {opened.file.name for opened in self._files}):
            both = [key for key in _names_in(index.parent / name) if key in names]
            if both:  # files of other tensors, as consolidated.safetensors, are not read
                refuse(
                    index,
                    None,
                    "no other file with the tensors that it lists",
                    f"{shown(both[0])} in {name} too, which it does not list",
                    f"remove {name}, or, if that is the checkpoint, the index and its files",
                )

    def __contains__(self, key: str) -> bool:
        return key in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    @property
    def bytes_read(self) -> int:
        """Of tensors, so far."""
        return sum(file.bytes_read for file in self._files)

    def path(self, key: str) -> Path:
        """The file a tensor is in."""
        return self._of[key].file

    def header(self, key: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """dtype and shape, from the file's header."""
        entry = self._of[key].entries[key]
        return entry.dtype, entry.shape

    def read(self, key: str) -> Tensor:
        """The tensor itself."""
        return self._of[key].read(key)

    def read_part(self, key: str, dim: int, part: int, parts: int) -> Tensor:
        """One of the equal parts of a tensor along a dim; nothing else of it is read."""
        return self._of[key].read_part(key, dim, part, parts)

    def check_unchanged(self) -> None:
        """Refuse files that were written to meanwhile."""
        for file in self._files:
            file.check_unchanged()


def _names_in(file: Path) -> list[str]:
    """Names of the tensors in a file; none if it is no safetensors file."""
    try:
        opened = TensorFile(file)
    except CheckpointError:
        return []
    opened.close()
    return list(opened.entries)


def _is_file(path: Path) -> bool:
    """Whether a path is one file's; refuses one that is nothing."""
    try:
        os.listdir(path)
    except NotADirectoryError:
        return True
    except FileNotFoundError:
        refuse(path, None, "a folder or a safetensors file", "nothing")
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        refuse(path, None, "a folder or a safetensors file", found)
    return False


def _files_of(path: Path) -> tuple[tuple[Path, dict[str, str]] | None, list[Path]]:
    """An index with what it says, if there is one, and the safetensors files."""
    if _is_file(path):
        return None, [path]
    names = list_folder(path)
    indices = [name for name in names if name.endswith(INDEX)]
    if not indices:
        files = [path / name for name in names if name.endswith(".safetensors")]
        if not files:
            refuse(path, None, "a folder with safetensors files", "none")
        return None, files
    if len(indices) > 1:
        refuse(path, None, "one index", " and ".join(indices), "remove the one of other weights")
    index = path / indices[0]
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        refuse(index, "weight_map", "a map from tensor to file", repr(listed)[:60])
    for name in set(map(str, listed.values())):
        # a name, not a path: a checkpoint must not read outside its folder
        if name not in listed.values() or Path(name).name != name:
            refuse(index, "weight_map", "names of files in the same folder", repr(name))
        if name not in names:
            refuse(index, "weight_map", f"the file {shown(name)}", "no such file")
    return (index, listed), [path / name for name in sorted(set(listed.values()))]


_T = TypeVar("_T")


def _old_or_new(path: Path, load: Callable[[Path | None], _T]) -> _T:
    """Load what is in a folder before or after another process saves into it.

    save_checkpoint puts the JSON in place and then the weights, which wait complete until they have
    their name. An error is one of the files only if they stayed as they are meanwhile: what is read
    partly before and partly after does not fit together.
    """
    tries = 0
    while True:
        before = _stamp(path)
        try:
            return load(_waiting_for(path))
        except CheckpointError:
            tries += 1
            if tries == _TRIES or _stamp(path) == before:
                raise


def _waiting_for(path: Path) -> Path | None:
    """Weights that wait to be in a folder, or to be a file."""
    if os.path.isdir(path):
        return waiting(path)
    found = waiting(path.parent)
    return found if found is not None and found.name == temporary(path.name) else None


def _stamp(path: Path) -> list[tuple[object, ...]]:
    """What changes when a file of a checkpoint does."""
    found: list[tuple[object, ...]] = []
    with suppress(OSError, ValueError):
        folder = path if os.path.isdir(path) else path.parent
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith((".safetensors", ".json", ".saving", ".before")):
                    status = entry.stat()
                    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
                    found.append((entry.name, *stamp))
    return sorted(found, key=str)


# ---- loading ----


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
    shares = None if mesh is None or plan is None else _Shares(mesh, plan)
    try:
        path = expanded(path)
    except TypeError as error:
        raise CheckpointError(f"load_checkpoint: path: {error}.") from None

    def load(waits: Path | None) -> tuple[LoadReport, Callable[[], None]]:
        with ExitStack() as stack:
            files = _Files(path, stack, waits, mapped=mmap)
            return _load(model, path, files, dtype, shares)

    # parameters made in inference mode could not be used outside
    with torch.inference_mode(False), torch.no_grad():
        if shares is None:
            with _LOCK:
                report, swap = _old_or_new(path, load)
                swap()
            return report
        with shares.agreeing() as found:  # nothing is changed on any rank unless all can go on
            report, swap = _old_or_new(path, load)
            found += [str(layer.row()) for layer in report]
        swap()
    return report


def check_model(function: str, model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{function}: model is a {type(model).__name__}, not an nn.Module.")


class _Shares:
    """Which part of which layer is this process's."""

    def __init__(self, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> None:
        from ..parallel.styles import LinearQuantStyle

        for pattern, style in plan.items():
            if not isinstance(style, LinearQuantStyle):
                raise CheckpointError(
                    f"load_checkpoint: the plan has {type(style).__name__} for {pattern}; allowed "
                    "are ColwiseLinearQuant and RowwiseLinearQuant. What to do: leave other "
                    "modules to parallelize_module, after loading."
                )
            style.check_mesh(mesh)
        self.mesh, self._plan = mesh, dict(plan)
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()

    def style(self, name: str) -> LinearQuantStyle | None:
        """The plan for a layer, if it has one."""
        tokens = name.split(".")
        for pattern, style in self._plan.items():
            patterns = pattern.split(".")
            if len(patterns) == len(tokens) and all(map(fnmatchcase, tokens, patterns)):
                return cast("LinearQuantStyle", style)
        return None

    @contextmanager
    def agreeing(self) -> Iterator[list[str]]:
        """Raise on every rank what one of them raises in the block, or that they differ in what
        they put into the list."""
        import torch.distributed as dist

        mine: BaseException | None = None
        found: list[str] = []
        try:
            yield found
        except BaseException as error:  # whatever it is, the others must not wait for this rank
            mine = error
        told: list[Any] = [None] * self.ranks
        answer = (None if mine is None else str(mine) or type(mine).__name__, found)
        dist.all_gather_object(told, answer, group=self.mesh.get_group())
        if mine is not None:
            raise mine
        for rank, (text, _) in enumerate(told):
            if text is not None:
                raise CheckpointError(f"rank {rank} of {self.ranks} could not load: {text}")
        for rank, (_, theirs) in enumerate(told):
            if theirs != told[0][1]:
                here, there = (
                    next(iter(sorted(set(a) - set(b))), "nothing more")
                    for a, b in ((told[0][1], theirs), (theirs, told[0][1]))
                )
                raise CheckpointError(
                    f"the ranks' checkpoints differ: rank 0 has {here}, rank {rank} has "
                    f"{there}. What to do: give every rank the same files and the same model."
                )


@dataclass
class _Layer:
    """A quantized layer of the files, and the module of the model that it replaces.

    Attributes:
        parts: the tensors it has in the files.
        keys: their names there; a weight that is tied to another layer's may be under that one's.
    """

    name: str
    module: nn.Module
    dynamic: bool
    n: int
    k: int
    output: torch.dtype = _F16
    style: LinearQuantStyle | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def _load(
    model: nn.Module,
    path: Path,
    files: _Files,
    dtype: torch.dtype | None,
    shares: _Shares | None,
) -> tuple[LoadReport, Callable[[], None]]:
    """Check and read everything; the function that is returned puts it into the model."""
    kind, schemes = schemes_of(path.parent if _is_file(path) else path, files)
    places = places_of(model)
    layers = _layers(model, path, files, kind, schemes)
    for layer in layers:
        _check_layer(files, path, kind, layer, dtype)
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
    held = _Held(model, {layer.module for layer in layers})
    used = {key for layer in layers for key in layer.keys.values()}
    rest = _check_rest(held, files, path, used)

    weights: dict[str, nn.Parameter] = {}
    new = {layer.module: _new(files, kind, layer, shares, weights) for layer in layers}
    changes = _Changes(held, files, rest)
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


# ---- quantized layers ----


def _layers(
    model: nn.Module, path: Path, files: _Files, kind: str, schemes: Mapping[str, bool]
) -> list[_Layer]:
    """The layers, each with the module it replaces and the keys it has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places, elsewhere = places_of(model), held_elsewhere(model)
    layers: dict[nn.Module, _Layer] = {}
    tied: dict[object, str] = {}  # a weight's memory in the model to its key in the files
    for name, dynamic in schemes.items():
        module = modules.get(name)
        layer = _module_for(path, name, module, dynamic)
        module = layer.module
        kind_of = QuantizedLinear if isinstance(module, QuantizedLinear) else nn.Linear
        why = why_not_replaceable(module, kind_of, places.get(module, ()))
        if not why and module in elsewhere:
            why = f"{elsewhere[module]} holds it too, where it would stay what it is"
        if why:
            todo = "make the model with a plain nn.Linear there, or load before it is changed"
            refuse(path, name, "a layer that can be replaced", why, todo)
        for part in PARTS[kind, dynamic]:
            if (key := f"{name}.{part.name}") in files:
                layer.parts[part.name], layer.keys[part.name] = part, key
        if other := layers.get(module):
            _check_same(files, other, layer)
            continue
        layers[module] = layer
        if "weight" in layer.keys:
            tied.setdefault(memory_of(_weight(module)), layer.keys["weight"])
    for layer in layers.values():
        same = tied.get(memory_of(_weight(layer.module)))
        if same is not None and "weight" not in layer.keys:
            layer.parts["weight"], layer.keys["weight"] = PARTS[kind, layer.dynamic][0], same
    return list(layers.values())


def _module_for(path: Path, name: str, module: nn.Module | None, dynamic: bool) -> _Layer:
    if not name:
        todo = "put it in an nn.Sequential"
        refuse(path, name, "a layer inside the model", "the model itself", todo)
    if not isinstance(module, nn.Linear | QuantizedLinear):
        found = "no module of that name" if module is None else type(module).__name__
        refuse(path, name, "an nn.Linear in the model", found)
    if isinstance(module, QuantizedLinear) and (
        module.takes_int8 or (module.linear.output_dtype or _I8) == _I8
    ):
        refuse(
            path,
            name,
            "a layer with float input and output",
            "one that takes or gives int8, and the ReLU beside it may be gone",
            "load into the float model",
        )
    return _Layer(name, module, dynamic, module.out_features, module.in_features)


def _check_same(files: _Files, one: _Layer, other: _Layer) -> None:
    """One module under two names has one set of tensors."""
    for part, key in other.keys.items():
        if part not in one.keys or not _equal(files.read(key), files.read(one.keys[part])):
            refuse(
                files.path(key),
                key,
                f"the tensor of {one.name}, which is the same layer",
                "another",
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are bit-equal."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(_bits(one), _bits(other))
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _weight(module: nn.Module) -> Tensor:
    found = module.linear.weight if isinstance(module, QuantizedLinear) else module.weight
    return cast(Tensor, found)


def memory_of(tensor: Tensor) -> object:
    """What is equal for tensors that are one: the object, or the memory and how it is read."""
    plain = not is_lazy(tensor) and not tensor.is_meta and tensor.layout == torch.strided
    if not plain or not tensor.numel():
        return id(tensor)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (tensor.device, *place, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _check_layer(
    files: _Files, path: Path, kind: str, layer: _Layer, dtype: torch.dtype | None
) -> None:
    """A layer's tensors are there, each of the right dtype, shape and values; and the model and the
    product can run it. Decides what it gives."""
    name, n, k = layer.name, layer.n, layer.k
    for part in PARTS[kind, layer.dynamic]:
        if part.name not in layer.keys:
            if part.required:
                refuse(path, f"{name}.{part.name}", _describe(part, n, k), "no such tensor")
            continue
        key = layer.keys[part.name]
        given, shape = files.header(key)
        shapes = [tuple({"n": n, "k": k}.get(str(s), s) for s in wanted) for wanted in part.shapes]
        if given not in part.dtypes or shape not in shapes:
            found = f"{'another dtype' if given is None else dtype_name(given)} {shape}"
            refuse(files.path(key), key, _describe(part, n, k), found)
        _check_values(files, key, part)
    layer.output = _output(files, path, layer, dtype)
    _check_input_scale(files, layer)
    _check_range(files, layer)
    _check_product(files, path, kind, layer)


def _describe(part: Part, n: int, k: int) -> str:
    shape = tuple({"n": n, "k": k}.get(str(size), size) for size in part.shapes[0])
    return f"{' or '.join(map(dtype_name, part.dtypes))} {shape}"


def _check_values(files: _Files, key: str, part: Part) -> None:
    """Scales are finite and positive, an input's zero point is one of int8, and a weight's is 0:
    LinearQuant has none."""
    if part.name == "weight_offset" and bool(files.read(key).any()):
        refuse(files.path(key), key, "zeros (symmetric weights)", "other values")
    if part.name == "input_offset":
        offset = files.read(key).float()
        if not bool(((offset >= -128) & (offset <= 127)).all()):
            found = str(float(offset.reshape(-1)[0]))
            refuse(files.path(key), key, "a value of -128 to 127", found)
    if part.positive:
        values = _scales(files, key)
        if not bool((values.isfinite() & (values > 0)).all()):
            refuse(files.path(key), key, "finite scales above 0", "NaN, infinity, 0 or less")


def _scales(files: _Files, key: str) -> Tensor:
    """The scales that a tensor holds, or of which it holds the bits."""
    values = files.read(key)
    return (values & 0xFFFFFFFF).to(torch.uint32).view(_F32) if values.dtype == _I64 else values


def fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite in a dtype."""
    return bool(values.to(dtype).isfinite().all())


def _check_range(files: _Files, layer: _Layer) -> None:
    """No weight and no bias that the files stand for is beyond the dtype of the layer's output."""
    keys, dtype = layer.keys, dtype_name(layer.output)
    todo = "load in bfloat16, or quantize again" if layer.output == _F16 else "quantize again"
    if (key := keys.get("bias")) is not None and not fits(files.read(key), layer.output):
        found = str(float(files.read(key).abs().max()))
        expected = f"finite values that {dtype} holds, the layer's dtype"
        refuse(files.path(key), key, expected, found, todo)
    for part in ("weight_scale", "deq_scale"):
        if (key := keys.get(part)) is None:
            continue
        scale = _scales(files, key).reshape(-1).double()
        if part == "deq_scale":  # the product of both scales
            scale = scale / files.read(keys["input_scale"]).double()
        if not fits(scale * 127, layer.output):
            expected = f"weights that {dtype} holds, the layer's dtype"
            refuse(files.path(key), key, expected, f"127 * {float(scale.max()):.6g}", todo)
    if (key := keys.get("quant_bias")) is not None:
        # the zero point's part of it is no bias: at most this
        zero_point = files.read(keys["input_offset"]).double().abs() * layer.k * 128
        least = (files.read(key).double().abs() - zero_point).clamp(min=0)
        bias = least * _scales(files, keys["deq_scale"]).double()
        if not fits(bias, layer.output):
            expected = f"a bias that {dtype} holds, the layer's dtype"
            refuse(files.path(key), key, expected, f"{float(bias.max()):.6g}", todo)


def _output(files: _Files, path: Path, layer: _Layer, dtype: torch.dtype | None) -> torch.dtype:
    """The float dtype a layer takes and gives."""
    module = layer.module
    own = module.input_dtype if isinstance(module, QuantizedLinear) else _weight(module).dtype
    wanted = dtype or own
    if wanted not in (_F16, _BF16):
        refuse(
            path,
            layer.name,
            "an output dtype of float16 or bfloat16",
            f"{dtype_name(wanted)}, the dtype of the model's layer",
            "pass dtype=torch.bfloat16 or torch.float16",
        )
    if (key := layer.keys.get("deq_scale")) is not None:
        given = files.header(key)[0]
        says = _F16 if given == _I64 else _BF16
        if says != wanted:
            refuse(
                files.path(key),
                key,
                f"{'int64' if wanted == _F16 else 'float32'}, of a layer in {dtype_name(wanted)}",
                f"{dtype_name(given)}, of one in {dtype_name(says)}",
                f"call model.to(torch.{dtype_name(says)}) first"
                if dtype is None
                else f"leave dtype= out, or pass torch.{dtype_name(says)}",
            )
    if not layer.dynamic and own in (_F16, _BF16) and own != wanted:
        refuse(
            path,
            layer.name,
            f"a layer in {dtype_name(wanted)}, as dtype= says",
            f"{dtype_name(own)} in the model, and a static layer takes one dtype",
            f"call model.to(torch.{dtype_name(wanted)}) first, or leave dtype= out",
        )
    return wanted


def _check_input_scale(files: _Files, layer: _Layer) -> None:
    """What the chip multiplies by, in the dtype that it does so in, and the product of the scales
    are no zero or infinity."""
    if (key := layer.keys.get("input_scale")) is None:
        return
    scale = files.read(key).reshape(-1).to(_F32)
    factor = scale.reciprocal().to(layer.output)
    if not bool((factor.isfinite() & (factor > 0)).all()):
        found = f"{float(scale[0])}, whose reciprocal is {float(factor[0])}"
        expected = f"a scale whose reciprocal is finite and above 0 in {dtype_name(layer.output)}"
        refuse(files.path(key), key, expected, found, "load in bfloat16, or quantize again")
    if "deq_scale" in layer.keys:
        return
    key = layer.keys["weight_scale"]
    product = scale * files.read(key).reshape(-1).to(_F32)
    if not bool((product.isfinite() & (product > 0)).all()):
        expected = "scales that, times input_scale, are finite and above 0 in float32"
        refuse(files.path(key), key, expected, "zero or infinity")
    if "bias" in layer.keys and layer.output == _F16:
        key = layer.keys["bias"]
        steps = files.read(key).double() / product.double()
        most = 2**31 - 1 - layer.k * 128 * 127  # leaves the product its room
        if not bool((steps.abs() <= most).all()):
            found = f"{float(steps.abs().nan_to_num(torch.inf).max()):.3g}"
            refuse(
                files.path(key),
                key,
                f"at most {most:,} steps of input_scale * weight_scale, for the int32 bias that "
                "float16 output takes",
                found,
                "load in bfloat16",
            )


def _check_product(files: _Files, path: Path, kind: str, layer: _Layer) -> None:
    """The product's tables have a row for the layer."""
    bias = None
    if "quant_bias" in layer.keys:
        bias = _I32
    elif "bias" in layer.keys:
        bias = _bias_dtype(kind, layer.dynamic, layer.output, files.header(layer.keys["bias"])[0])
    packed = "deq_scale" in layer.keys and files.header(layer.keys["deq_scale"])[0] == _I64
    why = no_row(
        layer.k,
        layer.n,
        static=not layer.dynamic,
        input_dtype=layer.output,
        output_dtype=layer.output,
        scale=_I64 if packed else _F32,
        bias=bias,
    )
    if why:
        found, todo = why.split(". What to do: ")
        refuse(path, layer.name, "a layer that the product can run", found, todo.rstrip("."))


def _bias_dtype(
    kind: str, dynamic: bool, output: torch.dtype, given: torch.dtype | None
) -> torch.dtype:
    """Of the built layer's bias, where the file has a float one."""
    if kind == "compressed-tensors" and not dynamic and output == _F16:
        return _I32  # the row of float16 output without pertoken_scale takes no other
    return output if given == output else _F32


# what a tensor of the files becomes: a parameter, by whose placement it is split
_BECOMES = {"weight": "weight", "quant_bias": "bias", "bias": "bias"}


def _new(
    files: _Files,
    kind: str,
    layer: _Layer,
    shares: _Shares | None,
    weights: dict[str, nn.Parameter],
) -> QuantizedLinear:
    """The layer that stands in the module's place."""
    new = build(kind, layer.dynamic, layer.output, partial(_read, files, layer, shares))
    new = new.to(_device_of(layer.module))
    if layer.style is None:  # one weight that several layers have stays one
        new.linear.weight = weights.setdefault(
            layer.keys["weight"], cast(nn.Parameter, new.linear.weight)
        )
    elif shares is not None:
        layer.style.adopt(new, shares.mesh)
    try:
        carry_over(layer.module, new)
    except LinearQuantTypeError as error:
        raise CheckpointError(f"load_checkpoint: {layer.name}: {error}") from None
    return new


def _read(files: _Files, layer: _Layer, shares: _Shares | None, part: str) -> Tensor | None:
    """A tensor of a layer, or this process's part of it; None if the layer has none."""
    if part not in layer.keys:
        return None
    key = layer.keys[part]
    shape = files.header(key)[1]
    if layer.style is None or shares is None or layer.parts[part].shapes[0][0] != "n":
        return files.read(key)
    size = shape if part == "weight" else shape[:1]
    placement = layer.style.placement(_BECOMES.get(part, "scale"), size)
    if placement.is_shard():
        dim = cast("Shard", placement).dim
        return files.read_part(key, dim, shares.rank, shares.ranks)
    tensor = files.read(key)
    return torch.zeros_like(tensor) if placement.is_partial() and shares.rank else tensor


def build(
    kind: str, dynamic: bool, output: torch.dtype, read: Callable[[str], Tensor | None]
) -> QuantizedLinear:
    """A layer of the tensors of a file.

    Args:
        kind: the file's format.
        dynamic: whether the layer quantizes its input per token.
        output: dtype that the layer takes and gives.
        read: gives a tensor by the name of PARTS, or None.
    """

    def floats(part: str) -> Tensor | None:
        tensor = read(part)
        return None if tensor is None else tensor.reshape(-1).to(_F32)

    weight, bias = read("weight"), read("bias")
    assert weight is not None
    weight_scale, input_scale, float_bias = floats("weight_scale"), floats("input_scale"), None
    if dynamic:
        scale = weight_scale
        weight_scale = None
    elif kind == "msmodelslim":
        # quant_bias holds the float bias and the zero point of the input already
        scale, float_bias, bias = read("deq_scale"), bias, read("quant_bias")
    else:
        assert weight_scale is not None and input_scale is not None
        scale = input_scale * weight_scale
        if bias is not None and _bias_dtype(kind, dynamic, output, bias.dtype) == _I32:
            float_bias, bias = bias, (bias.to(_F32) / scale).round().to(_I32)
    if bias is not None and bias.is_floating_point():
        bias = bias.to(_bias_dtype(kind, dynamic, output, bias.dtype))
    assert scale is not None
    return QuantizedLinear(
        layer_of(weight, scale, bias, pertoken=dynamic, output_dtype=output),
        input_scale,
        floats("input_offset"),
        input_dtype=output,
        weight_scale=weight_scale,
        float_bias=float_bias,
    )


def _device_of(module: nn.Module) -> torch.device:
    device = _weight(module).device
    return torch.device("cpu") if device.type == "meta" else device


# ---- everything else ----


@dataclass(frozen=True)
class _Place:
    """Where a module of the model has a tensor, or what its get_extra_state gives."""

    module: nn.Module
    name: str
    tensor: Any  # a Tensor, unless it is an extra state

    @property
    def is_extra(self) -> bool:
        """Whether it is no parameter or buffer."""
        return self.name == _EXTRA


class _Held:
    """What a model holds beside the layers that are replaced.

    Attributes:
        places: by name, what a state dict has; one tensor may be under several names.
        others: tensors on meta that a state dict has not.
    """

    def __init__(self, model: nn.Module, replaced: set[nn.Module]) -> None:
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
                f"load_checkpoint: {shown(different[0])}: model.state_dict() names its tensors "
                "otherwise than the model's modules do, so which tensor of the files is which "
                "cannot be told. What to do: remove the hooks that rename them, and load again."
            )


def _check_rest(held: _Held, files: _Files, path: Path, used: set[str]) -> Iterable[str]:
    """The keys that are loaded as they are: each in the model, of its shape, and none missing."""
    rest = {key: None for key in files if key not in used}  # in their order
    for key in rest:
        dtype, shape = files.header(key)
        if (place := held.places.get(key)) is None:
            refuse(files.path(key), key, "a tensor the model has", "no such parameter in the model")
        wanted = place.tensor
        if why := _why_not_loadable(place):
            refuse(files.path(key), key, "a plain tensor in the model", why)
        float_pair = (
            dtype is not None
            and dtype.is_floating_point == wanted.dtype.is_floating_point
            and dtype.is_complex == wanted.dtype.is_complex
        )
        if shape != tuple(wanted.shape) or not float_pair:
            expected = f"{dtype_name(wanted.dtype)} {tuple(wanted.shape)}"
            refuse(files.path(key), key, expected, f"{dtype and dtype_name(dtype)} {shape}")
    # files hold tied parameters once
    given = {memory_of(held.places[key].tensor) for key in rest}
    for key, place in sorted(held.places.items()):
        is_tensor = isinstance(place.tensor, Tensor)
        if key not in rest and not (is_tensor and memory_of(place.tensor) in given):
            refuse(path, key, "a tensor for every parameter of the model", "no such tensor")
    if held.others:
        more = "" if len(held.others) == 1 else f" and {len(held.others) - 1} more"
        raise CheckpointError(
            f"load_checkpoint: {held.others[0]}{more} would stay on meta: files do not hold what a "
            "module computes when it is made (non-persistent buffers, plain attributes). What to "
            "do: make the modules that have them anew, outside torch.device('meta'), and set them "
            "in the model before loading; or make the model with "
            "accelerate.init_empty_weights(include_buffers=False)."
        )
    return rest


def _why_not_loadable(place: _Place) -> str:
    """Why a tensor of the model cannot take one of the files; empty if it can."""
    tensor = place.tensor
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    if is_lazy(tensor):
        return "one without a size: run the model once, or make it with sizes"
    plain = type(tensor) in (Tensor, nn.Parameter) or (
        isinstance(tensor, nn.Parameter) and type(tensor.data) is Tensor and not tensor.is_meta
    )
    if not plain:
        return f"a {type(tensor).__name__}"
    if tensor.is_quantized:
        return f"one of {dtype_name(tensor.dtype)}"
    return "" if tensor.layout == torch.strided else f"one of layout {tensor.layout}"


def _converted(files: _Files, key: str, wanted: Tensor) -> Tensor:
    """A tensor of the files in the dtype and on the device of the model's, no value beyond it."""
    tensor = files.read(key)
    dtype = wanted.dtype
    if tensor.dtype != dtype:
        new = tensor.to(dtype)
        if dtype.is_floating_point or dtype.is_complex:
            back = new.float() if dtype.itemsize == 1 else new
            lost = tensor.isfinite() & ~back.isfinite()
            if not bool(back.any()):  # nothing is left of what was not 0
                lost = lost | (tensor != 0)
        else:  # integers are the same again when they are brought back
            lost = new.to(tensor.dtype) != tensor
        if bool(lost.any()):
            value = tensor[lost].reshape(-1)[0].item()
            refuse(
                files.path(key),
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


class _Changes:
    """New values of parameters, buffers and extra states, and how to put them in and take them
    back. A tensor keeps its memory, which others may look at, as load_state_dict keeps it."""

    def __init__(self, held: _Held, files: _Files, keys: Iterable[str]) -> None:
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
            new = _converted(files, key, tensor)
            if (other := self._by_tensor.get(id(tensor))) and not place.is_extra:
                if not _equal(other[1], new):
                    expected = f"the values of {other[0]}, which is the same tensor in the model"
                    refuse(files.path(key), key, expected, "others")
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
                # what cannot be written to gets other memory
                self._others.append(
                    (partial(_set, tensor, new), partial(_set, tensor, tensor.data))
                )
            else:
                self._copies.append((key, tensor, new, tensor.detach().clone()))
                storage = (tensor.device, tensor.untyped_storage().data_ptr())
                self._storages[storage] = self._storages.get(storage, 0) + 1

    def make(self, undo: ExitStack) -> None:
        """Put them all in; the stack takes them back."""
        for change, back in self._others:
            undo.callback(back)
            change()
        for _, tensor, new, old in self._copies:
            undo.callback(tensor.data.copy_, old)
            tensor.data.copy_(new)
        for key, tensor, new, _ in self._copies:
            storage = (tensor.device, tensor.untyped_storage().data_ptr())
            if self._storages[storage] > 1 and not _equal(tensor, new):
                raise CheckpointError(
                    f"load_checkpoint: {key} shares memory with another tensor of the model, for "
                    "which the files have other values. What to do: make the model with memory for "
                    "each tensor, or the files with one value for both."
                )


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    """A tensor in the place of one on meta."""
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
    """Whether two values of a tensor are one in memory, as in an expanded one."""
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
