"""Families of products: each has one set of rules."""

from __future__ import annotations

from functools import cache

__all__ = ["A2", "A950", "P310", "SOC_PREFIXES", "soc_family"]

A2 = "Atlas A2/A3"
P310 = "Atlas inference (310P)"
A950 = "Ascend 950"

# prefix of a SoC name: its family
SOC_PREFIXES = (
    ("Ascend910_93", A2),
    ("Ascend910B", A2),
    ("Ascend310P", P310),
    ("Ascend910_95", A950),
    ("Ascend950", A950),
)


@cache
def soc_family(soc: str) -> str | None:
    """The family of a SoC name such as Ascend910B2; None if there are no rules for it."""
    return next((family for prefix, family in SOC_PREFIXES if soc.startswith(prefix)), None)
