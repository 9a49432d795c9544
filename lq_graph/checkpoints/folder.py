"""The files of a checkpoint in a folder, also while another process saves into it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .files import INDEX, CheckpointError, TensorFile, list_folder, placed, read_json, refuse, shown
from .tensors import bit_equal

__all__ = [
    "CheckpointFiles",
    "is_file",
    "old_or_new",
]

_WHOLE = "download the folder again, with the index and all files of one version"
_ONE = "remove the file that is not of this checkpoint"
_CONVERT = "save the weights as safetensors, or pass the folder that has them"
_TRIES = 20  # of a folder that changes while it is read
_PART = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)\.safetensors")  # one file of several
_DIGITS = 6  # of the number of files
_COPY = "copy it from where the other files come from"


class CheckpointFiles:
    """Tensors of one or many safetensors files, read one at a time.

    Args:
        path: a folder, or one file.
        stack: closes the files.
        mapped: whether tensors use a mapping of the files, see `TensorFile`.

    Attributes:
        path: as given.

    Raises:
        CheckpointError: no files, broken files, or an index of other files.
    """

    def __init__(self, path: Path, stack: ExitStack, *, mapped: bool) -> None:
        self.path, self._stamp = path, _stamp(path)
        self._files: list[TensorFile] = []
        # by the name in the model: the file, and the name there
        self._of: dict[str, tuple[TensorFile, str]] = {}
        index, paths = _files_of(path)
        for file in paths:
            opened = TensorFile(file, mapped=mapped)
            stack.callback(opened.close)
            self._files.append(opened)
            for key in opened.entries:
                if key in self._of:
                    refuse(file, key, "one place", f"also in {self._of[key][0].file.name}", _ONE)
                self._of[key] = opened, key
        if index is not None:
            self._check_index(*index)

    def _check_index(self, index: Path, names: dict[str, str]) -> None:
        """Refuse an index of other files, which were in the folder earlier."""
        for key, name in names.items():
            if key not in self._of or self._of[key][0].file.name != name:
                refuse(index, key, f"a tensor in {name}", "no such tensor", _WHOLE)
        for key, (opened, _) in self._of.items():
            if key not in names:
                expected = f"a tensor that {index.name} has"
                refuse(opened.file, key, expected, "no such key there", _WHOLE)
        others = {name for name in list_folder(index.parent) if name.endswith(".safetensors")}
        for name in sorted(others - {opened.file.name for opened in self._files}):
            both = [key for key in _names_in(index.parent / name) if key in names]
            if both:  # files of other tensors, such as consolidated.safetensors, are not read
                refuse(
                    index,
                    None,
                    "no other file with the tensors that it lists",
                    f"{shown(both[0])} in {name} too, which it does not list",
                    f"remove {name}, or, if that is the checkpoint, the index and its files",
                )

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors the names that they have in the model.

        Args:
            names: the new name, by the name in the files.

        Raises:
            CheckpointError: two tensors that differ would have one name.
        """
        renamed: dict[str, tuple[TensorFile, str]] = {}
        for key, place in self._of.items():
            new = names.get(key, key)
            if new not in renamed:
                renamed[new] = place
                continue
            file, other = renamed[new]
            known = place[0].entries[key].dtype is not None
            if not known or not bit_equal(place[0].read(key), file.read(other)):
                expected = f"the values of {other}, which is {new} in the model too"
                todo = "save the weights again, each tensor once"
                refuse(place[0].file, key, expected, "other values", todo)
        self._of = renamed

    def leave_out(self, keys: Iterable[str]) -> None:
        """Forget tensors, which are then not read."""
        for key in keys:
            del self._of[key]

    def __contains__(self, key: str) -> bool:
        return key in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return sum(file.bytes_read for file in self._files)

    def file_of(self, key: str) -> Path:
        """The file a tensor is in."""
        return self._of[key][0].file

    def header(self, key: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """dtype and shape, from the file's header."""
        file, name = self._of[key]
        entry = file.entries[name]
        return entry.dtype, entry.shape

    def sizes(self) -> dict[str, int]:
        """The files, with their sizes in bytes."""
        return {file.file.name: file.size for file in self._files}

    def bytes_of(self, key: str) -> int:
        """The size of a tensor in the file."""
        file, name = self._of[key]
        return file.entries[name].end - file.entries[name].begin

    def name_of(self, key: str) -> str:
        """The name of a tensor in its file."""
        return self._of[key][1]

    def read(self, key: str) -> Tensor:
        """A tensor."""
        file, name = self._of[key]
        return file.read(name)

    def read_part(self, key: str, dim: int, part: int, parts: int) -> Tensor:
        """One of the equal parts of a tensor along a dim; nothing else of it is read."""
        file, name = self._of[key]
        return file.read_part(name, dim, part, parts)

    def check_one_save(self) -> None:
        """Refuse files that were replaced while they were opened, and the JSON was read: some may
        be of another save than others. What is read afterwards is of the files that are open."""
        self.check_unchanged()
        if _stamp(self.path) != self._stamp:
            refuse(
                self.path,
                None,
                "files that stay as they are",
                "others, put there meanwhile",
                "load again",
            )

    def check_unchanged(self) -> None:
        """Refuse files that were changed since they were opened."""
        for file in self._files:
            file.check_unchanged()


def _names_in(file: Path) -> list[str]:
    """Names of the tensors in a file; none if it is not a safetensors file."""
    try:
        opened = TensorFile(file)
    except CheckpointError:
        return []
    opened.close()
    return list(opened.entries)


def is_file(path: Path) -> bool:
    """Whether a path is a file and not a folder; refuses a path that does not exist."""
    try:
        os.listdir(placed(path))
    except NotADirectoryError:
        return True
    except FileNotFoundError:
        refuse(path, None, "a folder or a safetensors file", "nothing", "check the path")
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        refuse(path, None, "a folder or a safetensors file", found, "check that you may read it")
    return False


def _files_of(path: Path) -> tuple[tuple[Path, dict[str, str]] | None, list[Path]]:
    """The index and its contents, or None; and the safetensors files."""
    if is_file(path):
        return None, [path]
    names = list_folder(path)
    indices = [name for name in names if name.endswith(INDEX)]
    if not indices:
        files = [path / name for name in names if name.endswith(".safetensors")]
        if not files:
            refuse(path, None, "a folder with safetensors files", "none", _CONVERT)
        if missing := _missing_part({file.name for file in files}):
            refuse(path, None, f"the file {shown(missing)}", "no such file", _COPY)
        return None, files
    if len(indices) > 1:
        refuse(path, None, "one index", " and ".join(indices), "remove the one of other weights")
    index = path / indices[0]
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        refuse(index, "weight_map", "a map from tensor to file", repr(listed)[:60], _WHOLE)
    for name in set(map(str, listed.values())):
        # a name, not a path: a checkpoint must not read outside its folder
        if name not in listed.values() or Path(name).name != name:
            refuse(index, "weight_map", "names of files in the same folder", repr(name), _WHOLE)
        if name not in names:
            refuse(index, "weight_map", f"the file {shown(name)}", "no such file", _COPY)
    return (index, listed), [path / name for name in sorted(set(listed.values()))]


def _missing_part(names: Collection[str]) -> str:
    """The name of the first file that is missing beside "weights-00001-of-00003.safetensors"; empty
    if none is."""
    for name in names:
        if not (found := _PART.fullmatch(name)) or len(found[3]) > _DIGITS:
            continue
        before, number, of = found[1], found[2], found[3]
        for i in range(1, int(of) + 1):
            part = f"{before}-{i:0{len(number)}}-of-{of}.safetensors"
            if part not in names:
                return part
    return ""


_T = TypeVar("_T")


def old_or_new(path: Path, load: Callable[[], _T]) -> _T:
    """Load the old checkpoint or the new one while another process saves into the folder.

    A load whose files are replaced while it opens them fails. So after an error, if a file of the
    folder has changed meanwhile, the load is tried again.
    """
    tries = 0
    while True:
        before = _stamp(path)
        try:
            return load()
        except CheckpointError:
            tries += 1
            if tries == _TRIES or _stamp(path) == before:
                raise


def _stamp(path: Path) -> list[tuple[object, ...]]:
    """A value that differs after a file of a checkpoint was replaced. A save that is put in place
    changes it once."""
    found: list[tuple[object, ...]] = []
    with suppress(OSError, ValueError, CheckpointError):
        folder = path if os.path.isdir(path) else path.parent
        for name in list_folder(folder):
            if name.endswith((".safetensors", ".json")):
                with suppress(OSError):
                    status = os.stat(placed(folder / name))
                    found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return found
