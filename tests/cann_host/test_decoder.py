"""A small decoder of the vendor's operators generates the same tokens in every mode, with and
without torch_npu's task queue, as plain torch on the CPU."""

from __future__ import annotations

import pytest
import torch

import cann_host
from support import decoder
from support.processes import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
]
NEEDED = (
    "npu_add_rms_norm_dynamic_quant",
    "npu_apply_rotary_pos_emb",
    "npu_dequant_swiglu_quant",
    "npu_fused_infer_attention_score_v2",
)
if missing := [name for name in NEEDED if not hasattr(torch.ops.npu, name)]:
    pytest.skip(f"this torch_npu has no {', '.join(missing)}", allow_module_level=True)

# TASK_QUEUE_ENABLE=2 cannot be captured: torch_npu says so.
MODES = {"0": "eager ge_graph npugraph_ex", "1": "eager npugraph_ex", "2": "eager ge_graph"}


@pytest.fixture(scope="module")
def wanted() -> str:
    tokens, closest = decoder.generate_on_cpu()
    assert len(set(tokens)) > 4, tokens
    assert closest > 0.2, "the reference chooses between tokens that are nearly as likely"
    return " ".join(map(str, tokens))


@pytest.mark.parametrize("queue", MODES)
def test_every_mode_generates_the_same(queue: str, wanted: str) -> None:
    modes = MODES[queue]
    # npu_apply_rotary_pos_emb returns what it writes into: torch refuses that where CI is set
    variables = {"TASK_QUEUE_ENABLE": queue, "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0"}
    said = run(f"vendor_decoder.py {modes}", **variables).splitlines()
    assert dict(zip(modes.split(), said, strict=True)) == dict.fromkeys(modes.split(), wanted)
