"""LoRA adapters of peft on QuantizedLinear layers, beside the same formula in plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, QuantizedLinear
from support.hf_models import model_of, prompt
from support.hf_quantized import assert_same

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from lq_graph.integrations.peft import LoraQuantizedLinear, on_quantized  # noqa: E402

BF16 = torch.bfloat16
NAMES = ["q_proj", "v_proj", "down_proj"]


def lora(**changes: Any) -> Any:
    given = dict(target_modules=NAMES, r=4, lora_alpha=8, init_lora_weights=False) | changes
    return on_quantized(peft.LoraConfig(**given))


def with_adapters(scheme: Any = None, **changes: Any) -> tuple[Any, Any]:
    """A quantized model with adapters, and the same without."""
    model = model_of("qwen2").to(BF16)
    scheme = scheme or A8W8Dynamic()
    lq_graph.quantize(model, scheme, filter_fn=lambda _, name: name != "lm_head")
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora(**changes)), plain


class Reference(torch.nn.Module):
    """The layer's own output and the adapter's, in float32, rounded once."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__()
        self.layer = wrapped.base_layer
        (self.a,), (self.b,) = wrapped.lora_A.values(), wrapped.lora_B.values()
        (self.scaling,) = wrapped.scaling.values()

    def forward(self, x: Tensor) -> Tensor:
        delta = x.float() @ self.a.weight.float().T @ self.b.weight.float().T
        return (self.layer(x).float() + delta * self.scaling).to(x.dtype)


def reference(model: Any) -> Any:
    """The same model with references in place of the wrapped layers; adapters are shared."""
    other = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, LoraQuantizedLinear):
            other.set_submodule(name, Reference(module))
    return other


@pytest.mark.parametrize("scheme", [A8W8Dynamic(), A4W4Dynamic()], ids=str)
def test_the_adapters_are_added(scheme: Any) -> None:
    model, plain = with_adapters(scheme)
    ids, mask = prompt()
    with torch.no_grad():
        got, want = model(ids, mask).logits, reference(model)(ids, mask).logits
        assert torch.equal(got, want)
        assert not torch.equal(got, plain(ids, mask).logits)
        with model.disable_adapter():
            assert torch.equal(model(ids, mask).logits, plain(ids, mask).logits)


def test_training_is_refused() -> None:
    """The gradients of adapters before a quantized layer would lack what passes through it."""
    model, _ = with_adapters()
    ids, mask = prompt()
    with pytest.raises(ValueError, match=r"adapters before it cannot be trained. What to do: use"):
        model.train()(ids, mask)
    with torch.no_grad():
        model.train()(ids, mask)
    last, _ = with_adapters(target_modules=["layers.1.mlp.down_proj"])
    last.train()(ids, mask, labels=ids).loss.backward()  # no quantized layer is after it
    grads = [p.grad for p in last.parameters() if p.requires_grad]
    assert len(grads) == 2 and all(grad.abs().max() > 0 for grad in grads)


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model, plain = with_adapters()
    model.save_pretrained(tmp_path)
    config = on_quantized(peft.PeftConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(plain, tmp_path, config=config)
    ids, mask = prompt()
    with torch.no_grad():
        assert torch.equal(again(ids, mask).logits, model(ids, mask).logits)


def test_the_base_is_not_saved_with_adapters_in_it(tmp_path: Path) -> None:
    """Its layers have names that the class of the model has not, so they would not load."""
    from lq_graph.integrations.transformers import attach

    model, plain = with_adapters()
    base = model.get_base_model()
    attach(base)
    with pytest.raises(ValueError, match=r"q_proj.base_layer is no layer of .* unload\(\)"):
        base.save_pretrained(tmp_path)
    base = model.unload()
    base.save_pretrained(tmp_path)
    assert_same(type(base).from_pretrained(tmp_path), plain)


def test_adapters_on_a_model_of_from_pretrained(tmp_path: Path) -> None:
    """add_adapter of transformers; what it saves is the adapter alone."""
    float_model = model_of("qwen2").to(BF16)
    float_model.save_pretrained(tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype=BF16, quantization_config=lq_graph.Config()
    )
    assert not model.hf_quantizer.is_trainable
    try:
        model.add_adapter(lora())
    except ValueError as error:
        pytest.skip(str(error))  # this transformers wants a newer peft
    assert isinstance(model.model.layers[0].mlp.down_proj, LoraQuantizedLinear)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype=BF16, quantization_config=lq_graph.Config()
    )
    config = on_quantized(peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(
        base, tmp_path / "adapter", config=config, autocast_adapter_dtype=False
    )
    ids, mask = prompt()
    with torch.no_grad():
        assert torch.equal(again(ids, mask).logits, model(ids, mask).logits)


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_that_were_there_before(autocast: bool) -> None:
    """The layer inside the adapter is quantized, and the adapter stays."""
    float_model = model_of("qwen2").to(BF16)
    model = peft.get_peft_model(
        float_model,
        peft.LoraConfig(target_modules=NAMES, r=8, init_lora_weights=False),
        autocast_adapter_dtype=autocast,
    )
    own = [n for n, _ in model.named_modules() if ".lora_" in n]
    lq_graph.quantize(model, A8W8Dynamic(), filter_fn=lambda _, name: name not in own)
    wrapped = model.base_model.model.model.layers[0].mlp.down_proj
    assert isinstance(wrapped.base_layer, QuantizedLinear)
    ids, mask = prompt()
    with torch.no_grad():
        got = model(ids, mask).logits.float()
        for name, module in dict(model.named_modules()).items():
            if isinstance(module, peft.tuners.lora.Linear):
                model.set_submodule(name, Reference(module))
        want = model(ids, mask).logits.float()
    assert torch.cosine_similarity(got, want, dim=-1).min() > 0.999
    with pytest.raises(TypeError, match="change the float model and quantize it afterwards"):
        wrapped.merge()


REFUSED = {
    "dora": (dict(use_dora=True), "reads the weight of the layer. What to do: use plain LoRA"),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the weight"),
    "olora": (dict(init_lora_weights="olora"), "init_lora_weights='olora' changes the weight"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_of_lora_that_need_the_weight(kind: str) -> None:
    changes, text = REFUSED[kind]
    with pytest.raises(ValueError, match=text):
        with_adapters(**changes)


def test_merging_is_refused() -> None:
    model, _ = with_adapters()
    with pytest.raises(ValueError, match=r"cannot be merged into int8 or int4 values. What to do"):
        model.merge_adapter()


def test_peft_itself_names_the_class() -> None:
    model = model_of("qwen2").to(BF16)
    lq_graph.quantize(model, A8W8Dynamic())
    with pytest.raises(ValueError, match="Target module QuantizedLinear"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=NAMES))
