"""SwiGLU: silu(gate) * up, of the two halves of one tensor, and the quantization of the result.

With the quantization, and if the halves are a quantized product, it is the vendor's form: an int32
product, DequantSwigluQuant, and the next product. Else it is SwiGlu.

Sources: hicann/ops-nn, quant/dequant_swiglu_quant and activation/swi_glu, documents and op_host;
torch_npu-npu_dequant_swiglu_quant.md and torch_npu-npu_swiglu.md (Ascend/op-plugin).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..backends.compat_npu import find_operator
from ..errors import LinearQuantError
from ..rules.plan import plan
from ..rules.products import get_product
from ..rules.tables import A2, A3, ATLAS_INFERENCE, dtype_name
from .editor import (
    Editor,
    arguments_of,
    is_call,
    same_shape,
    same_size,
    value_of,
)
from .parts import (
    Part,
    behind_views,
    number,
    part_of,
    parts_of,
    reads_written,
    replay_views,
    same_stream,
    single_user,
)

__all__ = ["fuse_swiglu"]

NAME = "swiglu"
_aten, _ours = torch.ops.aten, torch.ops.lq_graph

# The products that torch_npu's page of npu_dequant_swiglu_quant names.
_DEQUANT_PRODUCTS = (A2, A3)
_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32
_SWIGLU_DTYPES = {  # swi_glu_def.cpp
    "310P": (_F16, _F32),
    "A2": (_F16, _BF16, _F32),
    "A3": (_F16, _BF16, _F32),
    "950": (_F16, _BF16, _F32),
}
_INFERENCE_BYTES = 64  # half of a row is a multiple, on Atlas inference (swi_glu's tiling)
_GELUS = (_aten.gelu.default,)


@dataclass(frozen=True)
class _Glu:
    """silu(gate) * up in a graph.

    Attributes:
        product: the node that multiplies.
        silu: the activation.
        gate, up: what is activated, and what is not, behind views.
        whole: the tensor whose halves they are; None if they are no halves.
        left: whether the first half is activated.
    """

    product: Node
    silu: Node
    gate: Node
    up: Node
    whole: Node | None
    left: bool = True

    @property
    def operands(self) -> tuple[Node, Node]:
        """What the product reads: views of silu and up, in its order."""
        first, second = self.product.args[:2]
        assert isinstance(first, Node) and isinstance(second, Node)
        return first, second


def fuse_swiglu(editor: Editor) -> None:
    """Fuse every silu(gate) * up, with its quantization where that is possible."""
    for node in editor.calls(_aten.mul.Tensor):
        if node._erased:
            continue
        if (gelu := _gelu_in(node)) is not None:
            editor.left(NAME, gelu, "its activation is gelu; the operators have silu")
        glu = _glu_of(node)
        if glu is None:
            continue
        if (why := _why_not_halves(glu)) or (why := _why_not_alone(glu)):
            editor.left(NAME, node, why)
            continue
        quantization = _quantization_of(glu)
        if quantization is not None:
            why = _why_not_quantized(editor, glu, quantization)
            if not why:
                _quantize(editor, glu, quantization)
                continue
            editor.left(NAME, quantization, f"{why}; its quantization is a kernel of its own")
        if why := _why_not_swiglu(editor, glu):
            editor.left(NAME, node, why)
        else:
            _swiglu(editor, glu)


# ---- what is there ----


def _gelu_in(node: Node) -> Node | None:
    """The gelu of gelu(gate) * up, if both are parts of one tensor or two quantized products."""
    for gate, up in (node.args[:2], reversed(node.args[:2])):
        gelu, other = behind_views(gate), behind_views(up)
        if not isinstance(gelu, Node) or not is_call(gelu, *_GELUS):
            continue
        source = behind_views(gelu.args[0])
        one, two = part_of(source), part_of(other)
        if one is not None and two is not None and one.source is two.source:
            return gelu
        if is_call(source, _ours.linear_quant.default) and is_call(other, source.target):
            return gelu
    return None


def _glu_of(node: Node) -> _Glu | None:
    for gate, up in (node.args[:2], reversed(node.args[:2])):
        silu, other = behind_views(gate), behind_views(up)
        if not is_call(silu, _aten.silu.default) or not isinstance(other, Node):
            continue
        source = behind_views(silu.args[0])
        whole, left = _halves(part_of(source), part_of(other))
        return _Glu(node, silu, source, other, whole, left)
    return None


def _halves(gate: Part | None, up: Part | None) -> tuple[Node | None, bool]:
    """The tensor whose halves gate and up are, and whether gate is the first."""
    if gate is None or up is None or gate.source is not up.source:
        return None, True
    size = number(value_of(gate.source).shape[-1])
    if size is None or size % 2:
        return None, True
    spans = (0, size // 2, 1), (size // 2, size, 1)
    given = tuple(gate[1:]), tuple(up[1:])
    if given not in (spans, spans[::-1]):
        return None, True
    return gate.source, given == spans


def _why_not_halves(glu: _Glu) -> str:
    if glu.whole is not None:
        return ""
    products = [is_call(one, _ours.linear_quant.default) for one in (glu.gate, glu.up)]
    if all(products) and glu.gate.args[0] is glu.up.args[0]:
        return "gate and up are two products: lq_graph.merge makes them one"
    if all(products):
        return "gate and up are products of two tensors"
    return "gate and up are not the halves of one tensor"


def _why_not_alone(glu: _Glu) -> str:
    """What keeps silu(gate) * up from being one call, quantized or not."""
    first, second = glu.operands
    if not (same_shape(glu.product, first) and same_shape(glu.product, second)):
        return "gate and up have other shapes"
    if len({value_of(node).dtype for node in (glu.product, glu.silu, glu.gate, glu.up)}) > 1:
        return "gate, up and their product have other dtypes"
    if not single_user(glu.silu, glu.product):
        return "silu(gate) has another reader"
    if not same_stream(glu.product, glu.silu, glu.gate, glu.up):
        return "it runs on two streams"
    if value_of(glu.product).device.type != "npu":
        return f"it is on {value_of(glu.product).device.type}"
    return ""


# ---- SwiGlu ----


def _why_not_swiglu(editor: Editor, glu: _Glu) -> str:
    assert glu.whole is not None
    if not find_operator("npu_swiglu"):
        return "torch_npu has no npu_swiglu"
    if not glu.left:
        return "its second half is activated; SwiGlu activates the first"
    product, value = get_product(), value_of(glu.whole)
    if value.dtype not in _SWIGLU_DTYPES[product.key]:
        return f"{product.key} has no SwiGlu of {dtype_name(value_of(glu.whole).dtype)}"
    half = value.shape[-1] // 2 * value.element_size()
    if product is ATLAS_INFERENCE and half % _INFERENCE_BYTES:
        return f"half of a row has {half} bytes; {product.key} takes multiples of 64"
    return "the graph writes into what it reads" if reads_written(editor, glu.whole) else ""


def _swiglu(editor: Editor, glu: _Glu) -> None:
    first, second = glu.operands
    node = editor.call(torch.ops.npu.npu_swiglu.default, glu.whole, before=glu.product)
    last = second if behind_views(second) is glu.up else first
    editor.replace(glu.product, replay_views(editor, node, last, glu.up, glu.product))
    editor.did(NAME, node)


# ---- with the quantization ----


def _quantizations() -> list[Any]:
    npu = getattr(torch.ops.npu, "npu_dynamic_quant", None)
    ours = [_ours.dynamic_quant.default, _ours.static_quant.default]
    return ours if npu is None else [*ours, npu.default]


def _quantization_of(glu: _Glu) -> Node | None:
    """The call that quantizes the result; the first, if there are several."""
    waiting = list(glu.product.users)
    while waiting:
        node = waiting.pop(0)
        if is_call(node, *_quantizations()):
            return node
        if behind_views(node) is glu.product:
            waiting += node.users
    return None


def _why_not_quantized(editor: Editor, glu: _Glu, quantization: Node) -> str:
    whole = behind_views(glu.whole)
    if not find_operator("npu_dequant_swiglu_quant"):
        return "torch_npu has no npu_dequant_swiglu_quant"
    if get_product() not in _DEQUANT_PRODUCTS:
        return f"npu_dequant_swiglu_quant is not for {get_product().key}"
    if not is_call(whole, _ours.linear_quant.default):
        return "gate and up are no quantized product"
    # A static product has no activation_scale. Without it the tiling and the kernel read none;
    # torch_npu's page asks for one, CANN's do not.
    return (
        _why_not_that_quantization(glu, quantization)
        or _why_not_those_readers(glu, whole)
        or _why_not_int32(whole)
        or ("the graph writes into what it reads" if reads_written(editor, *whole.args) else "")
    )


def _is_static(quantization: Node) -> bool:
    return quantization.target is _ours.static_quant.default


def _why_not_that_quantization(glu: _Glu, quantization: Node) -> str:
    if not same_stream(quantization, glu.product):
        return "it runs on two streams"
    if _is_static(quantization):
        values = value_of(quantization)
        why = _why_not_static(quantization)
    else:
        values = value_of(quantization)[0]
        why = _why_not_dynamic(quantization)
    unknown = [size for size in values.shape if number(size) is None]
    if not why and len(unknown) > 1 and values.dim() != 2:
        return "its quantization has several sizes that run time alone knows"
    return why


def _why_not_static(quantization: Node) -> str:
    given = arguments_of(quantization)
    forms = [given["scale"], given["zero_point"]]
    if None in forms:
        return (
            "static_quant has 1 / scale in the dtype of x; DequantSwigluQuant takes the scale in "
            "float32, and computing it is more kernels than are saved"
        )
    if any(value_of(form).numel() != 1 or value_of(form).dtype != _F32 for form in forms):
        return "its quantization's scale and zero_point are not float32 of one value"
    return ""


def _why_not_dynamic(quantization: Node) -> str:
    given, values = arguments_of(quantization), value_of(quantization)[0]
    if values.dtype != torch.int8:
        return "it is quantized to int4; DequantSwigluQuant has int8"
    for name in ("smooth_scales", "group_index"):
        if given.get(name) is not None:
            return f"its quantization has {name}"
    if given.get("quant_mode", "pertoken") != "pertoken":
        return f"its quantization has quant_mode {given['quant_mode']}"
    return ""


def _why_not_those_readers(glu: _Glu, whole: Node) -> str:
    if not single_user(glu.product, _quantization_of(glu) or glu.product):
        return "silu(gate) * up has another reader"
    if not (single_user(glu.gate, glu.silu) and single_user(glu.up, glu.product)):
        return "gate or up has another reader"
    if parts_of(whole) != {glu.gate, glu.up}:
        return "the product has another reader"
    if not same_stream(whole, glu.product):
        return "it runs on two streams"
    return ""


def _why_not_int32(whole: Node) -> str:
    """Why the product cannot be int32, with its scales applied by DequantSwigluQuant."""
    given, value = arguments_of(whole), value_of(whole)
    scale, pertoken, bias = _scale_of(given), given["pertoken_scale"], given["bias"]
    if value.dim() != 2:
        return f"the product has {value.dim()} dims; it must have 2"
    if value_of(scale).dtype == torch.int64:
        return "the product's scale is packed; weight_scale is float32"
    operands = [given[name] for name in _OPERANDS]
    if plan(*map(_value, operands), output_dtype=value.dtype).fold_scale:
        return (
            "the product's scale is packed in the graph, which cuts it; "
            "lq_graph.use_internal_format_weight packs it before, and keeps what is left of it"
        )
    if number(value_of(scale).shape[-1]) != value.shape[-1]:
        return "the product has one scale for all channels; weight_scale has one for each"
    if pertoken is not None and not same_size(value_of(pertoken).numel(), value.shape[0]):
        return "pertoken_scale does not have a value for each row"
    if bias is not None and value_of(bias).dtype != torch.int32:
        kind = dtype_name(value_of(bias).dtype)
        return f"the product has a {kind} bias; an int32 product takes int32"
    try:
        plan(*map(_value, _int32_operands(given)), output_dtype=torch.int32)
    except LinearQuantError as error:
        return f"the product cannot be int32: {str(error).partition(';')[0]}"
    return ""


_OPERANDS = ("x1", "weight", "scale", "offset", "pertoken_scale", "bias")


def _value(node: Node | None) -> Any:
    return None if node is None else value_of(node)


def _scale_of(given: dict[str, Any]) -> Any:
    """The scale of a product as float32, if the graph has it."""
    return given["scale"] if given["float_scale"] is None else given["float_scale"]


def _int32_operands(given: dict[str, Any]) -> list[Any]:
    """The arguments of the int32 product, in their order."""
    return [given["x1"], given["weight"], _scale_of(given), None, None, given["bias"]]


def _quantize(editor: Editor, glu: _Glu, quantization: Node) -> None:
    whole = behind_views(glu.whole)
    given = arguments_of(whole)
    product = editor.call(
        whole.target, *_int32_operands(given), output_dtype=torch.int32, before=whole
    )
    scale = _scale_of(given)
    if value_of(scale).dtype != torch.float32:
        scale = editor.call(_aten._to_copy.default, scale, dtype=torch.float32, before=whole)
    node = editor.call(
        torch.ops.npu.npu_dequant_swiglu_quant.default,
        product,
        weight_scale=scale,
        activation_scale=given["pertoken_scale"],
        activate_left=glu.left,
        **_mode_of(quantization),
        before=quantization,
        like=glu.product,
    )
    for result, index in _results_of(quantization):
        one = editor.call(operator.getitem, node, index, before=quantization)
        if not same_shape(one, result):
            sizes = [-1 if number(size) is None else size for size in value_of(result).shape]
            one = editor.call(_aten.reshape.default, one, sizes, before=quantization)
        editor.replace(result, one)
    editor.drop(quantization)
    editor.did(NAME, node)


def _results_of(quantization: Node) -> list[tuple[Node, Any]]:
    """The tensors that a quantization makes, and which result of the fused operator each is."""
    if _is_static(quantization):
        return [(quantization, 0)]
    return [(item, item.args[1]) for item in quantization.users]


def _mode_of(quantization: Node) -> dict[str, Any]:
    """The arguments of npu_dequant_swiglu_quant that say how it quantizes."""
    if not _is_static(quantization):
        return {"quant_mode": 1}
    given = arguments_of(quantization)
    return {"quant_mode": 0, "quant_scale": given["scale"], "quant_offset": given["zero_point"]}
