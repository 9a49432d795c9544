"""One file of a checkpoint, read: JSON, or safetensors.

Only regular files are read, and JSON only up to a size and a depth. Reading and writing use plain
system calls and not mapped memory: an error of the disk is an exception and not a signal, and each
tensor has its own memory. Every problem with a file is a CheckpointError.

While save_checkpoint puts new files in place, a folder has a list of them (COMMITTED): the new ones
may still have their temporary names, and old ones may still be there. Names and paths are those
after the save, and `placed` says where a file is now.

Source: safetensors' README (huggingface/safetensors), section Format: eight bytes of length, a
JSON header of at most 100 MB, and the tensors end to end.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import LinearQuantValueError

__all__ = [
    "CHUNK",
    "COMMITTED",
    "CONFIG",
    "DTYPES",
    "INDEX",
    "MAX_NAME",
    "CheckpointError",
    "Committed",
    "Entry",
    "Refusals",
    "TensorFile",
    "bytes_of",
    "check_model",
    "committed",
    "expanded",
    "list_folder",
    "placed",
    "read_json",
    "refuse",
    "shown",
    "temporary",
]

CONFIG = "config.json"  # of the model, as transformers writes it
INDEX = ".safetensors.index.json"  # how the name of an index ends
COMMITTED = ".save_checkpoint.json"  # the list of a save that is being put in place
MAX_JSON = 100_000_000  # bytes, safetensors' own limit
MAX_DEPTH = 50  # of objects in objects; a model's configuration has some five
MAX_NAME = 1000  # characters of a tensor's name
_MAX_DIMS = 64
_AGAIN = "copy or download the file again"
_READABLE = "check the path, and that you may read it"
_LOAD_LATER = "load again when nothing writes to it"
CHUNK = 1 << 24  # bytes for each call, so that Ctrl-C does not wait for gigabytes

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class CheckpointError(LinearQuantValueError):
    """A checkpoint that cannot be loaded or written. The text names the file, the key, what was
    expected and what was found. The model, or the folder, is unchanged."""


def shown(text: object, limit: int = 200) -> str:
    """Text from a file, printable and of limited length."""
    text = str(text)
    if not text.isprintable():
        text = ascii(text)
    return text if len(text) <= limit else f"{text[:limit]}..."


def expanded(path: str | Path) -> Path:
    """A path, with the home folder in place of a ~ at its beginning."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:  # there is no user of that name: ~ is part of the file's name
        return path


def refuse(file: Path, key: str | None, expected: str, found: str, todo: str) -> NoReturn:
    """Raise a CheckpointError, which ends with what to do."""
    where = shown(file, 4096) + (f": {shown(key)}" if key else "")
    text = f"{where}: expected {expected}, found {shown(found)}."
    raise CheckpointError(f"{text} What to do: {todo}.")


class Refusals:
    """What is refused: the first refusal is raised; or all are collected, to be told together.

    Args:
        collected: a list that gets all refusals; None to raise the first.
    """

    def __init__(self, collected: list[CheckpointError] | None = None) -> None:
        self._collected = collected

    @contextmanager
    def each(self) -> Iterator[None]:
        """A block that may refuse; if refusals are collected, the program goes on after it."""
        try:
            yield
        except CheckpointError as error:
            if self._collected is None:
                raise
            self._collected.append(error)


def list_folder(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted."""
    try:
        names = set(os.listdir(folder))
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        refuse(folder, None, "a folder", found, "pass a folder that you may read")
    if COMMITTED in names:
        save = committed(folder)
        names = (names - {COMMITTED, *save.old}) | set(save.new)
    return sorted(names)


def check_model(function: str, model: object) -> None:
    """Refuse a model that is not a module."""
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{function}: model is a {type(model).__name__}, not an nn.Module. What to do: pass "
            "the model first, then the path."
        )


# ---- a save that is being put in place ----


class Committed(NamedTuple):
    """The files of a save that is being put in place.

    Attributes:
        new: names of its files; the one that describes the others is the last.
        old: names of the files that it removes.
    """

    new: tuple[str, ...] = ()
    old: tuple[str, ...] = ()


def temporary(place: Path) -> Path:
    """Where a file is written, until it replaces the file of that name."""
    return place.with_name(f".{place.name}.saving")


def committed(folder: Path) -> Committed:
    """The save that is being put in place in a folder; no names if there is none."""
    file = folder / COMMITTED
    try:
        stream, (size, _) = _open_now(file)
    except FileNotFoundError:
        return Committed()
    except (OSError, ValueError):
        return Committed()  # the folder itself is the problem
    with stream:
        data = bytearray(min(size, MAX_JSON))
        _fill(stream, file, data, 0)
    todo = "remove it, if you did not save into the folder"
    try:
        found = _parse(data)
    except _NotJsonError as error:
        refuse(file, None, error.expected, error.found, todo)
    return Committed(*(_file_names(file, found.get(key), todo) for key in ("new", "old")))


def _file_names(file: Path, names: object, todo: str) -> tuple[str, ...]:
    """A list of names in JSON. Not paths: nothing outside the folder is read or written."""
    found = [name for name in names if _is_file_name(name)] if isinstance(names, list) else []
    if not isinstance(names, list) or len(found) != len(names):
        refuse(file, None, "lists of names of files", repr(names)[:60], todo)
    return tuple(found)


def _is_file_name(name: object) -> TypeGuard[str]:
    plain = isinstance(name, str) and name not in ("", "..") and "\0" not in name
    return plain and Path(str(name)).name == name


def placed(path: Path) -> Path:
    """Where a file is now."""
    if path.name in committed(path.parent).new and os.path.lexists(temporary(path)):
        return temporary(path)
    return path


# ---- reading ----


def _nonblocking(path: str, flags: int) -> int:
    # otherwise opening a FIFO would wait for a writer
    return os.open(path, flags | os.O_NONBLOCK)


def _open_now(file: Path) -> tuple[FileIO, tuple[int, int]]:
    """Open a regular file of this name. Returns it, with its size and its time of modification."""
    stream = FileIO(os.fspath(file), "rb", opener=_nonblocking)
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
        stream.close()
        raise ValueError("no regular file")
    return stream, (status.st_size, status.st_mtime_ns)


def _open(file: Path, expected: str) -> tuple[FileIO, tuple[int, int]]:
    """Open a regular file. Returns it, with its size and its time of modification."""
    try:
        try:
            return _open_now(placed(file))
        except FileNotFoundError:  # it was put in place meanwhile
            return _open_now(file)
    except OSError as error:
        refuse(file, None, expected, error.strerror or str(error), _READABLE)
    except ValueError as error:  # also a name that no file can have
        refuse(file, None, expected, str(error), _READABLE)


def _fill(stream: FileIO, file: Path, buffer: Any, offset: int) -> None:
    """Fill a buffer from a file; refuse a file that is too short."""
    view = memoryview(buffer).cast("B")
    while view:
        try:
            count = os.preadv(stream.fileno(), [view[:CHUNK]], offset)
        except OSError as error:
            refuse(file, None, "a file that can be read", error.strerror or str(error), _AGAIN)
        if not count:
            found = "its end: something shortened it during the read"
            refuse(file, None, "a whole file", found, _LOAD_LATER)
        view, offset = view[count:], offset + count


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: not a regular file with one object; more than 100 MB or 50 levels; a
            repeated key.
    """
    stream, (size, _) = _open(file, "a JSON object")
    with stream:
        if size > MAX_JSON:
            refuse(file, None, f"a JSON object of at most {MAX_JSON:,} bytes", f"{size:,}", _AGAIN)
        data = bytearray(size)
        _fill(stream, file, data, 0)
    try:
        return _parse(data)
    except _NotJsonError as error:
        refuse(file, None, error.expected, error.found, _AGAIN)


class _NotJsonError(Exception):
    """Data that is no JSON object."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


def _parse(data: bytes | bytearray) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_int)
    except (ValueError, RecursionError) as error:
        raise _NotJsonError("a JSON object", str(error)) from None
    if not isinstance(value, dict):
        raise _NotJsonError("a JSON object", type(value).__name__)
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
    if level:
        raise _NotJsonError(f"a JSON object of at most {MAX_DEPTH} levels", "more")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} twice")
    return found


def _int(digits: str) -> int:
    if len(digits) > 20:  # more than 64 bits can hold; long numbers take quadratic time
        raise ValueError(f"the number {shown(digits, 20)}")
    return int(digits)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: None for a dtype that torch does not have.
        shape: of the tensor.
        begin, end: of its bytes in the file.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, open.

    Args:
        file: its path.
        mapped: whether tensors use a private mapping of the file: writing to a tensor does not
            change the file. Otherwise they have their own memory.

    Attributes:
        entries: the tensors that the header lists, by name.
        bytes_read: bytes of tensors that were read so far.

    Raises:
        CheckpointError: it is not a safetensors file, or is cut off.
    """

    def __init__(self, file: Path, *, mapped: bool = False) -> None:
        self.file, self.bytes_read = file, 0
        self._stream, self._stamp = _open(file, "a safetensors file")
        self.entries = self._header()
        self._map: mmap.mmap | None = None
        if mapped:
            try:
                self._map = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                refuse(file, None, "a file that can be mapped", str(error), "leave mmap=False")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._stamp[0]

    def close(self) -> None:
        """Close the file; mapped tensors stay valid."""
        self._stream.close()

    def check_unchanged(self) -> None:
        """Refuse a file that was changed since it was opened."""
        try:
            status = os.fstat(self._stream.fileno())
        except OSError as error:
            refuse(self.file, None, "a file that can be read", error.strerror or str(error), _AGAIN)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            found = "it was written to meanwhile"
            refuse(self.file, None, "a file that stays as it is", found, _LOAD_LATER)

    def _header(self) -> dict[str, Entry]:
        size = self._stamp[0]

        def broken(what: str) -> NoReturn:
            refuse(self.file, None, "a safetensors file", what, _AGAIN)

        length = bytearray(8)
        if size < 8:
            broken(f"{size} bytes")
        _fill(self._stream, self.file, length, 0)
        end = 8 + int.from_bytes(length, "little")
        if end > size or end > MAX_JSON:
            broken(f"a header of {end - 8:,} bytes in a file of {size:,}")
        text = bytearray(end - 8)
        _fill(self._stream, self.file, text, 8)
        try:
            header = _parse(text)
        except _NotJsonError as error:
            broken(f"a header that is not valid: {error}")
        about = header.pop("__metadata__", None)
        if about is not None and not (
            isinstance(about, dict) and all(isinstance(v, str) for v in about.values())
        ):
            broken("__metadata__ that is not an object of strings")
        entries = {}
        for key, given in header.items():
            entry = _entry(given, end)
            if entry is None or len(key) > MAX_NAME:
                broken(f"{shown(key)}: {shown(given)}")
            entries[key] = entry
        place = end
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != place:
                broken(f"{shown(key)}, which does not begin where the one before it ends")
            place = entry.end
        if place != size:
            broken(f"{size:,} bytes where the header says {place:,}")
        return entries

    def read(self, key: str) -> Tensor:
        """A tensor."""
        entry = self.entries[key]
        return self._rows(entry, entry.begin, entry.shape)

    def read_part(self, key: str, dim: int, part: int, parts: int) -> Tensor:
        """One of the equal parts of a tensor along a dim; nothing else of it is read."""
        entry = self.entries[key]
        shape = list(entry.shape)
        shape[dim] //= parts
        assert entry.dtype is not None
        run = prod(shape[dim:])  # values that are adjacent in the file
        skip = prod(entry.shape[dim:])
        begin = entry.begin + part * run * entry.dtype.itemsize
        rows = [
            self._rows(entry, begin + i * skip * entry.dtype.itemsize, (run,))
            for i in range(prod(shape[:dim]))
        ]
        return torch.cat(rows).reshape(shape) if len(rows) > 1 else rows[0].reshape(shape)

    def _rows(self, entry: Entry, begin: int, shape: tuple[int, ...]) -> Tensor:
        dtype = entry.dtype
        assert dtype is not None
        count = prod(shape)
        self.bytes_read += count * dtype.itemsize
        if count and self._map is not None and begin % dtype.itemsize == 0:
            tensor = torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(shape)
        else:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            _fill(self._stream, self.file, bytes_of(tensor), begin)
        if dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            refuse(self.file, None, "0 and 1 for a bool", "other bytes", _AGAIN)
        return tensor


def _entry(given: object, offset: int) -> Entry | None:
    """The header's entry for a tensor; None if it is invalid."""
    if not isinstance(given, dict):
        return None
    name, shape, place = given.get("dtype"), given.get("shape"), given.get("data_offsets")
    if not isinstance(name, str) or not _are_sizes(shape) or not _are_sizes(place):
        return None
    dtype = DTYPES.get(name)
    if len(place) != 2 or place[0] > place[1] or len(shape) > _MAX_DIMS:
        return None
    if dtype is not None and prod(shape) * dtype.itemsize != place[1] - place[0]:
        return None
    return Entry(dtype, tuple(shape), offset + place[0], offset + place[1])


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor."""
    if not tensor.numel():
        return bytearray()
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
