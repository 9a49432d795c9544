"""Makes our operators known to torchair without importing it.

torchair finds a converter as the attribute `_ge_converter` of the operator, at the moment a
graph is lowered (seen in 6.0.rc3 to torch_npu 2.13's). We put a placeholder there that imports
the package `converters`, whose registration replaces the placeholder, and hands the call on. So
`import lq_graph` works before or after torchair, or without it.

`converters` is a name that a program may well have for a module of its own, in the working
directory for one. Then ours is loaded from its place, under a name of lq_graph's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from torch._ops import OpOverload

__all__ = ["install", "load"]

_ATTRIBUTE = "_ge_converter"
_NAME = "converters"
_OWN_NAME = "lq_graph._converters"
_FILE = Path(__file__).resolve().parent.parent / _NAME / "__init__.py"

_loading = threading.RLock()


def load() -> ModuleType:
    """Our package `converters`, also where something else has that name.

    Raises:
        ImportError: it is not where it was installed, or it needs a package that is not there.
    """
    if _is_ours(sys.modules.get(_NAME)) or (_NAME not in sys.modules and _found_is_ours()):
        return importlib.import_module(_NAME)
    with _loading:
        if _OWN_NAME not in sys.modules:
            _load_from_its_place()
        return sys.modules[_OWN_NAME]


def _is_ours(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == _FILE


def _found_is_ours() -> bool:
    found = importlib.util.find_spec(_NAME)
    return found is not None and found.origin is not None and Path(found.origin).resolve() == _FILE


def _load_from_its_place() -> None:
    if not _FILE.is_file():
        raise ImportError(
            f"lq_graph's converters for torchair are not at {_FILE.parent}. What to do: install "
            "lq-graph again."
        )
    spec = importlib.util.spec_from_file_location(
        _OWN_NAME, _FILE, submodule_search_locations=[str(_FILE.parent)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_OWN_NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_OWN_NAME]
        raise


class _Placeholder:
    """Stands for the converter of one operator until torchair asks for it."""

    # torchair passes meta_outputs to converters that declare it
    require_meta = True

    def __init__(self, op: OpOverload) -> None:
        self._op = op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        load().register()  # replaces self
        return getattr(self._op, _ATTRIBUTE)(*args, **kwargs)


def install(*ops: OpOverload) -> None:
    """Put a placeholder on each operator that has no converter yet."""
    for op in ops:
        if not hasattr(op, _ATTRIBUTE):
            setattr(op, _ATTRIBUTE, _Placeholder(op))
