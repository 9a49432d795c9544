"""How a checkpoint is written: complete under temporary names, then put in place, or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..modules.quantized_linear import QuantizedLinear
from .files import (
    CheckpointError,
    read_json,
    shown,
    tensors_header,
    write_all,
    write_tensor,
)
from .formats import (
    CONFIG,
    FILES,
    INDEX,
    SCHEMES,
    is_description,
    kept,
    temporary,
    waiting,
)

__all__ = ["write_checkpoint"]


def write_checkpoint(
    folder: Path,
    format: str,
    tensors: dict[str, Tensor],
    layers: dict[str, QuantizedLinear],
    pause: Callable[[], None],
) -> None:
    """Write the two files of a checkpoint, or leave the folder as it is."""
    weights, about = (folder / name for name in FILES[format])
    with ExitStack() as undo:
        _make(folder, undo)
        with _locked(folder) as descriptor:
            _finish(folder)
            old = _check_folder(folder, format)
            if format == "msmodelslim":
                new: dict[str, Any] = _description(tensors, layers)
            else:
                new = {**old, "quantization_config": _config(tensors, layers)}
            with ExitStack() as files:
                order, header = tensors_header(tensors)
                contents: list[bytes | Tensor] = [header, *(tensors[key] for key in order)]
                _write(_temporary(weights), contents, weights, files, pause)
                if new != old:
                    text = json.dumps(new, indent=2).encode()
                    _write(_temporary(about), [text], about, files, pause)
                    was = about.read_bytes() if about.exists() else b""
                    _write(_kept(about), [was], about, files, pause)
                pause()
                _put_in_place(weights, about, files, changes_json=new != old)
            undo.pop_all()
            with suppress(OSError):  # it is done; some file systems cannot make sure of a folder
                os.fsync(descriptor)


def _temporary(place: Path) -> Path:
    return place.with_name(temporary(place.name))


def _kept(place: Path) -> Path:
    return place.with_name(kept(place.name))


def _put_in_place(weights: Path, about: Path, files: ExitStack, *, changes_json: bool) -> None:
    """Give the complete files their names; Ctrl-C waits.

    The JSON comes first, while the weights wait under their temporary name: load_checkpoint finds
    them under either, so that the checkpoint is the new one from the first step on.
    """
    was_there = about.exists()
    if changes_json:
        os.replace(_temporary(about), about)
    try:
        os.replace(_temporary(weights), weights)
    except OSError as error:
        if not changes_json:
            raise
        try:
            if was_there:
                os.replace(_kept(about), about)
            else:
                os.unlink(about)
        except OSError:
            files.pop_all()  # what is there stays, and is complete
            raise CheckpointError(
                f"save_checkpoint: {shown(weights, 4096)}: {error.strerror}, and {about.name} "
                f"could not be taken back. The new weights are in {_temporary(weights).name}, "
                "where load_checkpoint finds them. What to do: save again when the disk is well."
            ) from error
        raise


def _finish(folder: Path) -> None:
    """End what a process that was killed has begun: its save, if its JSON is in place; if not, only
    its temporary files go."""
    if (waits := waiting(folder)) is not None:
        name = next(name for name, _ in FILES.values() if temporary(name) == waits.name)
        os.replace(waits, folder / name)
    for weights, about in ((folder / one, folder / other) for one, other in FILES.values()):
        # without the copy nothing waits: it goes first, in case that this is killed too
        for path in (_kept(about), _temporary(weights), _temporary(about)):
            _quietly(os.unlink, path)


def _make(folder: Path, undo: ExitStack) -> None:
    """Make a folder and those above it; noted in the stack, to be removed."""
    absent = []
    while not folder.exists():
        absent.append(folder)
        folder = folder.parent
    for path in reversed(absent):
        os.mkdir(path)
        undo.callback(_quietly, os.rmdir, path)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The folder, open, with no other save in it at the same time."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"save_checkpoint: {shown(folder, 4096)}: another save_checkpoint is writing into "
                "the folder. What to do: wait for it, or save elsewhere."
            ) from None
        except OSError:
            pass  # file systems without locks
        yield descriptor
    finally:
        os.close(descriptor)


def _check_folder(folder: Path, format: str) -> dict[str, Any]:
    """Refuse a folder whose other files would be read with what is written, or instead of it.
    Returns the JSON that is there, as far as it stays."""
    names = sorted(os.listdir(folder))
    weights, about = FILES[format]
    for name in names:
        foreign = (name.endswith((".safetensors", INDEX)) and name != weights) or (
            is_description(name) and name != about
        )
        if foreign:
            what = f"holds {shown(name)}, of another checkpoint"
        elif name in (weights, about) and not (folder / name).is_file():
            what = f"has something named {name} that is no file"
        else:
            continue
        raise CheckpointError(
            f"save_checkpoint: {shown(folder, 4096)} {what}: what is saved beside it would not be "
            "what is loaded. What to do: save into an empty folder, or remove that first."
        )
    if format != "msmodelslim":
        return read_json(folder / about) if about in names else {}
    if CONFIG in names and "quantization_config" in read_json(folder / CONFIG):
        raise CheckpointError(
            f"save_checkpoint: {shown(folder / CONFIG, 4096)} has quantization_config, which is "
            "not that of an msmodelslim checkpoint. What to do: remove the key, or save as "
            "compressed-tensors."
        )
    try:
        return read_json(folder / about) if about in names else {}
    except CheckpointError:
        return {}  # a broken one is replaced


def _write(
    path: Path,
    contents: list[bytes | Tensor],
    place: Path,
    files: ExitStack,
    pause: Callable[[], None],
) -> None:
    """Write bytes and tensors to a new file, which the stack removes, down to the disk. It has the
    permissions of the file whose place it is to take."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    files.callback(_quietly, os.unlink, path)
    try:
        with suppress(FileNotFoundError):
            os.fchmod(descriptor, place.stat().st_mode & 0o777)
        for part in contents:
            if isinstance(part, Tensor):
                write_tensor(descriptor, part, pause)
            else:
                write_all(descriptor, part, pause)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _quietly(remove: Callable[[Path], None], path: Path) -> None:
    with suppress(OSError):
        remove(path)


def _description(tensors: dict[str, Tensor], layers: dict[str, QuantizedLinear]) -> dict[str, Any]:
    words = {dynamic: word for word, dynamic in SCHEMES.items()}
    kinds = dict.fromkeys(tensors, "FLOAT")
    for key in [*tensors, *(f"{name}.weight" for name in layers)]:  # a tied one is not in the file
        layer = layers.get(key.rpartition(".")[0])
        if layer is not None:
            kinds[key] = words[layer.dynamic]
    return kinds


def _target(name: str) -> str:
    """The target that takes one layer: its name, or a pattern where that would mean more."""
    return f"re:{re.escape(name)}$" if name == "Linear" or name.startswith("re:") else name


def _config(tensors: dict[str, Tensor], layers: dict[str, QuantizedLinear]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    scales = {
        name for name, _, part in (k.rpartition(".") for k in tensors) if part == "weight_scale"
    }
    groups: dict[str, Any] = {}
    for dynamic in (False, True):
        names = [_target(name) for name, layer in layers.items() if layer.dynamic == dynamic]
        if names:
            groups[f"group_{len(groups)}"] = {
                "targets": names,
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    **common,
                    "strategy": "token" if dynamic else "tensor",
                    "dynamic": dynamic,
                },
            }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [_target(name) for name in sorted(scales - layers.keys())],
    }
