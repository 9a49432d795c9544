"""How a checkpoint is written: complete under temporary names, then put in place; atomic."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..modules.quantized_linear import QuantizedLinear
from .base import Format
from .files import INDEX, CheckpointError, shown, tensors_header, write_all, write_tensor
from .folder import backup_name, pending_weights, temporary_name
from .formats import FORMATS

__all__ = ["Saved", "write_checkpoint"]


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        tensors: of the file of weights; tied ones once.
        keys: names of all tensors, tied ones too.
        layers: the quantized layers by name.
        floats: names of the linear layers that stay float.
    """

    tensors: dict[str, Tensor]
    keys: list[str]
    layers: dict[str, QuantizedLinear]
    floats: list[str]


def write_checkpoint(folder: Path, format: Format, saved: Saved, pause: Callable[[], None]) -> None:
    """Write the two files of a checkpoint; if a step fails, the folder is unchanged.

    Args:
        folder: created if it does not exist.
        format: of the checkpoint.
        saved: the contents.
        pause: is called where Ctrl-C may be raised.
    """
    weights, about = folder / format.weights_file, folder / format.json_file
    with ExitStack() as undo:
        _make(folder, undo)
        with _locked(folder) as descriptor:
            _finish(folder)
            old = _check_folder(folder, format)
            new = format.json(saved.keys, saved.layers, saved.floats, old)
            with ExitStack() as files:
                order, header = tensors_header(saved.tensors)
                contents: list[bytes | Tensor] = [header, *(saved.tensors[key] for key in order)]
                _write(_temporary(weights), contents, weights, files, pause)
                if new != old:
                    text = json.dumps(new, indent=2).encode()
                    _write(_temporary(about), [text], about, files, pause)
                    was = about.read_bytes() if about.exists() else b""
                    _write(_backup(about), [was], about, files, pause)
                pause()
                _put_in_place(weights, about, files, changes_json=new != old)
            undo.pop_all()
            with suppress(OSError):  # some file systems cannot sync a folder; the files are done
                os.fsync(descriptor)


def _temporary(place: Path) -> Path:
    return place.with_name(temporary_name(place.name))


def _backup(place: Path) -> Path:
    return place.with_name(backup_name(place.name))


def _put_in_place(weights: Path, about: Path, files: ExitStack, *, changes_json: bool) -> None:
    """Give the complete files their final names; Ctrl-C waits.

    The JSON comes first. load_checkpoint also finds the weights under their temporary name, so the
    new checkpoint is valid after the first step.
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
                os.replace(_backup(about), about)
            else:
                os.unlink(about)
        except OSError:
            files.pop_all()  # keep the files: the checkpoint is complete with them
            raise CheckpointError(
                f"save_checkpoint: {shown(weights, 4096)}: {error.strerror}, and {about.name} "
                f"could not be restored. The new weights are in {_temporary(weights).name}, "
                "where load_checkpoint finds them. What to do: save again when the disk works."
            ) from error
        raise


def _finish(folder: Path) -> None:
    """Complete the save of a process that was killed, if its JSON is in place; otherwise only
    remove its temporary files."""
    if (pending := pending_weights(folder)) is not None:
        files = (format.weights_file for format in FORMATS.values())
        name = next(name for name in files if temporary_name(name) == pending.name)
        os.replace(pending, folder / name)
    for format in FORMATS.values():
        weights, about = folder / format.weights_file, folder / format.json_file
        # the backup first: without it no weights are pending, should this process be killed too
        for path in (_backup(about), _temporary(weights), _temporary(about)):
            _quietly(os.unlink, path)


def _make(folder: Path, undo: ExitStack) -> None:
    """Create a folder and its parents; the stack removes them."""
    absent = []
    while not folder.exists():
        absent.append(folder)
        folder = folder.parent
    for path in reversed(absent):
        os.mkdir(path)
        undo.callback(_quietly, os.rmdir, path)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The folder, open and locked against another save."""
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
            pass  # a file system without locks
        yield descriptor
    finally:
        os.close(descriptor)


def _check_folder(folder: Path, format: Format) -> dict[str, Any]:
    """Refuse a folder with other files that load_checkpoint would read with the new files, or
    instead of them. Returns the part of the folder's JSON that stays."""
    names = sorted(os.listdir(folder))
    own = (format.weights_file, format.json_file)
    for name in names:
        is_weights = name.endswith((".safetensors", INDEX))
        describes = any(other.describes_weights(name) for other in FORMATS.values())
        if (is_weights or describes) and name not in own:
            what = f"holds {shown(name)}, of another checkpoint"
        elif name in own and not (folder / name).is_file():
            what = f"has something named {name} that is no file"
        else:
            continue
        raise CheckpointError(
            f"save_checkpoint: {shown(folder, 4096)} {what}; load_checkpoint would not load "
            "what is saved beside it. What to do: save into an empty folder, or remove that first."
        )
    return format.json_to_keep(folder, names)


def _write(
    path: Path,
    contents: list[bytes | Tensor],
    place: Path,
    files: ExitStack,
    pause: Callable[[], None],
) -> None:
    """Write bytes and tensors to a new file, and sync it.

    Args:
        path: of the new file, which the stack removes.
        contents: in their order.
        place: of the file that it will replace, whose permissions it gets.
        files: the stack.
        pause: is called where Ctrl-C may be raised.
    """
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
