"""The table of docs/versions.md, made from docs/versions.json, which noxfile.py writes.

`python docs/_ext/versions.py` writes it into the page; it needs no torch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["versions"]

DOCS = Path(__file__).parents[1]
DATA = DOCS / "versions.json"


def versions() -> str:
    """A line for each torch_npu, and the reasons of the tests that were skipped or failed."""
    results = json.loads(DATA.read_text())
    reasons = _numbered(results)
    head = "| torch_npu | torch, Python | examples | passed | failed | skipped (reason) | run |"
    lines = [head, "|---|---|---|---|---|---|---|", *(_line(one, reasons) for one in results), ""]
    return "\n".join([*lines, *(f"{number}. {text}" for text, number in reasons.items())])


def _line(result: dict[str, Any], reasons: dict[str, int]) -> str:
    skipped = _by_reason(result)
    cells = [
        result["torch_npu"],
        f"{result['torch']}, {result['python']}",
        "ok" if all(result["examples"].values()) else "**fails**",
        f"{result.get('passed', 0):,}",
        str(len(result["failed"])),
        _skips(skipped, reasons),
        f"{result['date']}, {result['commit']}",
    ]
    return f"| {' | '.join(cells)} |"


def _skips(skipped: Counter[str], reasons: dict[str, int]) -> str:
    if not skipped:
        return "0"
    by_number = sorted((reasons[text], count) for text, count in skipped.items())
    parts = ", ".join(f"{count} ({number})" for number, count in by_number)
    return parts if len(by_number) == 1 else f"{skipped.total()}: {parts}"


def _by_reason(result: dict[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text, count in result.get("skipped", {}).items():
        counts[re.sub(r"\s+", " ", text)] += count
    return counts


def _numbered(results: list[dict[str, Any]]) -> dict[str, int]:
    texts = dict.fromkeys(text for result in results for text in sorted(_by_reason(result)))
    return {text: number for number, text in enumerate(texts, 1)}


if __name__ == "__main__":
    page = DOCS / "versions.md"
    text = re.sub(
        r"(<!-- table: versions -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{versions()}\n\n{found[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    page.write_text(text)
