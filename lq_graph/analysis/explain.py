"""explain(): the GE nodes of a model's quantized layers, beside those of the vendor's modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.compat_npu import import_torchair
from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..fusion.editor import FusionReport
from ..fusion.passes import reports
from ..modules.fusion_options import FusionOptions, fusion
from ..modules.linear_quant import LinearQuant
from ..modules.merged import MergedLinear
from ..modules.prepare import use_internal_format_weight
from ..modules.runs import arguments_of
from ..modules.vendor import convert
from ..reports import table
from ..rules.plan import Plan, Spec, plan
from ..rules.products import get_product
from ..rules.tables import PEAKS, Peak, Product, dtype_name, storage_name
from .explain_layers import VENDOR_SOURCE, Block, blocks_of, groups_of

__all__ = ["Explanation", "LayerExplanation", "explain", "require_npu"]


@dataclass(frozen=True)
class LayerExplanation:
    """One LinearQuant at the inputs it was called with.

    Attributes:
        name: the module's qualified name.
        plan: the row of the support table and the sizes.
        tensors: dtype and shape of every tensor the layer reads, by name, once prepared.
        weight_format: "ND" or "FRACTAL_NZ".
        ours, vendor: the GE graphs of the layer and of the vendor's module, from torchair
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
        """Bytes that the device reads and writes, each tensor once."""
        out = Spec(self.plan.output_dtype, self.plan.output_shape)
        return sum(_bytes(spec) for spec in (*self.tensors.values(), out))

    @property
    def intensity(self) -> float:
        """Operations (two for each MAC) per byte."""
        return 2 * self.macs / self.bytes

    @property
    def seconds(self) -> float:
        """Seconds of one call at the chip's published peaks, a lower bound."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def compute_seconds(self) -> float:
        """Seconds for the operations at the peak of int8 operations."""
        return 2 * self.macs / self.peak.int8_ops

    @property
    def memory_seconds(self) -> float:
        """Seconds for the bytes at the peak bandwidth."""
        return self.bytes / self.peak.bytes_per_second

    @property
    def bound(self) -> str:
        """Which peak limits it, "compute" or "memory"."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as text, and writes a page.

    Attributes:
        device: name of the device, from the driver.
        product: whose support table was read.
        layers: one for each LinearQuant that was called, in order of the calls.
        graphs: the GE graphs of the whole model.
        unfused: the same, lowered without our fusions, and not merged unless the model was.
        fusions: what fused in each graph, and what did not and why
            (`lq_graph.fusion.editor.FusionReport`).
        blocks: the same for each layer of the model, such as model.layers.0, with its kernels.
        peak: the figures from which the bounds are estimated.
    """

    device: str
    product: Product
    layers: tuple[LayerExplanation, ...]
    graphs: tuple[Any, ...]
    unfused: tuple[Any, ...]
    fusions: tuple[FusionReport, ...]
    blocks: tuple[Block, ...]
    peak: Peak

    @property
    def launches(self) -> tuple[int, int]:
        """Kernels of the whole model, without fusions and with them."""
        unfused, fused = (sum(len(g.launches) for g in w) for w in (self.unfused, self.graphs))
        return unfused, fused

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
        before, after = self.launches
        lines += ["", f"whole model: {before} kernels without fusion, {after} with"]
        for block, others in groups_of(self.blocks):
            lines += block.text(len(others))
        if any(block.has_attention for block in self.blocks):
            lines += ["", f"vendor: {VENDOR_SOURCE}"]
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


def explain(
    model: nn.Module, inputs: Tensor | Sequence[Any], *, peak: Peak | None = None
) -> Explanation:
    """Lower a model as for deployment, and show the GE nodes of each quantized layer.

    Works on copies of the model, prepared (`use_internal_format_weight`). One is run once for the
    shapes; each different LinearQuant of it is lowered alone, and so is the vendor's module,
    prepared by torchair's own function. It is then lowered as a whole, without our fusions. In the
    other, layers that read one tensor are merged; it is lowered as a whole, with our fusions. Sets
    torch.npu.config.allow_internal_format to True, as a deployment does.

    Args:
        model: on CPU or NPU, with LinearQuant layers; the vendor's are converted.
        inputs: the model's positional arguments, or a tensor that is the only one.
        peak: figures of your chip, for the bounds; default `lq_graph.rules.tables.PEAKS`, rough
            figures for each product.

    Returns:
        An Explanation: `print(it)`, `it.html("page.html")`.

    Raises:
        LinearQuantValueError: neither an NPU nor cann_host, or no LinearQuant layer was called.
        LinearQuantTypeError: inputs are neither a tensor nor a tuple or list.
        LinearQuantError: a layer that cannot be converted, prepared or run.

    Source: torchair's lowering, read by `lq_graph.converters.graph`.
    """
    arguments = _by_position(inputs)
    npu = require_npu()
    npu.config.allow_internal_format = True
    model = convert(copy.deepcopy(model)).to("npu").eval()
    plain = copy.deepcopy(model)
    _prepare(model)
    arguments = [one.to("npu") if isinstance(one, Tensor) else one for one in arguments]
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
    layers = []
    for name, layer, x1, pertoken in calls:
        found, tensors = _describe(layer, x1, pertoken, product)
        key = f"{layer}{[str(spec) for spec in tensors.values()]}"
        if key not in lowered:
            original = originals[name]
            assert isinstance(original, LinearQuant)
            lowered[key] = _lower_both(layer, original, x1, pertoken)
        ours, theirs = lowered[key]
        nz = "FRACTAL_NZ" if "FRACTAL_NZ" in str(ours) else "ND"
        layers.append(LayerExplanation(name, found, tensors, nz, ours, theirs, peak))
    _prepare(plain, tuple(arguments))
    with reports() as fusions:
        graphs = _lower(plain, arguments)
    with (
        fusion(FusionOptions(enabled=False)),
        reports() as without,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "fuse: .* merged layers")  # of a model that was merged
        unfused = _lower(model, arguments)
    return Explanation(
        npu.get_device_name(),
        product,
        tuple(layers),
        tuple(graphs),
        tuple(unfused),
        tuple(fusions),
        blocks_of(unfused, without, graphs, fusions),
        peak,
    )


def _by_position(inputs: Any) -> list[Any]:
    positional, by_keyword = arguments_of(inputs, "explain: inputs are")
    if by_keyword:
        raise LinearQuantTypeError(
            "explain: inputs are a mapping; allowed are a tensor, and a tuple or list of "
            "positional arguments. What to do: wrap the model in a module whose forward takes "
            "them by position."
        )
    return list(positional)


def _prepare(model: nn.Module, example: tuple[Any, ...] | None = None) -> None:
    with warnings.catch_warnings():
        # the copy has no graphs yet, but others in this process may
        warnings.filterwarnings("ignore", "use_internal_format_weight: formats of weights changed")
        use_internal_format_weight(model, example=example)


def require_npu() -> Any:
    """torch.npu, if there is a device or cann_host.

    Raises:
        LinearQuantValueError: there is neither of them.
    """
    npu: Any = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        raise LinearQuantValueError(
            "explain: there is no NPU to lower for. What to do: run it with CANN, or without a "
            "device as `python -m cann_host -m lq_graph explain ...`."
        )
    return npu


def _calls(
    model: nn.Module, arguments: list[Any]
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
    torchair = import_torchair()
    theirs = copy.deepcopy(_as_one_layer(original))
    if pertoken is not None:
        theirs.pertoken_scale = nn.Parameter(pertoken.clone(), requires_grad=False)
    vendor = convert(theirs, to="torch_npu")
    torchair.experimental.inference.use_internal_format_weight(vendor)
    arguments = [x1] if pertoken is None else [x1, pertoken]
    (mine,) = _lower(ours, arguments)
    (other,) = _lower(vendor, [x1])
    return mine, other


def _as_one_layer(layer: LinearQuant) -> LinearQuant:
    """Merged layers as one, which the vendor has a module for."""
    if not isinstance(layer, MergedLinear):
        return layer
    one = LinearQuant(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        pertoken_scale=layer.pertoken_scale is not None,
        output_dtype=layer.output_dtype,
        dtype=layer.weight.dtype,
        device="meta",
    )
    for name, tensor in layer.named_parameters(recurse=False):
        setattr(one, name, tensor)
    return one


def _lower(model: nn.Module, arguments: list[Any]) -> list[Any]:
    """The GE graphs of a model."""
    torchair = import_torchair()

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
