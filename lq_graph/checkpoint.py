"""load_checkpoint: a W8A8 checkpoint into a model. checkpoint_write.py goes the other way.

Two published formats, both folders of safetensors files:

    msmodelslim          quant_model_description*.json says what each tensor is: "W8A8" (static),
                         "W8A8_DYNAMIC" or "FLOAT"
    compressed-tensors   quantization_config in config.json says which modules are int8 and how
                         their inputs are quantized

Everything is checked against the files' headers and the scales' values before the model is touched.

Sources: vllm-project/vllm-ascend (docs/source/developer_guide/Design_Documents/quantization.md and
vllm_ascend/quantization) for msmodelslim's tensors; vllm-project/compressed-tensors
(src/compressed_tensors/quantization) for the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from .errors import LinearQuantValueError
from .formats import dtype_name
from .module import LinearQuant, layer_of
from .quantized_linear import QuantizedLinear
from .text import table

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ParallelStyle

    from .parallel import LinearQuantStyle

__all__ = ["CheckpointError", "LoadReport", "Loaded", "load_checkpoint"]

DESCRIPTION = "quant_model_description"
_INDEX = "model.safetensors.index.json"

_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_FLOATS = (_F32, _F16, _BF16)


class CheckpointError(LinearQuantValueError):
    """A checkpoint that cannot be loaded or written. The text names the file, the key, what was
    expected and what was found. The model is as it was."""


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized layer: its name after the layer's, and what it may be. n and k
    stand for the layer's sizes; a part that is not required may be absent."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[str | int, ...], ...]
    required: bool = True
    positive: bool = False


_WEIGHT = Part("weight", (_I8,), (("n", "k"),))
_BIAS = Part("bias", _FLOATS, (("n",),), required=False)
_WEIGHT_SCALE = Part("weight_scale", _FLOATS, (("n", 1), ("n",)), positive=True)
_WEIGHT_OFFSET = Part("weight_offset", (*_FLOATS, _I8), (("n", 1), ("n",)), required=False)
_INPUT_SCALE = Part("input_scale", _FLOATS, ((1,), ()), positive=True)

# (format, dynamic): the tensors of a layer
PARTS: dict[tuple[str, bool], tuple[Part, ...]] = {
    ("msmodelslim", False): (
        _WEIGHT,
        Part("quant_bias", (_I32,), (("n",),)),
        Part("deq_scale", (_I64, _F32), (("n",),), positive=True),
        _INPUT_SCALE,
        Part("input_offset", (*_FLOATS, _I8), ((1,), ())),
        Part("weight_scale", _FLOATS, (("n", 1), ("n",)), required=False, positive=True),
        _WEIGHT_OFFSET,
        _BIAS,
    ),
    ("msmodelslim", True): (_WEIGHT, _WEIGHT_SCALE, _WEIGHT_OFFSET, _BIAS),
    ("compressed-tensors", False): (_WEIGHT, _WEIGHT_SCALE, _INPUT_SCALE, _BIAS),
    ("compressed-tensors", True): (_WEIGHT, _WEIGHT_SCALE, _BIAS),
}
SCHEMES = {"W8A8": False, "W8A8_DYNAMIC": True}  # msmodelslim's words: dynamic?


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
        head = ["module", "scheme", "n", "k", "output", "bytes"]
        return "\n".join(table([head, *(layer.row() for layer in self)]))


def require_safetensors() -> Any:
    """The safetensors package, which lq-graph does not require."""
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError(
            "checkpoints need safetensors. What to do: pip install safetensors."
        ) from None
    return safetensors


class _Files:
    """Tensors of one or many safetensors files, read one at a time."""

    def __init__(self, path: Path) -> None:
        safetensors = require_safetensors()
        self._error = safetensors.SafetensorError
        self._open = safetensors.safe_open
        self.keys: dict[str, Path] = {}
        self.bytes_read = 0
        self._handles: dict[Path, Any] = {}
        for file in _files_of(path):
            for key in self._handle(file).keys():  # noqa: SIM118 - not a dict
                if key in self.keys:
                    _refuse(file, key, "one place", f"also in {self.keys[key].name}")
                self.keys[key] = file

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._open(str(file), framework="pt")
            except (OSError, self._error) as error:
                _refuse(file, None, "a safetensors file", f"{str(error).splitlines()[0]}")
        return self._handles[file]

    def header(self, key: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """dtype and shape, from the file's header."""
        found = self._handle(self.keys[key]).get_slice(key)
        return _ST_DTYPES.get(found.get_dtype()), tuple(found.get_shape())

    def read(self, key: str) -> Tensor:
        """The tensor itself."""
        tensor: Tensor = self._handle(self.keys[key]).get_tensor(key)
        self.bytes_read += tensor.nbytes
        return tensor

    def read_part(self, key: str, dim: int, part: int, parts: int) -> Tensor:
        """One of the equal parts of a tensor along a dim; nothing else of it is read."""
        lazy = self._handle(self.keys[key]).get_slice(key)
        size = lazy.get_shape()[dim] // parts
        wanted = slice(part * size, (part + 1) * size)
        tensor: Tensor = lazy[(slice(None),) * dim + (wanted,)]
        self.bytes_read += tensor.nbytes
        return tensor


_ST_DTYPES = {
    "F32": _F32, "F16": _F16, "BF16": _BF16, "F64": torch.float64, "I8": _I8, "I16": torch.int16,
    "I32": _I32, "I64": _I64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            _refuse(path, None, "a folder with safetensors files", "none")
        return files
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        _refuse(index, "weight_map", "a map from tensor to file", repr(names)[:60])
    for name in set(names.values()):
        # a name, not a path: a checkpoint must not read outside its folder
        if not isinstance(name, str) or Path(name).name != name:
            _refuse(index, "weight_map", "names of files in the same folder", repr(name))
        if not (path / name).is_file():
            _refuse(index, "weight_map", f"the file {name}", "no such file")
    return [path / name for name in sorted(set(names.values()))]


def _refuse(file: Path, key: str | None, expected: str, found: str, todo: str = "") -> NoReturn:
    where = f"{file}: {key}" if key else str(file)
    text = f"{where}: expected {expected}, found {found}."
    raise CheckpointError(text + (f" What to do: {todo}." if todo else ""))


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        _refuse(file, None, "a JSON object", str(error))
    if not isinstance(value, dict):
        _refuse(file, None, "a JSON object", type(value).__name__)
    return value


# ---- what the folder says ----


def _schemes(path: Path, files: _Files) -> tuple[str, dict[str, bool]]:
    """The format, and for each quantized layer whether it is dynamic."""
    folder = path if path.is_dir() else path.parent
    descriptions = sorted(folder.glob(f"{DESCRIPTION}*.json"))
    if descriptions:
        return "msmodelslim", dict(_from_description(descriptions[0]))
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in _json(config):
        return "compressed-tensors", dict(_from_config(config, files))
    _refuse(
        folder,
        None,
        f"{DESCRIPTION}*.json (msmodelslim) or config.json with quantization_config "
        "(compressed-tensors)",
        "neither",
    )


def _from_description(file: Path) -> Iterator[tuple[str, bool]]:
    for key, kind in _json(file).items():
        name, _, part = key.rpartition(".")
        if part != "weight" or kind == "FLOAT":
            continue
        if kind not in SCHEMES:
            _refuse(file, key, "W8A8, W8A8_DYNAMIC or FLOAT", repr(kind))
        yield name, SCHEMES[kind]


def _from_config(file: Path, files: _Files) -> Iterator[tuple[str, bool]]:
    config = _json(file)["quantization_config"]
    groups = config.get("config_groups") if isinstance(config, dict) else None
    if not isinstance(groups, dict) or config.get("quant_method") != "compressed-tensors":
        _refuse(
            file, "quantization_config", "compressed-tensors with config_groups", repr(config)[:80]
        )
    schemes = [
        (_patterns(file, f"config_groups.{name}.targets", _dict(group).get("targets")),
         _scheme_of(file, name, _dict(group)))
        for name, group in groups.items()
    ]  # fmt: skip
    ignored = _patterns(file, "ignore", config.get("ignore"))
    for key in files.keys:
        name, _, part = key.rpartition(".")
        if part != "weight_scale" or any(_targets(pattern, name) for pattern in ignored):
            continue
        dynamic = [d for targets, d in schemes if any(_targets(t, name) for t in targets)]
        if not dynamic:
            _refuse(file, "config_groups", f"a group whose targets take {name}", "none")
        yield name, dynamic[0]


def _scheme_of(file: Path, name: str, group: dict[str, Any]) -> bool:
    """Whether a config group quantizes its input dynamically; refuses what LinearQuant is not."""
    weights, inputs = _dict(group.get("weights")), _dict(group.get("input_activations"))
    wanted = {"num_bits": 8, "type": "int", "symmetric": True}
    for part, given, strategies in (
        ("weights", weights, ("channel",)),
        ("input_activations", inputs, ("tensor", "token")),
    ):
        ok = all(given.get(k) == v for k, v in wanted.items())
        if not ok or given.get("strategy") not in strategies:
            _refuse(
                file,
                f"config_groups.{name}.{part}",
                f"8 bits, int, symmetric, strategy {' or '.join(strategies)}",
                json.dumps({k: given.get(k) for k in (*wanted, "strategy")}),
            )
    dynamic = bool(inputs.get("dynamic"))
    if dynamic != (inputs["strategy"] == "token"):
        _refuse(
            file, f"config_groups.{name}", "dynamic with token, static with tensor", str(inputs)
        )
    return dynamic


def _dict(value: object) -> dict[str, Any]:
    """A JSON object, or an empty one in the place of anything else, which no check then accepts."""
    return value if isinstance(value, dict) else {}


def _patterns(file: Path, key: str, value: object) -> list[str]:
    """A list of module names, "Linear" or "re:" patterns."""
    patterns = value or []
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        _refuse(file, key, "a list of names", repr(value)[:60])
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            _refuse(file, key, "a regular expression after re:", f"{pattern!r}: {error}")
    return patterns


def _targets(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in ("Linear", name)


# ---- loading ----


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, ParallelStyle] | None = None,
) -> LoadReport:
    """Load a W8A8 checkpoint into a model.

    Each quantized layer of the files has to be an nn.Linear of that name in the model, which a
    `QuantizedLinear` replaces, or a QuantizedLinear. Every other tensor is loaded by name. All or
    nothing: the files' headers, sizes, dtypes and scales are checked first. Until the last layer
    is read, the old ones are kept; make the model under torch.device("meta") to have none.

    Args:
        model: with the float layers the checkpoint was made of.
        path: a folder, or one safetensors file with its json beside it.
        dtype: float16 or bfloat16, output of the dynamic layers, and of the static ones of
            compressed-tensors; default that of the layer's own weight. A static layer of
            msmodelslim says its own: int64 deq_scale float16, float32 deq_scale bfloat16.
        mesh, plan: to split quantized layers over devices: a mesh of one dim, and for names of
            layers (`*` for any part between two dots) a ColwiseLinearQuant or RowwiseLinearQuant of
            `lq_graph.parallel`. Each process reads only its part of those layers' tensors. The plan
            is applied: leave these layers out of parallelize_module.

    Returns:
        A report, one `Loaded` for each quantized layer.

    Raises:
        CheckpointError: anything missing, truncated, of another dtype or size, or not finite. With
            a mesh, on every rank if it is so on one.
        LinearQuantError: a layer that the plan cannot split.

    Source: see the module.
    """
    if (mesh is None) != (plan is None):
        raise CheckpointError("load_checkpoint: mesh and plan go together; give both or neither.")
    shares = None if mesh is None or plan is None else _Shares(mesh, plan)
    if shares is None:
        return _load(model, Path(path), dtype, None)[1]()
    with shares.agreeing() as found:  # nothing is changed on any rank unless all can go on
        layers, finish = _load(model, Path(path), dtype, shares)
        found += [str(layer.row()) for layer in layers]
    return finish()


class _Shares:
    """Which part of which layer is this process's."""

    def __init__(self, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> None:
        from .parallel import LinearQuantStyle

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

        mine: Exception | None = None
        found: list[str] = []
        try:
            yield found
        except Exception as error:  # whatever it is, the others must not wait for this rank
            mine = error
        told: list[Any] = [None] * self.ranks
        answer = (None if mine is None else str(mine), found)
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


def _load(
    model: nn.Module, path: Path, dtype: torch.dtype | None, shares: _Shares | None
) -> tuple[LoadReport, Callable[[], LoadReport]]:
    """Check and read the layers; the function that is returned puts them into the model."""
    if not path.exists():
        _refuse(path, None, "a folder or a safetensors file", "nothing")
    files = _Files(path)
    kind, schemes = _schemes(path, files)
    modules = dict(model.named_modules())
    used: set[str] = set()
    layers = []
    for name, dynamic in schemes.items():
        parts = _check_layer(files, path, name, PARTS[kind, dynamic], modules.get(name))
        used |= {f"{name}.{part}" for part in parts}
        output = _output(files, path, name, parts, modules[name], dtype)
        style = None if shares is None else shares.style(name)
        read = partial(_read, files, name, parts, shares, style)
        if style is not None and shares is not None:
            n, k = files.header(f"{name}.weight")[1]
            whole = LinearQuant(
                k,
                n,
                bias="bias" in parts or "quant_bias" in parts,
                pertoken_scale=dynamic,
                output_dtype=output,
                device="meta",
            )
            style.check(name, whole, shares.ranks)
        layers.append((name, dynamic, output, style, read))
    rest = _check_rest(model, files, path, set(schemes), used)
    new = {name: _build(kind, dynamic, output, read) for name, dynamic, output, _, read in layers}

    report = LoadReport()
    for name, dynamic, output, _, _ in layers:
        n, k = files.header(f"{name}.weight")[1]
        report.append(Loaded(name, "dynamic" if dynamic else "static", n, k, output))

    def finish() -> LoadReport:
        for name, _, _, style, _ in layers:
            parent, _, child = name.rpartition(".")
            layer = new[name].to(_device_of(modules[name]))
            if style is not None and shares is not None:
                style.adopt(layer, shares.mesh)
            setattr(modules[parent], child, layer.train(modules[name].training))
        for key in rest:
            _put(model, key, files.read(key))
        report.bytes_read = files.bytes_read
        return report

    return report, finish


# what a tensor of the files becomes: a parameter, by whose placement it is split
_BECOMES = {"weight": "weight", "quant_bias": "bias", "bias": "bias"}


def _read(
    files: _Files,
    name: str,
    parts: dict[str, Part],
    shares: _Shares | None,
    style: LinearQuantStyle | None,
    part: str,
) -> Tensor | None:
    """A tensor of a layer, or this process's part of it; None if the layer has none."""
    if part not in parts:
        return None
    key = f"{name}.{part}"
    shape = files.header(key)[1]
    if style is None or shares is None or parts[part].shapes[0][0] != "n":
        return files.read(key)
    size = shape if part == "weight" else shape[:1]
    placement = style.placement(_BECOMES.get(part, "scale"), size)
    if placement.is_shard():
        dim = cast("Shard", placement).dim
        return files.read_part(key, dim, shares.rank, shares.ranks)
    tensor = files.read(key)
    return torch.zeros_like(tensor) if placement.is_partial() and shares.rank else tensor


def _check_layer(
    files: _Files, path: Path, name: str, parts: tuple[Part, ...], module: nn.Module | None
) -> dict[str, Part]:
    """The parts a layer has in the files, each of the right dtype, shape and values."""
    if isinstance(module, QuantizedLinear):
        n, k = module.linear.out_features, module.linear.in_features
    elif isinstance(module, nn.Linear):
        n, k = module.out_features, module.in_features
    else:
        found = "no module of that name" if module is None else type(module).__name__
        _refuse(path, name, "an nn.Linear in the model", found)
    present = {}
    for part in parts:
        key = f"{name}.{part.name}"
        if key not in files.keys:
            if part.required:
                _refuse(path, key, _describe(part, n, k), "no such tensor")
            continue
        file = files.keys[key]
        dtype, shape = files.header(key)
        shapes = [tuple({"n": n, "k": k}.get(str(s), s) for s in wanted) for wanted in part.shapes]
        if dtype not in part.dtypes or shape not in shapes:
            found = f"{'another dtype' if dtype is None else dtype_name(dtype)} {shape}"
            _refuse(file, key, _describe(part, n, k), found)
        _check_values(files, file, key, part)
        present[part.name] = part
    return present


def _describe(part: Part, n: int, k: int) -> str:
    shape = tuple({"n": n, "k": k}.get(str(size), size) for size in part.shapes[0])
    return f"{' or '.join(map(dtype_name, part.dtypes))} {shape}"


def _check_values(files: _Files, file: Path, key: str, part: Part) -> None:
    """Scales are finite and positive, and a weight offset is zero: LinearQuant has none."""
    if part.name == "weight_offset" and bool(files.read(key).any()):
        _refuse(file, key, "zeros (symmetric weights)", "other values")
    if part.positive:
        values = files.read(key)
        if values.dtype == _I64:  # the bits of a float32
            values = (values & 0xFFFFFFFF).to(torch.uint32).view(_F32)
        if not bool((values.isfinite() & (values > 0)).all()):
            _refuse(file, key, "finite scales above 0", "NaN, infinity, 0 or less")


def _output(
    files: _Files,
    path: Path,
    name: str,
    parts: dict[str, Part],
    module: nn.Module,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """The float dtype a layer gives."""
    if "deq_scale" in parts:
        return _F16 if files.header(f"{name}.deq_scale")[0] == _I64 else _BF16
    if dtype is None:
        old = module.linear.output_dtype if isinstance(module, QuantizedLinear) else None
        dtype = old or getattr(module.weight, "dtype", None)
    if dtype not in (_F16, _BF16):
        _refuse(
            path,
            name,
            "an output dtype of float16 or bfloat16",
            f"{dtype_name(dtype)}, the dtype of the model's layer",
            "pass dtype=torch.bfloat16 or torch.float16",
        )
    return dtype


def _check_rest(
    model: nn.Module, files: _Files, path: Path, layers: set[str], used: set[str]
) -> list[str]:
    """The keys that are loaded as they are: each in the model, of its shape, and none missing."""
    state = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in layers)
    }
    rest = [key for key in files.keys if key not in used]
    for key in rest:
        dtype, shape = files.header(key)
        if key not in state:
            _refuse(
                files.keys[key], key, "a tensor the model has", "no such parameter in the model"
            )
        wanted = state[key]
        float_pair = dtype is not None and dtype.is_floating_point == wanted.dtype.is_floating_point
        if shape != tuple(wanted.shape) or not float_pair:
            expected = f"{dtype_name(wanted.dtype)} {tuple(wanted.shape)}"
            _refuse(files.keys[key], key, expected, f"{dtype and dtype_name(dtype)} {shape}")
    # files hold tied parameters once
    held = {state[key].data_ptr() for key in rest if not state[key].is_meta}
    absent = sorted(set(state) - set(rest))
    if missing := [key for key in absent if state[key].data_ptr() not in held]:
        _refuse(path, missing[0], "a tensor for every parameter of the model", "no such tensor")
    return rest


def _device_of(module: nn.Module) -> torch.device:
    device = next(module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _put(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Load one tensor by name; one on meta gets its memory now."""
    parent, _, name = key.rpartition(".")
    module = model.get_submodule(parent)
    current = getattr(module, name)
    if not current.is_meta:
        current.data.copy_(tensor)
    elif name in module._parameters:
        value = tensor.to(current.dtype)
        setattr(module, name, nn.Parameter(value, requires_grad=current.requires_grad))
    else:
        setattr(module, name, tensor.to(current.dtype))


def _build(
    kind: str, dynamic: bool, output: torch.dtype, read: Callable[[str], Tensor | None]
) -> QuantizedLinear:
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
        scale, bias = read("deq_scale"), read("quant_bias")
    else:
        assert weight_scale is not None and input_scale is not None
        scale = input_scale * weight_scale
        if output == _F16 and bias is not None:
            # the row of float16 output without pertoken_scale takes an int32 bias only
            float_bias, bias = bias, (bias.to(_F32) / scale).round().to(_I32)
    if bias is not None and bias.is_floating_point() and bias.dtype != output:
        bias = bias.to(_F32)
    assert scale is not None
    return QuantizedLinear(
        layer_of(weight, scale, bias, pertoken=dynamic, output_dtype=output),
        input_scale,
        floats("input_offset"),
        weight_scale=weight_scale,
        float_bias=float_bias,
    )
