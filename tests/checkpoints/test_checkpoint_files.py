"""Files that are broken, hostile or no files: a CheckpointError each, soon, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lq_graph
from lq_graph import A8W8Dynamic, A8W8Static, CheckpointError, load_checkpoint, save_checkpoint
from lq_graph.checkpoints.files import read_json
from lq_graph.checkpoints.patterns import Pattern, PatternError, Text, Work
from support.injection import model_state
from support.mutations import deep, header_of, loads, mutated, put_header, spoiled

F16 = torch.float16
WEIGHTS = {
    "msmodelslim": "quant_model_weights.safetensors",
    "compressed-tensors": "model.safetensors",
}
ABOUT = {"msmodelslim": "quant_model_description.json", "compressed-tensors": "config.json"}
MUTATIONS = 400  # of each format


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).half()


@pytest.fixture(params=WEIGHTS)
def good(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A format, and a folder with a checkpoint of it: static with an index, or dynamic."""
    kind = request.param
    made, folder = model(), tmp_path / "good"
    static = kind == "msmodelslim"
    config = A8W8Static(int8_between=False) if static else A8W8Dynamic()
    batches = [torch.randn(4, 8).half()] if static else None
    lq_graph.quantize(made, config, batches, filter_fn=lambda _, name: name == "0")
    save_checkpoint(made, folder, kind)
    if static:
        keys = [key for key, _ in header_of(folder / WEIGHTS[kind])[0].items() if key[0] != "_"]
        index = {"weight_map": dict.fromkeys(keys, WEIGHTS[kind])}
        (folder / f"{WEIGHTS[kind]}.index.json").write_text(json.dumps(index))
    else:
        about = json.loads((folder / ABOUT[kind]).read_text())
        about["quantization_config"]["ignore"] = ["re:.*lm_head", "re:layers\\.(0|1)\\..*"]
        (folder / ABOUT[kind]).write_text(json.dumps(about))
    load_checkpoint(model(), folder)
    return kind, folder


# ---- one by one ----


JSON = {
    "empty": b"",
    "not utf-8": b'{"\xff": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "deep objects": deep(100_000).encode(),
    "a little deep": deep(60).encode(),
    "deep lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "key twice": b'{"a": 1, "a": 2}',
    "long number": b'{"a": ' + b"9" * 5_000_000 + b"}",
    "a string": b'"a"',
    "nothing": b"null",
    "cut off": b'{"a": "b',
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_json_that_is_refused(content, good) -> None:
    kind, folder = good
    for name in [path.name for path in folder.iterdir() if path.suffix == ".json"]:
        file = folder / name
        kept = file.read_bytes()
        file.write_bytes(content)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"{name}: expected a JSON object"):
            load_checkpoint(model(), folder)
        assert time.monotonic() - start < 5
        file.write_bytes(kept)
    weights = folder / WEIGHTS[kind]
    put_header(weights, content, header_of(weights)[1])
    with pytest.raises(CheckpointError, match="expected a safetensors file, found a header"):
        load_checkpoint(model(), folder)


def test_json_is_bounded(tmp_path) -> None:
    file = tmp_path / "large.json"
    with file.open("wb") as stream:
        stream.truncate(100_000_001)
    with pytest.raises(CheckpointError, match="at most 100,000,000 bytes, found 100,000,001"):
        read_json(file)


def fifo(place: Path) -> None:
    os.mkfifo(place)


def device(place: Path) -> None:
    place.symlink_to("/dev/zero")


def loop(place: Path) -> None:
    place.symlink_to(place.name)


def listening(place: Path) -> None:
    here = os.getcwd()
    os.chdir(place.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(place.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "fifo": fifo,
    "device": device,
    "folder": Path.mkdir,
    "loop": loop,
    "socket": listening,
    "dangling": lambda place: place.symlink_to("nowhere"),
    "endless": lambda place: place.symlink_to("/proc/self/pagemap"),
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_regular_files_only(make, good) -> None:
    kind, folder = good
    for path in list(folder.iterdir()):
        kept = path.rename(folder.parent / "kept")
        make(path)
        target = model()
        before = model_state(target)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"{path.name}: expected"):
            load_checkpoint(target, folder)
        assert time.monotonic() - start < 5 and model_state(target) == before
        with pytest.raises(CheckpointError):
            load_checkpoint(target, path)
        path.rmdir() if make is Path.mkdir else path.unlink()
        kept.rename(path)
    load_checkpoint(model(), folder / WEIGHTS[kind])


PATHS = ["a\0b", "x" * 5000, "\ud800", "/proc/self/mem/x", "", ".", 3, None, b"x"]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_paths_that_are_none(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        load_checkpoint(model(), path)
    made = model()
    lq_graph.quantize(made, A8W8Dynamic())
    if path not in ("", "."):
        with pytest.raises(CheckpointError):
            save_checkpoint(made, path)
    assert not list(tmp_path.iterdir()) or path in ("", ".")


INDICES = {
    "missing shard": (lambda m: m.update(a="b.safetensors"), "the file b.safetensors"),
    "outside": (lambda m: m.update(a="../good/x"), "names of files in the same folder"),
    "absolute": (lambda m: m.update(a="/etc/passwd"), "names of files in the same folder"),
    "no name": (lambda m: m.update(a=["x"]), "names of files in the same folder"),
    "nul": (lambda m: m.update(a="x\0"), "the file 'x.x00'"),
    "of other weights": (lambda m: m.pop("1.weight"), "a tensor that .*index.json has"),
    "of more weights": (lambda m: m.update(a=WEIGHTS["msmodelslim"]), "a: expected a tensor in"),
}


@pytest.mark.parametrize(("change", "message"), INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("good", ["msmodelslim"], indirect=True)
def test_an_index_that_is_not_of_these_files(change, message, good) -> None:
    folder = good[1]
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model(), folder)


@pytest.mark.parametrize("good", ["msmodelslim"], indirect=True)
def test_weights_that_the_index_does_not_list(good) -> None:
    kind, folder = good
    (folder / "broken.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    save_file({"layers.0.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    load_checkpoint(model(), folder)  # files of other tensors
    shutil.copy(folder / WEIGHTS[kind], folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"index.json: .* model.safetensors too, .* remove"):
        load_checkpoint(model(), folder)


def test_two_checkpoints_in_one_folder(good) -> None:
    kind, folder = good
    if kind == "msmodelslim":
        shutil.copy(folder / ABOUT[kind], folder / "quant_model_description_w8a8.json")
        load_checkpoint(model(), folder)  # a copy under the other name that tools look for
        (folder / "quant_model_description_w8a8.json").write_text("{}")
        message = "expected one description"
    else:
        (folder / ABOUT["msmodelslim"]).write_text("{}")
        message = "quantization_config: expected none beside quant_model_description.json"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model(), folder)


CONFIGS = {
    "output": ({"output_activations": {}}, {}, "output_activations: expected none"),
    "rotation": ({}, {"transform_config": {"a": 1}}, "transform_config: expected none"),
    "hang": ({"targets": ["re:" + "(.*a){300}$"]}, {}, "found none"),
    "too long": ({"targets": ["re:" + "a?" * 900_000]}, {}, "a regular expression after re:"),
    "dynamic": ({"dynamic": "local"}, {}, "config_groups.g"),
}


@pytest.mark.parametrize(("group", "whole", "message"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("good", ["compressed-tensors"], indirect=True)
def test_configs_that_ask_for_more(group, whole, message, good) -> None:
    folder = good[1]
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    (first,) = about["config_groups"].values()
    if "dynamic" in group:
        first["input_activations"].update(group)
    else:
        first.update(group)
    about |= whole | {"config_groups": {"g": first}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": about}))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model(), folder)
    assert time.monotonic() - start < 5


def test_a_file_that_is_written_to_while_it_is_read(good, monkeypatch) -> None:
    kind, folder = good
    preadv, times = os.preadv, iter(range(1, 10**6))

    def read_and_touch(descriptor: int, buffers: list[Any], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        os.utime(folder / WEIGHTS[kind], ns=(0, next(times)))
        return count

    monkeypatch.setattr(os, "preadv", read_and_touch)
    with pytest.raises(CheckpointError, match="a file that stays as it is, found it was written"):
        load_checkpoint(model(), folder)


# ---- patterns ----


HOSTILE = [
    "(a+)+$", "(a|a)*$", "(a|aa)+$", "a*a*a*a*a*a*a*a*b", "((a{1,50}){1,50}){1,50}b", "(.*a){20}b",
    "(a?){1000000000}b", "(?:(?:a*)*)*b", "(?=(a+)+b)a*", "(a|b|ab)*c",
    "(?:" * 90 + "a+" + ")+" * 90,
    "(?<=a)" * 500 + "b", "(?=.*.*.*.*.*b)" * 50 + "c", "(x" * 200 + ")*" * 200,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_no_pattern_hangs(text) -> None:
    start = time.monotonic()
    with contextlib.suppress(PatternError):
        Pattern(text, Work()).matches(Text("a" * 1000 + "!"))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (r"(a)\1", "groupref"), ("(?i)a", "flags"), ("[", "unterminated"),
        ("(" * 5000, "recursion"),
        ("a{99999999999999}", "too large"), (r"(?P<x>a)(?(x)b|c)", "groupref_exists"),
    ],
)  # fmt: skip
def test_patterns_that_are_refused(text, why) -> None:
    with pytest.raises(PatternError, match=why):
        Pattern(text, Work())


def test_all_patterns_together_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr("lq_graph.checkpoints.patterns._ALL_STEPS", 300_000)
    work, start = Work(), time.monotonic()
    patterns = [Pattern(f".*.*.*{i}", work) for i in range(300)]
    names = [Text(f"model.layers.{i}.mlp.experts.3.up_proj") for i in range(1_000)]
    with pytest.raises(PatternError, match="too long"):
        sum(pattern.matches(name) for name in names for pattern in patterns)
    assert time.monotonic() - start < 5


def some_pattern(r: random.Random, depth: int) -> str:
    kind = r.random()
    if depth == 0 or kind < 0.3:
        return r.choice(
            [*"ab._^$", "[ab]", "[^a]", r"\w", r"\d", r"\.", r"\b", r"\B", r"\Z", "", "\n"]
        )
    first, second = some_pattern(r, depth - 1), some_pattern(r, depth - 1)
    if kind < 0.5:
        return first + second
    if kind < 0.65:
        return f"(?:{first}|{second})"
    if kind < 0.9:
        return f"({first})" + r.choice(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}", "{2,}"])
    return r.choice(["(?=", "(?!"]) + first + ")"


def test_patterns_match_as_pythons_do(tally) -> None:
    r, matches = random.Random(0), 0
    for text in (".*lm_head", ".*mlp.gate$", r"model\.layers\.(0|1|2)\..*", r"^(?!.*down).*proj$"):
        for name in (
            "lm_head",
            "model.lm_head",
            "model.layers.1.mlp.gate",
            "a.up_proj",
            "mlp_gate",
        ):
            found = Pattern(text, Work()).matches(Text(name))
            assert found == bool(re.match(text, name)), (text, name)
    for _ in range(3000):
        text = some_pattern(r, 4)
        try:
            compiled = re.compile(text)
        except re.error:
            continue
        pattern = Pattern(text, Work())
        for _ in range(3):
            name = "".join(r.choice("aab_1.\n") for _ in range(r.randrange(7)))
            assert pattern.matches(Text(name)) == bool(compiled.match(name)), (text, name)
            matches += 1
    tally("patterns matched as Python does", matches)


# ---- anything ----


def test_a_mutated_checkpoint_is_refused_or_loaded(good, tally) -> None:
    kind, folder = good
    r = random.Random(0)
    files = sorted(folder.iterdir())
    kept = {file: file.read_bytes() for file in files}
    header, rest = header_of(folder / WEIGHTS[kind])
    loaded = 0
    plain = model()
    before = model_state(plain)
    for i in range(MUTATIONS):
        file = r.choice(files)
        if r.random() < 0.3:
            file.write_bytes(spoiled(r, kept[file]))
        elif file.suffix == ".json":
            file.write_bytes(mutated(r, json.loads(kept[file])))
        else:
            put_header(file, mutated(r, header), rest)
        if loads(plain, folder, torch.ones(2, 8).half(), r, before, i):
            loaded += 1
            plain = model()
        file.write_bytes(kept[file])
    assert 0 < loaded < MUTATIONS / 2
    tally("mutated checkpoints refused", MUTATIONS - loaded)
    tally("mutated checkpoints loaded", loaded)
