"""inspect: what a folder holds, and everything that load_checkpoint would refuse, from headers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lq_graph
from lq_graph import CheckpointError, command_line, load_checkpoint
from support.checkpoint_files import ABOUT, FILE, Model, edit_file, layer_tensors, put, write

I8, F16, BF16, F32 = torch.int8, torch.float16, torch.bfloat16, torch.float32
H, INNER = 64, 128
ALL = ["310P", "A2", "A3", "950"]


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up_proj = nn.Linear(H, INNER, dtype=dtype)
        self.down_proj = nn.Linear(INNER, H, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(H, dtype=dtype)


class Decoder(nn.Module):
    """Two blocks and a head."""

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dtype) for _ in range(2))
        self.lm_head = nn.Linear(H, 16, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = block.norm(block.down_proj(block.up_proj(x)))
        return self.lm_head(x)


def saved(folder: Path, scheme: object, format: str, dtype: torch.dtype = BF16) -> Path:
    """A folder of Decoder, saved by lq_graph; the head is float."""
    torch.manual_seed(0)
    model = Decoder(dtype)
    batches = [torch.randn(4, H).to(dtype)] if isinstance(scheme, lq_graph.A8W8Static) else None
    lq_graph.quantize(model, scheme, batches, ignore=["lm_head"])
    lq_graph.save_checkpoint(model, folder, format)
    return folder


DYNAMIC, STATIC, INT4 = lq_graph.A8W8Dynamic(), lq_graph.A8W8Static(), lq_graph.A4W4Dynamic()
BOTH, NO_BF16 = "yes: float16, bfloat16", "no"
# (scheme, format, dtype): the row of up_proj, and the products that run it
ROWS = {
    (DYNAMIC, "msmodelslim", BF16): (
        "int8 x int8, scale float32, pertoken_scale float32, bias bfloat16 -> bfloat16",
        {"310P": "", "A2": BOTH, "A3": BOTH, "950": BOTH},
    ),
    (DYNAMIC, "compressed-tensors", F16): (
        "int8 x int8, scale float32, pertoken_scale float32, bias float16 -> float16",
        {"310P": "", "A2": BOTH, "A3": BOTH, "950": BOTH},
    ),
    (STATIC, "msmodelslim", F16): (
        "int8 x int8, scale int64, bias int32 -> float16",
        dict.fromkeys(ALL, "yes: float16"),
    ),
    (STATIC, "msmodelslim", BF16): (
        "int8 x int8, scale float32, bias int32 -> bfloat16",
        {"310P": ""} | dict.fromkeys(ALL[1:], "yes: bfloat16"),
    ),
    (INT4, "compressed-tensors", BF16): (
        "int4 x int4, scale float32, pertoken_scale float32, bias bfloat16 -> bfloat16",
        {"310P": "", "A2": BOTH, "A3": BOTH, "950": BOTH},
    ),
}


@pytest.mark.parametrize(("made", "expected"), ROWS.items(), ids=lambda x: str(x)[:60])
def test_each_layer_has_its_row_and_its_products(made, expected, tmp_path) -> None:
    scheme, format, dtype = made
    row, products = expected
    saved(tmp_path, scheme, format, dtype)
    report = load_checkpoint(Decoder(dtype), tmp_path)
    for model in (None, Decoder(dtype)):
        found = lq_graph.inspect(tmp_path, model)
        assert found, found
        assert found.format == format
        layers = [
            (one.name, one.scheme, one.n, one.k, one.output, one.bytes) for one in found.layers
        ]
        assert layers == [(x.name, x.scheme, x.n, x.k, x.output_dtype, x.bytes) for x in report]
        up = next(one for one in found.layers if one.name == "layers.0.up_proj")
        assert up.row == row
        for product, answer in products.items():
            assert up.products[product] == answer or (not answer and up.products[product])
            assert up.products[product].startswith("yes") is bool(answer)
        names = {tensor.name for tensor in found.tensors}
        assert names == {k for k in Decoder().state_dict() if "norm" in k or "head" in k}


TEXT = """\
FOLDER
compressed-tensors, int-quantized 0.19.0; 1 file, 78,872 bytes

A8W8 dynamic: int8 x int8, scale float32, pertoken_scale float32 -> bfloat16
  runs on Atlas A2, Atlas A3, Ascend 950 in float16 and bfloat16
  not on Atlas inference (310P): linear_quant: pertoken_scale is float32; with
    int8 x1 and weight, float16 output and scale float32, Atlas inference (310P)
    takes no pertoken_scale (no output takes one)
  layer               count   n    k   bytes
  layers.*.down_proj      2  64  128  16,384

A8W8 dynamic: int8 x int8, scale float32, pertoken_scale float32, bias bfloat16
  -> bfloat16
  runs on Atlas A2, Atlas A3, Ascend 950 in float16 and bfloat16
  not on Atlas inference (310P): linear_quant: pertoken_scale is float32 and
    bias is float32; with int8 x1 and weight, float16 output and scale float32,
    Atlas inference (310P) takes no pertoken_scale and allows bias int32 or
    absent
  layer             count    n   k   bytes
  layers.*.up_proj      2  128  64  16,384

other tensors         count  dtype     shape  bytes
lm_head.weight            1  bfloat16  16x64  2,048
layers.*.norm.bias        2  bfloat16  64       256
layers.*.norm.weight      2  bfloat16  64       256

Nothing is refused. Not compared with a model; the values of the scales were not
read."""


def test_layers_alike_share_a_line(tmp_path) -> None:
    saved(tmp_path, DYNAMIC, "compressed-tensors")
    found = lq_graph.inspect(tmp_path)
    text = re.sub(r"\d+ bytes$|[\d,]+ bytes$", "78,872 bytes", str(found), count=1, flags=re.M)
    text = text.replace(str(tmp_path), "FOLDER")
    text = re.sub(r"int-quantized[^;]*;", "int-quantized 0.19.0;", text)
    assert text == TEXT
    everything = found.text(everything=True)
    assert "layers.1.up_proj  " in everything and "*" not in everything


def rename_shard(folder: Path) -> None:
    (folder / FILE).rename(folder / "model-00001-of-00002.safetensors")


def cut(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def two_problems(folder: Path) -> None:
    put("up.weight", torch.zeros(24, 40))(folder)
    put("norm.weight", torch.zeros(3).half())(folder)
    put("extra.a", torch.zeros(1))(folder)


# (spoils a folder, patterns of the problems without a model, and with one)
PROBLEMS: dict[str, tuple[Callable, list[str], list[str]]] = {
    "several": (
        two_problems,
        [r"up.weight: expected int8 \(24, 40\)"],
        [r"up.weight: expected int8", r"extra.a: expected a tensor the", r"norm.weight: expected"],
    ),
    "a part is missing": (rename_shard, [r"the file model-00002-of-00002"], [r"the file model-00"]),
    "cut off": (cut, [r"expected a safetensors file"], [r"expected a safetensors file"]),
    "no weight": (
        edit_file(lambda tensors: tensors.pop("up.weight")),
        [r"up.weight: expected the weight of a quantized layer, found no tensor"],
        [r"up.weight: expected int8 \(24, 40\), found no such tensor"],
    ),
    "a scale is missing": (
        edit_file(lambda tensors: tensors.pop("up.weight_scale")),
        [r"up.weight_scale: expected float32 or .* found no such tensor"],
        [r"up.weight_scale: expected float32 or .* found no such tensor"],
    ),
    "int8 that the JSON does not name": (
        put("head.weight", torch.zeros(8, 24, dtype=I8)),
        [r"head.weight: expected a float weight, because the JSON does not say"],
        [r"head.weight: expected float16 \(8, 24\), found int8"],
    ),
    "no JSON": (
        lambda folder: (folder / ABOUT).unlink(),
        [r"expected quant_model_description"],
        [r"expected quant_model_description"],
    ),
    "a model without": (
        edit_file(lambda tensors: tensors.pop("norm.weight")),
        [],
        [r"norm.weight: expected a tensor for every parameter"],
    ),
}


@pytest.mark.parametrize(("spoil", "alone", "compared"), PROBLEMS.values(), ids=PROBLEMS)
def test_everything_that_is_refused_is_told(spoil, alone, compared, tmp_path, capsys) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    spoil(tmp_path)
    for model, patterns in ((None, alone), (Model(), compared)):
        found = lq_graph.inspect(tmp_path, model)
        assert len(found.problems) == len(patterns), found.problems
        for text, pattern in zip(found.problems, patterns, strict=True):
            assert re.search(pattern, text) and " What to do: " in text
        assert bool(found) is not bool(patterns)
        lines = str(found).splitlines()
        assert all(len(line) <= 80 or " " not in line.strip() for line in lines)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Model(), tmp_path)
    assert str(caught.value) == found.problems[0]
    assert command_line.main(["inspect", str(tmp_path)]) == int(bool(alone))
    capsys.readouterr()


def test_problems_alike_are_counted(tmp_path) -> None:
    layers = {f"layers.{i}.up": layer_tensors("msmodelslim", True, F16) for i in range(3)}
    tensors = {f"{name}.{k}": v for name, parts in layers.items() for k, v in parts.items()}
    save_file({k: v for k, v in tensors.items() if "weight_scale" not in k}, tmp_path / FILE)
    words = {f"{name}.weight": "W8A8_DYNAMIC" for name in layers}
    (tmp_path / ABOUT).write_text(json.dumps(words))
    found = lq_graph.inspect(tmp_path)
    assert len(found.problems) == 3
    assert "(2 more like it)" in str(found) and "\n2. " not in str(found)


def test_names_from_files_are_printed_as_text(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    put("a\x1b[31m\n.bias", torch.zeros(1))(tmp_path)
    put("b" * 200, torch.zeros(1))(tmp_path)
    text = str(lq_graph.inspect(tmp_path))
    assert "\x1b" not in text and "a\\x1b[31m\\n.bias" in text
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_no_tensor_is_read(tmp_path) -> None:
    """A file of 100 GB, of which the disk has the header."""
    n, k = 1_600_000, 65_528
    shapes = {"up.weight": ("I8", [n, k]), "up.weight_scale": ("F32", [n, 1])}
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = shape[0] * shape[1] * (1 if dtype == "I8" else 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (tmp_path / FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    try:
        os.truncate(tmp_path / FILE, 8 + len(text) + end)
    except OSError:
        pytest.skip("this disk has no sparse files of 100 GB")
    (tmp_path / ABOUT).write_text(json.dumps({"up.weight": "W8A8_DYNAMIC"}))
    found = lq_graph.inspect(tmp_path)
    assert found and found.layers[0].bytes == n * k > 100e9
    with torch.device("meta"):
        model = nn.ModuleDict({"up": nn.Linear(k, n, bias=False, dtype=BF16)})
    assert lq_graph.inspect(tmp_path, model)


def describe(**changes: str | None) -> Callable[[Path], None]:
    """Change the description: words by keys, with __ for a dot; None removes the key."""

    def edit(folder: Path) -> None:
        words = json.loads((folder / ABOUT).read_text())
        for name, word in changes.items():
            words.pop(name.replace("__", "."), None)
            if word is not None:
                words[name.replace("__", ".")] = word
        (folder / ABOUT).write_text(json.dumps(words))

    return edit


def another_name(folder: Path) -> None:
    (folder / ABOUT).rename(folder / "quant_model_description_w8a8.json")


def other_prefix(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    save_file({f"model.{key}": value for key, value in tensors.items()}, folder / FILE)


def old_config(folder: Path) -> None:
    about = {"quantization_config": {"model_quant_type": "W8A8"}}
    (folder / "config.json").write_text(json.dumps(about))


NOTES = {
    "agrees": (lambda folder: None, []),
    "a key is missing": (
        describe(head__weight=None),
        [r"has no entry for 1 of the weights, head.weight: .* ends with KeyError: 'head.weight'$"],
    ),
    "another prefix": (
        other_prefix,
        [r"KeyError: 'model.\w+.weight'. It has \w+.weight: the beginning of the names differs"],
    ),
    "another file name": (
        another_name,
        [r"reads quant_model_description.json and not quant_model_"],
    ),
    "another description in config.json": (
        old_config,
        [r"reads instead of .*; it has other entri"],
    ),
    "fused layers of two words": (
        describe(a__q_proj__weight="FLOAT", a__k_proj__weight="W8A8", a__v_proj__weight="W8A8"),
        [r"q_proj, k_proj, v_proj of a are FLOAT and W8A8: vllm-ascend joins"],
    ),
}


@pytest.mark.parametrize(("spoil", "patterns"), NOTES.values(), ids=NOTES)
def test_where_the_description_and_the_weights_do_not_agree(spoil, patterns, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    spoil(tmp_path)
    found = lq_graph.inspect(tmp_path)
    assert len(found.notes) == len(patterns), found.notes
    for text, pattern in zip(found.notes, patterns, strict=True):
        assert re.search(pattern, text), text


def test_what_is_ignored_is_not_looked_at(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    put("visual.weight", torch.zeros(2, 2, dtype=I8))(tmp_path)
    describe(visual__weight="W4A16")(tmp_path)
    assert "W4A16" in lq_graph.inspect(tmp_path).problems[0]
    for model in (None, Model()):
        found = lq_graph.inspect(tmp_path, model, ignore=["visual"])
        assert found and found.left_out == {"visual.weight": "ignore has 'visual'"}
        assert "left out: 1 tensor, 4 bytes, visual.weight: ignore has 'visual'" in str(found)
    assert (
        lq_graph.inspect(tmp_path, ignore=["text.*"]).problems[0].startswith("load_checkpoint: ig")
    )


def test_the_product_in_force_decides(tmp_path) -> None:
    folders = [tmp_path / "half", tmp_path / "bfloat"]
    for folder, dtype in zip(folders, (F16, BF16), strict=True):
        saved(folder, STATIC, "msmodelslim", dtype)
        assert lq_graph.inspect(folder)
    lq_graph.set_product("310P")
    try:
        assert lq_graph.inspect(folders[0])
        assert "(310P)" in lq_graph.inspect(folders[1]).problems[0]
    finally:
        lq_graph.set_product(None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lq_graph.inspect(3), "inspect: path: .* What to do: pass a str"),
        (lambda: lq_graph.inspect("a", 3), "inspect: model is a int, not an nn.Module"),
        (lambda: lq_graph.inspect("a", ignore="b"), "ignore is 'b'. What to do: "),
        (lambda: lq_graph.inspect("a", dtype=I8), "inspect: dtype is int8. What to do: "),
        (lambda: lq_graph.inspect("a", prefer="no"), "inspect: prefer is 'no'. What to do: "),
    ],
)
def test_arguments_that_do_not_fit(call, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        call()


# ---- the command ----


def test_the_command_prints_the_same(tmp_path, capsys) -> None:
    saved(tmp_path, DYNAMIC, "msmodelslim")
    found = lq_graph.inspect(tmp_path)
    assert command_line.main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert command_line.main(["inspect", str(tmp_path), "--all"]) == 0
    assert capsys.readouterr().out == f"{found.text(everything=True)}\n"
    assert command_line.main(["inspect", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == found.as_json() and answer["ok"] is True
    assert [layer["name"] for layer in answer["layers"]] == [one.name for one in found.layers]
    page = (Path(lq_graph.__file__).parents[1] / "docs/inspect.md").read_text()
    documented = set(re.findall(r"`(\w+)`", page[page.index("## JSON") :]))
    parts = (answer, *answer["layers"], *answer["tensors"])
    assert {key for part in parts for key in part} <= documented | {"shape"}
    bad = ["inspect", str(tmp_path), "--ignore", "lm_head", "--ignore", "none.*", "--json"]
    assert command_line.main(bad) == 1
    assert "none.*" in json.loads(capsys.readouterr().out)["problems"][0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect"], "the following arguments are required: folder"),
        (["inspect", "no/such"], "inspect: there is no no/such"),
        (["inspect", ".", "--dtype", "half16"], "'half16' is not a dtype"),
        (["inspect", ".", "--prefer", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_a_mistake_in_the_command(arguments, text, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.slow
def test_the_model_of_a_config(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=H, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=40, dtype=BF16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(BF16)
    lq_graph.quantize(model, DYNAMIC)
    config.save_pretrained(tmp_path)
    lq_graph.save_checkpoint(model, tmp_path, "msmodelslim")
    both = ["inspect", str(tmp_path), "--model", str(tmp_path)]
    assert command_line.main(both) == 0
    assert "loads this into LlamaForCausalLM" in " ".join(capsys.readouterr().out.split())
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path / "one")
    assert command_line.main([*both[:3], str(tmp_path / "one")]) == 1
    assert 'pass ignore=["model.layers.1.*"]' in " ".join(capsys.readouterr().out.split())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(SystemExit):
        command_line.main([*both[:3], str(tmp_path / "bad")])
    assert "transformers cannot make the model of its config.json" in capsys.readouterr().err
