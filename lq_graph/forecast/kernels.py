"""The kernels of a decoder, as our GE graphs have them.

A test compares these lists with what `explain` finds. Where they differ from a GE graph on purpose:
the Transpose of a float weight is left out, for a product reads a transposed weight (a published
step of a float model, 15.1 GB in 15.5 ms, has no time for one).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ..errors import LinearQuantValueError
from .decoders import Decoder

__all__ = [
    "FLOAT",
    "FUSIONS",
    "QUANTS",
    "Kernel",
    "LayerWriter",
    "Shape",
    "embedding",
    "head",
    "step_kernels",
]

Spec = tuple[str, tuple[int, ...]]

FLOAT = "bf16"
QUANTS = (FLOAT, "w8a8", "w4a4")  # per token, dynamic
_DTYPES = {"w8a8": "int8", "w4a4": "int4"}
# as `lq_graph.set_fusion` names them, and the merging of weights that read one tensor
FUSIONS = (
    "merge",
    "equal_quantizations",
    "rope",
    "rms_norm",
    "add_rms_norm",
    "add_rms_norm_dynamic_quant",
    "swiglu",
)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a step.

    Attributes:
        op: the op type of GE, or a collective.
        role: what it is in the model: "qkv_proj".
        inputs, outputs: dtype and shape of each tensor.
        message: bytes of a collective; 0 for kernels.
        in_layer: whether it belongs to the layers, and not to what they share.
        times: how many there are in a step.
    """

    op: str
    role: str
    inputs: tuple[Spec, ...] = ()
    outputs: tuple[Spec, ...] = ()
    message: int = 0
    in_layer: bool = False
    times: int = 1


@dataclass(frozen=True)
class Shape:
    """What a step computes: `queries` new tokens for each of `batch` sequences, each of which then
    reads `context` positions. `tp` devices share the model."""

    batch: int
    queries: int
    context: int
    tp: int = 1

    @property
    def rows(self) -> int:
        return self.batch * self.queries


@dataclass
class LayerWriter:
    """Writes the kernels of a layer down, one after the other."""

    model: Decoder
    shape: Shape
    quant: str
    fusions: Collection[str]
    float_dtype: str

    def __post_init__(self) -> None:
        tp = self.shape.tp
        self.kernels: list[Kernel] = []
        self.heads = self.model.heads // tp
        self.kv_heads = max(self.model.kv_heads // tp, 1)  # fewer heads than devices: copies
        self.inner = self.model.intermediate // tp
        self.dtype = _DTYPES.get(self.quant, self.float_dtype)
        self.is_float = self.quant == FLOAT
        # our merging is of quantized layers
        self.merged = "merge" in self.fusions and not self.is_float

    def on(self, name: str) -> bool:
        return name in self.fusions

    def add(self, op: str, role: str, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        self.kernels.append(Kernel(op, role, tuple(inputs), tuple(outputs)))

    def values(self, *sizes: int, dtype: str = "") -> Spec:
        return dtype or self.float_dtype, sizes

    def pointwise(self, op: str, role: str, spec: Spec, inputs: int = 1) -> None:
        self.add(op, role, [spec] * inputs, [spec])

    def quantize(self, role: str, k: int) -> None:
        m = self.shape.rows
        out = [self.values(m, k, dtype=self.dtype), ("float32", (m,))]
        self.add("DynamicQuant", role, [self.values(m, k)], out)

    def product(self, role: str, k: int, n: int, output: str = "") -> None:
        m = self.shape.rows
        x1, weight = self.values(m, k, dtype=self.dtype), self.values(n, k, dtype=self.dtype)
        out = [self.values(m, n, dtype=output)]
        if self.is_float:
            self.add("BatchMatMul", role, [x1, weight], out)
            return
        scales: list[Spec] = [("float32", (n,)), ("float32", (m,))]
        self.add("QuantBatchMatmulV3", role, [x1, weight, *scales[: 1 if output else 2]], out)

    def norm(self, role: str, follower: bool = True, residual: bool = True) -> None:
        """A norm, the sum before it, and the quantization of its result."""
        m, hidden = self.shape.rows, self.model.hidden
        x, weight, rstd = self.values(m, hidden), self.values(hidden), ("float32", (m, 1))
        # else each of q, k, v (gate, up) quantizes its own input
        once = self.merged or self.on("equal_quantizations")
        quantized = follower and once and not self.is_float
        if not self.on("rms_norm"):
            if residual:
                self.pointwise("Add", f"residual of {role}", x, 2)
            self.norm_pieces(role, x)
        elif residual and self.on("add_rms_norm"):
            if quantized and self.dtype == "int8" and self.on("add_rms_norm_dynamic_quant"):
                out: list[Spec] = [("int8", (m, hidden)), x, ("float32", (m,))]
                self.add("AddRmsNormDynamicQuant", role, [x, x, weight], out)
                return
            self.add("AddRmsNorm", role, [x, x, weight], [x, rstd, x])
        else:
            if residual:
                self.pointwise("Add", f"residual of {role}", x, 2)
            self.add("RmsNorm", role, [x, weight], [x, rstd])
        if quantized:
            self.quantize(role, hidden)

    def norm_pieces(self, role: str, x: Spec) -> None:
        wide: Spec = ("float32", x[1])
        mean: Spec = ("float32", (*x[1][:-1], 1))
        self.add("Cast", role, [x], [wide])
        self.pointwise("Pow", role, wide)
        self.add("ReduceMean", role, [wide], [mean])
        self.pointwise("Add", role, mean)
        self.pointwise("Rsqrt", role, mean)
        self.add("Mul", role, [wide, mean], [wide])
        self.pointwise("Cast", role, wide)
        self.add("Cast", role, [wide], [x])
        self.pointwise("Mul", role, x)
        self.pointwise("Cast", role, x)

    def rotated(self) -> tuple[Spec, Spec]:
        """Query and key."""
        batch, s, head = self.shape.batch, self.shape.queries, self.model.head
        return self.values(batch, s, self.heads, head), self.values(batch, s, self.kv_heads, head)

    def head_norms(self) -> None:
        """The norms of queries and keys, if the model has them."""
        if not self.model.has_norms:
            return
        for role, x in zip(("q_norm", "k_norm"), self.rotated(), strict=True):
            if self.on("rms_norm"):
                rstd: Spec = ("float32", (*x[1][:-1], 1))
                self.add("RmsNorm", role, [x, self.values(self.model.head)], [x, rstd])
            else:
                self.norm_pieces(role, x)

    def rope(self) -> None:
        head = self.model.head
        angle = self.values(self.shape.batch, self.shape.queries, 1, head)
        query, key = self.rotated()
        if self.on("rope"):
            if self.is_float:  # query and key are results of two products
                for role, x in (("q", query), ("k", key)):
                    self.add("RotaryMul", f"rope of {role}", [x, angle, angle], [x])
                return
            self.add("ApplyRotaryPosEmb", "rope", [query, key, angle, angle], [query, key])
            return
        for role, (_, sizes) in (("q", query), ("k", key)):
            x = self.values(*sizes)
            half = self.values(*sizes[:-1], head // 2)
            for _ in range(2):
                self.add("Mul", f"rope of {role}", [x, angle], [x])
                self.pointwise("Cast", f"rope of {role}", x)
                self.add("StridedSliceV2", f"rope of {role}", [half], [half])
            self.pointwise("Neg", f"rope of {role}", half)
            self.add("ConcatV2", f"rope of {role}", [half, half], [x])
            self.pointwise("Add", f"rope of {role}", x, 2)

    def cached(self) -> tuple[Spec, Spec]:
        """New keys, and the part of their cache that a step reads; values have the same."""
        batch, head = self.shape.batch, self.model.head
        new = self.values(batch, self.shape.queries, self.kv_heads, head)
        return new, self.values(batch, self.shape.context, self.kv_heads, head)

    def attention(self) -> None:
        new, cache = self.cached()
        slots: Spec = ("int64", (self.shape.batch,))
        if self.shape.queries == 1:  # one kernel writes keys and values
            caches = [new, cache, slots, new, cache]
            self.add("ScatterPaKvCache", "cache", caches, [cache, cache])
        else:
            for _ in range(2):
                self.add("Scatter", "cache", [cache, slots, new], [cache])
        self.attend()

    def attend(self) -> None:
        _, cache = self.cached()
        query, _ = self.rotated()
        self.add("FusedInferAttentionScore", "attention", [query, cache, cache], [query])

    def attention_block(self) -> None:
        hidden, head = self.model.hidden, self.model.head
        q, kv = self.heads * head, self.kv_heads * head
        self.inputs({"q_proj": q, "k_proj": kv, "v_proj": kv}, "qkv_proj", hidden)
        if self.merged:
            m = self.shape.rows
            parts = [self.values(m, n) for n in (q, kv, kv)]
            self.add("SplitV", "q, k, v", [self.values(m, q + 2 * kv)], parts)
        self.head_norms()
        self.rope()
        self.attention()
        if not self.is_float:
            self.quantize("o_proj", q)
        self.product("o_proj", q, hidden)
        self.all_reduce()

    def inputs(self, parts: dict[str, int], merged: str, k: int) -> None:
        """Products that read one tensor."""
        if self.merged:
            self.product(merged, k, sum(parts.values()))
            return
        for role, n in parts.items():
            if not self.is_float and not self.on("equal_quantizations"):
                self.quantize(role, k)
            self.product(role, k, n)

    def mlp(self) -> None:
        m, k, inner = self.shape.rows, self.model.hidden, self.inner
        x, both = self.values(m, inner), self.values(m, 2 * inner)
        fused = self.merged and self.on("swiglu") and self.on("equal_quantizations")
        if fused and self.dtype == "int8":
            self.int32_swiglu()
        else:
            self.inputs({"gate_proj": inner, "up_proj": inner}, "gate_up_proj", k)
            if fused:
                self.add("SwiGlu", "swiglu", [both], [x])
            else:
                if self.merged:
                    self.add("SplitV", "gate, up", [both], [x, x])
                self.pointwise("Swish", "swiglu", x)
                self.pointwise("Mul", "swiglu", x, 2)
                self.pointwise("Cast", "swiglu", x)
            if not self.is_float:
                self.quantize("down_proj", inner)
        self.product("down_proj", inner, k)
        self.all_reduce()

    def int32_swiglu(self) -> None:
        """gate and up as one product in int32, and what dequantizes and quantizes around SwiGLU."""
        m, inner = self.shape.rows, self.inner
        self.product("gate_up_proj", self.model.hidden, 2 * inner, "int32")
        read: list[Spec] = [("int32", (m, 2 * inner)), ("float32", (2 * inner,)), ("float32", (m,))]
        out: list[Spec] = [("int8", (m, inner)), ("float32", (m,))]
        self.add("DequantSwigluQuant", "swiglu", read, out)

    def all_reduce(self) -> None:
        if self.shape.tp > 1:
            message = 2 * self.shape.rows * self.model.hidden
            self.kernels.append(Kernel("allReduce", "sum over devices", message=message))


def check_shared(model: Decoder, tp: int) -> None:
    """Raises:
    LinearQuantValueError: tp devices cannot share the model.
    """
    if tp < 1:
        raise LinearQuantValueError(f"forecast: tp is {tp}; it has to be a whole number from 1")
    for what, size in (("heads", model.heads), ("columns of gate and up", model.intermediate)):
        if size % tp:
            raise LinearQuantValueError(
                f"forecast: {tp} devices cannot share the {size} {what} of {model.name}; tp has to "
                "divide them"
            )
    if model.kv_heads % tp and tp % model.kv_heads:
        raise LinearQuantValueError(
            f"forecast: {tp} devices cannot share the {model.kv_heads} kv heads of {model.name}; "
            "one number has to divide the other"
        )


def step_kernels(
    model: Decoder,
    shape: Shape,
    quant: str,
    fusions: Collection[str] = FUSIONS,
    float_dtype: str = "bfloat16",
) -> list[Kernel]:
    """The kernels of a step: what comes before the layers, one layer, and what comes after.

    Raises:
        LinearQuantValueError: shape.tp devices cannot share the model.
    """
    check_shared(model, shape.tp)

    def writer() -> LayerWriter:
        return LayerWriter(model, shape, quant, fusions, float_dtype)

    before, norm, layer, after = writer(), writer(), writer(), writer()
    embedding(before)
    positions(before)
    before.norm("input_layernorm", residual=False)  # the first layer has no sum before its norm
    norm.norm("input_layernorm")
    layer.attention_block()
    layer.norm("post_attention_layernorm")
    layer.mlp()
    after.norm("norm", follower=False)
    head(after)
    return [
        *before.kernels,
        *(replace(one, in_layer=True, times=model.layers - 1) for one in norm.kernels),
        *(replace(one, in_layer=True, times=model.layers) for one in layer.kernels),
        *after.kernels,
    ]


def embedding(to: LayerWriter) -> None:
    """Rows of the embedding's table."""
    shape, model = to.shape, to.model
    ids: Spec = ("int64", (shape.batch, shape.queries))
    table = to.values(model.vocab, model.hidden)
    to.add("GatherV2", "embed_tokens", [table, ids], [to.values(shape.rows, model.hidden)])


def head(to: LayerWriter) -> None:
    """The head, of the last token, in float. Each device has a part of its columns."""
    batch, hidden, tp = to.shape.batch, to.model.hidden, to.shape.tp
    vocab = -(-to.model.vocab // tp)
    x = to.values(batch, hidden)
    if to.shape.queries > 1:
        to.pointwise("StridedSliceV2", "last token", x)
    to.add("BatchMatMul", "lm_head", [x, to.values(vocab, hidden)], [to.values(batch, vocab)])
    if tp > 1:
        to.kernels.append(Kernel("allGather", "logits", message=2 * batch * vocab))


def positions(to: LayerWriter) -> None:
    """Small kernels that all layers share: position, mask, angles."""
    shape, width = to.shape, to.model.head
    one: Spec = ("int64", (1,))
    places: Spec = ("int64", (shape.context,))
    angle: Spec = ("float32", (shape.queries, width))
    mask: Spec = ("bool", (shape.queries, shape.context))
    key = to.values(shape.batch, shape.queries, to.kv_heads, width)
    more = 0 if to.fusions else 1  # views and casts that change nothing are left
    counts: list[tuple[str, Spec, dict[str, int]]] = [
        ("position", one, {"GatherV2": 2, "Range": 1 + more, "Add": 3, "ClipByValueV2": 2}),
        ("position", one, {"Cast": 1 + more, "Equal": 1}),
        ("position", key, {"SelectV2": 1}),
        ("mask", places, {"Range": 1, "Cast": 1, "Add": 2}),
        ("mask", mask, {"LessEqual": 1, "LogicalNot": 1}),
        ("angles", angle, {"Mul": 1 + 2 * more, "ConcatV2": 1, "Cos": 1, "Sin": 1}),
        ("angles", angle, {"Cast": 5 + 2 * more}),
    ]
    for role, spec, kinds in counts:
        for op, count in kinds.items():
            for _ in range(count):
                to.pointwise(op, role, spec)
