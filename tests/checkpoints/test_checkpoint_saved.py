"""What is saved, what files cannot hold, and loads and saves at the same time."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import resource
import signal
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lq_graph
from lq_graph import (
    A8W8Static,
    CheckpointError,
    QuantizedLinear,
    load_checkpoint,
    save_checkpoint,
)
from lq_graph.checkpoints import load as loading
from lq_graph.checkpoints.folder import CheckpointFiles
from support.checkpoint_files import (
    FILE,
    INDEX,
    Model,
    Told,
    write,
)
from support.injection import folder_state, model_state

I8, I32, I64 = torch.int8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


# ---- saving ----


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("bias", [False, True])
def test_symmetric_static_layers_are_saved_and_read_back(dtype, bias, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32, bias=bias, dtype=dtype) for _ in range(3)])
    plain, x = copy.deepcopy(model), torch.randn(16, 32).to(dtype)
    config = A8W8Static(symmetric=True, int8_between=False)
    lq_graph.quantize(model, config, [x])
    save_checkpoint(model, tmp_path)
    load_checkpoint(plain, tmp_path)
    assert torch.equal(plain(x), model(x))
    state = model.state_dict()
    for key, tensor in plain.state_dict().items():
        if key.endswith("scale") and tensor.dtype == I64:
            tensor = (tensor & 0xFFFFFFFF).to(torch.uint32).view(F32)
        if key in state:  # a bias of zeros in the place of none
            assert torch.equal(tensor, state[key]), key
    assert set(state) <= set(plain.state_dict())


def test_only_quantization_config_changes(tmp_path) -> None:
    about = {"model_type": "llama", "hidden_size": 24, "eps": 1e-06, "limit": [0.0, float("inf")]}
    (tmp_path / "config.json").write_text(json.dumps({**about, "quantization_config": 3}))
    (tmp_path / "config.json").chmod(0o640)
    model = Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic(), filter_fn=lambda _, name: name == "up")
    save_checkpoint(model, tmp_path, "compressed-tensors")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == about and list(written) == list(about)
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o640
    load_checkpoint(Model(), tmp_path)


OTHERS = {
    "index": {INDEX: '{"weight_map": {"a": "b.safetensors"}}'},
    "shard": {"model-00001-of-00002.safetensors": ""},
    "other format's weights": {"model.safetensors": ""},
    "other description": {"quant_model_description_w8a8.json": "{}"},
    "quantization_config": {"config.json": '{"quantization_config": {"quant_method": "fp8"}}'},
    "broken config": {"config.json": "{"},
}


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_a_folder_with_other_weights_is_refused(files, tmp_path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    model = Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    before = folder_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"empty folder|remove the key|a JSON object"):
        save_checkpoint(model, tmp_path)
    assert folder_state(tmp_path) == before


def unsaved(key: str, value: torch.Tensor):
    return lambda m: m.register_buffer(key, value)


UNSAVED = {
    "meta": (unsaved("b", torch.zeros(2, device="meta")), "b is on meta and has no values"),
    "sparse": (unsaved("b", torch.eye(2).to_sparse()), "b has layout torch.sparse_coo"),
    "complex128": (unsaved("b", torch.zeros(2, dtype=torch.complex128)), "b is complex128"),
    "extra state": (lambda m: setattr(m, "told", Told()), "told._extra_state is a dict"),
    "name": (unsaved("b\ud800", torch.zeros(2)), r"b\\ud800' has a name that files cannot"),
    "metadata": (unsaved("__metadata__", torch.zeros(2)), "name that the files use themselves"),
    "no name": (
        lambda m: m.register_state_dict_post_hook(lambda *a: a[1].update({3: torch.ones(1)})),
        "save_checkpoint: 3 has a name that files cannot hold",
    ),
    "scale": (lambda m: m.up.linear.scale.data.fill_(torch.nan), "up.linear.scale holds NaN"),
    "itself": (None, "the model itself is a layer"),
}


@pytest.mark.parametrize(("change", "message"), UNSAVED.values(), ids=UNSAVED)
def test_a_tensor_that_files_cannot_hold_is_refused_by_name(change, message, tmp_path) -> None:
    model = Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    if change is not None:
        change(model)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(model if change is not None else model.up, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_any_plain_tensor_is_saved_as_it_is(tmp_path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    given = {
        "transposed": wide.t(), "expanded": torch.ones(1).expand(5), "slice": wide[:, 1:3],
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(3.0), "conj": torch.ones(2) * 1j,
        "flags": torch.tensor([True, False]), "u16": torch.tensor([7], dtype=torch.uint16),
        "f8": torch.ones(1).to(torch.float8_e4m3fn), "f64": torch.ones(1, dtype=torch.float64),
    }  # fmt: skip
    given["conj"] = given["conj"].conj()
    models = [Model(), Model()]
    for i, model in enumerate(models):
        for key, tensor in given.items():
            model.register_buffer(key, torch.zeros_like(tensor) if i else tensor)
    lq_graph.quantize(models[0], lq_graph.A8W8Dynamic())
    save_checkpoint(models[0], tmp_path)
    load_checkpoint(models[1], tmp_path)
    read = load_file(tmp_path / FILE)  # by the format's own package
    for key, tensor in given.items():
        for found in (models[1].get_buffer(key), read[key]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape, key
            assert found.tolist() == tensor.tolist(), key


def test_links_and_files_in_the_way(tmp_path) -> None:
    model, other = Model(), Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_checkpoint(model, tmp_path / "link")
    # a cache holds its files elsewhere, under other names
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "real").iterdir():
        file.rename(tmp_path / "blobs" / file.name[::-1])
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name[::-1]}")
    load_checkpoint(other, tmp_path / "snapshot")
    blobs = folder_state(tmp_path / "blobs")
    save_checkpoint(other, tmp_path / "snapshot")
    assert folder_state(tmp_path / "blobs") == blobs
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"save_checkpoint: .*file: Not a directory"):
        save_checkpoint(model, tmp_path / "file")
    (tmp_path / "real" / FILE).mkdir()
    with pytest.raises(CheckpointError, match=f"has something named {FILE} that is no file"):
        save_checkpoint(model, tmp_path / "real")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path) -> None:
    old, new = nn.Sequential(nn.Linear(8, 8)).half(), nn.Sequential(nn.Linear(512, 512)).half()
    for model in (old, new):
        lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    save_checkpoint(old, tmp_path)
    before = folder_state(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large. The folder is unchanged"):
            save_checkpoint(new, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folder_state(tmp_path) == before


def test_one_save_at_a_time(tmp_path) -> None:
    model = Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another save_checkpoint is writing"):
            save_checkpoint(model, tmp_path)
    finally:
        os.close(descriptor)
    save_checkpoint(model, tmp_path)


def test_names_that_mean_more_in_a_config(tmp_path) -> None:
    """A layer named as a class, one named as a pattern, and a float tensor named as a scale."""

    def make() -> nn.Module:
        model = nn.Module()
        model.add_module("Linear", nn.Linear(16, 16, dtype=F16))
        model.add_module("re:", nn.Linear(16, 16, dtype=F16))
        model.add_module("norm", nn.LayerNorm(16, dtype=F16))
        model.norm.register_buffer("weight_scale", torch.ones(1))
        model.forward = lambda x: getattr(model, "re:")(model.Linear(x))
        return model

    source, model, x = make(), make(), torch.randn(3, 16).half()
    config = A8W8Static(symmetric=True, int8_between=False)
    lq_graph.quantize(source, config, [x], filter_fn=lambda _, name: name == "Linear")
    lq_graph.quantize(source, lq_graph.A8W8Dynamic())
    save_checkpoint(source, tmp_path, "compressed-tensors")
    report = load_checkpoint(model, tmp_path)
    assert {x.name: x.scheme for x in report} == {"Linear": "A8W8 static", "re:": "A8W8 dynamic"}
    assert torch.equal(model(x), source(x))


def test_a_model_without_quantized_layers_is_saved_with_a_warning(tmp_path) -> None:
    source, model = Model(), Model()
    with pytest.warns(UserWarning, match=r"no QuantizedLinear; .*quantize it first") as caught:
        save_checkpoint(source, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    assert load_checkpoint(model, tmp_path) == []
    assert torch.equal(model.up.weight, source.up.weight)


def test_a_path_in_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    model = Model()
    load_checkpoint(model, write(tmp_path / "a", "msmodelslim", True, F16))
    for folder in ("~/b", "~no such user/b"):  # the second is a name as any other
        save_checkpoint(model, folder)
        load_checkpoint(Model(), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "~no such user"]


class Strict(Model):
    """A model whose modules cannot be set."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self).get("_modules", {}):
            raise TypeError("frozen")
        super().__setattr__(name, value)


def test_a_parent_with_a_setattr_of_its_own(tmp_path) -> None:
    model = Strict()
    load_checkpoint(model, write(tmp_path, "msmodelslim", True, F16))
    assert isinstance(model.up, QuantizedLinear)


# ---- at the same time ----


def test_threads_load_one_model(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model, errors = Model(), []

    def load() -> None:
        try:
            for _ in range(5):
                load_checkpoint(model, tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and isinstance(model.up, QuantizedLinear)


@pytest.mark.parametrize("same", [False, True])
def test_a_signal_handler_loads_in_the_middle_of_a_load(same, tmp_path, monkeypatch) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model, other = Model(), Model()
    before = model_state(model)
    read, loads = CheckpointFiles.read, []

    def handler(*_: object) -> None:
        loads.append(1)
        load_checkpoint(model if same else other, tmp_path)

    def read_and_signal(files: Any, key: str) -> torch.Tensor:
        if not loads and key == "norm.weight":
            signal.raise_signal(signal.SIGUSR1)
        return read(files, key)

    monkeypatch.setattr(CheckpointFiles, "read", read_and_signal)
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        if same:
            with pytest.raises(CheckpointError, match=r"changed by something else while"):
                load_checkpoint(model, tmp_path)
        else:
            load_checkpoint(model, tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert len(loads) == 1 and model_state(model) != before
    assert isinstance((model if same else other).up, QuantizedLinear)


def test_a_child_does_not_wait_for_a_thread_of_its_parent(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = Model()
    has, done = threading.Event(), threading.Event()

    def hold() -> None:
        with loading._LOCK:
            has.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait(60)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        torch.set_num_threads(1)
        with contextlib.suppress(BaseException):
            load_checkpoint(model, tmp_path)
            os._exit(0)
        os._exit(1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
