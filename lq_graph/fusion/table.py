"""Every fusion, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

from . import norm_followers, norms, quantizations, rope, shapes, swiglu
from .editor import Pass

__all__ = ["FUSIONS", "Fusion"]


@dataclass(frozen=True)
class Fusion:
    """A fusion.

    Attributes:
        name: of `set_fusion(off=...)`.
        what: the pattern and what replaces it.
        saves: kernels at each place.
        exact: whether no bit of the result changes.
        differs: where it is not exact, the roundings that are gone.
        source: the public definition of what replaces it.
        run: does it at every place of a graph.
    """

    name: str
    what: str
    saves: str
    exact: bool
    run: Pass
    source: str = ""
    differs: str = ""


FUSIONS = (
    Fusion(
        name="shapes",
        what="views of views, views and casts that change nothing: gone",
        saves="a cast or a copy each; views cost no kernel",
        exact=True,
        run=shapes.remove_needless,
    ),
    Fusion(
        name="equal_quantizations",
        what="equal quantizations of one tensor, and equal products of merged layers: one",
        saves="2 DynamicQuant for q, k, v; 1 for gate, up; merged layers: their products",
        exact=True,
        run=quantizations.merge_equal_quantizations,
    ),
    Fusion(
        name="rope",
        what="x * cos + rotated(x) * sin: npu_apply_rotary_pos_emb for query and key in GE graphs, "
        "npu_rotary_mul for each in others (one for both, if they are neighbours in one row of a "
        "product), and where sizes or layout ask for it",
        saves="10 of 11 for query and key, or 9 (2 Neg, 2 ConcatD, 4 Mul, 2 Add, and the slices)",
        exact=False,
        run=rope.fuse_rope,
        source="npu_apply_rotary_pos_emb, npu_rotary_mul (Ascend/op-plugin); "
        "posembedding/apply_rotary_pos_emb, rotary_position_embedding (hicann/ops-transformer)",
        differs="npu_rotary_mul does not round the two products; npu_apply_rotary_pos_emb neither, "
        "in bfloat16, and it rounds the sum half away from zero (in float16 it rounds as the "
        "pieces do)",
    ),
    Fusion(
        name="rms_norm",
        what="the pieces of an RMSNorm, as transformers, torch.nn.RMSNorm and Gemma write it: "
        "npu_rms_norm",
        saves="6 to 7 kernels of 7 to 8; of Gemma's 10 the two of 1 + weight stay, or one of them",
        exact=False,
        run=norms.rms_norm,
        source="npu_rms_norm (Ascend/op-plugin), norm/rms_norm (hicann/ops-nn)",
        differs="x / rms(x) is not rounded to float16 or bfloat16 before the weight",
    ),
    Fusion(
        name="add_rms_norm",
        what="a sum of two tensors and its npu_rms_norm: npu_add_rms_norm, which gives both",
        saves="1 Add",
        exact=False,
        run=norms.add_rms_norm,
        source="npu_add_rms_norm (Ascend/op-plugin), norm/add_rms_norm (hicann/ops-nn)",
        differs="before Ascend 950, x / rms(x) is rounded before the weight, as models write it; "
        "Gemma's 1 + weight is rounded to the dtype of x, which the operator asks for",
    ),
    Fusion(
        name="add_rms_norm_dynamic_quant",
        what="npu_add_rms_norm and one or two dynamic quantizations of the norm, through views: "
        "npu_add_rms_norm_dynamic_quant",
        saves="1 or 2 DynamicQuant",
        exact=False,
        run=norm_followers.add_rms_norm_dynamic_quant,
        source="npu_add_rms_norm_dynamic_quant (Ascend/op-plugin), "
        "norm/add_rms_norm_dynamic_quant (hicann/ops-nn)",
        differs="the norm is of the sum before it is rounded, and is quantized before it is "
        "rounded; the scale is 1 / (127 / peak)",
    ),
    Fusion(
        name="add_rms_norm_quant",
        what="npu_add_rms_norm and one or two static quantizations of the norm, through views: "
        "npu_add_rms_norm_quant",
        saves="1 or 2 AscendQuant or Quantize",
        exact=False,
        run=norm_followers.add_rms_norm_quant,
        source="npu_add_rms_norm_quant (Ascend/op-plugin), norm/add_rms_norm_quant (hicann/ops-nn)",
        differs="none for float16 on Atlas A2 and A3; for bfloat16 the norm is of the sum before "
        "it is rounded, x / rms(x) is not rounded, and it is quantized before it is rounded",
    ),
    Fusion(
        name="add_rms_norm_cast",
        what="npu_add_rms_norm and a cast of the norm to float32: npu_add_rms_norm_cast",
        saves="1 Cast",
        exact=False,
        run=norm_followers.add_rms_norm_cast,
        source="npu_add_rms_norm_cast (Ascend/op-plugin), norm/add_rms_norm_cast (hicann/ops-nn)",
        differs="none before Ascend 950; there the float32 result is not rounded before",
    ),
    Fusion(
        name="npu_operators",
        what="lq_graph::dynamic_quant to int8: torch_npu's npu_dynamic_quant, which torchair's and "
        "others' patterns know",
        saves="what those patterns save",
        exact=True,
        run=quantizations.name_as_torch_npu,
        source="npu_dynamic_quant (Ascend/op-plugin)",
    ),
    Fusion(
        name="swiglu",
        what="silu(gate) * up of the halves of one tensor: npu_swiglu; if they are one quantized "
        "product, and the result is quantized, per token or statically: the product in int32, and "
        "npu_dequant_swiglu_quant",
        saves="SplitV, Swish, Mul and DynamicQuant or AscendQuant become one",
        exact=False,
        run=swiglu.fuse_swiglu,
        source="npu_dequant_swiglu_quant, npu_swiglu (Ascend/op-plugin); DequantSwigluQuant, "
        "SwiGlu (hicann/ops-nn)",
        differs="gate and up, silu(gate), and before the quantization silu(gate) * up are not "
        "rounded to the dtype of the layer; a static quantization multiplies by 1 / scale, "
        "divided again in float32",
    ),
    Fusion(
        name="equal_calls",
        what="other equal calls: one",
        saves="1 each",
        exact=True,
        run=quantizations.merge_equal,
    ),
    Fusion(
        name="all_dims",
        what="the first operand of a pointwise call with fewer dims than the result, and as many "
        "values: a view with all dims, in captured graphs",
        saves="no kernel; torch's pass that makes calls in place fails on some without it",
        exact=True,
        run=shapes.give_all_dims,
        source="torch.fx.passes.reinplace (PyTorch)",
    ),
)
