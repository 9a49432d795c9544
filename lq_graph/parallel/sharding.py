"""How DTensor may shard lq_graph's operators.

With m, k, n of one call, for each dim of a mesh:

    column-wise   weight, scale, offset, bias on n; the output on n. Exact.
    by rows of x  x1, pertoken_scale on m; the output on m. Exact. Batch dims likewise.
    row-wise      x1, weight on k; each device has a partial sum of the output, rounded there, so
                  the sum is close to one device's, not equal. int32 output is summed exactly.

A split that would give wrong results is refused with the reason. Importing this module, or
`lq_graph.parallel`, registers the rules.

Source: torch.distributed.tensor.experimental.register_sharding.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..errors import LinearQuantValueError
from ..ops import OPERATORS, NotNeeded, load

__all__ = [
    "NO_PARTIAL_BIAS",
    "NO_PARTIAL_INT8",
    "dynamic_quant",
    "linear_quant",
    "static_quant",
    "trans_quant_param",
]

_I8 = torch.int8

# For one mesh dim: placements of the outputs and of the inputs (None if it is not a tensor).
Sharding = tuple[list[Placement], list["Placement | None"]]

NO_PARTIAL_INT8 = (
    "int8 output cannot be summed over devices: each would round and clamp its part before the "
    "sum. What to do: RowwiseLinearQuant(exact=True), which sums the int32 accumulators, a float "
    "output, or shard on n (ColwiseLinearQuant)."
)
NO_PARTIAL_BIAS = (
    "every device would add the whole bias, and the sum would contain it several times. What to "
    "do: distribute it as Partial, whole on one device and zeros on the others, as "
    "RowwiseLinearQuant does, or add it after the sum."
)


def _vector_placement(tensor: Any, sharded: bool) -> Placement | None:
    """Placement of a vector of n values, or of one value for all of n, when n is sharded or not."""
    if tensor is None:
        return None
    is_per_channel = tensor.shape[-1] != 1
    return Shard(len(tensor.shape) - 1) if sharded and is_per_channel else Replicate()


def _replicated(*tensors: Any) -> list[Placement | None]:
    return [None if tensor is None else Replicate() for tensor in tensors]


def linear_quant(
    x1: Any,
    weight: Any,
    scale: Any,
    offset: Any = None,
    pertoken_scale: Any = None,
    bias: Any = None,
    *,
    output_dtype: torch.dtype | None = None,
    float_scale: Any = None,
) -> list[Sharding]:
    def placed(**placements: Placement | None) -> list[Placement | None]:
        given = {
            "x1": x1,
            "weight": weight,
            "scale": scale,
            "offset": offset,
            "pertoken_scale": pertoken_scale,
            "bias": bias,
            **({} if float_scale is None else {"float_scale": float_scale}),
        }
        rest = {name: None if t is None else Replicate() for name, t in given.items()}
        return list({**rest, **placements}.values())

    dims = max(len(x1.shape), len(weight.shape))  # of the output
    found: list[Sharding] = [
        ([Replicate()], placed()),
        (
            [Shard(dims - 1)],
            placed(
                weight=Shard(len(weight.shape) - 2),
                scale=_vector_placement(scale, True),
                offset=_vector_placement(offset, True),
                bias=_vector_placement(bias, True),
                **(
                    {}
                    if float_scale is None
                    else {"float_scale": _vector_placement(float_scale, True)}
                ),
            ),
        ),
        (
            [Shard(dims - 2)],
            placed(
                x1=Shard(len(x1.shape) - 2),
                pertoken_scale=None if pertoken_scale is None else Shard(0),
            ),
        ),
    ]
    for dim in range(dims - 2):
        sides = {"x1": _batch_dim(x1, dim, dims), "weight": _batch_dim(weight, dim, dims)}
        if bias is not None and len(bias.shape) == 3:
            sides["bias"] = Shard(0)
        found.append(([Shard(dim)], placed(**sides)))

    on_k = placed(x1=Shard(len(x1.shape) - 1), weight=Shard(len(weight.shape) - 1))
    wanted = _mesh_dims_on_k(x1, weight)
    why_not = _why_no_partial(output_dtype or _I8, bias, wanted)
    if why_not and wanted:
        _refuse(f"x1 and weight are sharded on k: {why_not}")
    if not why_not:
        if bias is not None:
            on_k[5] = Partial()
        found.append(([Partial()], on_k))
    return found


def _batch_dim(tensor: Any, dim: int, dims: int) -> Placement:
    """Placement of an operand when output dim `dim` is sharded. The operand may lack the dim, or
    broadcast it with size 1."""
    own = dim - (dims - len(tensor.shape))
    return Shard(own) if own >= 0 and tensor.shape[own] != 1 else Replicate()


def _mesh_dims_on_k(x1: Any, weight: Any) -> list[int]:
    return [
        i
        for i, (a, b) in enumerate(zip(x1.placements, weight.placements, strict=True))
        if a.is_shard(len(x1.shape) - 1) and b.is_shard(len(weight.shape) - 1)
    ]


def _why_no_partial(output: torch.dtype, bias: Any, mesh_dims: list[int]) -> str:
    """Why a call cannot be split on k; empty if it can."""
    if output == _I8:
        return NO_PARTIAL_INT8
    if bias is None:
        return ""
    partial_dims = [i for i, p in enumerate(bias.placements) if p.is_partial()]
    return "" if partial_dims and set(mesh_dims) <= set(partial_dims) else NO_PARTIAL_BIAS


def trans_quant_param(scale: Any, offset: Any = None, round_mode: int = 0) -> list[Sharding]:
    del round_mode
    found: list[Sharding] = [([Replicate()], [*_replicated(scale, offset), None])]
    if scale.shape[-1] != 1 and len(scale.shape) == 1:
        found.append(([Shard(0)], [Shard(0), _vector_placement(offset, True), None]))
    return found


def dynamic_quant(x: Any, *, dtype: torch.dtype | None = None) -> list[Sharding]:
    # k is not split: a row's scale needs the largest magnitude of the whole row
    del dtype
    rows: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(len(x.shape) - 1))]
    return [([placement, placement], [placement]) for placement in rows]


def static_quant(
    x: Any,
    scale_reciprocal: Any,
    offset: Any = None,
    *,
    scale: Any = None,
    zero_point: Any = None,
    reciprocals: Any = None,
    zero_points: Any = None,
) -> list[Sharding]:
    last = len(x.shape) - 1
    forms = [t for t in (scale, zero_point, reciprocals, zero_points) if t is not None]
    given = (scale_reciprocal, offset, *forms)
    found: list[Sharding] = [([Replicate()], _replicated(x, *given))]
    for dim in range(last + 1):
        vectors = [_vector_placement(t, dim == last) for t in given]
        found.append(([Shard(dim)], [Shard(dim), *vectors]))
    return found


def _refuse(text: str) -> NoReturn:
    raise LinearQuantValueError(f"linear_quant: {text}")


for _operator in OPERATORS:
    if not isinstance(_operator.sharding, NotNeeded):
        register_sharding(_operator.overload)(load(_operator.sharding))
