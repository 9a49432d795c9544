"""Which tensors of the files are not loaded: those that the caller ignores, and those of which the
model's own code says that it does not need them."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from ..modules.name_patterns import name_pattern
from .files import CheckpointError, refuse, shown
from .folder import CheckpointFiles

__all__ = [
    "NamePattern",
    "ignored_tensors",
    "lines_of_left_out",
    "patterns_for",
    "patterns_in",
    "some",
    "unneeded_tensors",
    "weight_with",
]

_MOST = 10  # patterns in a message
# the tensors that make a quantized layer, by how their names begin: all are ignored, or none
_OF_A_LAYER = re.compile(r"(weight|input_|deq_scale|quant_bias|bias$)")
# where transformers' models list what their checkpoints may have more than they have
_UNEXPECTED = "_keys_to_ignore_on_load_unexpected"


class NamePattern(NamedTuple):
    """A pattern of names.

    Attributes:
        text: as given.
        matches: whether it matches a name.
    """

    text: str
    matches: Callable[[str], object]


def patterns_in(ignore: Iterable[str]) -> list[NamePattern]:
    """The patterns that a caller gives.

    A pattern is one of `name_pattern`, over the name of a tensor, or of a module and then of
    everything in it.

    Raises:
        CheckpointError: of another type, or no regular expression.
    """
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise CheckpointError(
            f"load_checkpoint: ignore is {ignore!r}. What to do: pass a list of patterns, such as "
            "['model.layers.61.*']."
        )
    return list(map(_pattern, ignore))


def _pattern(text: object) -> NamePattern:
    if not isinstance(text, str):
        raise CheckpointError(
            f"load_checkpoint: ignore has {text!r}. What to do: give patterns of names, as str."
        )
    try:
        return NamePattern(text, name_pattern(text).match)
    except re.error as error:
        raise CheckpointError(
            f"load_checkpoint: ignore has {text!r}, which is no regular expression: {error}. What "
            "to do: correct it, or write a glob."
        ) from None


def ignored_tensors(patterns: Iterable[NamePattern], files: CheckpointFiles) -> dict[str, str]:
    """The tensors that patterns ignore, with the reason; by their names in the files.

    Raises:
        CheckpointError: a pattern that matches nothing; one that ignores a part of a quantized
            layer.
    """
    names = list(files)
    found: dict[str, str] = {}
    for text, matches in patterns:
        hit = [name for name in names if any(map(matches, _prefixes(name)))]
        if not hit:
            raise CheckpointError(
                f"load_checkpoint: ignore has {shown(repr(text))}, which matches no tensor of the "
                f"files. What to do: remove it, or correct it; near are {_near(text, names)}."
            )
        for name in hit:
            found.setdefault(name, f"ignore has {text!r}")
    _check_whole_layers(found, files)
    return found


def _prefixes(name: str) -> list[str]:
    """The names of the modules that hold a tensor, and its own."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _near(pattern: str, names: Iterable[str]) -> str:
    """The names that are most like a pattern, with * for numbers."""
    folded = {re.sub(r"\.\d+(?=\.|$)", ".*", part) for name in names for part in _prefixes(name)}
    near = get_close_matches(pattern.removeprefix("re:"), sorted(folded), 3, 0)
    return ", ".join(shown(repr(name)) for name in near)


def _check_whole_layers(ignored: Mapping[str, str], files: CheckpointFiles) -> None:
    """Refuse to ignore a scale, a zero point or a bias of a layer whose weight is loaded."""
    for name, why in ignored.items():
        if weight := weight_with(name, files, ignored):
            refuse(
                files.file_of(name),
                name,
                f"a tensor that is loaded, because {shown(weight)} is",
                why,
                f"ignore the whole layer, as {name.rpartition('.')[0]}.*, or no part of it",
            )


def weight_with(name: str, files: CheckpointFiles, ignored: Container[str] = ()) -> str:
    """The weight without which a tensor cannot be ignored: an integer weight, of a scale, a zero
    point or a bias; or the weight of a norm or a float layer, of its bias. Empty for none.

    Args:
        name: of the tensor.
        files: that have it.
        ignored: tensors that are not loaded.
    """
    module, _, part = name.rpartition(".")
    if not module or not _OF_A_LAYER.match(part):
        return ""
    for weight in (f"{module}.weight", f"{module}.weight_packed"):
        if weight == name or weight not in files or weight in ignored:
            continue
        dtype, _ = files.header(weight)
        if part == "bias" or (dtype is not None and not dtype.is_floating_point):
            return weight
    return ""


def unneeded_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The tensors of the files that the model has not, and of which its code says that it does not
    need them, with the reason.

    These are buffers that the model computes, such as rotary_emb.inv_freq, also where earlier
    versions of the model had them; and what the class of a transformers model lists, such as the
    layers that predict several tokens.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    own: set[str] = set()
    computed: set[str] = set()
    listed: dict[str, str] = {}
    for prefix, module in modules.items():
        dot = f"{prefix}." if prefix else ""
        for name in module._buffers:
            (computed if name in module._non_persistent_buffers_set else own).add(dot + name)
        own.update(dot + name for name in module._parameters)
        for pattern in getattr(module, _UNEXPECTED, None) or ():
            listed.setdefault(str(pattern), type(module).__name__)
    ends = {_end(name): name for name in computed if "." in name}
    found = {}
    for name in names:
        if name in own:
            continue
        if (buffer := name if name in computed else ends.get(_end(name))) is not None:
            found[name] = f"the model computes {buffer}"
        elif name.rpartition(".")[0] not in modules:
            for pattern, owner in listed.items():
                if re.search(pattern, name):
                    found[name] = f"{owner} says that it does not need {pattern!r}"
                    break
    return found


def _end(name: str) -> str:
    """The last two parts of a name."""
    return ".".join(name.split(".")[-2:])


def patterns_for(names: Sequence[str], model: nn.Module, files: Iterable[str]) -> str:
    """A list of patterns that ignore these tensors and nothing else, as a line to paste.

    Args:
        names: of tensors in the files.
        model: that has not these tensors.
        files: names of all tensors in the files.
    """
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    rest = set(files) - set(names)
    ends = {name.rpartition(".")[2] for name in rest}
    found: dict[str, None] = {}
    for name in names:
        absent = next((part for part in _prefixes(name)[:-1] if part not in modules), None)
        end = name.rpartition(".")[2]
        if absent is not None and not any(other.startswith(f"{absent}.") for other in rest):
            found[f"{absent}.*"] = None
        else:
            found[name if end in ends or "." not in name else f"*.{end}"] = None
    given = [f'"{shown(pattern)}"' for pattern in found]
    return ", ".join([*given[:_MOST], *(["..."] if len(given) > _MOST else [])])


def some(names: Sequence[str], most: int = 2) -> str:
    """Some of several names, and how many more there are."""
    text = ", ".join(map(shown, names[:most]))
    return text + (f" and {len(names) - most:,} more" if len(names) > most else "")


def lines_of_left_out(left_out: Mapping[str, str], sizes: Mapping[str, int]) -> list[str]:
    """A line for each reason why tensors are left out."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    lines = []
    for why, names in reasons.items():
        count = f"{len(names):,} tensor{'s' if len(names) > 1 else ''}"
        size = sum(sizes.get(name, 0) for name in names)
        lines.append(f"left out: {count}, {size:,} bytes, {some(names)}: {why}")
    return lines
