"""Files of checkpoints with something in them changed at random."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq_graph import CheckpointError, load_checkpoint
from support.injection import model_state


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def put_header(file: Path, text: bytes, rest: bytes) -> None:
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


class Raw:
    """Text in the place of a JSON value."""

    def __init__(self, text: str) -> None:
        self.text = text


NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 8, 8.5, 2**31, 2**63, 2**64, 10**30, 1e300, "", "0", "W8A8",
    4, "group", "channel", "weight_input", "float",
    "FLOAT", "re:(", "re:(a+)+$", "Linear", "I8", "F16", "BOOL", "F8_E8M0", "token", "tensor",
    "\ud800", "\n", "x" * 3000, "../x", "a\0", [], {}, [[]], [1, 2], ["Linear"], {"a": 1}, [0, 0],
    [8, 8], [2**62, 4], Raw("NaN"), Raw("Infinity"), Raw("1e999"), Raw("9" * 30), Raw("{" * 3),
    Raw(deep(70)),
    Raw('{"a": 1, "a": 2}'), Raw(""), Raw("'x'"), Raw("0x1"), Raw("[1,]"),
]  # fmt: skip


def mutated(r: random.Random, value: Any) -> bytes:
    """JSON of a value with something in it replaced, removed or renamed."""
    value = copy.deepcopy(value)
    raw: list[str] = []
    for _ in range(r.choice([1, 1, 2])):
        places: list[tuple[Any, Any]] = []
        todo = [value]
        while todo:
            whole = todo.pop()
            if isinstance(whole, dict | list):
                for key in whole if isinstance(whole, dict) else range(len(whole)):
                    places.append((whole, key))
                    todo.append(whole[key])
        if not places:
            continue
        whole, key = r.choice(places)
        kind = r.random()
        if kind < 0.7:
            new = r.choice(NASTY)
            if isinstance(new, Raw):
                raw.append(new.text)
                new = f"raw{len(raw) - 1}"
            whole[key] = copy.deepcopy(new)
        elif kind < 0.85:
            del whole[key]
        elif isinstance(whole, dict):
            name = r.choice(
                ["", "0.weight", "1.weight", "weight", "__metadata__", "2.weight_scale"]
            )
            whole[name] = whole.pop(key)
        else:
            whole.append(whole[key])
    text = json.dumps(value)
    for i, piece in enumerate(raw):
        text = text.replace(f'"raw{i}"', piece)
    return text.encode()


def spoiled(r: random.Random, data: bytes) -> bytes:
    """Bytes with some of them changed, lost or doubled."""
    place, length = r.randrange(len(data)), r.randrange(1, 9)
    kind = r.randrange(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + r.randbytes(length) + data[place + length :]
    if kind == 2:
        return data[:place] + data[place + length :]
    return data[:place] + data[place : place + length] + data[place:]


def loads(
    model: nn.Module, path: Path, x: Tensor, r: random.Random, before: object, case: int
) -> bool:
    """Whether a mutated checkpoint is loaded, and the model then takes x; else it is refused in one
    printable sentence, and the model is as before. Both in a short time."""
    start = time.monotonic()
    loaded = True
    try:
        load_checkpoint(model, path, mmap=r.random() < 0.2)
    except CheckpointError as error:
        text, loaded = str(error), False
        assert text.isprintable() and model_state(model) == before, (case, text)
    if loaded:
        with torch.no_grad():
            model(x)
    assert time.monotonic() - start < 5, case
    return loaded
