"""Why a call is refused, as a record, and the one place that turns the record into a sentence.

A broken rule raises a `LinearQuantError` with a `Refusal`; `error.refusal` holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from .tables import Choice, Product, dtype_name

if TYPE_CHECKING:
    import torch

    from ..errors import LinearQuantError

__all__ = ["PARAM_INVALID", "Fix", "Refusal", "list_of", "names_of", "refused"]

E = TypeVar("E", bound="LinearQuantError")

PARAM_INVALID = 161002  # ACLNN_ERR_PARAM_INVALID


@dataclass(frozen=True)
class Fix:
    """One thing a caller can do about a refusal.

    Attributes:
        text: what to do, as a command: "pass scale.float()".
        changes: the dtype (None: absent) that each changed argument has afterwards. Empty if the
            advice is not about dtypes.
        numbers: how the numbers of the result change; empty if they stay as they are.
    """

    text: str
    changes: tuple[tuple[str, torch.dtype | None], ...] = ()
    numbers: str = ""

    def __str__(self) -> str:
        return f"{self.text} (changes the numbers: {self.numbers})" if self.numbers else self.text

    def apply(self, dtypes: Mapping[str, torch.dtype | None]) -> dict[str, torch.dtype | None]:
        """The dtypes of a call's arguments after the fix."""
        return {**dtypes, **dict(self.changes)}


@dataclass(frozen=True)
class Refusal:
    """Why a call is refused. `str()` gives the sentence.

    Attributes:
        operator: an operator ("linear_quant"), a function or a variable that refuses the call.
        arguments: the names of the wrong arguments.
        given: what was given, as a clause: "scale is float16".
        allowed: what is allowed instead: "1 or n = 64 values". Empty if `choices` has it.
        choices: for each wrong dtype, the dtypes that the product allows if the other arguments
            stay (None: absent). With several arguments: the dtypes they may have together.
        context: the arguments that `choices` depends on: "int8 x1 and weight, int8 output".
        product: whose table was read; None if every product refuses the call.
        why: the reason, or when it would be allowed.
        fixes: what to do; the fixes that keep the numbers come first.
        takers: the other products that take the call as it is.
        since: the CANN release that takes the call; empty if it is refused for another reason than
            CANN's version.
        code: the code that aclnn would report; None if aclnn is not called or does not refuse.
        aclnn: what aclnn does, if it does something else than report `code`.
        caller: the function that found the refusal in a model; empty if none.
        layer: the qualified name of the layer; empty if it is not known.
    """

    operator: str
    arguments: tuple[str, ...]
    given: str
    allowed: str = ""
    choices: tuple[tuple[str, Choice], ...] = ()
    context: str = ""
    product: Product | None = None
    why: str = ""
    fixes: tuple[Fix, ...] = ()
    takers: tuple[Product, ...] = ()
    since: str = ""
    code: int | None = PARAM_INVALID
    aclnn: str = ""
    caller: str = ""
    layer: str = ""

    def __str__(self) -> str:
        where = [part for part in (self.caller, self.layer, self.operator) if part]
        return f"{': '.join(where)}: {self.sentence()}"

    def error(self, kind: type[E]) -> E:
        """The error that carries this record, to be raised."""
        error = kind(str(self))
        error.refusal = self
        return error

    def sentence(self, product: str | None = None) -> str:
        """The refusal without the names of operator and layer.

        Args:
            product: what to call the product; None for its name.
        """
        todo = ", or ".join(map(str, self.fixes))
        aclnn = self.aclnn or (f"aclnn would report {self.code}" if self.code else "")
        return (
            self.reason(product)
            + (f" What to do: {todo}." if todo else "")
            + (f" {list_of(map(str, self.takers))} would take it as it is." if self.takers else "")
            + (f" ({aclnn})" if aclnn else "")
        )

    def reason(self, product: str | None = None) -> str:
        """The first part of the sentence: what is given and what is allowed, without advice."""
        name = product or (str(self.product) if self.product else "")
        if self.choices:
            allowed = self._choices()
        else:
            verb = "takes" if self.allowed.startswith("no ") else "allows"
            allowed = f"{verb if name else 'allowed is'} {self.allowed}"
        return (
            f"{self.given}; "
            + (f"with {self.context}, " if self.context else "")
            + (f"{name} {allowed}" if name else allowed)
            + (f" ({self.why})." if self.why else ".")
        )

    def _choices(self) -> str:
        """ "allows float32 or int64", "takes no offset and allows scale float32"."""
        none = [argument for argument, dtypes in self.choices if dtypes == (None,)]
        some = [
            (f"{argument} " if len(self.choices) > 1 else "") + names_of(dtypes)
            for argument, dtypes in self.choices
            if dtypes != (None,)
        ]
        takes = [f"takes no {list_of(none, 'or')}"] if none else []
        return " and ".join([*takes, f"allows {list_of(some)}"] if some else takes)


def refused(
    error: type[E],
    operator: str,
    argument: str,
    given: str,
    allowed: str,
    *fixes: Fix | str,
    product: Product | None = None,
    why: str = "",
    since: str = "",
    code: int | None = PARAM_INVALID,
    aclnn: str = "",
) -> E:
    """The error for one wrong argument; raise it.

    Args:
        error: which kind.
        operator, argument, given, allowed, product, why, since, code, aclnn: as in `Refusal`.
        fixes: what to do; a fix that is a string keeps the numbers.
    """
    todo = tuple(Fix(fix) if isinstance(fix, str) else fix for fix in fixes)
    return Refusal(
        operator,
        (argument,),
        given,
        allowed,
        product=product,
        why=why,
        fixes=todo,
        since=since,
        code=code,
        aclnn=aclnn,
    ).error(error)


def list_of(words: Iterable[str], last: str = "and") -> str:
    """ "a, b and c", each word once."""
    *first, end = dict.fromkeys(words)
    return f"{', '.join(first)} {last} {end}" if first else end


def names_of(dtypes: Iterable[torch.dtype | None]) -> str:
    """ "float32, int64 or absent" for a choice of dtypes."""
    choice = set(dtypes)
    words = sorted(dtype_name(dtype) for dtype in choice if dtype is not None)
    return list_of([*words, "absent"] if None in choice else words, "or")
