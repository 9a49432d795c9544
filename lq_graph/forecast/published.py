"""The kernels of models whose times others have published, as their sources have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .decoders import Decoder
from .kernels import FLOAT, Kernel, LayerWriter, Shape, embedding, head

__all__ = ["PUBLISHED", "published_kernels"]


class _Recipe(LayerWriter):
    """models/qwen of hicann/cann-recipes-infer@fbc225d2, a GE graph: q, k and v, gate and up are
    one product each, in float too. Float has SiLU and Mul; int8 an int32 product and
    DequantSwigluQuant. AddRmsNorm and DynamicQuant are two kernels."""

    def layer_norm(self, role: str) -> None:
        self.norm(role)

    def qkv(self) -> None:
        shape, head_size = self.shape, self.model.head
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        width = head_size * sum(sizes)
        self.product("qkv_proj", self.model.hidden, width)
        parts = [self.values(shape.rows, n * head_size) for n in sizes]
        self.add("SplitV", "q, k, v", [self.values(shape.rows, width)], parts)
        self.head_norms()
        query, key = self.rotated()
        angle = self.values(shape.batch, shape.queries, 1, head_size)
        self.add("ApplyRotaryPosEmb", "rope", [query, key, angle, angle], [query, key])

    def write(self) -> None:
        new, cache = self.cached()
        for _ in range(2):
            self.add("ScatterNdUpdate", "cache", [cache, ("int64", (self.shape.batch,)), new],
                     [cache])  # fmt: skip

    def mlp(self) -> None:
        m, inner, hidden = self.shape.rows, self.inner, self.model.hidden
        if self.is_float:
            self.product("gate_up_proj", hidden, 2 * inner)
            x = self.values(m, inner)
            self.pointwise("StridedSliceV2", "gate", x)
            self.pointwise("StridedSliceV2", "up", x)
            self.pointwise("Swish", "swiglu", x)
            self.pointwise("Mul", "swiglu", x, 2)
        else:
            self.int32_swiglu()
        self.product("down_proj", inner, hidden)
        self.all_reduce()

    def layer(self) -> None:
        self.layer_norm("input_layernorm")
        self.qkv()
        self.write()
        self.attend()
        if not self.is_float:
            self.quantize("o_proj", self.heads * self.model.head)
        self.product("o_proj", self.heads * self.model.head, self.model.hidden)
        self.all_reduce()
        self.layer_norm("post_attention_layernorm")
        self.mlp()


class _Captured(_Recipe):
    """vllm-ascend 0.15, a captured graph, from the kernels of its profile: split, norms of q and k,
    and rope are one Triton kernel, the cache is written by one, and float has SwiGlu."""

    def qkv(self) -> None:
        width = self.model.head * (self.heads + 2 * self.kv_heads)
        self.product("qkv_proj", self.model.hidden, width)
        x = self.values(self.shape.rows, width)
        self.pointwise("split_qkv_rmsnorm_rope", "rope", x)

    def write(self) -> None:
        new, _ = self.cached()
        self.add("ReshapeAndCacheNdKernel", "cache", [new, new], [new, new])

    def mlp(self) -> None:
        m, inner, hidden = self.shape.rows, self.inner, self.model.hidden
        self.product("gate_up_proj", hidden, 2 * inner)
        self.add("SwiGlu", "swiglu", [self.values(m, 2 * inner)], [self.values(m, inner)])
        self.product("down_proj", inner, hidden)
        self.all_reduce()


PUBLISHED: dict[str, Callable[..., _Recipe]] = {
    "cann-recipes": _Recipe,
    "vllm-ascend": _Captured,
}
_FUSIONS = ("equal_quantizations", "rms_norm", "add_rms_norm")


def published_kernels(name: str, model: Decoder, shape: Shape, quant: str) -> list[Kernel]:
    """The kernels of a step of one of PUBLISHED, without its small kernels for positions."""

    def writer() -> _Recipe:
        return PUBLISHED[name](model, shape, quant, _FUSIONS, "bfloat16")

    before, layer, after = writer(), writer(), writer()
    embedding(before)
    layer.layer()
    after.norm("norm", follower=False)
    head(after)
    if quant == FLOAT or name == "cann-recipes":  # logits in float32
        logits = -(-model.vocab // shape.tp)
        after.add("Cast", "logits", [after.values(shape.batch, logits)],
                  [("float32", (shape.batch, logits))])  # fmt: skip
    inside = [replace(one, in_layer=True, times=model.layers) for one in layer.kernels]
    return [*before.kernels, *inside, *after.kernels]
