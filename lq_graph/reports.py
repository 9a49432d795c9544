"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["table"]


def table(rows: Sequence[Sequence[object]], indent: str = "") -> list[str]:
    """Rows as lines with aligned columns. Numbers are right-aligned, with a comma between
    thousands. The first row is the head."""
    numbers = [
        all(isinstance(cell, int) for cell in column[1:]) for column in zip(*rows, strict=True)
    ]
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        indent
        + "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in cells
    ]
