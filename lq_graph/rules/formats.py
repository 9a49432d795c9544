"""Checks of a weight's storage format."""

from __future__ import annotations

from ..errors import LinearQuantValueError
from .products import get_product
from .refusal import refused
from .tables import ND

__all__ = ["check_graph_format"]


def check_graph_format(weight_format: int) -> None:
    """Refuse an ND weight in a GE graph, on a product whose kernels read FRACTAL_NZ alone. In an
    eager call, aclnn casts the weight itself, each time.

    Raises:
        LinearQuantValueError: the weight is ND.
    """
    product = get_product()
    if not product.graphs_take_nz_only or weight_format != ND:
        return
    raise refused(
        LinearQuantValueError,
        "linear_quant",
        "weight",
        "weight is ND, in a GE graph",
        "FRACTAL_NZ",
        "set torch.npu.config.allow_internal_format = True and call "
        "lq_graph.use_internal_format_weight(model) before the first call",
        product=product,
        code=None,
        aclnn="GE would report 561002",
    )
