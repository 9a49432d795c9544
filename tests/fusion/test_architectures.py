"""Public architectures of transformers in graphs: the logits beside eager ones on the CPU, and what
fuses. benchmarks/architectures.py measures all of them; these are a few that differ most."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cann_host
import lq_graph
from support.has import need_operator

pytest.importorskip("transformers")
pytest.importorskip("torch_npu")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
architectures: Any = pytest.importorskip("architectures")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cann_host.is_active(), reason="needs cann_host in place of CANN"),
]

LEAST = 0.999  # cosine of a token's logits
ONLY = ("rms_norm", "rope", "add_rms_norm", "add_rms_norm_dynamic_quant", "swiglu")
# model_type, mode: how often what fuses in a layer of a step
CASES: dict[tuple[str, str], dict[str, int]] = {
    # norms of the queries and keys of a batch, after their rotation
    ("hunyuan_v1_dense", "GE"): {
        "rms_norm": 4,
        "rope": 1,
        "add_rms_norm": 2,
        "add_rms_norm_dynamic_quant": 2,
        "swiglu": 1,
    },
    # 1 + weight, norms before and after, norms of queries and keys, two masks
    ("gemma3_text", "npugraph_ex"): {
        "rms_norm": 6,
        "rope": 2,
        "add_rms_norm": 2,
        "add_rms_norm_dynamic_quant": 2,
    },
    # half of each head rotates, in pairs: repeat_interleave; RotaryMul has no pairs
    ("glm", "GE"): {
        "rms_norm": 2,
        "add_rms_norm": 2,
        "add_rms_norm_dynamic_quant": 2,
        "swiglu": 1,
    },
    # experts, which are no layers; queries and keys of several rows rotate apart
    ("mixtral", "npugraph_ex"): {
        "rms_norm": 2,
        "rope": 2,
        "add_rms_norm": 2,
        "add_rms_norm_dynamic_quant": 1,
        "swiglu": 1,
    },
}


def need_model(name: str) -> None:
    from transformers import CONFIG_MAPPING

    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")


@pytest.mark.parametrize(("name", "mode"), CASES, ids=str)
def test_logits_and_fusions(name: str, mode: str) -> None:
    need_model(name)
    need_operator("npu_add_rms_norm_dynamic_quant")
    measured = architectures.measure(name, batch=2, modes=(mode,), ways=("fused",))
    assert not measured.errors and measured.worst > LEAST, str(measured)
    done = {line.fusion: line.places for line in measured.step[mode] if not line.why_not}
    assert {fusion: done[fusion] for fusion in ONLY if fusion in done} == CASES[name, mode]


def test_the_logits_hang_on_the_positions() -> None:
    """Else a wrong rotation would not show."""
    model = architectures.quantized("llama", 2, torch.float16)
    ids = architectures.tokens(1)
    with torch.no_grad():
        right = model(ids, use_cache=False).logits
        wrong = model(ids, position_ids=torch.zeros_like(ids), use_cache=False).logits
    assert isinstance(model.lm_head, lq_graph.QuantizedLinear)
    assert architectures.cosine(right, wrong) < 0.9
