"""Names that differ between the files and the model: renamed if it is clear how, else refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lq_graph import CheckpointError, QuantizedLinear, load_checkpoint
from support.checkpoint_files import BF16, F16, I8, write
from support.checkpoint_files import Model as Plain
from support.compressed import CHANNEL, CHANNEL4, TOKEN, TOKEN4, config, group, layer
from support.injection import model_state

SIZE = 16


def tree(*names: str, norms: tuple[str, ...] = ()) -> nn.Module:
    """A model with linear layers, and norms, of these names."""
    root = nn.Module()
    for name in (*names, *norms):
        parent, parts = root, name.split(".")
        for part in parts[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        made = nn.LayerNorm(SIZE) if name in norms else nn.Linear(SIZE, SIZE, bias=False)
        parent.add_module(parts[-1], made.to(BF16))
    return root


def files(folder: Path, *names: str, norms: tuple[str, ...] = (), **about: object) -> Path:
    """A folder with these quantized layers and norms; each has its own values."""
    tensors: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        parts = layer(CHANNEL, TOKEN, SIZE, SIZE, bias=False, seed=i)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    for i, name in enumerate(norms):
        tensors[f"{name}.weight"] = torch.full((SIZE,), float(i + 2), dtype=BF16)
        tensors[f"{name}.bias"] = torch.zeros(SIZE, dtype=BF16)
    save_file(tensors, folder / "model.safetensors")
    said = config(group(CHANNEL, TOKEN), ignore=[]) | about
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    return folder


RENAMED = {  # names in the files, names in the model, in the same order; layers, then norms
    "the same": (["model.layers.0.q"], ["model.layers.0.q"], [], []),
    "images, older": (
        ["language_model.model.layers.0.q", "language_model.model.layers.1.q"],
        ["model.language_model.layers.0.q", "model.language_model.layers.1.q"],
        ["language_model.lm_head", "vision_tower.post", "language_model.model.norm"],
        ["lm_head", "model.vision_tower.post", "model.language_model.norm"],
    ),
    "images": (
        ["model.layers.0.q"],
        ["model.language_model.layers.0.q"],
        ["visual.merger", "model.norm", "lm_head"],
        ["model.visual.merger", "model.language_model.norm", "lm_head"],
    ),
    "images, some of them quantized": (
        ["model.layers.0.q", "visual.layers.0.q"],
        ["model.language_model.layers.0.q", "model.visual.layers.0.q"],
        ["model.norm"],
        ["model.language_model.norm"],
    ),
    "images, the head quantized too": (
        ["lm_head", "model.layers.0.q"],
        ["lm_head", "model.language_model.layers.0.q"],
        [],
        [],
    ),
    "the language model alone": (
        ["model.language_model.layers.0.q"],
        ["model.layers.0.q"],
        ["model.language_model.norm", "lm_head"],
        ["model.norm", "lm_head"],
    ),
    "without the head": (["model.layers.0.q"], ["layers.0.q"], ["model.norm"], ["norm"]),
    "in a module of one's own": (
        ["model.layers.0.q", "model.layers.1.q"],
        ["lm.model.layers.0.q", "lm.model.layers.1.q"],
        ["model.norm", "lm_head"],
        ["lm.model.norm", "lm.lm_head"],
    ),
    "two towers alike": (
        ["language_model.model.layers.0.q"],
        ["model.language_model.layers.0.q"],
        ["vision_tower.vision_model.layers.0.q"],
        ["model.vision_tower.layers.0.q"],
    ),
}


@pytest.mark.parametrize(("old", "new", "old_norms", "new_norms"), RENAMED.values(), ids=RENAMED)
def test_tensors_get_the_names_of_the_model(old, new, old_norms, new_norms, tmp_path) -> None:
    folder = files(tmp_path, *old, norms=tuple(old_norms))
    tensors = load_file(folder / "model.safetensors")
    model = tree(*new, norms=tuple(new_norms))
    report = load_checkpoint(model, folder)
    assert sorted(loaded.name for loaded in report) == sorted(new)
    for in_file, in_model in zip(old, new, strict=True):
        made = model.get_submodule(in_model)
        assert isinstance(made, QuantizedLinear)
        assert torch.equal(made.linear.weight, tensors[f"{in_file}.weight"])
    for in_file, in_model in zip(old_norms, new_norms, strict=True):
        assert torch.equal(model.get_submodule(in_model).weight, tensors[f"{in_file}.weight"])
    assert ("another name in the files" in str(report)) == (old != new or old_norms != new_norms)
    pairs = zip([*old, *old_norms], [*new, *new_norms], strict=True)
    differ = {f"{a}.weight": f"{b}.weight" for a, b in pairs if a != b}
    assert {k: v for k, v in report.renamed.items() if k.endswith(".weight")} == differ


UNCLEAR = {
    "two places": (["layers.0.q"], ["a.layers.0.q", "b.layers.0.q"]),
    "two towers": (["q"], ["model.text.q", "model.vision.q"]),
    "one layer that the model lacks": (
        ["model.layers.0.q", "mtp.layers.0.q"],
        ["model.language_model.layers.0.q"],
    ),
    "no layer": (["model.layers.0.q"], ["encoder.block.attention"]),
    "another beginning for a part": (["a.0.q", "b.q"], ["a.0.q", "c.b.q"]),
}


@pytest.mark.parametrize(("old", "new"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_is_unclear_is_refused(old, new, tmp_path) -> None:
    model = tree(*new)
    before = model_state(model)
    with pytest.raises(CheckpointError, match=r"expected a tensor the model has, .* It has "):
        load_checkpoint(model, files(tmp_path, *old))
    assert model_state(model) == before


def test_two_tensors_for_one_of_the_model(tmp_path) -> None:
    folder = files(tmp_path, "model.layers.0.q", norms=("model.norm", "language_model.norm"))
    model = tree("model.language_model.layers.0.q", norms=("model.language_model.norm",))
    with pytest.raises(CheckpointError, match=r"the values of language_model\.norm"):
        load_checkpoint(model, folder)


def test_the_config_may_use_either_name(tmp_path) -> None:
    """llmcompressor writes the model's names into the config, and older ones for the tensors."""
    (first, second) = "model.layers.0.q", "model.layers.1.q"
    groups = {
        "a": group(CHANNEL4, TOKEN4, "model.language_model.layers.0.q"),
        "b": group(CHANNEL, TOKEN, "re:model.layers.*"),
    }
    folder = files(tmp_path, first, second, config_groups=groups, ignore=["model.visual.q"])
    file = folder / "model.safetensors"
    small = {f"{first}.weight": torch.ones(SIZE, SIZE, dtype=I8)}
    save_file(load_file(file) | small, file)
    model = tree("model.language_model.layers.0.q", "model.language_model.layers.1.q")
    report = load_checkpoint(model, folder)
    assert [loaded.scheme for loaded in report] == ["A4W4 dynamic", "A8W8 dynamic"]


def test_text_config_may_use_the_names_of_the_language_model(tmp_path) -> None:
    said = config(group(CHANNEL, TOKEN, "model.layers.0.q"), ignore=[])
    folder = files(tmp_path, "model.language_model.layers.0.q")
    whole = {"text_config": {"quantization_config": said}}
    (folder / "config.json").write_text(json.dumps(whole))
    assert len(load_checkpoint(tree("model.language_model.layers.0.q"), folder)) == 1


def test_names_of_what_is_left_out(tmp_path) -> None:
    folder = files(tmp_path, "model.layers.0.q", kv_cache_scheme={"num_bits": 8})
    file = folder / "model.safetensors"
    more = {
        "model.layers.0.k_scale": torch.ones(1),
        "model.layers.0.q.weight_zero_point": torch.zeros(SIZE, 1, dtype=I8),
    }
    save_file(load_file(file) | more, file)
    report = load_checkpoint(tree("model.language_model.layers.0.q"), folder)
    assert report.left_out == {
        "model.language_model.layers.0.k_scale": "the attention and its cache stay float",
        "model.language_model.layers.0.q.weight_zero_point": "it is zero",
    }


def test_the_other_format_is_renamed_too(tmp_path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Plain(F16)

    model = Wrapped()
    (loaded,) = load_checkpoint(model, write(tmp_path, "msmodelslim", False, F16))
    assert loaded.name == "model.up" and isinstance(model.model.up, QuantizedLinear)
