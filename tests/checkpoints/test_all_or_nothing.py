"""All or nothing, load_checkpoint and save_checkpoint: a fault or Ctrl-C at any point, and model or
folder are bit-equal to before, or complete."""

from __future__ import annotations

import errno
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

from lq_graph import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from lq_graph.checkpoints import write
from lq_graph.checkpoints.folder import backup_name, temporary_name
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


def test_a_disk_that_fails_for_good_between_the_two_files(checkpoints, tmp_path) -> None:
    kind, old, new = checkpoints
    source = quantized(2, FORMATS[kind][1])
    real, calls = os.replace, []

    def replace(*args: object) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(CheckpointError, match=r"The new weights are in \.\w+\.safe.* again"):
            save_checkpoint(source, old, kind)
    found, want = model(3), model(3)
    load_checkpoint(found, old)
    load_checkpoint(want, new)
    assert model_state(found) == model_state(want)
    save_checkpoint(source, old, kind)  # ends what was begun, and cleans up
    assert folder_state(old) == folder_state(new)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("in_place", [False, True], ids=["before the JSON", "after the JSON"])
def test_killed_while_it_cleans_up_after_one_that_was_killed(
    in_place, checkpoints, tmp_path
) -> None:
    kind, old, new = checkpoints
    weights, about = FILE_FORMATS[kind].weights_file, FILE_FORMATS[kind].json_file
    found, want = model(3), model(3)
    load_checkpoint(want, new if in_place else old)
    for steps in range(10):
        folder = tmp_path / str(steps)
        shutil.copytree(old, folder)
        shutil.copy(new / weights, folder / temporary_name(weights))
        shutil.copy(new / about, folder / temporary_name(about))
        shutil.copy(old / about, folder / backup_name(about))
        if in_place:
            os.replace(folder / temporary_name(about), folder / about)
        left = [steps]

        def stops(real: Callable[..., None], left: list[int] = left) -> Callable[..., None]:
            def call(*args: object) -> None:
                if left[0] == 0:
                    raise Killed
                real(*args)
                left[0] -= os.path.lexists(str(args[0])) is False

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", stops(os.unlink))
            patch.setattr(os, "replace", stops(os.replace))
            try:
                write._finish(folder)
                ended = True
            except Killed:
                ended = False
        load_checkpoint(found, folder)
        assert model_state(found) == model_state(want), steps
        if ended:
            assert {path.name for path in folder.iterdir()} == {weights, about}
            break
    assert ended and steps >= 2


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
