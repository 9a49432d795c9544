"""A cache of keys and values that a step writes in place.

All positions are kept, also in layers with a sliding window: their mask holds the window. So the
shapes of every step are the same, and a graph is compiled once.

A step of one token is one ScatterPaKvCache for keys and values. A prompt is a ScatterUpdate each,
and so is every step where ScatterPaKvCache is not to be had; the memory is then in another order.
What transformers sees is the same.

Sources: hicann/ops-transformer attention/scatter_pa_kv_cache (document, definition, kernel);
Ascend/op-plugin torch_npu-npu_scatter_pa_kv_cache.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer

from ..backends.compat_npu import find_operator
from ..rules.products import get_product
from ..rules.tables import A2, A3
from .compat import NO_CACHE, layer_kinds, no_cache

__all__ = ["StaticCache"]

# how transformers names layers whose cache is keys and values of all, or of the last, positions
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")

# ScatterPaKvCache; it is for Ascend 950 too, where attention is not one operator
_PRODUCTS = (A2, A3)
_DTYPES = (torch.float16, torch.bfloat16)


class _Progress:
    """How far a cache is written, which its layers share: no layer counts by itself.

    Attributes:
        size: positions that the cache has.
        length: int64 (batch,), positions written; None before the first step. One value for each
            row, because the operator takes it so; the values are equal.
        first: int64 (batch,), the slot of each row's first position: batch * size.
        place: int64 (batch,), where this step writes; None between two steps.
        slots: int64 (batch,), the same for ScatterPaKvCache: batch * size + position. None until a
            layer of the step asks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.length: Tensor | None = None
        self.first: Tensor | None = None
        self.place: Tensor | None = None
        self.slots: Tensor | None = None

    def start(self, batch: int, device: torch.device) -> None:
        if self.length is None:
            self.length = torch.zeros(batch, dtype=torch.int64, device=device)
            self.first = torch.arange(batch, dtype=torch.int64, device=device) * self.size
            _keep_address(self.length)
            _keep_address(self.first)
        elif self.length.shape[0] != batch or self.length.device != device:
            raise ValueError(
                f"lq_graph: the cache has a batch of {self.length.shape[0]} on "
                f"{self.length.device}, and a layer one of {batch} on {device}"
            )

    def check_room(self, tokens: int) -> None:
        """Refuse a step that does not fit. A graph cannot: its step gives NaN, see `begin`."""
        if torch.compiler.is_compiling() or self.length is None or _is_capturing(self.length):
            written = 0
        else:
            written = int(self.length[0])
        if written + tokens > self.size:
            raise ValueError(
                f"lq_graph: the cache has {self.size} positions; {written} are written and {tokens}"
                " more do not fit. What to do: make it with a larger max_cache_len."
            )

    def begin(self, key: Tensor) -> Tensor:
        """Where this step writes, when its first layer does.

        Returns:
            The keys; NaN if the step does not fit, so that its logits are NaN too.
        """
        if self.place is not None:
            raise RuntimeError(
                "lq_graph: the last step did not reach the last layer of this cache, so it is not "
                "known what is written. What to do: cache.reset()."
            )
        tokens = key.shape[2]
        self.check_room(tokens)
        assert self.length is not None  # of a layer that is initialized
        self.place = self.length
        if torch.compiler.is_compiling():
            # never outside of the cache: the operator does not check it
            self.place = self.length.clamp(max=self.size - tokens)
            fits = self.place == self.length
            key = torch.where(fits[:, None, None, None], key, torch.nan)
        return key

    def one_slot(self) -> Tensor:
        """The slots of a step of one token, made once for all layers."""
        if self.slots is None:
            assert self.place is not None and self.first is not None
            self.slots = self.first + self.place
        return self.slots

    def end(self, tokens: int) -> None:
        """The last layer is written."""
        assert self.length is not None
        self.length.add_(tokens)
        if torch.compiler.is_compiling():
            self.length.clamp_(max=self.size + 1)  # what did not fit once never fits again
        self.place = self.slots = None


class _Layer(StaticLayer):
    """Keys and values of one layer.

    Attributes:
        whole_keys, whole_values: the memory, None before the first step: (batch, positions, kv
            heads, head size) if `is_paged`, else (batch, kv heads, positions, head size).
        is_paged: whether ScatterPaKvCache writes them. For it, a row of the batch is a block.
    """

    def __init__(self, progress: _Progress, *, is_first: bool, is_last: bool) -> None:
        # not StaticLayer's: it would count by itself
        self.whole_keys: Tensor | None = None
        self.whole_values: Tensor | None = None
        self.is_paged = False
        self.is_initialized = False
        self.max_cache_len = progress.size
        self.progress, self.is_first, self.is_last = progress, is_first, is_last

    # views of the memory for transformers: (batch, kv heads, positions, head size)
    keys: Any = property(lambda self: self._seen(self.whole_keys))
    values: Any = property(lambda self: self._seen(self.whole_values))

    def _seen(self, whole: Tensor | None) -> Tensor | None:
        return whole.transpose(1, 2) if whole is not None and self.is_paged else whole

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Take the memory. Older transformers give no values: they are then like the keys."""
        value_states = key_states if value_states is None else value_states
        self.device = key_states.device
        self.progress.start(key_states.shape[0], key_states.device)
        self.is_paged = _is_paged(key_states, value_states)
        for name, new in (("whole_keys", key_states), ("whole_values", value_states)):
            batch, heads, _, size = new.shape
            rows = (self.max_cache_len, heads) if self.is_paged else (heads, self.max_cache_len)
            shape = (batch, *rows, size)
            setattr(self, name, torch.zeros(shape, dtype=new.dtype, device=new.device))
            _keep_address(getattr(self, name))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new positions; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.whole_keys is not None and self.whole_values is not None
        progress = self.progress
        if self.is_first:
            key_states = progress.begin(key_states)
        if progress.place is None:
            raise RuntimeError(
                "lq_graph: a layer of the cache is written before the first one, so it is not "
                "known where"
            )
        pairs = ((self.whole_keys, key_states), (self.whole_values, value_states))
        for whole, new in pairs:
            if whole.shape[0] != new.shape[0]:
                raise ValueError(
                    f"lq_graph: the cache has a batch of {whole.shape[0]}, and the step of "
                    f"{new.shape[0]}"
                )
        if self.is_paged and key_states.shape[2] == 1:
            torch.ops.npu.npu_scatter_pa_kv_cache(
                *(_one_token(new) for _, new in pairs),
                self.whole_keys,
                self.whole_values,
                progress.one_slot(),
                cache_mode="Norm",
            )
        else:
            for whole, new in pairs:
                _write(whole, progress.place, new, is_paged=self.is_paged)
        if self.is_last:
            progress.end(key_states.shape[2])
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Keys of a mask, and the first's position. Older transformers give the positions of the
        queries."""
        count = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        self.progress.check_room(count)
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """The positions written: a tensor, because a graph must not depend on its value."""
        length = self.progress.length
        return 0 if length is None else length[0]

    def reset(self) -> None:
        for whole in (self.whole_keys, self.whole_values):
            if whole is not None:
                whole.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search, in place: a graph has the addresses."""
        for whole in (self.whole_keys, self.whole_values):
            if whole is not None:
                whole.copy_(whole.index_select(0, beam_idx.to(whole.device)))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("lq_graph: crop the cache, not one layer")


class StaticCache(Cache):
    """transformers' StaticCache for graphs on an NPU: `model(..., past_key_values=cache)`, and
    `generate(past_key_values=cache)`.

    A step of one token writes keys and values of a layer in place with one ScatterPaKvCache, in
    float16 and bfloat16 on Atlas A2 and A3; other steps with one ScatterUpdate each. No shape and
    no number of the graph depends on the position.

    A step that does not fit is refused when it runs eagerly, and when `generate` prepares it. A
    graph cannot refuse it: nothing is written outside, and all logits are NaN until `reset`.

    Args:
        config: of the model.
        max_cache_len: positions of prompt and text together.

    Raises:
        NotImplementedError: a layer's cache is not one of keys and values.
    """

    def __init__(self, config: Any, max_cache_len: int) -> None:
        kinds = layer_kinds(config)
        if wrong := [(i, kind) for i, kind in enumerate(kinds) if kind not in (*_KINDS, NO_CACHE)]:
            raise NotImplementedError(
                f"lq_graph: layer {wrong[0][0]} is {wrong[0][1]!r}; lq_graph's cache has keys and "
                "values only. What to do: use transformers' StaticCache."
            )
        own = [i for i, kind in enumerate(kinds) if kind != NO_CACHE]
        self.progress = _Progress(max_cache_len)
        super().__init__(
            layers=[
                no_cache()
                if kind == NO_CACHE
                else _Layer(self.progress, is_first=i == own[0], is_last=i == own[-1])
                for i, kind in enumerate(kinds)
            ]
        )

    def reset(self) -> None:
        """Forget all positions; the memory stays where it is."""
        super().reset()
        self.progress.place = self.progress.slots = None
        if self.progress.length is not None:
            self.progress.length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions.

        Args:
            tokens_to_remove: minus their number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"lq_graph: crop takes minus the number, not {tokens_to_remove}")
        if self.progress.length is not None:
            self.progress.length.add_(tokens_to_remove)


def _is_paged(key: Tensor, value: Tensor) -> bool:
    """Whether one ScatterPaKvCache can write keys and values."""
    if key.device.type != "npu" or key.dtype not in _DTYPES or value.dtype != key.dtype:
        return False
    return key.shape[1] == value.shape[1] and _has_scatter_pa()


@torch.compiler.assume_constant_result
def _has_scatter_pa() -> bool:
    """Older ones of torch_npu write blocks of FRACTAL_NZ only: their operator has no cache_mode."""
    if get_product() not in _PRODUCTS:
        return False
    functional = "npu_scatter_pa_kv_cache_functional"  # what torchair converts
    return find_operator(functional, "cache_mode") is not None


def _one_token(new: Tensor) -> Tensor:
    """(batch, kv heads, 1, head size) as (batch, kv heads, head size). Contiguous: the kernel does
    not read strides.

    It takes several tokens too, but as (batch * tokens, kv heads, head size). Of the transpose and
    the view to that, torchair drops the transpose where torch's tensor has this order in memory
    already; GE's tensor has not.
    """
    return new.reshape(new.shape[0], new.shape[1], new.shape[3]).contiguous()


def _write(whole: Tensor, place: Tensor, new: Tensor, *, is_paged: bool) -> None:
    """Write (batch, kv heads, tokens, head size) from position `place` on."""
    if whole.device.type != "npu":
        at = torch.arange(new.shape[2], device=whole.device) + place[0]
        whole.index_copy_(2, at, new)
    elif is_paged:
        torch.ops.npu.scatter_update_(whole, place, new.transpose(1, 2), 1)
    else:
        torch.ops.npu.scatter_update_(whole, place, new, -2)


def _keep_address(x: Tensor) -> None:
    """A graph may then write into it without copies."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)


def _is_capturing(x: Tensor) -> bool:
    """Whether a graph is captured, when the host must not wait for a value."""
    if x.device.type != "npu":
        return False
    npu: Any = torch.get_device_module(x.device)
    return bool(npu.is_current_stream_capturing())
