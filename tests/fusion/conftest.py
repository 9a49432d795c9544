"""Fusions need a torchair that runs passes of others."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from support import has

    if has.HAS_PASSES:
        return
    skip = pytest.mark.skip(reason="torchair has no register_replacement")
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(skip)
