"""Models of transformers that are quantized: how the tests make them, and compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, Config, QuantizedLinear

from .hf_models import prompt


def load(folder: Path, dtype: Any = "auto", **given: Any) -> Any:
    """The causal model in a folder, by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)


SCHEMES: dict[str, Any] = {
    "A8W8 dynamic": A8W8Dynamic(),
    "A8W8 dynamic to float16": A8W8Dynamic(torch.float16),
    "A4W4 dynamic": A4W4Dynamic(),
    "A8W8 static": A8W8Static(),
}


def calibration() -> list[Tensor]:
    """Inputs for static schemes."""
    return [prompt()[0]]


def quantized_in(model: nn.Module) -> list[str]:
    """Names of the quantized layers."""
    return sorted(n for n, m in model.named_modules() if isinstance(m, QuantizedLinear))


def config_of(scheme: Any) -> Config:
    """With inputs for a static scheme."""
    return Config(scheme, calibration=calibration() if isinstance(scheme, A8W8Static) else None)


def in_memory(folder: Path, scheme: Any) -> Any:
    """The float model, and then quantize: what every other way has to give."""
    model = load(folder)
    lq_graph.quantize(model, scheme, calibration() if isinstance(scheme, A8W8Static) else None)
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Bit for bit, and the same classes under the same names."""
    got, want = one.state_dict(), other.state_dict()
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key].cpu(), tensor.cpu()), key
    kinds = [{n: type(m) for n, m in model.named_modules()} for model in (one, other)]
    assert kinds[0] == kinds[1]
    for name, module in other.named_modules():
        if isinstance(module, QuantizedLinear):
            new: Any = one.get_submodule(name)
            assert new.input_dtype == module.input_dtype
            assert new.linear.output_dtype == module.linear.output_dtype
            assert not any(p.requires_grad for p in new.parameters())
            assert new.training == module.training


@torch.no_grad()
def generated(model: Any) -> Tensor:
    """Four tokens after the prompt."""
    ids, mask = (tensor.to(model.device) for tensor in prompt())
    return model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).cpu()


def want_config(folder: Path) -> dict[str, Any]:
    """quantization_config in a config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found
