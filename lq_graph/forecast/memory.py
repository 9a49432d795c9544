"""The memory of a model on one device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .decoders import KINDS, Decoder
from .kernels import FLOAT

__all__ = ["Memory", "memory_of"]

ALIGNED = 512  # bytes: torch_npu's allocator gives multiples
FRACTAL = 16  # rows of a tile of FRACTAL_NZ
TILE_BYTES = 32  # and its width
# What CANN, torch_npu and the collectives hold beside a model. Assumed: no public figure.
RUNTIME = 2 * 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: with scales, embedding and head, as they are stored in ND.
        padding: that FRACTAL_NZ adds to quantized weights.
        cache: keys and values of all positions.
        workspace: the largest activations alive at a time, of a prefill of one prompt or of a step.
        runtime: of CANN and torch_npu, assumed.
        per_sequence: of cache, for one sequence more.
    """

    weights: int
    padding: int
    cache: int
    workspace: int
    runtime: int
    per_sequence: int

    @property
    def total(self) -> int:
        return self.weights + self.padding + self.cache + self.workspace + self.runtime

    def sequences_that_fit(self, memory: int) -> int:
        """How many sequences of this length fit; the workspace is taken as it is."""
        left = memory - (self.total - self.cache)
        return max(left // self.per_sequence, 0)


def memory_of(
    model: Decoder, quant: str, batch: int, positions: int, prompt: int, tp: int = 1
) -> Memory:
    """The bytes on each of tp devices.

    Args:
        positions: of the cache, for each sequence.
        prompt: tokens of a prefill, of one sequence.
    """
    bits = {FLOAT: 16, "w8a8": 8, "w4a4": 4}[quant]
    kv_heads = max(model.kv_heads // tp, 1)
    q, kv, inner = model.heads // tp * model.head, kv_heads * model.head, model.intermediate // tp
    hidden = model.hidden
    shapes = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = padding = 0
    for k, n in shapes:
        size = k * n * bits // 8
        weights += size
        if quant != FLOAT:
            weights += 4 * n  # a float32 scale for each column
            padding += nz_bytes(k, n, bits) - size
    norms = 2 * hidden + (2 * model.head if model.has_norms else 0)
    bias = q + 2 * kv if KINDS[model.kind][1] else 0
    weights += 2 * (norms + bias)
    vocab = -(-model.vocab // tp)
    # a tied head is the whole embedding on one device; with tp each has its part of the head too
    tables = model.vocab * hidden + (0 if model.tied and tp == 1 else vocab * hidden)
    total = model.layers * weights + 2 * (tables + hidden)
    each = 2 * 2 * kv * positions * model.layers
    return Memory(
        total,
        model.layers * padding,
        batch * each,
        _workspace(
            model, quant, max(prompt, batch), q + 2 * kv, inner, vocab * batch, prompt * positions
        ),
        RUNTIME,
        each,
    )


def nz_bytes(k: int, n: int, bits: int) -> int:
    """Bytes of a weight (n, k) in FRACTAL_NZ: n to a multiple of 16, k to one of 32 bytes."""
    width = TILE_BYTES * 8 // bits
    return math.ceil(n / FRACTAL) * FRACTAL * math.ceil(k / width) * width * bits // 8


def _workspace(
    model: Decoder, quant: str, rows: int, qkv: int, inner: int, logits: int, mask: int
) -> int:
    """The most that is alive at a time: the residual, the mask, and the widest product's input and
    output; the mask and its inverse; or the logits in bf16 and float32."""
    residual = 2 * rows * model.hidden
    item = 1 if quant != FLOAT else 2
    wide = 4 if quant == "w8a8" else 2  # gate and up in int32
    mlp = item * rows * model.hidden + wide * rows * 2 * inner + item * rows * inner
    attention = item * rows * model.hidden + 2 * rows * 2 * qkv
    parts = residual + max(mask + max(mlp, attention), 2 * mask), 6 * logits
    return math.ceil(max(parts) / ALIGNED) * ALIGNED
