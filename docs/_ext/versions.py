"""The table of docs/versions.md, made from docs/versions.json, which noxfile.py writes.

`python docs/_ext/versions.py` writes it into the page; it needs no torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from string import ascii_lowercase
from typing import Any

__all__ = ["versions"]

DOCS = Path(__file__).parents[1]
sys.path.append(str(DOCS.parent / "tests"))

from support.versions import VERSIONS  # noqa: E402

DATA = DOCS / "versions.json"


def versions() -> str:
    """A line for each torch_npu, and the reasons of the tests that were skipped or failed."""
    results = json.loads(DATA.read_text())
    reasons = _lettered(results)
    head = "| torch_npu | torch, Python | examples | passed | failed | skipped | run |"
    lines = [head, "|---|---|---|---|---|---|---|", *(_line(one, reasons) for one in results), ""]
    lines += [f"- {letter}: {text}" for text, letter in reasons.items()]
    run = {one["torch_npu"] for one in results}
    if not_run := [one.torch_npu for one in VERSIONS if one.torch_npu not in run]:
        lines += ["", f"Not run yet: {', '.join(not_run)}."]
    return "\n".join(lines)


def _line(result: dict[str, Any], reasons: dict[str, str]) -> str:
    skipped = sorted((reasons[text], count) for text, count in _by_reason(result).items())
    cells = [
        result["torch_npu"],
        f"{result['torch']}, {result['python']}",
        "ok" if all(result["examples"].values()) else "**fails**",
        f"{result.get('passed', 0):,}",
        str(len(result["failed"])),
        ", ".join(f"{count} {letter}" for letter, count in skipped) or "0",
        f"{result['date']}, {result['commit']}",
    ]
    return f"| {' | '.join(cells)} |"


def _by_reason(result: dict[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text, count in result.get("skipped", {}).items():
        reason = re.sub(r"\s+", " ", text).removeprefix(f"torch_npu {result['torch_npu']}: ")
        counts[reason.rstrip(".")] += count
    return counts


def _lettered(results: list[dict[str, Any]]) -> dict[str, str]:
    texts = dict.fromkeys(text for result in results for text in sorted(_by_reason(result)))
    letters = [*ascii_lowercase, *(first + second for first in "abc" for second in ascii_lowercase)]
    return dict(zip(texts, letters, strict=False))


if __name__ == "__main__":
    page = DOCS / "versions.md"
    text = re.sub(
        r"(<!-- table: versions -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{versions()}\n\n{found[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    page.write_text(text)
