"""Which Ascend product the rules are read for."""

from __future__ import annotations

import os
import sys

from .errors import LinearQuantValueError
from .formats import A2, PRODUCTS, Product, product_by_name, product_of_soc

__all__ = ["ENV", "get_product", "set_product"]

ENV = "LQ_GRAPH_PRODUCT"
_DEFAULT = A2

_chosen: Product | None = None
_detected: Product | None = None


def _parse(name: str, where: str) -> Product:
    product = product_by_name(name)
    if product is None:
        known = ", ".join(p.key for p in PRODUCTS)
        raise LinearQuantValueError(
            f"{where}: {name!r} is not a product lq_graph knows; use one of {known}, or a SoC name "
            "such as Ascend910B2."
        )
    return product


def _detect() -> Product | None:
    """The product of the device torch_npu sees. torch_npu is never imported for this."""
    npu = getattr(sys.modules.get("torch"), "npu", None)
    if "torch_npu" not in sys.modules or npu is None or not npu.is_available():
        return None
    return product_of_soc(npu.get_device_name())


def get_product() -> Product:
    """The product in force: set in code, else LQ_GRAPH_PRODUCT, else the device, else Atlas A2.

    Raises:
        LinearQuantValueError: LQ_GRAPH_PRODUCT names no known product.
    """
    global _detected
    if _chosen is not None:
        return _chosen
    if name := os.environ.get(ENV):
        return _parse(name, ENV)
    if _detected is None:
        _detected = _detect()
    return _detected or _DEFAULT


def set_product(product: Product | str | None) -> None:
    """Set the product for this process; None goes back to the environment and the device.

    Args:
        product: a `Product`, its key ("310P", "A2", "A3"), its name, or a SoC name.

    Raises:
        LinearQuantValueError: no such product.
    """
    global _chosen
    _chosen = _parse(product, "set_product") if isinstance(product, str) else product
