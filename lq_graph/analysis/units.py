"""Numbers with the unit that a reader wants, in a few characters."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bytes_text", "count_text", "seconds_text"]


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    place = 0
    while round(value) >= 1000 and place < len(units) - 1:
        value, place = value / step, place + 1
    unit = units[place]
    if unit == units[0] and value == int(value):
        return f"{int(value)} {unit}".rstrip()
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f} {unit}".rstrip()


def bytes_text(count: float) -> str:
    """Bytes: "979 KiB", "1.41 MiB"."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count_text(count: float, unit: str) -> str:
    """A count: "8.39 MMAC", "16.8 TOPS" of a unit that is counted in thousands."""
    return _scaled(count, 1000, [f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P")])


def seconds_text(seconds: float) -> str:
    """Seconds: "0.35 us", "1.20 ms"."""
    return _scaled(seconds * 1e6, 1000, ("us", "ms", "s"))
