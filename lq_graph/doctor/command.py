"""The command line of the doctor."""

from __future__ import annotations

import argparse
import json

from . import report
from .facts import Examination
from .problems import find_notes, find_problems

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "NEEDS_TORCH", "add_arguments", "run"]

HELP = "what this machine has, what is wrong, and what to do first"
DESCRIPTION = (
    "Look at torch, torch_npu, torchair, CANN, the device and lq_graph, also where `import torch` "
    "fails, and say what is wrong, what must be solved first at the top. Then run every row of the "
    "product's support table on the CPU and, if there is an NPU, on it, eagerly and in a GE graph. "
    "Without an NPU: python -m cann_host -m lq_graph doctor."
)
EPILOG = "Exit status: 0 if there is no problem, 1 if there is one, 2 for a mistake in the command."
NEEDS_TORCH = False  # it must work where torch cannot be imported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.add_argument("--no-self-test", action="store_true", help="do not run the self-test")


def run(asked: argparse.Namespace) -> int:
    """Examine, and print; returns the exit status."""
    examination = Examination(self_test=not asked.no_self_test)
    try:
        facts = examination.look()
        if asked.json:
            for _ in examination.self_test():
                pass
            problems = find_problems(facts)
            answer = report.as_json(facts, problems, find_notes(facts))
            print(json.dumps(answer, indent=2, allow_nan=False))
            return 1 if problems else 0
        return _run_as_text(examination)
    finally:
        examination.close()


def _run_as_text(examination: Examination) -> int:
    facts = examination.facts
    early = find_problems(facts)
    _show(report.problems_text(early))
    _show(report.facts_text(facts))
    if facts.modes:
        _show(["modes", *report.mode_text(facts)])
    if examination.has_self_test:
        print("self-test, against an integer reference", flush=True)
        for test in examination.self_test():
            print(report.progress_text(test), flush=True)
        print()
    _show(report.rows_text(facts))
    _show(report.notes_text(find_notes(facts)))
    problems = find_problems(facts)
    late = [problem for problem in problems if problem not in early]
    _show(report.problems_text(late))
    if not problems:
        print("no problem found")
    else:
        many = f"{len(problems)} problems; solve first" if len(problems) > 1 else "1 problem"
        print(f"{many}: {problems[0].id}")
    return 1 if problems else 0


def _show(lines: list[str]) -> None:
    if lines:
        print(*lines, "", sep="\n", flush=True)
