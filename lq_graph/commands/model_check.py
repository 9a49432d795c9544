"""`python -m lq_graph check FILE.py:FUNCTION`: every quantizing call of a model."""

from __future__ import annotations

import argparse

from ..errors import LinearQuantValueError
from .model_file import model_and_inputs
from .output import only_the_answer, print_json

__all__ = ["run"]

_OF_ONE_CALL = ("weight", "offset", "pertoken_scale", "bias")
_DEFAULTS = {"x1": "int8", "scale": "float32", "output": "int8"}


def run(asked: argparse.Namespace) -> int:
    """Check the model, and print; returns the exit status."""
    from ..analysis.check_model import check_model

    given = {name for name in _OF_ONE_CALL if getattr(asked, name) is not None}
    given |= {name for name, usual in _DEFAULTS.items() if getattr(asked, name) != usual}
    if given:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise LinearQuantValueError(
            f"check: {names} is of one call, and {asked.model} is a model. What to do: leave out "
            "one of the two."
        )
    with only_the_answer(asked.json):
        model, inputs = model_and_inputs("check", asked.model)
        answer = check_model(model, tuple(inputs), product=asked.product, cann=asked.cann)
    if asked.json:
        print_json(answer.as_json())
    else:
        print(answer)
    return 0 if answer else 1
