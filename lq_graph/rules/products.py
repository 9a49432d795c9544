"""The product in force: the Ascend product whose rules apply."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache

from ..errors import LinearQuantValueError
from .refusal import refused
from .tables import A2, PRODUCTS, Product, product_by_name, product_of_soc

__all__ = ["ENV", "get_product", "parse_product", "set_product"]

ENV = "LQ_GRAPH_PRODUCT"
_DEFAULT = A2

_chosen: Product | None = None


def parse_product(name: Product | str, where: str) -> Product:
    """A product by key ("A2"), name or SoC name; a Product is returned as it is.

    Args:
        name: what was given.
        where: the function or variable that names it, for the message.

    Raises:
        LinearQuantValueError: no such product.
    """
    if isinstance(name, Product):
        return name
    product = product_by_name(name)
    if product is None:
        known = ", ".join(p.key for p in PRODUCTS)
        raise refused(
            LinearQuantValueError,
            where,
            "product",
            f"{name!r} is not a product that lq_graph knows",
            f"one of {known}, or a SoC name such as Ascend910B2",
            "name the product whose support table applies to your chip",
            code=None,
        )
    return product


def _detect() -> Product | None:
    """The product of the device that torch_npu finds; None if there is no device, or, with a
    warning, if lq_graph has no table for it."""
    npu = sys.modules["torch"].npu
    if not npu.is_available():
        return None
    name = npu.get_device_name()
    product = product_of_soc(name)
    if product is None:
        warnings.warn(
            f"lq_graph has no support table for {name} and uses that of {_DEFAULT}. What to do: "
            f"set {ENV} or call lq_graph.set_product to choose another product.",
            stacklevel=2,
        )
    return product


@cache
def _found(with_npu: bool) -> Product:
    """The product of the environment variable or of the device. Cached, because every call needs
    it. This does not import torch_npu: if it is not imported, there is no device."""
    if name := os.environ.get(ENV):
        return parse_product(name, ENV)
    return (_detect() if with_npu else None) or _DEFAULT


def get_product() -> Product:
    """The product in force: set in code, else LQ_GRAPH_PRODUCT, else the device, else Atlas A2.

    The environment and the device are read at the first call, and again after `set_product(None)`.

    Raises:
        LinearQuantValueError: LQ_GRAPH_PRODUCT names no known product.
    """
    return _chosen or _found(sys.modules.get("torch_npu") is not None)


def set_product(product: Product | str | None) -> None:
    """Set the product for this process; None goes back to the environment and the device.

    Args:
        product: a `Product`, its key ("310P", "A2", "A3", "950"), its name, or a SoC name.

    Raises:
        LinearQuantValueError: no such product.
    """
    global _chosen
    _chosen = None if product is None else parse_product(product, "set_product")
    _found.cache_clear()
