"""The files beside the weights: configuration, tokenizer, several files of weights, and folders
that hold something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lq_graph
from lq_graph import CheckpointError, load_checkpoint, save_checkpoint
from support.injection import folder_state

F16, BF16 = torch.float16, torch.bfloat16
both = pytest.mark.parametrize("format", ["msmodelslim", "compressed-tensors"])
DESCRIBED_BY = {"msmodelslim": "quant_model_description.json", "compressed-tensors": "config.json"}
STEM = {"msmodelslim": "quant_model_weights", "compressed-tensors": "model"}


class Settings:
    """A configuration as transformers has it, by the method that is used."""

    def __init__(self, **values: object) -> None:
        self.values = values

    def to_json_string(self) -> str:
        return json.dumps(self.values)


class TinyForCausalLM(nn.Module):
    """A model with tied embeddings, a router, and a configuration."""

    _tied_weights_keys = ("^lm_head.weight",)

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.lm_head = nn.Linear(
            16, 24, bias=False, dtype=dtype
        )  # before the one that it is tied to
        self.embed_tokens = nn.Embedding(24, 16, dtype=dtype)
        self.lm_head.weight = self.embed_tokens.weight
        self.up = nn.Linear(16, 32, dtype=dtype)
        self.down = nn.Linear(32, 16, dtype=dtype)
        self.gate = TopKRouter()
        self.config = Settings(model_type="tiny", hidden_size=16, dtype="float32", architectures=[])
        self.generation_config = Settings(eos_token_id=3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(self.up(self.embed_tokens(ids)).relu()))


class TopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 16))


def quantized(dtype: torch.dtype = BF16) -> TinyForCausalLM:
    torch.manual_seed(0)
    model = TinyForCausalLM(dtype)
    lq_graph.quantize(model, lq_graph.A8W8Dynamic(), filter_fn=lambda _, name: name == "up")
    return model


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


# ---- configuration ----


@both
def test_the_configuration_is_complete(format: str, tmp_path: Path) -> None:
    save_checkpoint(quantized(), tmp_path, format)
    config = read(tmp_path / "config.json")
    assert config["model_type"] == "tiny" and config["hidden_size"] == 16
    assert config["architectures"] == ["TinyForCausalLM"] and config["dtype"] == "bfloat16"
    assert read(tmp_path / "generation_config.json") == {"eos_token_id": 3}
    if format == "compressed-tensors":
        assert config["quantization_config"]["ignore"] == ["lm_head", "down", "gate"]
    else:
        assert "quantization_config" not in config
        said = read(tmp_path / DESCRIBED_BY[format])
        # vllm-ascend looks up the head, which is in the files as the embeddings
        assert said["lm_head.weight"] == said["embed_tokens.weight"] == "FLOAT"


@both
def test_a_second_save_leaves_what_the_user_has_changed(format: str, tmp_path: Path) -> None:
    save_checkpoint(quantized(), tmp_path, format)
    changed = {**read(tmp_path / "config.json"), "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    save_checkpoint(quantized(), tmp_path, format)
    assert read(tmp_path / "config.json") == changed
    assert read(tmp_path / "generation_config.json") == {"top_p": 0.5}


@both
def test_a_configuration_of_another_model_is_refused(format: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = folder_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"is of a llama, and the model is a tiny.* to do: "):
        save_checkpoint(quantized(), tmp_path, format)
    assert folder_state(tmp_path) == before


# ---- copied files ----


def float_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in (
        "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model", "modeling_x.py",
        "generation_config.json", "model.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin.index.json", "quant_model_description.json", "README.md", ".hidden.json",
    ):  # fmt: skip
        (folder / name).write_text(f'{{"{name}": 1}}')
    (folder / "config.json").write_text('{"model_type": "tiny", "quantization_config": {}}')
    (folder / "more.json").mkdir()
    return folder


COPIED = {
    "tokenizer.json",
    "merges.txt",
    "chat_template.jinja",
    "tokenizer.model",
    "modeling_x.py",
    "generation_config.json",
}


@both
def test_files_are_copied_and_no_weights(format: str, tmp_path: Path) -> None:
    source = float_folder(tmp_path / "float")
    for _ in range(2):  # the same files again
        save_checkpoint(quantized(), tmp_path / "new", format, copy_from=source)
        names = {path.name for path in (tmp_path / "new").iterdir()}
        written = {f"{STEM[format]}.safetensors", DESCRIBED_BY[format], "config.json"}
        assert names == COPIED | written
        for name in COPIED:
            assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    plain = quantized()
    del plain.config
    save_checkpoint(plain, tmp_path / "plain", format, copy_from=source)
    config = read(tmp_path / "plain" / "config.json")
    assert config["model_type"] == "tiny"
    assert bool(config.get("quantization_config")) == (format == "compressed-tensors")


@both
def test_a_copied_file_never_replaces_another(format: str, tmp_path: Path) -> None:
    source, folder = float_folder(tmp_path / "float"), tmp_path / "new"
    save_checkpoint(quantized(), folder, format, copy_from=source)
    (folder / "merges.txt").write_text("mine")
    before = folder_state(folder)
    with pytest.raises(CheckpointError, match=r"merges.txt is another file .* to do: remove it"):
        save_checkpoint(quantized(), folder, format, copy_from=source)
    assert folder_state(folder) == before
    save_checkpoint(quantized(), folder, format)
    with pytest.raises(CheckpointError, match=r"copy_from is .*no folder. What to do: pass the"):
        save_checkpoint(quantized(), folder, format, copy_from=tmp_path / "none")
    before = folder_state(folder)
    (source / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(CheckpointError, match=r"folder of a other, and the model is a tiny"):
        save_checkpoint(quantized(), folder, format, copy_from=source)
    assert folder_state(folder) == before


# ---- weights ----


@both
def test_several_files_hold_what_one_holds(format: str, tmp_path: Path) -> None:
    source = quantized()
    for size in (1, 600, "2kB", "1KiB"):
        save_checkpoint(source, tmp_path, format, max_shard_size=size)
        index = read(tmp_path / f"{STEM[format]}.safetensors.index.json")
        names = {path.name for path in tmp_path.glob("*.safetensors")}
        assert names == set(index["weight_map"].values()) and len(names) > 1
        limit = {1: 1, 600: 600, "2kB": 2000, "1KiB": 1024}[size]
        assert index["metadata"]["total_size"] == sum(
            entry.numel() * entry.element_size() for entry in tensors_in(tmp_path).values()
        )
        for name in names:
            held = tensors_in(tmp_path, name)
            sizes = [tensor.numel() * tensor.element_size() for tensor in held.values()]
            assert sum(sizes) <= limit or len(sizes) == 1
        again = TinyForCausalLM()
        load_checkpoint(again, tmp_path)
        check_same(again, source)
    save_checkpoint(source, tmp_path, format)  # one file again: the others are gone
    weights = [path.name for path in tmp_path.iterdir() if "safetensors" in path.name]
    assert weights == [f"{STEM[format]}.safetensors"]


def tensors_in(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: t for file in folder.glob(pattern) for key, t in load_file(file).items()}


def check_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "5 EB", "0GB", 1.5, True, None])
def test_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"max_shard_size is .* What to do: pass a text"):
        save_checkpoint(quantized(), tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


@both
def test_tied_weights_have_the_name_that_transformers_loads(format: str, tmp_path: Path) -> None:
    source = quantized()
    save_checkpoint(source, tmp_path, format)
    keys = tensors_in(tmp_path).keys()
    assert "embed_tokens.weight" in keys and "lm_head.weight" not in keys
    for device in ("cpu", "meta"):
        with torch.device(device):
            again = TinyForCausalLM()
        load_checkpoint(again, tmp_path)
        assert again.lm_head.weight is again.embed_tokens.weight
        check_same(again, source)


@both
@pytest.mark.parametrize(
    ("declared", "written"),
    [
        ({}, {"embed_tokens.weight", "lm_head.weight"}),
        ({"lm_head.weight": "embed_tokens.weight"}, {"embed_tokens.weight"}),
        ({"embed_tokens.weight": "lm_head.weight"}, {"lm_head.weight"}),
    ],
    ids=["of the user", "of the model", "the other way"],
)
def test_only_ties_that_the_model_declares_are_left_to_it(
    declared: dict[str, str], written: set[str], format: str, tmp_path: Path
) -> None:
    """transformers 5 says what it ties: what it does not tie itself must be in the files."""
    source, again = quantized(), TinyForCausalLM()
    source.all_tied_weights_keys = declared  # type: ignore[assignment]
    save_checkpoint(source, tmp_path, format)
    assert tensors_in(tmp_path).keys() & {"embed_tokens.weight", "lm_head.weight"} == written
    load_checkpoint(again, tmp_path)
    assert again.lm_head.weight is again.embed_tokens.weight
    check_same(again, source)


# ---- folders with something else ----


@both
@pytest.mark.parametrize("shards", [1, 2])
def test_the_float_models_own_folder_is_not_written_into(
    format: str, shards: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    for name in ["model.safetensors"] if shards == 1 else ["model-00001-of-00002.safetensors"]:
        (tmp_path / name).write_text("the float weights")
    before = folder_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"of another checkpoint.* to do: save into an empty"):
        save_checkpoint(quantized(), tmp_path, format)
    assert folder_state(tmp_path) == before


def test_the_weights_of_an_earlier_version_are_replaced(tmp_path: Path) -> None:
    save_checkpoint(quantized(), tmp_path)
    old = tmp_path / "quant_model_weight_w8a8.safetensors"
    (tmp_path / "quant_model_weights.safetensors").rename(old)
    load_checkpoint(TinyForCausalLM(), tmp_path)
    save_checkpoint(quantized(), tmp_path)
    assert not old.exists() and (tmp_path / "quant_model_weights.safetensors").exists()


BROKEN_LISTS = {
    "no json": "{",
    "no lists": '{"new": 3, "old": []}',
    "a path": '{"new": ["../config.json"], "old": []}',
    "a folder": '{"new": [".."], "old": []}',
    "no text": '{"new": [], "old": [3]}',
    "a name of nothing": '{"new": [""], "old": []}',
}


@pytest.mark.parametrize("text", BROKEN_LISTS.values(), ids=BROKEN_LISTS)
def test_a_list_of_a_save_that_no_save_has_written(text: str, tmp_path: Path) -> None:
    save_checkpoint(quantized(), tmp_path)
    (tmp_path / ".save_checkpoint.json").write_text(text)
    before = folder_state(tmp_path)
    for call in (load_checkpoint, save_checkpoint):
        model = TinyForCausalLM() if call is load_checkpoint else quantized()
        with pytest.raises(CheckpointError, match=r"save_checkpoint.json: .* to do: remove it"):
            call(model, tmp_path)  # type: ignore[operator]
    assert folder_state(tmp_path) == before
