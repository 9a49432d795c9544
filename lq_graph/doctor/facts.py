"""Everything the doctor knows, in one record."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cann import Cann, find_cann, has_device_files
from .children import Child, ask_stand_in
from .environment import autoload_is_off, variables_that_matter
from .inside import NPU_MODES, on_the_cpu, on_the_npu
from .packages import Torch, TorchNpu, find_file_instead, find_torch, find_torch_npu

__all__ = ["Examination", "Facts", "StandIn"]


@dataclass
class StandIn:
    """cann_host.

    Attributes:
        active: whether this process runs on it.
        cann_version: the version of CANN that it reports; "" if it is not active.
        why_not: why it cannot be used; "" if it can, or if nobody asked (CANN is sourced, or there
            is no torch_npu).
    """

    active: bool
    cann_version: str = ""
    why_not: str = ""


@dataclass
class Facts:
    """What was found.

    Attributes:
        lq_graph, python: versions and folders.
        torch, torch_npu: as their files describe them; None: not installed.
        cann: see `Cann`.
        stand_in: cann_host.
        device_files: whether the driver's /dev/davinci* are there.
        variables: those that matter.
        autoload_off: whether `import torch` leaves torch_npu alone.
        shadowed: the file that is imported instead of torch or torch_npu, by their name.
        torch_error: why torch (or lq_graph on it) cannot be imported; "" if it can; None: not
            tried.
        torch_npu_error, torchair_error: the same of these.
        kernel: "why_not" and "library" of the compiled CPU kernel.
        device: "name", "count" and "cann", as torch_npu reports them; None without a device.
        device_error: why there is no device.
        allow_internal_format: torch_npu's switch, as a program finds it; None if not known.
        compute_error: why the device computes nothing; "" if it does.
        product: "name", "key", whether it is "known", and its "rows".
        product_error: why there is no product.
        modes: "mode" and "why_not" of each.
        self_test: of each mode "mode", "seconds" and "results".
        self_test_errors: what ended it early.
    """

    lq_graph: dict[str, str]
    python: dict[str, str]
    torch: Torch | None
    torch_npu: TorchNpu | None
    cann: Cann
    stand_in: StandIn
    device_files: bool
    variables: dict[str, str]
    autoload_off: bool
    shadowed: dict[str, str] = field(default_factory=dict)
    torch_error: str | None = None
    torch_npu_error: str | None = None
    torchair_error: str | None = None
    kernel: dict[str, Any] | None = None
    device: dict[str, Any] | None = None
    device_error: str = ""
    allow_internal_format: bool | None = None
    compute_error: str = ""
    product: dict[str, Any] | None = None
    product_error: str = ""
    modes: list[dict[str, str]] = field(default_factory=list)
    self_test: list[dict[str, Any]] = field(default_factory=list)
    self_test_errors: list[str] = field(default_factory=list)


Events = Iterator[tuple[str, dict[str, Any]]]


@dataclass
class _Source:
    """Where events come from: the CPU's or the NPU's half of `inside`, here or in a child."""

    where: str
    events: Events
    child: Child | None = None


class Examination:
    """Collects the facts: first `look`, then `self_test`, then `close`."""

    def __init__(self, *, self_test: bool) -> None:
        self._with_test = self_test
        self._sources: list[_Source] = []
        self._begun: list[tuple[_Source, str]] = []
        self.facts = _from_files()

    def look(self) -> Facts:
        """Everything but the self-test."""
        facts = self.facts
        if "torch_npu" in sys.modules:  # on cann_host: this process is as good as another
            self._sources = [
                _Source("cpu", on_the_cpu(self._with_test)),
                _Source("npu", on_the_npu(self._with_test)),
            ]
        elif facts.torch is not None:
            for where in ["cpu"] + ["npu"] * (facts.torch_npu is not None):
                child = Child(where, self_test=self._with_test)
                self._sources.append(_Source(where, child.events(), child))
        for source in self._sources:
            begun = next((fields for name, fields in self._took(source) if name == "begin"), None)
            if begun is not None:
                self._begun.append((source, begun["mode"]))
            else:
                self._ended(source)
        if facts.torch_error == "" and not any(mode["mode"] in NPU_MODES for mode in facts.modes):
            why = "cannot be imported" if facts.torch_npu else "is not installed"
            facts.modes += [{"mode": mode, "why_not": f"torch_npu {why}"} for mode in NPU_MODES]
        if facts.torch_npu and not facts.stand_in.active and facts.cann.state != "sourced":
            facts.stand_in.why_not = ask_stand_in()
        return facts

    @property
    def has_self_test(self) -> bool:
        """Whether a self-test has begun."""
        return bool(self._begun)

    def self_test(self) -> Iterator[dict[str, Any]]:
        """Run the self-test; yields "mode", "seconds" and "results" of each mode when it ends."""
        for source, mode in self._begun:
            for name, fields in self._took(source):
                if name == "begin":
                    mode = fields["mode"]
                elif name == "results":
                    mode = ""
                    yield fields
            self._ended(source, mode)

    def close(self) -> None:
        """End the processes."""
        for source in self._sources:
            if source.child is not None:
                source.child.close()

    def _took(self, source: _Source) -> Events:
        """The events of a source; each is written into the facts."""
        facts = self.facts
        for name, fields in source.events:
            if name == "torch":
                facts.torch_error = ""
            elif name == "torch_npu":
                facts.torch_npu_error = ""
            elif name == "torchair":
                facts.torchair_error = fields["why_not"]
            elif name == "mode":
                modes = {mode["mode"]: mode for mode in [*facts.modes, fields]}  # the last counts
                facts.modes = [*modes.values()]
            elif name == "results":
                facts.self_test.append(fields)
            elif name in ("kernel", "device", "product"):
                setattr(facts, name, fields)
            elif name == "compute":
                facts.allow_internal_format = fields["allow_internal_format"]
            elif name == "failed":
                self._failed(**fields)
            yield name, fields

    def _failed(self, stage: str, error: str) -> None:
        if stage == "self-test":
            self.facts.self_test_errors.append(error)
        else:  # torch_npu_error, device_error, compute_error or product_error
            setattr(self.facts, f"{stage}_error", error)

    def _ended(self, source: _Source, mode: str = "") -> None:
        """Take note if the process ended before it should, in this mode of the self-test."""
        facts = self.facts
        if source.child is None:
            return
        error = source.child.error
        if not error:
            before = facts.torch_error if source.where == "cpu" else facts.torch_npu_error
            if before is not None and (not mode or facts.self_test_errors):
                return
            error = "the process ended before it had said everything"
        if mode:
            facts.self_test_errors.append(f"in mode {mode}: {error}")
        elif source.where == "cpu" and facts.torch_error is None:
            facts.torch_error = error
        elif source.where == "npu" and facts.torch_npu_error is None:
            facts.torch_npu_error = error
        else:
            facts.device_error = error


def _from_files() -> Facts:
    import lq_graph

    environ = dict(os.environ)
    stand_in = sys.modules.get("cann_host")
    info: dict[str, Any] = stand_in.info() if stand_in is not None else {"active": False}
    return Facts(
        lq_graph={"version": lq_graph.__version__, "folder": str(Path(lq_graph.__file__).parent)},
        python={
            "version": platform.python_version(),
            "executable": sys.executable,
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
        },
        torch=find_torch(),
        torch_npu=find_torch_npu(),
        cann=find_cann(environ),
        stand_in=StandIn(info["active"], info["cann_version"] if info["active"] else ""),
        device_files=has_device_files(),
        variables=variables_that_matter(environ),
        autoload_off=autoload_is_off(environ),
        shadowed={
            name: file for name in ("torch", "torch_npu") if (file := find_file_instead(name))
        },
    )
