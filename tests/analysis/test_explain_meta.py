"""explain() of a model on meta: the same as with its weights, which take no memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    command_line,
    explain,
    quantize,
)
from lq_graph.analysis import dry_run
from lq_graph.rules.plan import Spec
from support.hf_models import model_of
from support.processes import python

BF16 = torch.bfloat16
SCHEMES = [A8W8Dynamic(), A8W8Static(), A4W4Dynamic()]


@pytest.fixture(autouse=True)
def nearly_everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small models take the way of large ones."""
    monkeypatch.setattr(dry_run, "_SMALL", 64)


def told(model: nn.Module, inputs: Any, **options: Any) -> dict[str, Any]:
    """All of an Explanation that can be compared, node for node."""
    found = explain(model, inputs, **options)
    return {
        "layers": [
            (one.name, one.plan, one.tensors, one.weight_format, str(one.ours), str(one.vendor))
            for one in found.layers
        ],
        "graphs": [str(graph) for graph in found.graphs],
        "unfused": [str(graph) for graph in found.unfused],
        "launches": found.launches,
        "fusions": [str(report) for report in found.fusions],
        "blocks": found.blocks,
        "text": str(found),
    }


class Mlp(nn.Module):
    """Layers to merge, a bias, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def mlp() -> nn.Module:
    return Mlp().to(BF16).requires_grad_(False)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: type(scheme).__name__)
def test_it_is_what_the_weights_would_give(scheme: Any) -> None:
    inputs = torch.randn(2, 64).to(BF16)
    real = told(mlp(), inputs, scheme=scheme)
    assert "FRACTAL_NZ" in str(real["layers"]) or isinstance(scheme, A4W4Dynamic)
    assert ("DequantSwigluQuant" in str(real["graphs"])) != isinstance(scheme, A4W4Dynamic)
    with torch.device("meta"):
        model = mlp()
    assert told(model, inputs, scheme=scheme) == real
    assert all(tensor.is_meta for tensor in model.parameters())  # as it was
    assert isinstance(model.down, nn.Linear)


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=lambda scheme: type(scheme).__name__)
def test_a_quantized_model_may_be_on_meta(scheme: Any) -> None:
    inputs = torch.randn(2, 64).to(BF16)
    model = mlp()
    quantize(model, scheme, [inputs] if isinstance(scheme, A8W8Static) else None)
    real = told(copy.deepcopy(model), inputs)
    for given in (Spec(BF16, (2, 64)), inputs.to("meta"), [Spec(BF16, (2, 64))]):
        assert told(copy.deepcopy(model).to("meta"), given) == real


class Step(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from lq_graph.integrations.transformers import StaticCache

        self.model = model
        model.set_attn_implementation("lq_graph")
        self.cache = StaticCache(model.config, max_cache_len=16)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=token, past_key_values=self.cache).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme", "changes"),
    [
        ("llama", SCHEMES[0], {}),
        # symmetric: values decide whether a zero point is 0, and so whether there is a bias
        ("llama", A8W8Static(symmetric=True), {}),
        ("qwen3", SCHEMES[0], {"tie_word_embeddings": True}),
        ("qwen3", SCHEMES[2], {}),
    ],
    ids=["llama", "llama, static", "qwen3, tied", "qwen3, int4"],
)
def test_a_decode_step(name: str, scheme: Any, changes: dict[str, Any]) -> None:
    token = torch.ones(1, 1, dtype=torch.int64)
    real = told(Step(model_of(name, **changes).to(BF16)), token, scheme=scheme)
    assert "FusedInferAttentionScore" in str(real["graphs"])
    with torch.device("meta"):
        model = model_of(name, **changes).to(BF16)
    assert told(Step(model), token, scheme=scheme) == real


BIG = """
import resource, torch, torch_npu, torchair
import lq_graph
from torch import nn

torchair.CompilerConfig()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

with torch.device("meta"):
    layers = [nn.Linear(16384, 16384, bias=False, dtype=torch.bfloat16) for _ in range(4)]
    model = nn.Sequential(*layers).requires_grad_(False)
x = torch.ones(1, 16384, dtype=torch.bfloat16)
before = peak()
found = lq_graph.explain(model, x, scheme=lq_graph.A8W8Dynamic())
print(len(found.layers), peak() - before)
"""


@pytest.mark.slow
def test_weights_take_no_memory(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(BIG)
    done = python("-m", "cann_host", "--memory", "1TiB", tmp_path / "big.py")
    assert done.returncode == 0, done.stderr
    layers, megabytes = done.stdout.split()
    assert layers == "4" and float(megabytes) < 400  # 2 GB of bfloat16, 1 GB of int8


@pytest.mark.slow
def test_without_room_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(BIG)
    done = python("-m", "cann_host", "--memory", "1GiB", tmp_path / "big.py")
    assert done.returncode == 1 and "What to do: python -m cann_host --memory 4TiB" in done.stderr


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "dtype": "bfloat16",
}


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for model in (tmp_path, tmp_path / "config.json"):
        status = command_line.main(
            ["explain", str(model), "--quant", "a4w4", "--batch", "3", "--context", "16"]
        )
        assert status == 0
        assert "7 LinearQuant layers" in capsys.readouterr().out
    assert command_line.main(["explain", str(tmp_path), "--prefill", "--context", "16"]) == 0
    assert "16 x 64 x 64" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--batch 0", "--batch is 0, below 1"), ("", "transformers cannot make the model")],
)
def test_command_line_mistakes(arguments: str, message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["explain", str(tmp_path), *arguments.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
