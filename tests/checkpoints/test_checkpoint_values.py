"""Values that do not fit, dtypes and products that cannot run them, memory that is shared."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lq_graph
from lq_graph import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from support.checkpoint_files import (
    BIG,
    FILE,
    SMALL,
    Model,
    Told,
    edit_file,
    example_input,
    put,
    write,
)
from support.injection import model_state

I8, I32, I64 = torch.int8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
N, K = 24, 40

NARROW = {
    "bfloat16 to float16": (
        put("norm.bias", BIG.bfloat16()),
        F16,
        r"norm.bias: .* found 1.0\d*e\+30",
    ),
    "float32 to float16": (put("norm.bias", BIG / 1e25), F16, r"norm.bias: .* float16 holds"),
    "float64 to bfloat16": (put("norm.bias", BIG.double() * 1e10), BF16, r"norm.bias: .* bfloat16"),
    "rounds to infinity": (put("norm.bias", BIG.double() * 3.4028235e8), BF16, "norm.bias"),
    "buffer": (put("steps", torch.tensor([2**40])), F16, r"steps: .* int32 holds.* 1099511627776"),
    "bool": (put("mask", torch.tensor([2], dtype=I8)), F16, r"mask: .* bool holds.* found 2"),
    "all become 0": (put("norm.weight", SMALL), F16, r"norm.weight: .* float16 holds"),
    "bfloat16, all 0": (
        put("norm.weight", SMALL.bfloat16()),
        F16,
        r"norm.weight: .* float16",
    ),
}


class Buffers(Model):
    """With an int32 and a bool buffer."""

    def __init__(self, dtype: torch.dtype = F16) -> None:
        super().__init__(dtype)
        self.register_buffer("steps", torch.zeros(1, dtype=I32))
        self.register_buffer("mask", torch.zeros(1, dtype=torch.bool))


@pytest.mark.parametrize(("spoil", "dtype", "message"), NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_values_beyond_the_models_dtype_are_refused(
    spoil, dtype, message, device, tmp_path
) -> None:
    write(tmp_path, "msmodelslim", True, dtype)
    put("steps", torch.ones(1, dtype=I64))(tmp_path)
    put("mask", torch.ones(1, dtype=torch.uint8))(tmp_path)
    with torch.device(device):
        model = Buffers(dtype)
    load_checkpoint(model, tmp_path)
    assert model.steps.item() == 1 and model.mask.item() is True
    spoil(tmp_path)
    with torch.device(device):
        model = Buffers(dtype)
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


def test_nan_and_infinity_in_the_files_are_kept(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    values = torch.zeros(N, dtype=BF16)
    values[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    put("norm.bias", values)(tmp_path)
    model = Model()
    load_checkpoint(model, tmp_path)
    assert model.norm.bias.isnan().tolist()[:3] == [True, False, False]
    assert torch.equal(model.norm.bias[1:], values[1:].half())


SCALES = {
    "reciprocal overflows": (False, put("up.input_scale", torch.tensor([1e-6])), "input_scale"),
    "reciprocal is 0": (False, put("up.input_scale", torch.tensor([1e9])), "input_scale"),
    "offset is nan": (False, put("up.input_offset", torch.tensor([float("nan")])), "-128 to 127"),
    "offset beyond int8": (False, put("up.input_offset", torch.tensor([300.0])), "-128 to 127"),
    "product is 0": (True, put("up.weight_scale", torch.full((N, 1), 1e-45)), "times input_scale"),
    "bias beyond int32": (True, put("up.bias", torch.full((N,), 1e30)), "steps of input_scale"),
    "bias is nan": (True, put("up.bias", torch.full((N,), torch.nan)), "steps of input_scale"),
}


@pytest.mark.parametrize(("compressed", "spoil", "message"), SCALES.values(), ids=SCALES)
def test_scales_that_would_be_lost_are_refused(compressed, spoil, message, tmp_path) -> None:
    write(tmp_path, "compressed-tensors" if compressed else "msmodelslim", False, F16)
    spoil(tmp_path)
    model = Model()
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


def fill(key: str, value: float, dtype: torch.dtype = F32):
    """All values of a tensor of "up"."""
    return edit_file(lambda t: t.update({key: torch.full_like(t[key], value, dtype=dtype)}))


BEYOND = {
    "bias": ("msmodelslim", True, F16, "bias", 1e6, "up.bias: .*float16 holds.* 1000000"),
    "bias, bfloat16": ("msmodelslim", True, BF16, "bias", 3.4e38, "up.bias: .*bfloat16 holds"),
    "bias is nan": ("msmodelslim", True, BF16, "bias", torch.nan, "up.bias: .*finite"),
    "bias is infinite": ("compressed-tensors", True, F16, "bias", -torch.inf, "up.bias: .*finite"),
    "static bias": ("compressed-tensors", False, BF16, "bias", 3.4e38, "up.bias: .*bfloat16"),
    "static bias is nan": ("compressed-tensors", False, BF16, "bias", torch.nan, "up.bias: .*fini"),
    "weights": ("msmodelslim", True, F16, "weight_scale", 520, "weight_scale: .* 127 . 520"),
    "weights, bfloat16": ("msmodelslim", True, BF16, "weight_scale", 3e36, "up.weight_scale: .*bf"),
    "static weights": (
        "compressed-tensors",
        False,
        F16,
        "weight_scale",
        520,
        "weight_scale: .*127",
    ),
    "deq_scale": ("msmodelslim", False, BF16, "deq_scale", 1e36, "up.deq_scale"),
}


@pytest.mark.parametrize(
    ("kind", "dynamic", "dtype", "part", "value", "message"), BEYOND.values(), ids=BEYOND
)
def test_layers_beyond_their_dtype_are_refused(
    kind, dynamic, dtype, part, value, message, tmp_path
) -> None:
    write(tmp_path, kind, dynamic, dtype)
    fill(f"up.{part}", value)(tmp_path)
    model = Model(dtype)
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


def test_an_int32_bias_beyond_float16_is_refused(tmp_path) -> None:
    write(tmp_path, "msmodelslim", False, F16)
    word = torch.full((N,), 0.03125).view(I32).to(I64)
    put("up.deq_scale", word)(tmp_path)
    load_checkpoint(Model(), tmp_path)
    put("up.quant_bias", torch.full((N,), 2**22, dtype=I32))(tmp_path)  # 131072, or less by
    with pytest.raises(CheckpointError, match=r"up.quant_bias: expected a bias that float16"):
        load_checkpoint(Model(), tmp_path)  # 5 * 128 * K * 0.03125 for the zero point


def test_weights_up_to_the_dtypes_limit_are_loaded(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    fill("up.weight_scale", 65504 / 127)(tmp_path)
    fill("up.bias", -65504)(tmp_path)
    load_checkpoint(Model(), tmp_path)


@pytest.mark.parametrize(("part", "value"), [("bias", 1e6), ("bias", torch.nan), ("scale", 520)])
def test_a_layer_that_could_not_be_loaded_is_not_saved(part, value, tmp_path) -> None:
    model = Model()
    load_checkpoint(model, write(tmp_path, "msmodelslim", True, F16))
    held = getattr(model.up.linear, part)
    held.data = torch.full_like(held, value, dtype=F32)
    with pytest.raises(CheckpointError, match=rf"up.linear.{part} holds NaN, .* beyond float16"):
        save_checkpoint(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ---- what the model or the product cannot run ----


@pytest.mark.parametrize(
    ("files", "model", "dtype", "message"),
    [
        (F16, BF16, None, r"up.deq_scale: expected float32, .* do: call model.to\(torch.float16"),
        (BF16, F16, None, r"up.deq_scale: expected int64, .* float32, of a layer in bfloat16"),
        (F16, F16, BF16, r"up.deq_scale: .* What to do: leave dtype= out, or pass torch.float16"),
        (F16, F32, None, r"up: .* found float32, .* call model\.bfloat16\(\) or model\.half\(\)"),
        (F16, F32, BF16, r"up.deq_scale: expected float32"),
    ],
)  # fmt: skip
def test_static_files_of_another_dtype(files, model, dtype, message, tmp_path) -> None:
    write(tmp_path, "msmodelslim", False, files)
    target = Model(model)
    before = model_state(target)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(target, tmp_path, dtype=dtype)
    assert model_state(target) == before


def test_a_static_layer_takes_the_models_dtype(tmp_path) -> None:
    write(tmp_path, "compressed-tensors", False, F16)
    with pytest.raises(CheckpointError, match=r"up: .* found bfloat16 in the model"):
        load_checkpoint(Model(BF16), tmp_path, dtype=F16)
    with pytest.raises(CheckpointError, match=r"dtype is int8. What to do: pass torch.float16 or"):
        load_checkpoint(Model(), tmp_path, dtype=I8)
    model = Model(F32)
    load_checkpoint(model, tmp_path, dtype=F16)
    model.half()
    assert model(example_input(F16)).dtype == F16


@pytest.mark.parametrize(
    ("kind", "dynamic", "dtype"),
    [("msmodelslim", True, F16), ("compressed-tensors", True, F16), ("msmodelslim", False, BF16)],
)
def test_a_layer_without_a_row_in_the_products_table(kind, dynamic, dtype, tmp_path) -> None:
    write(tmp_path, kind, dynamic, dtype)
    model = Model(dtype)
    before = model_state(model)
    lq_graph.set_product("310P")
    try:
        with pytest.raises(CheckpointError, match=r"up: expected a layer that .* \(310P\)"):
            load_checkpoint(model, tmp_path)
    finally:
        lq_graph.set_product(None)
    assert model_state(model) == before


# ---- memory ----


def test_tied_weights_are_saved_once_and_loaded_tied(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(N, K, dtype=F16)
            self.up = nn.Linear(K, K, dtype=F16)
            self.same = self.up  # one layer, two names
            self.left = nn.Linear(K, N, dtype=F16)
            self.right = nn.Linear(K, N, bias=False, dtype=F16)  # two layers, one weight
            self.right.weight = self.left.weight
            self.head = nn.Linear(K, N, bias=False, dtype=F16)
            self.head.weight = self.embed.weight

    source = Tied()
    lq_graph.quantize(source, lq_graph.A8W8Dynamic(), filter_fn=lambda _, name: name != "head")
    assert source.left.linear.weight is source.right.linear.weight
    for kind in ("msmodelslim", "compressed-tensors"):
        save_checkpoint(source, tmp_path / kind, kind)
        (file,) = (tmp_path / kind).glob("*.safetensors")
        keys = set(load_file(file))
        assert {"embed.weight", "up.weight", "left.weight", "right.weight_scale"} <= keys
        assert not keys & {"head.weight", "same.weight", "right.weight"}
        for device in ("cpu", "meta"):
            with torch.device(device):
                model = Tied()
            load_checkpoint(model, tmp_path / kind)
            assert model.head.weight is model.embed.weight and model.up is model.same
            assert model.left.linear.weight is model.right.linear.weight
            for key, tensor in source.state_dict().items():
                assert torch.equal(model.state_dict()[key], tensor), key


def test_two_values_for_one_tensor_are_refused(tmp_path) -> None:
    class Tied(Model):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.LayerNorm(N, dtype=F16)
            self.twin.weight = self.norm.weight
            self.flat = nn.Parameter(torch.zeros(4, dtype=F16))
            self.piece = nn.Parameter(self.flat.data[:2])

    write(tmp_path, "msmodelslim", True, F16)
    values = {"twin.weight": torch.ones(N), "twin.bias": torch.zeros(N), "flat": torch.ones(4)}
    for key, value in {**values, "piece": torch.ones(2)}.items():
        put(key, value.half())(tmp_path)
    model = Tied()
    load_checkpoint(model, tmp_path)
    assert model.piece.tolist() == [1, 1] and model.twin.weight is model.norm.weight
    for key, message in (
        ("twin.weight", "the same tensor in the model"),
        ("piece", "shares memory"),
    ):
        put(key, torch.full_like(values.get(key, torch.ones(2)), 2).half())(tmp_path)
        model = Tied()
        before = model_state(model)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(model, tmp_path)
        assert model_state(model) == before
        put(key, values.get(key, torch.ones(2)).half())(tmp_path)


@pytest.mark.slow
def test_buffers_that_would_stay_on_meta_are_named_first(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    source = transformers.LlamaForCausalLM(config).half().eval()
    lq_graph.quantize(source, lq_graph.A8W8Dynamic(), filter_fn=lambda _, name: name != "lm_head")
    folder = tmp_path / "model"
    folder.mkdir()
    config.save_pretrained(folder)
    save_checkpoint(source, folder, "compressed-tensors")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).half().eval()
    before = model_state(model)
    with pytest.raises(
        CheckpointError, match=r"model.rotary_emb.\w*inv_freq and 1 more would stay"
    ):
        load_checkpoint(model, folder)
    assert model_state(model) == before
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    assert len(load_checkpoint(model, folder)) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.arange(12).reshape(2, 6)
    source.model.rotary_emb = LlamaRotaryEmbedding(config)  # not that of .half()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, source(tokens).logits)


@pytest.mark.parametrize("mmap", [False, True])
def test_loaded_weights_are_the_files_only_if_asked(mmap, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    with torch.device("meta"):
        model = Model()
    load_checkpoint(model, tmp_path, mmap=mmap)
    x = example_input(F16)
    want = model(x)
    save_checkpoint(model, tmp_path)  # over the files it was loaded from
    assert torch.equal(model(x), want)
    again = Model()
    load_checkpoint(again, tmp_path, mmap=mmap)
    assert torch.equal(again(x), want)
    with torch.no_grad():
        again.up.linear.weight.zero_()  # the file is not written to
    data = (tmp_path / FILE).read_bytes()
    load_checkpoint(again, tmp_path, mmap=mmap)
    assert torch.equal(again(x), want)
    with open(tmp_path / FILE, "r+b") as file:  # in place
        file.seek(-len(data) // 2, 2)
        file.write(bytes(len(data) // 2))
    assert torch.equal(again(x), want) is not mmap
    if not mmap:
        (tmp_path / FILE).write_bytes(b"")  # would be SIGBUS
        assert torch.equal(again(x), want)


@pytest.mark.parametrize("kind", ["msmodelslim", "compressed-tensors"])
def test_defaults_that_others_have_set(kind, tmp_path) -> None:
    write(tmp_path, kind, False, F16)
    plain, model = Model(), Model()
    load_checkpoint(plain, tmp_path)
    torch.set_default_dtype(BF16)
    try:
        with torch.device("meta"), torch.inference_mode():
            load_checkpoint(model, tmp_path)
            save_checkpoint(model, tmp_path / "again", kind)
    finally:
        torch.set_default_dtype(F32)
    assert model_state(model) == model_state(plain)
    assert not model.up.linear.scale.is_inference()
    again = Model()
    load_checkpoint(again, tmp_path / "again")
    assert model_state(again) == model_state(plain)


def test_tensors_keep_their_memory_and_hooks_that_rename_are_refused(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = Model()
    view, parameter = model.norm.weight.data.view(2, -1), model.head.weight
    model.norm.weight.data.zero_()
    load_checkpoint(model, tmp_path)
    assert view.flatten().tolist() == [1.0] * N and model.head.weight is parameter

    def rename(module, state, prefix, local) -> None:
        state[prefix + "gain"] = state.pop(prefix + "weight")

    model = Model()
    model.norm.register_state_dict_post_hook(rename)
    before = model_state(model)
    with pytest.raises(CheckpointError, match=r"norm.gain: model.state_dict\(\) and the model"):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


UNUSUAL = {
    "lazy": (lambda m: setattr(m, "lazy", nn.LazyLinear(3)), {}, r"lazy.bias: expected a tensor f"),
    "lazy, given": (
        lambda m: setattr(m, "lazy", nn.LazyLinear(3)),
        {"lazy.weight": torch.ones(3, 3), "lazy.bias": torch.ones(3)},
        r"lazy.bias: expected a plain tensor in the model, found a lazy tensor, without a size",
    ),
    "sparse": (
        lambda m: m.register_buffer("b", torch.eye(2).to_sparse()),
        {"b": torch.ones(2, 2)},
        r"b: expected a plain tensor in the model, found one of layout torch.sparse_coo",
    ),
    "extra state": (
        lambda m: setattr(m, "told", Told()),
        {},
        r"told._extra_state: expected a tensor for every",
    ),
}


@pytest.mark.parametrize(("change", "tensors", "message"), UNUSUAL.values(), ids=UNUSUAL)
def test_tensors_that_cannot_be_loaded_are_named(change, tensors, message, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    for key, tensor in tensors.items():
        put(key, tensor)(tmp_path)
    model = Model()
    change(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert type(model.up) is nn.Linear


def test_models_that_are_none(tmp_path) -> None:
    for act in (load_checkpoint, save_checkpoint):
        with pytest.raises(CheckpointError, match=r"model is a int, not an nn.Module"):
            act(3, tmp_path)
