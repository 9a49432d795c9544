"""Which scheme each nn.Linear of a model gets, by patterns of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import nn

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..modules.linear_quant import LinearQuant
from ..modules.name_patterns import name_pattern
from ..modules.quantized_linear import QuantizedLinear
from ..modules.vendor import vendor_layers
from .schemes import SCHEMES, Scheme

__all__ = [
    "Choice",
    "Schemes",
    "check_patterns",
    "choose",
    "quantized_kinds",
    "schemes_in",
]

Schemes = Scheme | Mapping[str, Scheme | None]  # for all layers, or by pattern; None: stays float
Names = Mapping[nn.Module, list[str]]  # a module may have several


class Choice(NamedTuple):
    """What a layer gets.

    Attributes:
        scheme: None if it stays float.
        why: why it stays float; empty with a scheme.
    """

    scheme: Scheme | None
    why: str


def quantized_kinds() -> tuple[type[nn.Module], ...]:
    """The classes of quantized layers, ours and the vendor's."""
    return (QuantizedLinear, LinearQuant, *vendor_layers())


def schemes_in(schemes: Schemes) -> list[Scheme]:
    """The schemes that occur, without None."""
    given = schemes.values() if isinstance(schemes, Mapping) else [schemes]
    return [scheme for scheme in given if scheme is not None]


def choose(
    model: nn.Module, schemes: Schemes, ignore: Iterable[str] = (), caller: str = "quantize"
) -> dict[str, Choice]:
    """What each nn.Linear of a model gets, by its qualified name.

    A pattern is one of `name_pattern`, over the qualified name. The first that matches decides, and
    those of `ignore` come first. A layer that no pattern matches stays float.

    An output layer stays float, unless the pattern that decides spells the last part of its name:
    "lm_head" and "*.lm_head" do, "*" does not. Output layers are what get_output_embeddings() of a
    module in the model returns, and what is called lm_head.

    Args:
        model: the whole model; its weights may be on meta.
        schemes: a scheme for all layers, or a mapping of patterns to schemes, in order.
        ignore: patterns of layers that stay float.
        caller: how a message begins.

    Raises:
        LinearQuantTypeError: schemes or ignore of another type.
        LinearQuantValueError: a pattern that decides about no layer; an invalid regular expression.
    """
    patterns = _patterns(schemes, ignore, caller)
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    outputs = _output_layers(names_of)
    layers = {module: names for module, names in names_of.items() if _is_float(module)}
    chosen, used = {}, set()
    for module, names in layers.items():
        pattern = next((pattern for pattern in patterns if pattern.matches(names)), None)
        used.add(pattern)
        chosen[names[0]] = _choice(names[0], pattern, outputs.get(module))
    for pattern in patterns:
        if layers and pattern not in used and (why := _complaint(pattern, patterns, names_of)):
            raise LinearQuantValueError(f"{caller}: {pattern.argument} has {pattern.text!r}, {why}")
    return chosen


def check_patterns(schemes: Schemes, ignore: Iterable[str], caller: str) -> None:
    """Refuse what `choose` refuses without a model: another type, and an invalid expression."""
    _patterns(schemes, ignore, caller)


class _Pattern:
    """A pattern of names, with what the layers get that match it, and the argument that has it."""

    def __init__(self, text: str, scheme: Scheme | None, argument: str, caller: str) -> None:
        self.text, self.scheme, self.argument = text, scheme, argument
        try:
            self._regex = name_pattern(text)
        except re.error as error:
            raise LinearQuantValueError(
                f"{caller}: {argument} has {text!r}, which is no regular expression: {error}."
            ) from None

    def matches(self, names: Iterable[str]) -> bool:
        """Whether it matches one of a module's names."""
        return any(map(self._regex.match, names))


def _patterns(schemes: Schemes, ignore: Iterable[str], caller: str) -> list[_Pattern]:
    """All patterns, in the order in which they decide."""
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise LinearQuantTypeError(
            f"{caller}: ignore is {ignore!r}; allowed is a list of patterns. What to do: pass "
            f"[{ignore!r}]."
        )
    given: list[tuple[Any, Any, str]] = [(text, None, "ignore") for text in ignore]
    if isinstance(schemes, Mapping):
        given += [(text, scheme, "scheme") for text, scheme in schemes.items()]
    elif type(schemes) in SCHEMES:
        given.append(("*", schemes, "scheme"))
    else:
        raise LinearQuantTypeError(
            f"{caller}: scheme is {schemes!r}; allowed are A8W8Dynamic(), A8W8Static(), "
            "A4W4Dynamic(), and a mapping of patterns of names to these or None."
        )
    for text, scheme, argument in given:
        if not isinstance(text, str):
            raise LinearQuantTypeError(
                f"{caller}: {argument} has {text!r}; allowed are patterns of names, as strings."
            )
        if scheme is not None and type(scheme) not in SCHEMES:
            raise LinearQuantTypeError(
                f"{caller}: scheme[{text!r}] is {scheme!r}; allowed are A8W8Dynamic(), "
                "A8W8Static(), A4W4Dynamic() and None."
            )
    return [_Pattern(*one, caller) for one in given]


def _is_float(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, quantized_kinds())


def _output_layers(names_of: Names) -> dict[nn.Module, str]:
    """The layers that make a model's logits, with the last part of the name that a pattern must
    spell. A layer whose weight is an embedding's is none: it is float in any case."""
    heads = {m for m, names in names_of.items() if any(_last(name) == "lm_head" for name in names)}
    for module in names_of:
        get: Callable[[], object] | None = getattr(module, "get_output_embeddings", None)
        with suppress(Exception):  # models without embeddings may raise anything
            if callable(get) and isinstance(found := get(), nn.Module):
                heads.add(found)
    embeddings = {id(m.weight) for m in names_of if isinstance(m, nn.Embedding)}
    return {
        layer: _last(names_of[head][0])
        for head in heads & names_of.keys()
        for layer in head.modules()  # an adapter holds the layer
        if id(getattr(layer, "weight", None)) not in embeddings
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _choice(name: str, pattern: _Pattern | None, output: str | None) -> Choice:
    """What a layer gets from the pattern that decides about it."""
    if pattern is None:
        return Choice(None, "no pattern matches it")
    if pattern.scheme is None:
        says = "ignore has" if pattern.argument == "ignore" else "None is the scheme of"
        return Choice(None, f"{says} {pattern.text!r}")
    if output and output not in pattern.text:
        scheme = type(pattern.scheme).__name__
        todo = f'{{"{name}": {scheme}(), ...}} quantizes it'
        return Choice(None, f"an output layer, float by default; {todo}")
    return Choice(pattern.scheme, "")


def _complaint(pattern: _Pattern, patterns: list[_Pattern], names_of: Names) -> str:
    """What is wrong with a pattern that decides about no float layer; empty if nothing: it is "*",
    it matches a quantized layer, or it leaves float what is no nn.Linear and holds none."""
    met = [module for module, names in names_of.items() if pattern.matches(names)]
    if pattern.text == "*" or any(isinstance(module, quantized_kinds()) for module in met):
        return ""
    layers = [names for module, names in names_of.items() if _is_float(module)]
    if hit := next(filter(pattern.matches, layers), None):
        before = next(other for other in patterns if other.matches(hit))
        return (
            f"which matches only layers that {before.text!r} or another pattern before it matches: "
            f"{hit[0]} for example. What to do: put it first."
        )
    if pattern.scheme is None and any(not any(map(_is_float, m.modules())) for m in met):
        return ""
    names = [name for names in layers for name in names]
    inside = f"{pattern.text}.*"
    if any(map(name_pattern(inside).match, names)):
        todo = f"write {inside!r}, which matches the layers inside it"
    else:
        near = get_close_matches(pattern.text, names, 3, 0)
        todo = f"the nearest names are {', '.join(near)}"
    return f"which matches no nn.Linear layer. What to do: {todo}."
