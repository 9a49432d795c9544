"""All or nothing, load_checkpoint and save_checkpoint: a fault or Ctrl-C at any point, and model or
folder are bit-equal to before, or complete."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lq_graph import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from lq_graph.checkpoints import write
from lq_graph.checkpoints.formats import FORMATS as FILE_FORMATS
from support.checkpoints import FORMATS, model, quantized
from support.injection import (
    STRIKES,
    folder_state,
    model_state,
    modes,
    points,
    rehearse,
)
from support.processes import script

TRIALS = 200


def changed(after: object, before: object) -> str:
    """The first thing of a state that is not as before."""
    assert isinstance(after, dict) and isinstance(before, dict)
    return next((k for k in {**before, **after} if after.get(k) != before.get(k)), "")


@pytest.fixture(params=FORMATS)
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """A format, and two folders with checkpoints that differ in everything."""
    kind = request.param
    old, new = tmp_path / "old", tmp_path / "new"
    save_checkpoint(quantized(1, FORMATS[kind][0], "up"), old, kind)
    save_checkpoint(quantized(2, FORMATS[kind][1]), new, kind)
    return kind, old, new


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", STRIKES)
def test_load(name, device, checkpoints, tally) -> None:
    strike, error = STRIKES[name]
    folder = checkpoints[2]
    target = model(3, device)
    count = rehearse(strike, lambda: load_checkpoint(target, folder))
    whole, ends = model_state(target), Counter()
    extra = target.norm.state.tolist()
    assert extra == [2.0, 2.0]
    for at in points(count, TRIALS):
        target = model(3, device)
        before, set_before = model_state(target), modes()
        with strike(at) as events:
            try:
                load_checkpoint(target, folder)
                raised = False
            except error:
                raised = True
        after = model_state(target)
        done = after == whole
        assert done or after == before, (at, changed(after, before))
        assert modes() == set_before, at
        assert target.norm.state.tolist() == (extra if done else [3.0, 3.0]), at
        # Ctrl-C is never lost; what the system refuses may be asked for again
        assert raised or not events.struck or name == "os_fault", at
        ends[f"load: {name}, {'complete' if done else 'as before'}"] += 1
    for end, times in ends.items():
        tally(end, times)


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["over another", "into nothing"])
@pytest.mark.parametrize("name", STRIKES)
def test_save(name, there, checkpoints, tmp_path, tally) -> None:
    strike, error = STRIKES[name]
    kind, old, _ = checkpoints
    folder, source, ends = tmp_path / "made" / "folder", quantized(2, FORMATS[kind][1]), Counter()

    def prepare() -> dict[str, bytes | None]:
        shutil.rmtree(folder.parent, ignore_errors=True)
        if there:
            shutil.copytree(old, folder)
            if kind == "msmodelslim":
                (folder / "config.json").write_text("{}")
        return folder_state(tmp_path)

    prepare()
    count = rehearse(strike, lambda: save_checkpoint(source, folder, kind))
    whole = folder_state(tmp_path)
    for at in points(count, TRIALS):
        before, set_before = prepare(), modes()
        with strike(at) as events:
            try:
                save_checkpoint(source, folder, kind)
                raised = False
            except error:
                raised = True
        after = folder_state(tmp_path)
        done = after == whole
        assert done or after == before, (at, changed(after, before))
        assert modes() == set_before, at
        assert raised or not events.struck or (name == "os_fault" and done), at
        assert done or raised, at
        ends[f"save: {name}, {'complete' if done else 'as before'}"] += 1
    for end, times in ends.items():
        tally(end, times)


@pytest.mark.parametrize("shards", ["5GB", "600B"], ids=["one file", "shards"])
def test_a_disk_that_fails_for_good_after_the_first_step(shards, checkpoints) -> None:
    kind, old, new = checkpoints
    source = quantized(2, FORMATS[kind][1])
    real, calls = os.replace, []

    def replace(*args: object) -> None:
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(*args)

    def unlink(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "unlink", unlink)
        with pytest.raises(CheckpointError, match=r"load_checkpoint finds it.* do: save again"):
            save_checkpoint(source, old, kind, max_shard_size=shards)
    found, want = model(3), model(3)
    load_checkpoint(found, old)
    load_checkpoint(want, new)
    assert model_state(found) == model_state(want)
    save_checkpoint(source, old, kind)  # ends what was begun, and cleans up
    assert folder_state(old) == folder_state(new)


def killed_at(step: int, call: Callable[[], None]) -> bool:
    """Call a function in a child that is killed before a step that changes a folder. Returns
    whether it ended before."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WEXITSTATUS(status) in (0, 9), status
        return os.WEXITSTATUS(status) == 0
    torch.set_num_threads(1)
    left = [step]

    def stops(real: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: object) -> None:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            real(*args)

        return counted

    os.replace, os.unlink = stops(os.replace), stops(os.unlink)  # type: ignore[assignment]
    with contextlib.suppress(BaseException):
        call()
        os._exit(0)
    os._exit(1)


def complete(folder: Path, kind: str) -> bool:
    """Whether another program finds a checkpoint: the JSON, and the files that it leads to."""
    names = {path.name for path in folder.iterdir()}
    indices = [name for name in names if name.endswith("safetensors.index.json")]
    files = {
        name
        for index in indices
        for name in json.loads((folder / index).read_text())["weight_map"].values()
    }
    found = {name for name in names if name.endswith(".safetensors")}
    return FILE_FORMATS[kind].json_file in names and bool(found) and files <= found


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [("5GB", "5GB"), ("1kB", "1500B")], ids=str)
def test_killed_at_any_step_and_again_while_the_next_save_cleans_up(
    sizes, checkpoints, tmp_path, tally
) -> None:
    kind = checkpoints[0]
    first, second = quantized(1, FORMATS[kind][0], "up"), quantized(2, FORMATS[kind][1])

    def loaded(folder: Path) -> object:
        found = model(3)
        load_checkpoint(found, folder)
        return model_state(found)

    states: list[object] = []
    for source, size in zip((first, second), sizes, strict=True):
        save_checkpoint(source, tmp_path / f"{len(states)}", kind, max_shard_size=size)
        states.append(loaded(tmp_path / f"{len(states)}"))
    ended, kills, seen = False, 0, set()
    folder = tmp_path / "killed"

    def save() -> None:
        save_checkpoint(second, folder, kind, max_shard_size=sizes[1])

    for step in itertools.count():
        for again in (step % 5, None):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "0", folder)
            ended = killed_at(step, save)
            if again is not None:
                killed_at(again, lambda: write._finish(folder))
            kills += not ended
            at = states.index(loaded(folder))
            seen.add(at)
            if complete(folder, kind):  # another program finds what load_checkpoint finds, or none
                copied = tmp_path / "copied"
                shutil.rmtree(copied, ignore_errors=True)
                hidden = shutil.ignore_patterns(".*")
                shutil.copytree(folder, copied, ignore=hidden)
                assert loaded(copied) in states, (step, again)
            write._finish(folder)
            assert loaded(folder) == states[at], (step, again)
            assert folder_state(folder) == folder_state(tmp_path / f"{at}"), (step, again)
        if ended:
            break
    assert seen == {0, 1} and step >= 5
    tally("saves that were killed", kills)


@pytest.mark.slow
def test_a_reader_finds_the_old_or_the_new(tmp_path, tally) -> None:
    wanted = {}
    for kind, (config, other) in FORMATS.items():
        folder = tmp_path / kind
        for made in (quantized(2, other), quantized(1, config, "up")):
            save_checkpoint(made, folder, kind)
            found = model(3)
            load_checkpoint(found, folder)
            wanted.setdefault(kind, []).append(model_state(found))
    command = [sys.executable, *script(f"saves_for_ever.py {tmp_path}")]
    saver = subprocess.Popen(command, stdout=subprocess.PIPE)
    seen: Counter[tuple[str, int]] = Counter()

    def read() -> None:
        for kind, states in wanted.items():
            found = model(3)
            load_checkpoint(found, tmp_path / kind)
            seen[kind, states.index(model_state(found))] += 1

    try:
        assert saver.stdout is not None
        assert saver.stdout.readline() == b"ready\n"
        end = time.monotonic() + 3
        while time.monotonic() < end:
            read()
        saver.send_signal(signal.SIGKILL)  # wherever it is
    finally:
        saver.kill()
        saver.communicate()
    assert len(seen) == 4
    read()
    tally("loads while another process saves", seen.total())
    for kind, (_, config) in FORMATS.items():  # cleans up after the one that was killed
        save_checkpoint(quantized(2, config), tmp_path / kind, kind)
        save_checkpoint(quantized(2, config), tmp_path / "new" / kind, kind)
        assert folder_state(tmp_path / kind) == folder_state(tmp_path / "new" / kind)
