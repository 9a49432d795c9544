"""Paged caches of keys and values: ScatterPaKvCache and KvRmsNormRopeCache.

Source: hicann/ops-transformer 9.1.0, attention/scatter_pa_kv_cache and
posembedding/kv_rms_norm_rope_cache: op_api for an eager call, definition and tiling under op_host.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A2, A950, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal, one_of

__all__ = [
    "CACHE_MODES",
    "KvRmsNormRopeCall",
    "ScatterPaCall",
    "check_kv_rms_norm_rope_cache",
    "check_scatter_pa_kv_cache",
    "kv_rms_norm_rope_ignores",
]

_INDICES = ("int32", "int64")
_BYTES = {"int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "float32": 4, "int32": 4}
_ROW_BYTES = 32  # of the last dim of a cache in NZ blocks
_MOST_BLOCK_SIZE_NZ = 65535

# ---- ScatterPaKvCache ----

_PA_DTYPES = {A2: ("float16", "bfloat16", "int8"), A950: tuple(_BYTES)}
_PA_MODES = ("PA_NZ", "Norm", "")


class ScatterPaCall(NamedTuple):
    """A call of ScatterPaKvCache.

    Attributes:
        soc: name of the chip.
        key, value: (tokens, heads, D).
        key_cache, value_cache: (blocks, block size, heads, D); in mode PA_NZ (blocks,
            heads * D / d0, block size, d0) or (blocks, heads, D / d0, block size, d0), where d0
            values take 32 bytes.
        slots: (tokens,), block * block size + place; a negative one is skipped.
        cache_mode, scatter_mode: attributes of those names.
        compressed: whether one of compress_lens, compress_seq_offset and seq_lens is given.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    key: TensorDesc
    key_cache: TensorDesc
    slots: TensorDesc
    value: TensorDesc
    value_cache: TensorDesc
    cache_mode: str = "Norm"
    scatter_mode: str = "None"
    compressed: bool = False
    is_graph: bool = False


@lru_cache(maxsize=4096)  # a model makes the same few calls again and again
def check_scatter_pa_kv_cache(call: ScatterPaCall) -> Refusal | None:
    """Why a ScatterPaKvCache is refused; None if it is accepted."""
    refusal = _check_pa_dtypes(call)
    if refusal is not None:
        return refusal
    if call.cache_mode not in _PA_MODES:
        return Refusal(f"cache_mode is {call.cache_mode!r}; it must be Norm or PA_NZ", TILING)
    if call.scatter_mode not in ("None", ""):
        return Refusal(f"scatter_mode {call.scatter_mode}, which cann_host does not compute", None)
    if call.compressed and soc_family(call.soc) == A950:
        return Refusal("compress_lens or seq_lens is given, which cann_host does not compute", None)
    if not call.value_cache.shape:
        return Refusal("value_cache has no dims: a key alone, which cann_host does not store", None)
    key, value, slots = call.key.shape, call.value.shape, call.slots.shape
    if len(key) != 3 or len(value) != 3 or len(slots) != 1:
        return Refusal(
            f"key has shape {key}, value {value} and slot_mapping {slots}; they must have 3, 3 and "
            "1 dims",
            TILING,
        )
    if key[:2] != value[:2]:
        return Refusal(f"key has shape {key} and value {value}; tokens and heads differ", TILING)
    for name, rows, cache in (
        ("key_cache", call.key, call.key_cache),
        ("value_cache", call.value, call.value_cache),
    ):
        if refusal := _check_pa_cache(name, rows, cache, call.cache_mode == "PA_NZ"):
            return refusal
    is_nz = call.cache_mode == "PA_NZ"
    pages = [_blocks(c.shape, is_nz) for c in (call.key_cache, call.value_cache)]
    if pages[0] != pages[1]:
        return Refusal(
            f"key_cache has shape {call.key_cache.shape} and value_cache {call.value_cache.shape}; "
            "they must have the same blocks",
            TILING,
        )
    blocks, size = pages[0]
    if blocks * size < key[0]:
        return Refusal(f"{key[0]} tokens and {blocks} blocks of {size}, too few", TILING)
    if slots[0] != key[0]:
        code = TILING if soc_family(call.soc) == A950 else None
        own = "" if code else ". CANN does not check it; cann_host does"
        return Refusal(f"slot_mapping has shape {slots}; key has {key[0]} tokens{own}", code)
    return None


def _check_pa_dtypes(call: ScatterPaCall) -> Refusal | None:
    allowed = _PA_DTYPES.get(soc_family(call.soc) or "")
    if allowed is None:
        return Refusal(f"{call.soc} does not have ScatterPaKvCache", NO_KERNEL)
    code = NO_KERNEL if call.is_graph else INVALID
    key, value = call.key.dtype, call.value.dtype
    for name, dtype, cache in (
        ("key", key, call.key_cache.dtype),
        ("value", value, call.value_cache.dtype),
    ):
        if dtype not in allowed:
            return Refusal(f"{name} is {dtype}; {call.soc} allows {one_of(allowed)}", code)
        if cache != dtype:
            return Refusal(f"{name}_cache is {cache} and {name} {dtype}", code)
    if call.slots.dtype not in _INDICES:
        return Refusal(f"slot_mapping is {call.slots.dtype}; it must be {one_of(_INDICES)}", code)
    if key != value and call.cache_mode != "PA_NZ":
        return Refusal(f"key is {key} and value {value}; they may differ in PA_NZ only", code)
    if value == "int8" and key != "int8":
        return Refusal(f"value is int8 and key {key}; key must be int8 too", TILING)
    return None


def _blocks(shape: tuple[int, ...], is_nz: bool) -> tuple[int, int]:
    """The number of blocks and their size."""
    return shape[0], shape[-2] if is_nz else shape[1]


def _check_pa_cache(name: str, rows: TensorDesc, cache: TensorDesc, is_nz: bool) -> Refusal | None:
    _, heads, d = rows.shape
    shape = cache.shape
    if not is_nz:
        if len(shape) == 4 and shape[2:] == (heads, d):
            return None
        return Refusal(f"{name} has shape {shape}; it must be (.., .., {heads}, {d})", TILING)
    d0 = _ROW_BYTES // _BYTES[rows.dtype]
    if d % d0:
        return Refusal(
            f"{name[:-6]} has shape {rows.shape}; D must take {_ROW_BYTES} bytes, or a multiple",
            TILING,
        )
    wanted = ((heads * d // d0,), (heads, d // d0))
    if len(shape) not in (4, 5) or shape[1:-2] not in wanted or shape[-1] != d0:
        return Refusal(
            f"{name} has shape {shape}; in PA_NZ it must be (.., {heads * d // d0}, .., {d0}) or "
            f"(.., {heads}, {d // d0}, .., {d0})",
            TILING,
        )
    if shape[-2] > _MOST_BLOCK_SIZE_NZ:
        return Refusal(f"{name} has blocks of {shape[-2]}, over {_MOST_BLOCK_SIZE_NZ}", TILING)
    return None


# ---- KvRmsNormRopeCache ----

# cache_mode: whether a page's index is given for each block, and whether pages are NZ blocks
CACHE_MODES = {
    "Norm": (False, False),
    "PA": (False, False),
    "PA_BNSD": (False, False),
    "PA_NZ": (False, True),
    "PA_BLK_BNSD": (True, False),
    "PA_BLK_NZ": (True, True),
}
_KV = ("float16", "bfloat16")
_ROPE_D, _NORM_D, _KV_D = 64, 512, 576  # of A2, without v
_NORM_D_V, _V_D, _HEADS_V = 192, 128, (1, 2, 4, 8)  # with v


class KvRmsNormRopeCall(NamedTuple):
    """A call of KvRmsNormRopeCache.

    Attributes:
        soc: name of the chip.
        kv: (B, N, S, D).
        gamma: factors of the norm.
        cos, sin: (B, N, S or 1, Dk).
        places: `index`, in the caches; -1 is skipped.
        k_cache, ckv_cache: (blocks, block size, N, D); in mode Norm (batches, N, length, D).
        scales, offsets: of k_cache and of ckv_cache, None if absent.
        v: (B, N, S, Dv), if k is normed and v is only stored.
        cache_mode, is_output_kv: attributes of those names.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    kv: TensorDesc
    gamma: TensorDesc
    cos: TensorDesc
    sin: TensorDesc
    places: TensorDesc
    k_cache: TensorDesc
    ckv_cache: TensorDesc
    scales: tuple[TensorDesc | None, TensorDesc | None] = (None, None)
    offsets: tuple[TensorDesc | None, TensorDesc | None] = (None, None)
    v: TensorDesc | None = None
    cache_mode: str = "Norm"
    is_output_kv: bool = False
    is_graph: bool = False

    @property
    def mode(self) -> str:
        """cache_mode as the tiling reads it: what it does not know is Norm."""
        return self.cache_mode if self.cache_mode in CACHE_MODES else "Norm"

    @property
    def rope_and_norm(self) -> tuple[int, int]:
        """D of k_cache and of ckv_cache."""
        rope, norm = self.cos.shape[-1], self.gamma.shape[0]
        return (rope, norm) if self.v is None else (norm, self.v.shape[-1])


def kv_rms_norm_rope_ignores(call: KvRmsNormRopeCall) -> str | None:
    """What an accepted KvRmsNormRopeCache does not do, if there is something."""
    if call.cache_mode not in CACHE_MODES:
        return f"cache_mode {call.cache_mode!r} is taken as Norm"
    if soc_family(call.soc) != A2:
        return None
    if call.is_output_kv and call.mode == "Norm" and call.scales == (None, None):
        return f"k_rope and c_kv are not written in cache_mode Norm on {call.soc}"
    if call.v is None and call.offsets != (None, None):
        return f"k_rope_offset and c_kv_offset have no effect on {call.soc}"
    return None


@lru_cache(maxsize=4096)
def check_kv_rms_norm_rope_cache(call: KvRmsNormRopeCall) -> Refusal | None:
    """Why a KvRmsNormRopeCache is refused; None if it is accepted."""
    family = soc_family(call.soc)
    if family not in (A2, A950):
        return Refusal(f"{call.soc} does not have KvRmsNormRopeCache", NO_KERNEL)
    refusal = _check_kv_dtypes(call) or _check_kv_shapes(call)
    if refusal is not None:
        return refusal
    if family == A2:
        refusal = _check_kv_a2(call)
    elif call.v is not None:
        refusal = Refusal(f"v is given on {call.soc}, which cann_host does not compute", None)
    elif call.cos.shape[-1] % 2 or call.kv.shape[1] != 1:
        refusal = Refusal(
            f"kv has shape {call.kv.shape} and cos {call.cos.shape}; N must be 1 and D of cos even",
            TILING,
        )
    return refusal or _check_kv_caches(call) or _check_scales(call)


def _check_kv_dtypes(call: KvRmsNormRopeCall) -> Refusal | None:
    code = NO_KERNEL if call.is_graph else INVALID
    kv = call.kv.dtype
    if kv not in _KV:
        return Refusal(f"kv is {kv}; {call.soc} allows {one_of(_KV)}", code)
    same = {"gamma": call.gamma, "cos": call.cos, "sin": call.sin}
    if call.v is not None:
        same["v"] = call.v
    for name, tensor in same.items():
        if tensor.dtype != kv:
            return Refusal(f"{name} is {tensor.dtype} and kv {kv}", code)
    if call.places.dtype != "int64":
        return Refusal(f"index is {call.places.dtype}; it must be int64", code)
    parts = zip(
        ("k", "ckv"), (call.k_cache, call.ckv_cache), call.scales, call.offsets, strict=True
    )
    for name, cache, scale, offset in parts:
        if cache.dtype not in (kv, "int8"):
            return Refusal(f"{name}_cache is {cache.dtype}; it must be {kv} or int8", code)
        for factor in (scale, offset):
            if factor is not None and factor.dtype != "float32":
                return Refusal(
                    f"scale or offset of {name}_cache is {factor.dtype}; it must be float32", code
                )
        if (cache.dtype == "int8") != (scale is not None):
            return Refusal(
                f"{name}_cache is {cache.dtype} and its scale "
                f"{'absent' if scale is None else 'given'}, which cann_host does not compute",
                None,
            )
    return None


def _check_kv_shapes(call: KvRmsNormRopeCall) -> Refusal | None:
    tensors = {
        "kv": call.kv,
        "cos": call.cos,
        "sin": call.sin,
        "k_cache": call.k_cache,
        "ckv_cache": call.ckv_cache,
    }
    if call.v is not None:
        tensors["v"] = call.v
    for name, tensor in tensors.items():
        if len(tensor.shape) != 4 or 0 in tensor.shape:
            return Refusal(f"{name} has shape {tensor.shape}; it must have 4 dims, not 0", TILING)
    if len(call.gamma.shape) != 1 or 0 in call.gamma.shape:
        return Refusal(f"gamma has shape {call.gamma.shape}; it must have one dim", TILING)
    b, n, s, _ = call.kv.shape
    if call.cos.shape != call.sin.shape or call.cos.shape[:3] not in ((b, n, s), (b, n, 1)):
        return Refusal(
            f"kv has shape {call.kv.shape}, cos {call.cos.shape} and sin {call.sin.shape}; cos and "
            f"sin must be ({b}, {n}, {s} or 1, ..)",
            TILING,
        )
    if call.v is not None and call.v.shape[:3] != (b, n, s):
        return Refusal(f"v has shape {call.v.shape} and kv {call.kv.shape}", TILING)
    by_block, _ = CACHE_MODES[call.mode]
    size = call.k_cache.shape[1]
    wanted = b * (-(-s // size) if by_block else s)
    count = 1
    for dim in call.places.shape:
        count *= dim
    if count != wanted:
        return Refusal(
            f"index has shape {call.places.shape}; cache_mode {call.mode} needs {wanted} values",
            TILING,
        )
    return None


def _check_kv_a2(call: KvRmsNormRopeCall) -> Refusal | None:
    """kv_rms_norm_rope_cache_ds_tiling.cpp"""
    kv, n, norm = call.kv.shape[-1], call.kv.shape[1], call.gamma.shape[0]
    sizes = f"D of kv is {kv}, of gamma {norm} and of cos {call.cos.shape[-1]}"
    if call.cos.shape[-1] != _ROPE_D or norm != (_NORM_D if call.v is None else _NORM_D_V):
        wanted = _NORM_D if call.v is None else _NORM_D_V
        return Refusal(f"{sizes}; gamma must have {wanted} and cos {_ROPE_D}", TILING)
    if call.v is None:
        if n != 1:
            return Refusal(f"kv has {n} heads; without v it must have 1", TILING)
        if kv != _KV_D:
            return Refusal(f"{sizes}; kv must have {_KV_D}", TILING)
        if call.mode == "Norm" and call.scales != (None, None):
            return Refusal("a scale is given in cache_mode Norm", TILING)
        return None
    if n not in _HEADS_V:
        return Refusal(
            f"kv has {n} heads; with v it must have {one_of(map(str, _HEADS_V))}", TILING
        )
    if call.v.shape[-1] != _V_D:
        return Refusal(f"v has shape {call.v.shape}; its D must be {_V_D}", TILING)
    if kv != _NORM_D_V:
        return Refusal(f"{sizes}; CANN does not check kv, cann_host takes {_NORM_D_V}", None)
    return None


def _check_kv_caches(call: KvRmsNormRopeCall) -> Refusal | None:
    """A2's tiling does not look at the caches; its kernel would write outside."""
    family = soc_family(call.soc)
    code = TILING if family == A950 else None
    own = "" if code else " (refused by cann_host)"
    b, n, _, kv = call.kv.shape
    rope, norm = call.rope_and_norm
    if call.v is None and rope + norm != kv:
        return Refusal(
            f"D of kv is {kv}, and {rope} + {norm} of cos and gamma (refused by cann_host)", None
        )
    _, is_nz = CACHE_MODES[call.mode]
    for name, cache, d in (("k_cache", call.k_cache, rope), ("ckv_cache", call.ckv_cache, norm)):
        batches, first, second, last = cache.shape
        heads, length = (first, second) if call.mode == "Norm" else (second, first)
        if heads != n or last != d or (call.mode == "Norm" and batches < b):
            return Refusal(
                f"{name} has shape {cache.shape} and kv {call.kv.shape}; in mode {call.mode} it "
                f"must have {n} heads of {d}{own}",
                code,
            )
        d0 = _ROW_BYTES // _BYTES[cache.dtype]
        if is_nz and d % d0:
            return Refusal(f"D of {name} is {d}; in NZ blocks a multiple of {d0}", TILING)
        if family == A950 and call.mode != "Norm" and length % d0:
            return Refusal(f"{name} has blocks of {length}; it must be a multiple of {d0}", TILING)
    if call.k_cache.shape[1:3] != call.ckv_cache.shape[1:3]:
        return Refusal(
            f"k_cache has shape {call.k_cache.shape} and ckv_cache {call.ckv_cache.shape}; their "
            "blocks must have the same size (refused by cann_host)",
            None,
        )
    return None


def _check_scales(call: KvRmsNormRopeCall) -> Refusal | None:
    n = call.kv.shape[1]
    parts = zip(("k", "ckv"), call.rope_and_norm, call.scales, call.offsets, strict=True)
    for name, d, scale, offset in parts:
        allowed = [(d,), (n, d)] + ([(1,)] if soc_family(call.soc) == A950 else [])
        for factor in (scale, offset):
            if factor is not None and factor.shape not in allowed:
                return Refusal(
                    f"scale or offset of {name}_cache has shape {factor.shape}; it must be "
                    f"{one_of(map(str, allowed))}",
                    TILING,
                )
    dims = {len(scale.shape) for scale in call.scales if scale is not None}
    if soc_family(call.soc) == A2 and len(dims) > 1:
        return Refusal("the scales must have equally many dims", TILING)
    return None
