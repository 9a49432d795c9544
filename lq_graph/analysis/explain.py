"""explain(): what a model's quantized layers become on the device, beside the vendor's lowering."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LinearQuantValueError
from ..modules.linear_quant import LinearQuant
from ..modules.prepare import use_internal_format_weight
from ..modules.vendor import convert
from ..reports import table
from ..rules.plan import Plan, Spec, plan
from ..rules.products import get_product
from ..rules.tables import PEAKS, Peak, Product, dtype_name, storage_name

__all__ = ["Explanation", "LayerStory", "explain", "require_npu"]


@dataclass(frozen=True)
class LayerStory:
    """One LinearQuant at the inputs it was called with.

    Attributes:
        name: the module's qualified name.
        plan: the row of the support table and the sizes.
        tensors: dtype and shape of every tensor the layer reads, by name, once prepared.
        weight_format: "ND" or "FRACTAL_NZ".
        ours, vendor: the GE graphs torchair lowers the layer and the vendor's module to
            (`lq_graph.converters.graph.Graph`).
        peak: the chip's published figures.
    """

    name: str
    plan: Plan
    tensors: dict[str, Spec]
    weight_format: str
    ours: Any
    vendor: Any
    peak: Peak

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        count = self.plan.k
        for size in self.plan.output_shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes that have to cross the memory once: every tensor in, the result out."""
        out = Spec(self.plan.output_dtype, self.plan.output_shape)
        return sum(_bytes(spec) for spec in (*self.tensors.values(), out))

    @property
    def intensity(self) -> float:
        """Operations (two a MAC) for each byte."""
        return 2 * self.macs / self.bytes

    @property
    def seconds(self) -> float:
        """The least time by the chip's published peaks: an estimate from below."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def compute_seconds(self) -> float:
        return 2 * self.macs / self.peak.int8_ops

    @property
    def memory_seconds(self) -> float:
        return self.bytes / self.peak.bytes_per_second

    @property
    def bound(self) -> str:
        """Which peak is met first."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as text, and writes itself as a page.

    Attributes:
        device: name of the device, as the driver gives it.
        product: whose tables were read.
        layers: one story for each LinearQuant that was called, in order of the calls.
        graphs: the GE graphs of the whole model.
        peak: the figures the bounds are estimated from.
    """

    device: str
    product: Product
    layers: tuple[LayerStory, ...]
    graphs: tuple[Any, ...]
    peak: Peak

    def rows(self) -> list[list[object]]:
        """The table of layers, its head first."""
        words = (
            "layer, m x k x n, row, weight, nodes, vendor, MACs, bytes, ops/byte, us at peak, bound"
        )
        head: list[object] = [*words.split(", ")]
        rows: list[list[object]] = [head]
        for layer in self.layers:
            p = layer.plan
            batch = "".join(f"{size} x " for size in p.output_shape[:-2])
            rows.append(
                [
                    layer.name or "(model)",
                    f"{batch}{p.m} x {p.k} x {p.n}",
                    f"{storage_name(p.row.storage)} to {dtype_name(p.output_dtype)}",
                    layer.weight_format,
                    len(layer.ours.compute),
                    len(layer.vendor.compute),
                    layer.macs,
                    layer.bytes,
                    f"{layer.intensity:.1f}",
                    f"{layer.seconds * 1e6:.2f}",
                    layer.bound,
                ]
            )
        return rows

    def __str__(self) -> str:
        total = sum(layer.seconds for layer in self.layers)
        nodes = sum(len(graph.compute) for graph in self.graphs)
        ours = sum(len(layer.ours.compute) for layer in self.layers)
        theirs = sum(len(layer.vendor.compute) for layer in self.layers)
        lines = [
            f"{self.device}, {self.product}: {len(self.layers)} LinearQuant layers, {ours} GE "
            f"nodes (the vendor's module: {theirs}); whole model {nodes} GE nodes",
            "",
            *table(self.rows()),
            "",
            f"at least {total * 1e6:.2f} us in these layers: {self.peak}",
        ]
        seen = set()
        for layer in self.layers:
            shown = (str(layer.ours), str(layer.vendor))
            if shown in seen:
                continue
            seen.add(shown)
            lines += ["", f"{layer.name or '(model)'}: {layer.plan.row.source}"]
            for title, graph in (("ours", layer.ours), ("vendor", layer.vendor)):
                lines.append(f"  {title}, {len(graph.compute)} nodes")
                lines += [f"    {line}" for line in str(graph).splitlines()]
        return "\n".join(lines)

    def html(self, path: str | Path) -> None:
        """Write one self-contained page, with the graphs drawn.

        Args:
            path: the file to write.

        Raises:
            LinearQuantValueError: matplotlib is not installed.
        """
        from .explain_page import page

        Path(path).write_text(page(self))


def explain(model: nn.Module, inputs: Sequence[Tensor], *, peak: Peak | None = None) -> Explanation:
    """Lower a model as it would be deployed, and tell what each quantized layer becomes.

    Works on a copy: prepares it (`use_internal_format_weight`), runs it once for the shapes, lowers
    the whole of it, and lowers each different LinearQuant alone, ours and as the vendor's module
    prepared by torchair's own function. Sets torch.npu.config.allow_internal_format, as a
    deployment does.

    Args:
        model: CPU or NPU, with LinearQuant layers; the vendor's are converted.
        inputs: the model's positional arguments.
        peak: figures of your chip for the bounds; default a rough `lq_graph.rules.tables.PEAKS`.

    Returns:
        An Explanation: `print(it)`, `it.html("page.html")`.

    Raises:
        LinearQuantValueError: no NPU and no stand-in, or a model without LinearQuant layers.
    """
    npu = require_npu()
    npu.config.allow_internal_format = True
    model = convert(copy.deepcopy(model)).to("npu").eval()
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        # the copy has no graphs yet, whatever else was compiled here
        warnings.filterwarnings("ignore", "use_internal_format_weight: formats of weights changed")
        use_internal_format_weight(model)
    arguments = [tensor.to("npu") for tensor in inputs]
    calls = _calls(model, arguments)
    if not calls:
        raise LinearQuantValueError(
            "explain: no LinearQuant layer was called. What to do: quantize the model first, or "
            "pass inputs that reach its quantized layers."
        )
    product = get_product()
    peak = peak or PEAKS[product.key]
    originals = dict(plain.named_modules())
    lowered: dict[str, tuple[Any, Any]] = {}
    stories = []
    for name, layer, x1, pertoken in calls:
        found, tensors = _describe(layer, x1, pertoken, product)
        key = f"{layer}{[str(spec) for spec in tensors.values()]}"
        if key not in lowered:
            original = originals[name]
            assert isinstance(original, LinearQuant)
            lowered[key] = _lower_both(layer, original, x1, pertoken)
        ours, theirs = lowered[key]
        nz = "FRACTAL_NZ" if "FRACTAL_NZ" in str(ours) else "ND"
        stories.append(LayerStory(name, found, tensors, nz, ours, theirs, peak))
    return Explanation(
        npu.get_device_name(), product, tuple(stories), tuple(_lower(model, arguments)), peak
    )


def require_npu() -> Any:
    """torch.npu, where there is a device or the stand-in.

    Raises:
        LinearQuantValueError: there is neither.
    """
    npu: Any = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        raise LinearQuantValueError(
            "explain: there is no NPU to lower for. What to do: run it with CANN, or without a "
            "device as `python -m cann_host -m lq_graph explain ...`."
        )
    return npu


def _calls(
    model: nn.Module, arguments: list[Tensor]
) -> list[tuple[str, LinearQuant, Tensor, Tensor | None]]:
    """Each LinearQuant call of one run: name, layer, input, runtime pertoken_scale."""
    calls: list[tuple[str, LinearQuant, Tensor, Tensor | None]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(layer: LinearQuant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pertoken = args[1] if len(args) > 1 else kwargs.get("pertoken_scale")
            calls.append((name, layer, args[0], pertoken))

        return note

    hooks = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in model.named_modules()
        if isinstance(layer, LinearQuant)
    ]
    try:
        with torch.no_grad():
            model(*arguments)
    finally:
        for handle in hooks:
            handle.remove()
    return calls


def _describe(
    layer: LinearQuant, x1: Tensor, pertoken: Tensor | None, product: Product
) -> tuple[Plan, dict[str, Spec]]:
    given = {
        "x1": x1,
        "weight": layer.weight,
        "scale": layer.scale,
        "offset": layer.offset,
        "pertoken_scale": layer.pertoken_scale if pertoken is None else pertoken,
        "bias": layer.bias,
    }
    found = plan(**given, output_dtype=layer.output_dtype, product=product)  # type: ignore[arg-type]
    if found.row.folds_scale:
        given["offset"] = None  # in the packed scale, once prepared
    return found, {
        name: Spec(tensor.dtype, tuple(tensor.shape))
        for name, tensor in given.items()
        if tensor is not None
    }


def _lower_both(
    ours: LinearQuant, original: LinearQuant, x1: Tensor, pertoken: Tensor | None
) -> tuple[Any, Any]:
    import torchair

    theirs = copy.deepcopy(original)
    if pertoken is not None:
        theirs.pertoken_scale = nn.Parameter(pertoken.clone(), requires_grad=False)
    vendor = convert(theirs, to="torch_npu")
    torchair.experimental.inference.use_internal_format_weight(vendor)
    arguments = [x1] if pertoken is None else [x1, pertoken]
    (mine,) = _lower(ours, arguments)
    (other,) = _lower(vendor, [x1])
    return mine, other


def _lower(model: nn.Module, arguments: list[Tensor]) -> list[Any]:
    """The GE graphs a model becomes."""
    import torchair

    from .. import converters  # imports torchair

    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    backend = torchair.get_npu_backend(compiler_config=config)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with converters.graph.capture(config) as graphs, torch.no_grad():
        compiled(*arguments)
    return list(graphs)


def _bytes(spec: Spec) -> int:
    count = spec.dtype.itemsize
    for size in spec.shape:
        count *= size
    return count
