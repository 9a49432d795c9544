"""Programs of examples/ and benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

__all__ = ["module_of"]

ROOT = Path(__file__).parents[2]


def module_of(program: str) -> Any:
    """A program as a module, by its path in the repository; a dataclass of it looks for it in
    sys.modules."""
    path = ROOT / program
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
