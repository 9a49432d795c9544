"""A converter that torchair lacks.

torch.nn.functional.scaled_dot_product_attention becomes npu_fusion_attention_v3 in a traced graph.
For an operator without a converter torchair compiles a C++ program against CANN's headers, which
calls the operator from the graph. There are no headers here; the stand-in's converter makes the
node that torchair's own converter of npu_fusion_attention makes.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch

__all__ = ["add_attention"]


def add_attention() -> None:
    """Register the converter, if torchair is in the process and has none."""
    if "torchair" in sys.modules:
        _register()


@cache
def _register() -> None:
    import torchair
    from torchair._ge_concrete_graph.fx2ge_converter import _get_converter

    target = getattr(torch.ops.npu, "npu_fusion_attention_v3", None)
    if target is None or _has_converter(_get_converter, target.default):
        return
    torchair.register_fx_node_ge_converter(target.default)(_convert)


def _has_converter(find: Any, target: Any) -> bool:
    try:
        return find(target) is not None
    except (AttributeError, KeyError):
        return False


def _convert(
    query: Any,
    key: Any,
    value: Any,
    head_num: int,
    input_layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Any = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Any = None,
    meta_outputs: Any = None,
) -> tuple[Any, ...]:
    from torchair._ge_concrete_graph import ge_apis as ge

    del gen_mask_parallel, sync, meta_outputs
    if keep_prob != 1.0 or softmax_layout or sink is not None:
        raise NotImplementedError(
            "cann_host converts npu_fusion_attention_v3 without dropout, softmax_layout and sink; "
            f"keep_prob is {keep_prob}"
        )
    most, total, nothing, out = ge.FlashAttentionScore(
        query,
        key,
        value,
        real_shift=pse,
        drop_mask=None,
        padding_mask=padding_mask,
        atten_mask=atten_mask,
        prefix=prefix,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
        q_start_idx=None,
        kv_start_idx=None,
        head_num=head_num,
        input_layout=input_layout,
        scale_value=scale,
        keep_prob=keep_prob,
        pre_tockens=pre_tockens,
        next_tockens=next_tockens,
        inner_precise=inner_precise,
        sparse_mode=sparse_mode,
    )
    seed = ge.Const([0], dtype=9)  # not drawn without dropout
    return out, most, total, nothing, seed, seed
