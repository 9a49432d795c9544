"""How a checkpoint is written: complete under temporary names, then put in place; atomic.

1. Each file is written under its temporary name and synced.
2. A list of the files is put into the folder (COMMITTED, in files.py). From here on
   load_checkpoint reads the new checkpoint.
3. The old files are moved away, the JSON first, and the new ones are put in place, the JSON last.
   So other programs find the old checkpoint, none, or the new one, and never files of both.
4. The list is removed, and then the old files.

If a step fails, the steps are undone in reverse. A process that is killed leaves the folder as the
list says, and the next save completes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..modules.quantized_linear import QuantizedLinear
from .base import Format
from .files import (
    COMMITTED,
    INDEX,
    CheckpointError,
    committed,
    shown,
    temporary,
)
from .formats import FORMATS
from .json_files import small_files
from .shards import index_of, shards_of
from .tensor_writing import tensors_header, write_all, write_tensor

__all__ = ["Saved", "write_checkpoint"]

_Contents = list[bytes | Tensor]
# temporary files and backups of a save that was killed
_LEFT_OVER = re.compile(r"\..+\.(safetensors|json|txt|jinja|model|tiktoken|py)\.(saving|before)")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        tensors: of the files of weights; tied ones once.
        keys: names of all tensors, tied ones too.
        layers: the quantized layers by name.
        floats: names of the linear layers that stay float.
        config: of the model, without the quantization; {} for none.
        beside: the contents of other files, by name.
        may_differ: names of these that stay as they are in a folder.
        shard_size: bytes of a file of weights at most.
    """

    tensors: dict[str, Tensor]
    keys: list[str]
    layers: dict[str, QuantizedLinear]
    floats: list[str]
    config: dict[str, Any]
    beside: dict[str, bytes]
    may_differ: frozenset[str]
    shard_size: int


def write_checkpoint(folder: Path, format: Format, saved: Saved, pause: Callable[[], None]) -> None:
    """Write the files of a checkpoint; if a step fails, the folder is unchanged.

    Args:
        folder: created if it does not exist.
        format: of the checkpoint.
        saved: the contents.
        pause: is called where Ctrl-C may be raised.
    """
    with ExitStack() as undo:
        _make(folder, undo)
        with _locked(folder) as descriptor:
            _finish(folder)
            names = sorted(os.listdir(folder))
            new = _files(folder, names, format, saved)
            stale = [name for name in names if format.is_weights(name) and name not in new]
            with ExitStack() as files:
                for name, contents in new.items():
                    _write(temporary(folder / name), contents, folder / name, files, pause)
                listed = json.dumps({"new": list(new), "old": stale}).encode()
                commit = folder / COMMITTED
                _write(temporary(commit), [listed], commit, files, pause)
                pause()
                _put_in_place(folder, list(new), stale, files)
            undo.pop_all()
            with suppress(OSError):  # some file systems cannot sync a folder; the files are done
                os.fsync(descriptor)


def _files(folder: Path, names: list[str], format: Format, saved: Saved) -> dict[str, _Contents]:
    """The files to write, by name; the JSON that describes the weights comes last."""
    _check_folder(folder, names, format)
    described = small_files(folder, names, format, saved)
    new: dict[str, _Contents] = {}
    shards = shards_of(saved.tensors, saved.shard_size, format.stem)
    for name, tensors in shards.items():
        order, header = tensors_header(tensors)
        new[name] = [header, *(tensors[key] for key in order)]
    if len(shards) > 1:
        new[f"{format.stem}{INDEX}"] = [index_of(shards)]
    return {**new, **{name: [text] for name, text in described.items()}}


def _backup(place: Path) -> Path:
    """Where an old file is until the save is done."""
    return place.with_name(f".{place.name}.before")


def _put_in_place(folder: Path, new: list[str], stale: list[str], files: ExitStack) -> None:
    """Give the complete files their final names; Ctrl-C waits."""
    places = [folder / name for name in new]
    old = [path for path in (*reversed(places), *map(folder.joinpath, stale)) if is_there(path)]
    moves = [(path, _backup(path)) for path in old] + [(temporary(p), p) for p in places]
    commit = folder / COMMITTED
    os.replace(temporary(commit), commit)
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
        os.unlink(commit)
    except OSError as error:
        try:
            for source, target in reversed(done):
                os.replace(target, source)
            os.unlink(commit)
        except OSError:
            files.pop_all()  # keep the files: the checkpoint is complete with them
            raise CheckpointError(
                f"save_checkpoint: {shown(folder, 4096)}: {error.strerror}, and the old files "
                "could not be put back. The new checkpoint is complete, and load_checkpoint finds "
                "it; other programs do not. What to do: save again when the disk works."
            ) from error
        raise
    for path in old:
        _quietly(os.unlink, _backup(path))


def is_there(path: Path) -> bool:
    """Whether there is a file of this name, or a link."""
    return os.path.lexists(path)


def _finish(folder: Path) -> None:
    """Complete the save of a process that was killed, if its files were complete; otherwise only
    remove its temporary files."""
    save = committed(folder)
    if COMMITTED in os.listdir(folder):
        for name in (*reversed(save.new), *save.old):
            if name in save.old or is_there(temporary(folder / name)):
                _quietly(os.unlink, folder / name)
        for name in save.new:
            if is_there(temporary(folder / name)):
                os.replace(temporary(folder / name), folder / name)
        os.unlink(folder / COMMITTED)
    for name in os.listdir(folder):
        if _LEFT_OVER.fullmatch(name):
            _quietly(os.unlink, folder / name)


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


def _check_folder(folder: Path, names: list[str], format: Format) -> None:
    """Refuse a folder with other files that load_checkpoint, or another program, would read with
    the new files, or instead of them."""
    own = format.is_in(folder, names)
    for name in names:
        weights = format.is_weights(name)
        others = name.endswith((".safetensors", INDEX)) and not weights
        describes = any(other.describes_weights(name) for other in FORMATS.values())
        if (weights or name == format.json_file) and not (folder / name).is_file():
            what = f"has something named {name} that is no file"
        elif (weights and not own) or others or (describes and name != format.json_file):
            what = f"holds {shown(name)}, of another checkpoint"
        else:
            continue
        raise CheckpointError(
            f"save_checkpoint: {shown(folder, 4096)} {what}; load_checkpoint would not load "
            "what is saved beside it. What to do: save into an empty folder, or remove that first."
        )


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
