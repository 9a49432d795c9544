"""What can only be known with torch in the process: run by `children` in processes of their own, as
`python -m lq_graph.doctor.inside`, or in this process if it has torch_npu already (cann_host).

It yields events, so that all that is known reaches the parent even if the process dies at the next
step.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["NPU_MODES", "Event", "on_the_cpu", "on_the_npu"]

# name and fields; the names: torch, kernel, product, mode, torch_npu, torchair, device, compute,
# failed, begin and results
Event = tuple[str, dict[str, Any]]

_INDUCTOR = "Inductor on the CPU"
CPU_MODES = ("CPU", "torch.export", _INDUCTOR)
NPU_MODES = (
    "eager on the NPU",
    "GE graph",
    "captured graph (reduce-overhead)",
    "captured graph (torch.npu.graph)",
    "captured graph (npugraph_ex)",
)

# A device compiles the one graph of all rows in some ten seconds; if it has to be split, no
# further graph is begun after this time.
_SECONDS_OF_GRAPHS = 30.0


def on_the_cpu(self_test: bool) -> Iterator[Event]:
    """What torch alone has: the CPU kernel, the product's table, export, Inductor."""
    importlib.import_module("torch")
    yield "torch", {}
    from ..kernels import library

    yield (
        "kernel",
        {
            "why_not": library.why_not_used(),
            "library": library.path(),
            "instruction_set": found.instruction_set if (found := library.loaded()) else "",
        },
    )
    product = list(_guarded("product", _product))
    yield from product
    for mode, why_not in zip(CPU_MODES, ("", "", _why_no_inductor()), strict=True):
        yield "mode", {"mode": mode, "why_not": why_not}
    if self_test and product[0][0] != "failed":
        yield from _guarded_events("self-test", lambda: _run("cpu"))


def on_the_npu(self_test: bool) -> Iterator[Event]:
    """torch_npu, torchair and the device; and the self-test there."""
    try:
        npu = importlib.import_module("torch_npu").npu
    except Exception as error:
        yield "failed", {"stage": "torch_npu", "error": _root(error)}
        return
    yield "torch_npu", {}
    torchair = ""
    try:
        _torchair().CompilerConfig  # noqa: B018 - now it is loaded
    except Exception as error:
        torchair = _root(error)
    yield "torchair", {"why_not": torchair}
    device = ""
    try:
        yield "device", _device(npu)
    except Exception as error:
        device = _root(error)
        yield "failed", {"stage": "device", "error": device}
    yield from _npu_modes(npu, device and "no device", torchair and "torchair cannot be imported")
    if device:
        return
    yield from _guarded("compute", lambda: {"allow_internal_format": _allows_internal_format()})
    product = list(_guarded("product", _product))
    yield from product
    if not self_test or product[0][0] == "failed":
        return
    npu.config.allow_internal_format = True
    yield from _guarded_events("self-test", lambda: _run("npu"))
    if not torchair:
        yield from _guarded_events("self-test", lambda: _run("graph"))


# ---- parts ----


def _torchair() -> Any:
    """torchair. Only an import statement loads it: what import_module finds is a placeholder."""
    import torchair

    return torchair


def _device(npu: Any) -> dict[str, Any]:
    count = npu.device_count()
    if not count:
        raise RuntimeError("torch_npu finds no device")
    ask = getattr(npu.utils, "get_cann_version", None)
    return {
        "name": npu.get_device_name(),
        "count": count,
        "cann": ask("CANN") if ask else "",
    }


def _allows_internal_format() -> bool:
    """The switch of this process. It can only be set, so a cast shows what it is."""
    import torch

    from ..backends.npu import cast_format, format_of
    from ..rules.tables import FRACTAL_NZ

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is off
        cast = cast_format(torch.zeros(64, 64, dtype=torch.int8, device="npu"), FRACTAL_NZ)
    return format_of(cast) == FRACTAL_NZ


def _product() -> dict[str, Any]:
    from ..analysis.self_test import LAYERS, cases_of
    from ..rules.products import get_product
    from ..rules.tables import product_of_soc

    product = get_product()
    known = True
    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is not None and torch_npu.npu.is_available():
        known = product_of_soc(torch_npu.npu.get_device_name()) is not None
    groups = dict.fromkeys(case.group for case in cases_of(product))
    rows = [group for group in groups if group != LAYERS]
    return {"name": product.name, "key": product.key, "known": known, "rows": rows}


def _why_no_inductor() -> str:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler.split()[0]) is None:
        return f"there is no C++ compiler ({compiler})"
    return ""


def _npu_modes(npu: Any, device: str, torchair: str) -> Iterator[Event]:
    """What torch_npu and torchair have; asked by what exists."""
    import torch

    captured = by_hand = named = ""
    if not device and not torchair:
        config = _torchair().CompilerConfig()
        try:
            config.mode = "reduce-overhead"
        except Exception:
            captured = "this torchair has no mode reduce-overhead"
    if not hasattr(npu, "NPUGraph"):
        by_hand = "this torch_npu has no NPUGraph"
    if "npugraph_ex" not in torch._dynamo.list_backends(exclude_tags=()):
        named = "this torch_npu has no such backend"
    answers = ("", torchair, torchair or captured, by_hand, named)
    for mode, why_not in zip(NPU_MODES, answers, strict=True):
        yield "mode", {"mode": mode, "why_not": device or why_not}
    if why_not := _why_no_inductor_beside_npu():
        yield "mode", {"mode": _INDUCTOR, "why_not": why_not}


def _why_no_inductor_beside_npu() -> str:
    """With torch_npu in the process, torch.compile with Inductor first imports torch_npu's part of
    it, on the CPU too; in some releases that needs triton."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that triton-ascend is not installed: needed on the NPU
        try:
            importlib.import_module("torch_npu._inductor")
        except Exception as error:
            return (
                f"beside torch_npu it fails: {_root(error)}. Without torch_npu "
                "(TORCH_DEVICE_BACKEND_AUTOLOAD=0) it works"
            )
    return ""


def _run(mode: str) -> Iterator[Event]:
    """The self-test in one mode: "cpu", "npu" or "graph"."""
    from ..analysis.self_test import cases_of, run_compiled, run_eagerly
    from ..rules.products import get_product

    cases = cases_of(get_product())
    yield "begin", {"mode": mode, "count": len(cases)}
    start = time.monotonic()
    if mode == "graph":
        torchair = _torchair()
        backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
        found = list(run_compiled(cases, backend, "npu", _SECONDS_OF_GRAPHS))
    else:
        found = list(run_eagerly(cases, mode))
    results = [{**dataclasses.asdict(result), "passed": result.passed} for result in found]
    yield "results", {"mode": mode, "seconds": time.monotonic() - start, "results": results}


def _guarded(name: str, ask: Callable[[], dict[str, Any]]) -> Iterator[Event]:
    """One event, or "failed"."""
    try:
        yield name, ask()
    except Exception as error:
        yield "failed", {"stage": name, "error": _root(error)}


def _guarded_events(stage: str, events: Callable[[], Iterator[Event]]) -> Iterator[Event]:
    try:
        yield from events()
    except Exception as error:
        yield "failed", {"stage": stage, "error": _root(error)}


def _root(error: BaseException) -> str:
    """The innermost cause of an error, in one line without torch_npu's line of time and code."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).partition("[ERROR]")[0].split())
    return f"{type(error).__name__}: {text}".rstrip(".")


def main(arguments: list[str]) -> None:
    """cpu|npu, the descriptor of a pipe for the events, and "test" for the self-test."""
    where, pipe, *test = arguments
    ask = on_the_cpu if where == "cpu" else on_the_npu
    with Path(f"/proc/self/fd/{pipe}").open("w") as events:
        for event in ask(bool(test)):
            events.write(json.dumps(event) + "\n")
            events.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
