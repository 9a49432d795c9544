"""The answer of the doctor, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..reports import styled, table, wrapped
from .environment import AUTOLOAD
from .facts import Facts
from .problems import Problem

__all__ = ["as_json", "facts_text", "mode_text", "notes_text", "problems_text", "rows_text"]

_LABEL = 12
# those of csrc/targets
_INSTRUCTION_SETS = {
    "amx": "AMX int8, which was never run on such a processor",
    "avx512vnni": "AVX-512 VNNI",
    "avxvnni": "AVX-VNNI",
    "avx2": "AVX2",
    "neon_i8mm": "NEON I8MM",
    "neon_dot": "NEON SDOT",
}
_KERNEL = {
    "": "compiled, {instruction_set}",
    "off": "torch; LQ_GRAPH_NATIVE turns the compiled one off",
    "variable": "torch; LQ_GRAPH_NATIVE has a wrong value",
    "absent": "torch; the compiled one is not built",
    "openmp": "torch; the compiled one cannot be loaded beside this torch",
    "stale": "torch; the compiled one was built from other sources",
    "processor": "torch; the compiled one has no instruction set of this processor",
}


def _kernel(facts: Facts) -> str:
    if facts.kernel is None:
        return "unknown"
    name = facts.kernel["instruction_set"]
    return _KERNEL[facts.kernel["why_not"]].format(
        instruction_set=_INSTRUCTION_SETS.get(name, name)
    )


def problems_text(problems: Sequence[Problem]) -> list[str]:
    """A numbered list; the first is to be solved first."""
    lines = []
    for number, problem in enumerate(problems, 1):
        head = f"{number}. " if len(problems) > 1 else ""
        indent = " " * len(head)
        lines += wrapped(head + problem.what, indent)
        lines += wrapped(f"{indent}fix: {problem.fix}", indent + " " * 5)
        lines += [f"{indent}     {command}" for command in problem.commands]
    return lines


def notes_text(notes: Sequence[str]) -> list[str]:
    """One for each line."""
    return [line for note in notes for line in wrapped(f"note: {note}", " " * 6)]


def facts_text(facts: Facts) -> list[str]:
    """What is here, one label for each line."""
    lines: list[str] = []
    rows: list[tuple[str, str]] = [
        ("lq_graph", f"{facts.lq_graph['version']}, {facts.lq_graph['folder']}"),
        ("Python", f"{facts.python['version']} on {facts.python['machine']}, "
                   f"{facts.python['executable']}"),
        ("torch", _torch(facts)),
        ("torch_npu", _torch_npu(facts)),
        ("torchair", _torchair(facts)),
        ("CANN", _cann(facts)),
        ("device", _device(facts)),
        ("CPU kernel", _kernel(facts)),
    ]  # fmt: skip
    if facts.allow_internal_format is not None:
        switch = "on" if facts.allow_internal_format else "off"
        rows.insert(-1, ("weights", f"allow_internal_format is {switch}"))
    for label, text in rows:
        lines += wrapped(label.ljust(_LABEL) + text, " " * _LABEL)
    label = "variables"
    for name, value in facts.variables.items():
        lines += wrapped(f"{label:{_LABEL}}{name}={value}", " " * (_LABEL + 3))
        label = ""
    return lines


def mode_text(facts: Facts) -> list[str]:
    """What can be used, and why not."""
    lines = []
    for mode in facts.modes:
        answer = "yes" if not mode["why_not"] else "no"
        why = f": {mode['why_not']}" if mode["why_not"] else ""
        first, *more = wrapped(f"   {answer:5}{mode['mode']}{why}", " " * 11)
        coloured = styled(answer, "bad" if mode["why_not"] else "good")
        lines += [first.replace(answer, coloured, 1), *more]
    return lines


def rows_text(facts: Facts) -> list[str]:
    """The rows of the product's table; after the self-test with what each gave, by mode: how many
    calls were right, of how many. Then what was wrong."""
    if facts.product is None:
        return []
    operator = "linear_quant "  # most rows are its own; the others name theirs
    head = f"{operator}on {facts.product['name']}"
    groups = [*facts.product["rows"]]
    for test in facts.self_test[:1]:
        groups = [*dict.fromkeys(result["group"] for result in test["results"])]
    lines = [[head, *(test["mode"] for test in facts.self_test)]]
    for group in groups:
        label = f"   {group.removeprefix(operator)}"
        lines.append([label, *(_right(test, group) for test in facts.self_test)])
    return [*table(lines), *_wrong(facts.self_test)]


def progress_text(test: dict[str, Any]) -> str:
    """A mode of the self-test that has ended."""
    count = Counter(result["passed"] for result in test["results"] if not result["left_out"])
    calls = f"{sum(count.values())} calls"
    verdict = "all right" if not count[False] else f"{count[False]} not right"
    return f"   {test['mode']:6} {calls:10} {test['seconds']:6.1f} s   {verdict}"


def as_json(facts: Facts, problems: Sequence[Problem], notes: Sequence[str]) -> dict[str, Any]:
    """The structure that docs/doctor.md describes."""
    imports = {"torch": facts.torch_error, "torch_npu": facts.torch_npu_error}
    packages = {"torch": facts.torch, "torch_npu": facts.torch_npu}
    return {
        "structure": 1,
        "ok": not problems,
        "problems": [dataclasses.asdict(problem) for problem in problems],
        "notes": list(notes),
        "lq_graph": facts.lq_graph,
        "python": facts.python,
        **{
            name: package
            and {**dataclasses.asdict(package), "imports": _yes(error), "error": error or ""}
            for (name, package), error in zip(packages.items(), imports.values(), strict=True)
        },
        "torchair": {"imports": _yes(facts.torchair_error), "error": facts.torchair_error or ""},
        "cann": {**dataclasses.asdict(facts.cann), "cann_host": dataclasses.asdict(facts.stand_in)},
        "device": facts.device,
        "allow_internal_format": facts.allow_internal_format,
        "product": facts.product,
        "cpu_kernel": facts.kernel,
        "variables": facts.variables,
        "modes": facts.modes,
        "self_test": facts.self_test,
    }


# ---- parts ----


def _yes(error: str | None) -> bool | None:
    return None if error is None else not error


def _imports(error: str | None) -> str:
    if error is None:
        return ""
    return "; cannot be imported" if error else "; imports"


def _torch(facts: Facts) -> str:
    if facts.torch is None:
        return "not installed"
    return f"{facts.torch.version}, {facts.torch.build} build{_imports(facts.torch_error)}"


def _torch_npu(facts: Facts) -> str:
    npu = facts.torch_npu
    if npu is None:
        return "not installed"
    off = f" ({AUTOLOAD}=0)" if facts.autoload_off else ""
    return f"{npu.version}, made for torch {npu.made_for}{_imports(facts.torch_npu_error)}{off}"


def _torchair(facts: Facts) -> str:
    if facts.torch_npu is None or not facts.torch_npu.has_torchair:
        return "not installed"
    return f"part of torch_npu{_imports(facts.torchair_error)}"


def _cann(facts: Facts) -> str:
    if facts.stand_in.active:
        return f"cann_host stands in for CANN {facts.stand_in.cann_version}"
    used = facts.cann.used
    if used is None:
        return "none; cann_host can stand in for it" if facts.torch_npu else "none"
    others = "".join(f"; also {other.folder}" for other in facts.cann.installed[1:])
    return f"{used.version}, {used.folder}; {facts.cann.state}{others}"


def _device(facts: Facts) -> str:
    if facts.device is None:
        files = "the driver's /dev/davinci* are there" if facts.device_files else ""
        return "none" + (files and f"; {files}")
    device = facts.device
    where = " (cann_host)" if facts.stand_in.active else ""
    product = f", {facts.product['name']}" if facts.product else ""
    cann = f", with CANN {device['cann']}" if device["cann"] else ""
    return f"{device['count']} x {device['name']}{where}{product}{cann}"


def _right(test: dict[str, Any], group: str) -> str:
    results = [result for result in test["results"] if result["group"] == group]
    ran = [result for result in results if not result["left_out"]]
    if not ran:
        return "-"
    return f"{sum(result['passed'] for result in ran)}/{len(ran)}"


def _wrong(tests: Iterable[dict[str, Any]]) -> list[str]:
    """A paragraph for each error, and for each row with wrong numbers."""
    lines: list[str] = []
    for test in tests:
        alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for result in test["results"]:
            if not result["left_out"] and not result["passed"]:
                key = ("", result["error"]) if result["error"] else (result["group"], "")
                alike.setdefault(key, []).append(result)
        for (_, error), results in alike.items():
            first = f"{results[0]['group']} ({results[0]['name']})"
            if len(results) > 1:
                first += f" and {len(results) - 1} more"
            said = error or (
                f"{sum(result['wrong'] for result in results):,} of "
                f"{sum(result['count'] for result in results):,} numbers differ, by at most "
                f"{max(result['largest'] for result in results):g}"
            )
            lines += wrapped(f"wrong in {test['mode']}: {first}: {said}", "   ")
    return lines
