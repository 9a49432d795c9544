"""The arithmetic of LinearQuant, written once. It imports torch, and nothing else of lq_graph.

lq_graph's CPU backend and cann_host's operators both call these functions, so an eager call on the
CPU and a compiled graph on the stand-in compute the same numbers. Nothing here decides what is
legal: lq_graph.rules does this, and cann_host.rules does it a second time for CANN, independently
and on purpose. A kernel raises OperandError for an operand that it cannot read.

The names below are what the rest of lq_graph and cann_host may use:

- `quant_layer`, activations and matmul in one call, of a form that `form_of_layer` gives;
- `quant_matmul`, its parts `matmul_int32` and `epilogue`, and `is_cut`; `library` tells whether
  the compiled kernels are used;
- int4 in int32: `storage_k` and `logical_k` for sizes, `pack_int4` and `unpack_int4` for values;
- the 64-bit scale: `pack_scale`, `unpack_scale`, `unpack_finite_scale`, `s19`, `s19_at_least`;
- weights packed beforehand: `prepare_weight`, `drop_prepared`;
- FRACTAL_NZ: `nd_to_nz`, `nz_to_nd`, `nz_shape`, `NzWeight`;
- conditions on sizes that may be symbols: `guard_or_false`; whether torch.export traces:
  `is_exporting`;
- activations: `dynamic_quant`, `dynamic_quant_with_offset`, `quantize_rows`, `static_quant`.
"""

from __future__ import annotations

from .activations import (
    Arithmetic,
    dynamic_quant,
    dynamic_quant_with_offset,
    for_rows,
    quantize_rows,
    static_quant,
)
from .errors import NotFiniteError, OperandError, PartialGroupError, ShortStorageError
from .layer import LayerForm, form_of_layer, quant_layer
from .layouts import NZ_ROW_BYTES, NzWeight, nd_to_nz, nz_shape, nz_to_nd
from .memory import check_held
from .numerics import TensorLike, epilogue, is_cut, matmul_int32, quant_matmul
from .packing import (
    INT4_PER_INT32,
    STORAGE_DTYPES,
    logical_k,
    pack_int4,
    pack_int4_in_graph,
    pack_scale,
    s19,
    s19_at_least,
    storage_k,
    unpack_finite_scale,
    unpack_int4,
    unpack_scale,
)
from .prepared import drop as drop_prepared
from .prepared import prepare as prepare_weight
from .symbolic import guard_or_false, is_exporting

__all__ = [
    "INT4_PER_INT32",
    "NZ_ROW_BYTES",
    "STORAGE_DTYPES",
    "Arithmetic",
    "LayerForm",
    "NotFiniteError",
    "NzWeight",
    "OperandError",
    "PartialGroupError",
    "ShortStorageError",
    "TensorLike",
    "check_held",
    "drop_prepared",
    "dynamic_quant",
    "dynamic_quant_with_offset",
    "epilogue",
    "for_rows",
    "form_of_layer",
    "guard_or_false",
    "is_cut",
    "is_exporting",
    "logical_k",
    "matmul_int32",
    "nd_to_nz",
    "nz_shape",
    "nz_to_nd",
    "pack_int4",
    "pack_int4_in_graph",
    "pack_scale",
    "prepare_weight",
    "quant_layer",
    "quant_matmul",
    "quantize_rows",
    "s19",
    "s19_at_least",
    "static_quant",
    "storage_k",
    "unpack_finite_scale",
    "unpack_int4",
    "unpack_scale",
]
