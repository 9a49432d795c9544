"""How tensors are written to a safetensors file.

Source: safetensors' README (huggingface/safetensors), section Format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .files import CHUNK, DTYPES, bytes_of

__all__ = ["tensors_header", "write_all", "write_tensor"]


def tensors_header(tensors: Mapping[str, Tensor]) -> tuple[list[str], bytes]:
    """The order of the tensors in a safetensors file, and the bytes before them. Large dtypes come
    first, so that each tensor is aligned."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        tensor = tensors[key]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text


def write_tensor(descriptor: int, tensor: Tensor, pause: Callable[[], None]) -> None:
    """Write the bytes of a tensor, on any device and with any strides."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    write_all(descriptor, bytes_of(plain), pause)


def write_all(descriptor: int, data: Any, pause: Callable[[], None]) -> None:
    """Write bytes; `pause` is called after each chunk."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view[:CHUNK]) :]
        pause()
