"""What is in force: the Ascend product whose rules apply, and the version of CANN."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache

from ..errors import LinearQuantValueError
from .cann import ENV_CANN, CannVersion, Target, detect_cann, parse_cann_version, target_of
from .refusal import refused
from .tables import A2, PRODUCTS, Product, product_by_name, product_of_soc

__all__ = [
    "ENV",
    "get_cann_version",
    "get_product",
    "get_target",
    "parse_product",
    "set_cann_version",
    "set_product",
    "target_with",
]

ENV = "LQ_GRAPH_PRODUCT"
_DEFAULT = A2

# set in code
_product: Product | None = None
_cann: CannVersion | None = None
_times_set = 0  # of the two: another thread may be asking what was in force before


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
    product = product_by_name(name) if isinstance(name, str) else None
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
def _in_force(with_npu: bool, times_set: int) -> Target:  # noqa: ARG001 - of the cache
    """Both, with or without torch_npu. Cached, because every call needs it. This does not import
    torch_npu: if it is not imported, there is no device, and its CANN does not matter."""
    product, cann = _product, _cann
    if product is None and (name := os.environ.get(ENV)):
        product = parse_product(name, ENV)
    if cann is None and (text := os.environ.get(ENV_CANN)):
        cann = parse_cann_version(text, ENV_CANN)
    if with_npu:
        product = product or _detect()
        cann = cann or detect_cann()
    return target_of(product or _DEFAULT, cann)


def get_target() -> Target:
    """The product and the CANN version in force; see `get_product` and `get_cann_version`."""
    return _in_force(sys.modules.get("torch_npu") is not None, _times_set)


def target_with(product: Product | None, cann: CannVersion | None) -> Target:
    """A product and a CANN version; None: what is in force."""
    target = get_target()
    return target_of(product or target.product, cann or target.cann)


def get_product() -> Product:
    """The product in force: set in code, else LQ_GRAPH_PRODUCT, else the device, else Atlas A2.

    The environment and the device are read at the first call, and again after `set_product(None)`.

    Raises:
        LinearQuantValueError: LQ_GRAPH_PRODUCT names no known product.
    """
    return get_target().product


def set_product(product: Product | str | None) -> None:
    """Set the product for this process; None goes back to the environment and the device.

    Args:
        product: a `Product`, its key ("310P", "A2", "A3", "950"), its name, or a SoC name.

    Raises:
        LinearQuantValueError: no such product.
    """
    global _product, _times_set
    _product = None if product is None else parse_product(product, "set_product")
    _times_set += 1
    _in_force.cache_clear()


def get_cann_version() -> CannVersion | None:
    """The CANN version in force: set in code, else LQ_GRAPH_CANN, else what torch_npu finds. None
    if it is not known; then no row is refused for it.

    CANN tells its version from 8.1.RC1 on, and torch_npu has to be imported. The environment and
    torch_npu are asked at the first call, and again after `set_cann_version(None)`.

    Raises:
        LinearQuantValueError: LQ_GRAPH_CANN is not a version of CANN.
    """
    return get_target().cann


def set_cann_version(version: CannVersion | str | None) -> None:
    """Set the CANN version for this process; None goes back to the environment and torch_npu.

    Rows of the support tables that a newer CANN brought are then refused. Set it to check a model
    for a machine with another CANN.

    Args:
        version: as the vendor writes it: "8.2.RC1", "9.0.0".

    Raises:
        LinearQuantValueError: not a version of CANN.
    """
    global _cann, _times_set
    _cann = None if version is None else parse_cann_version(version, "set_cann_version")
    _times_set += 1
    _in_force.cache_clear()
