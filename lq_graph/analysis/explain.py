"""explain(): the GE nodes of a model's quantized layers, beside those of the vendor's modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.compat_npu import import_torchair
from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..fusion.passes import reports
from ..modules.fusion_options import FusionOptions, fusion
from ..modules.linear_quant import LinearQuant
from ..modules.merged import MergedLinear
from ..modules.prepare import use_internal_format_weight
from ..modules.runs import arguments_of
from ..modules.vendor import convert
from ..quantization.choose import Schemes, schemes_in
from ..quantization.quantize import quantize
from ..quantization.schemes import A8W8Static
from ..rules.plan import Plan, Spec, plan
from ..rules.products import get_product
from ..rules.tables import PEAKS, Peak, Product, dtype_name
from .dry_run import DryRun, copied, is_dry, is_on_meta, outside, with_values, without_values
from .explain_layers import blocks_of
from .explanation import Explanation, LayerExplanation

__all__ = ["explain", "require_npu"]


def explain(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    *,
    scheme: Schemes | None = None,
    peak: Peak | None = None,
) -> Explanation:
    """Lower a model as for deployment, and show the GE nodes of each quantized layer.

    Works on copies of the model, prepared (`use_internal_format_weight`). One is run once for the
    shapes; each different LinearQuant of it is lowered alone, and so is the vendor's module,
    prepared by torchair's own function. It is then lowered as a whole, without our fusions. In the
    other, layers that read one tensor are merged; it is lowered as a whole, with our fusions. Sets
    torch.npu.config.allow_internal_format to True, as a deployment does.

    The model may be on meta, before there are any weights. Then nothing runs but what is small, and
    no weight takes memory. The answer is the same, except where values decide it: scales count as
    equal, so static layers that read one tensor are merged; zero points that `scheme` finds are not
    0, so static layers have an int32 bias, unless they are symmetric; and a model whose forward
    branches on values, such as experts, takes any branch. On cann_host, whose devices have as much
    memory as the machine, begin with `python -m cann_host --memory 4TiB`.

    Args:
        model: on CPU, NPU or meta, with LinearQuant layers; the vendor's are converted.
        inputs: the model's positional arguments, or a tensor that is the only one. Tensors on meta,
            and `lq_graph.rules.plan.Spec`, become zeros.
        scheme: quantize the copies first, as `quantize` does: a scheme, or a mapping of patterns
            to schemes. A8W8Static is calibrated with the inputs.
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
    if not is_on_meta(model):
        return _explain(copy.deepcopy(model), arguments, scheme, peak)
    try:
        with DryRun():
            return _explain(copied(model), arguments, scheme, peak)
    except torch.OutOfMemoryError:
        raise LinearQuantValueError(
            "explain: the device has less memory than the model needs. Nothing would be written to "
            "it, but a device counts it. What to do: python -m cann_host --memory 4TiB ..., which "
            "takes no memory of the machine."
        ) from None


def _explain(
    model: nn.Module, arguments: list[Any], scheme: Schemes | None, peak: Peak | None
) -> Explanation:
    """explain(), of a model of its own, in a block of `DryRun` if it has no weights."""
    npu = require_npu()
    arguments = [with_values(one, "npu") for one in arguments]
    called = _call_of(model, arguments)
    if scheme is not None:
        model = model.to("npu")
        static = any(isinstance(one, A8W8Static) for one in schemes_in(scheme))
        quantize(model, scheme, [tuple(arguments)] if static else None)
    model = convert(model).to("npu").eval()
    plain = copy.deepcopy(model)
    _prepare(model)
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
        blocks_of(unfused, without, graphs, fusions, product.key),
        peak,
        called,
    )


def _call_of(model: nn.Module, arguments: Sequence[Any]) -> str:
    """ "Step of LlamaForCausalLM, called with int64[1, 1]"."""
    inside = list(model.children())
    whole = f"{type(model).__name__} of {type(inside[0]).__name__}" if len(inside) == 1 else ""
    given = [
        f"{dtype_name(one.dtype)}{list(one.shape)}" if isinstance(one, Tensor) else str(one)
        for one in arguments
    ]
    return f"{whole or type(model).__name__}, called with {', '.join(given)}"


def _by_position(inputs: Any) -> list[Any]:
    given = [inputs] if isinstance(inputs, Spec) else inputs
    positional, by_keyword = arguments_of(given, "explain: inputs are")
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
    run = not is_dry()
    if not run:
        backend = without_values(backend, converters.graph.LoweredError)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with converters.graph.capture(config, run=run) as graphs, outside(), torch.no_grad():
        compiled(*arguments)
    return list(graphs)
