"""Tensor parallelism: LinearQuant over several devices, by torch.distributed.

    parallelize_module(model, mesh, {"up": ColwiseLinearQuant(), "down": RowwiseLinearQuant()})

Importing this module teaches DTensor how lq_graph's operators may be sharded. With m, k, n of one
call, for each dim of a mesh:

    column-wise   weight, scale, offset, bias on n; the output on n. Exact.
    by rows of x  x1, pertoken_scale on m; the output on m. Exact. Batch dims likewise.
    row-wise      x1, weight on k; each device has a partial sum of the output.

A row-wise output is rounded on every device before the sum, so it is close to one device's, not
equal; int8 output cannot be summed at all. `RowwiseLinearQuant(exact=True)` sums int32 accumulators
instead and scales after: equal bit for bit, at 4 bytes for each output element on the wire instead
of 2.

Source: torch.distributed.tensor.experimental.register_sharding, torch.distributed.tensor.parallel.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle

from . import numerics
from .errors import LinearQuantTypeError, LinearQuantValueError
from .formats import FRACTAL_NZ, STORAGE_DTYPES, dtype_name, rows_of
from .module import PARAMETERS, LinearQuant
from .npu import format_of
from .plan import check_finite
from .prepare import folds_scale
from .product import get_product
from .quantized_linear import QuantizedLinear

__all__ = ["ColwiseLinearQuant", "LinearQuantStyle", "RowwiseLinearQuant", "layer_in"]

_linear_quant = torch.ops.lq_graph.linear_quant.default
_I8, _I32 = torch.int8, torch.int32

# ---- how the operators may be sharded ----

# For one mesh dim: placements of the outputs and of the inputs (None for what is no tensor).
Sharding = tuple[list[Placement], list["Placement | None"]]

NO_PARTIAL_INT8 = (
    "int8 output cannot be summed over devices: each would round and clamp its part before the "
    "sum. What to do: RowwiseLinearQuant(exact=True), which sums the int32 accumulators, a float "
    "output, or shard on n (ColwiseLinearQuant)."
)
NO_PARTIAL_BIAS = (
    "the bias would be added on every device, once too often on all but one. What to do: "
    "distribute it as Partial, whole on one device and zeros on the others, as RowwiseLinearQuant "
    "does, or add it after the sum."
)


def _vector(tensor: Any, sharded: bool) -> Placement | None:
    """Where a vector of n values (or of one, for all of n) goes when n is sharded or not."""
    if tensor is None:
        return None
    is_per_channel = tensor.shape[-1] != 1
    return Shard(len(tensor.shape) - 1) if sharded and is_per_channel else Replicate()


def _replicated(*tensors: Any) -> list[Placement | None]:
    return [None if tensor is None else Replicate() for tensor in tensors]


@register_sharding(_linear_quant)
def _linear_quant_shardings(
    x1: Any,
    weight: Any,
    scale: Any,
    offset: Any = None,
    pertoken_scale: Any = None,
    bias: Any = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> list[Sharding]:
    def placed(**placements: Placement | None) -> list[Placement | None]:
        given = {
            "x1": x1,
            "weight": weight,
            "scale": scale,
            "offset": offset,
            "pertoken_scale": pertoken_scale,
            "bias": bias,
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
                scale=_vector(scale, True),
                offset=_vector(offset, True),
                bias=_vector(bias, True),
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
    """Where an operand goes when output dim `dim` is sharded: it may not have it, or only 1."""
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


@register_sharding(torch.ops.lq_graph.trans_quant_param.default)
def _trans_quant_param_shardings(
    scale: Any, offset: Any = None, round_mode: int = 0
) -> list[Sharding]:
    del round_mode
    found: list[Sharding] = [([Replicate()], [*_replicated(scale, offset), None])]
    if scale.shape[-1] != 1 and len(scale.shape) == 1:
        found.append(([Shard(0)], [Shard(0), _vector(offset, True), None]))
    return found


@register_sharding(torch.ops.lq_graph.dynamic_quant.default)
def _dynamic_quant_shardings(x: Any, *, dtype: torch.dtype | None = None) -> list[Sharding]:
    # a row's scale is of its largest magnitude, so k stays whole
    del dtype
    rows: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(len(x.shape) - 1))]
    return [([placement, placement], [placement]) for placement in rows]


@register_sharding(torch.ops.lq_graph.static_quant.default)
def _static_quant_shardings(x: Any, scale_reciprocal: Any, offset: Any = None) -> list[Sharding]:
    last = len(x.shape) - 1
    found: list[Sharding] = [([Replicate()], _replicated(x, scale_reciprocal, offset))]
    for dim in range(last + 1):
        vectors = [_vector(t, dim == last) for t in (scale_reciprocal, offset)]
        found.append(([Shard(dim)], [Shard(dim), *vectors]))
    return found


def _refuse(text: str) -> NoReturn:
    raise LinearQuantValueError(f"linear_quant: {text}")


# ---- plans for parallelize_module ----


class LinearQuantStyle(ParallelStyle):
    """What both plans share; use one of the two."""

    # where each parameter is split: of a 2-dim weight, and of a vector of n values
    weight_dim: int
    splits_vectors: bool
    desired_input: Placement
    natural_output: Placement

    def __init__(
        self, input_layouts: Placement, output_layouts: Placement, use_local_output: bool
    ) -> None:
        super().__init__()
        self.input_layouts = (input_layouts,)
        self.output_layouts = (output_layouts,)
        self.use_local_output = use_local_output

    def placement(self, name: str, shape: tuple[int, ...]) -> Placement:
        """Where a parameter goes.

        Args:
            name: weight, scale, offset, pertoken_scale or bias.
            shape: of the whole parameter.
        """
        if name == "weight":
            return Shard(self.weight_dim)
        if name in ("scale", "offset", "bias") and self.splits_vectors and shape[-1] != 1:
            return Shard(len(shape) - 1)
        return Replicate()

    def adopt(self, module: QuantizedLinear, mesh: DeviceMesh, n: int, k: int) -> nn.Module:
        """Apply the plan to a layer whose tensors are this device's parts already.

        Args:
            module: its parameters as `placement` says, of this device.
            mesh: one dim.
            n, k: of the whole layer.
        """
        layer = module.linear
        for name in PARAMETERS:
            tensor = getattr(layer, name)
            if tensor is not None:
                size = (n,) if tensor.dim() == 1 else (n, k)
                placement = self.placement(name, size if tensor.numel() > 1 else (1,))
                part = DTensor.from_local(tensor.data, mesh, [placement], run_check=False)
                setattr(layer, name, nn.Parameter(part, requires_grad=False))
        layer.in_features, layer.out_features = k, n
        return self._finish(module, mesh)

    def check(self, name: str, layer: LinearQuant, ranks: int) -> None:
        """Refuse a layer that cannot be split.

        Raises:
            LinearQuantValueError, LinearQuantTypeError: with the reason.
        """
        weight = layer.weight
        if weight.dim() != 2:
            raise LinearQuantValueError(
                f"{name}: weight has {weight.dim()} dims; a plan splits (n, k). What to do: "
                "distribute the tensors yourself; DTensor knows how a batch may be sharded."
            )
        if format_of(weight) == FRACTAL_NZ:
            raise LinearQuantValueError(
                f"{name}: weight is FRACTAL_NZ, whose blocks of 16 x 32 bytes do not split. What "
                "to do: parallelize the model first and call use_internal_format_weight after it."
            )
        pack = STORAGE_DTYPES[weight.dtype]  # int4 needs n and k in eights, on each device
        what, size = (
            ("out_features (n)", weight.shape[0])
            if self.weight_dim == 0
            else ("in_features (k)", weight.shape[1] * pack)
        )
        if size % (ranks * pack):
            raise LinearQuantValueError(
                f"{name}: {what} is {size} and there are {ranks} devices; each takes an equal part"
                + (f", a multiple of {pack} for int4" if pack > 1 else "")
                + f". What to do: pad it with zeros to a multiple of {ranks * pack}, or use a mesh "
                "of another size."
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        self.check_mesh(device_mesh)
        if not isinstance(module, LinearQuant | QuantizedLinear):
            raise LinearQuantTypeError(
                f"{name}: the module is {type(module).__name__}; allowed are LinearQuant and "
                "QuantizedLinear. What to do: convert the vendor's modules with lq_graph.convert; "
                "torch's own plans are for nn.Linear."
            )
        layer = layer_in(module)
        if isinstance(layer.weight, DTensor):
            raise LinearQuantValueError(
                f"{name}: the layer is split already, by load_checkpoint or another plan. What to "
                "do: leave it out of this one."
            )
        _check_same(name, layer, device_mesh)
        self.check(name, layer, device_mesh.size())
        for parameter in PARAMETERS:
            tensor = getattr(layer, parameter)
            if tensor is not None:
                placement = self.placement(parameter, tuple(tensor.shape))
                split = _distribute(tensor.data, device_mesh, placement, self.src_data_rank)
                setattr(layer, parameter, nn.Parameter(split, requires_grad=False))
        layer._float_scale = None  # of the whole n; the state dict holds what is in use
        return self._finish(module, device_mesh)

    def check_mesh(self, mesh: DeviceMesh) -> None:
        """Refuse a mesh of several dims."""
        if mesh.ndim != 1:
            raise LinearQuantValueError(
                f"{type(self).__name__}: the mesh has {mesh.ndim} dims; a plan takes one. What to "
                'do: pass a part of it, such as mesh["tp"].'
            )

    def _finish(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Let a layer whose parameters are split take and give what the plan says."""
        return distribute_module(
            module,
            mesh,
            input_fn=partial(self._input, self.input_layouts, self.desired_input),
            output_fn=partial(self._output, self.output_layouts, self.use_local_output),
        )

    @staticmethod
    def _input(
        layouts: tuple[Placement], desired: Placement, module: nn.Module, inputs: Any, mesh: Any
    ) -> Any:
        del module
        x, *rest = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, layouts, run_check=False)
        x = x.redistribute(placements=_for_dims(desired, x.dim()))
        # pertoken_scale: one value for each row, the same on every device
        rest = [
            DTensor.from_local(t, mesh, [Replicate()], run_check=False)
            if isinstance(t, Tensor) and not isinstance(t, DTensor)
            else t
            for t in rest
        ]
        return (x, *rest)

    @staticmethod
    def _output(
        layouts: tuple[Placement], local: bool, module: nn.Module, out: Any, mesh: Any
    ) -> Any:
        del module, mesh
        out = out.redistribute(placements=_for_dims(layouts[0], out.dim()))
        return out.to_local() if local else out

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


def _for_dims(placement: Placement, dims: int) -> list[Placement]:
    """A placement with a dim counted from the end, counted from the front."""
    if isinstance(placement, Shard) and placement.dim < 0:
        return [Shard(placement.dim + dims)]
    return [placement]


def layer_in(module: LinearQuant | QuantizedLinear) -> LinearQuant:
    """The LinearQuant a plan splits."""
    return module.linear if isinstance(module, QuantizedLinear) else module


def _distribute(
    whole: Tensor, mesh: DeviceMesh, placement: Placement, src_data_rank: int | None
) -> DTensor:
    if not placement.is_partial():
        return distribute_tensor(whole, mesh, [placement], src_data_rank=src_data_rank)
    copy = distribute_tensor(whole, mesh, [Replicate()], src_data_rank=src_data_rank).to_local()
    mine = copy if mesh.get_local_rank() == 0 else torch.zeros_like(copy)
    return DTensor.from_local(mine, mesh, [placement], run_check=False)


def _check_same(style_name: str, layer: LinearQuant, mesh: DeviceMesh) -> None:
    """Every rank must split the same layer: a rank with another checkpoint or another model is told
    so, on all ranks, before anything is split."""
    everyone = [""] * mesh.size()
    dist.all_gather_object(everyone, layer.extra_repr(), group=mesh.get_group())
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise LinearQuantValueError(
                f"{style_name}: the ranks hold different layers. Rank 0 has ({everyone[0]}), rank "
                f"{rank} has ({theirs}). What to do: load the same checkpoint into the same model "
                "on every rank."
            )


class ColwiseLinearQuant(LinearQuantStyle):
    """Split a LinearQuant or QuantizedLinear on n, its output channels. Exact.

    Weight, per-channel scale (packed or not), offset and bias are split; each device computes its
    own channels of every row, and nothing is summed.

    Args:
        input_layouts: how the input comes; default Replicate().
        output_layouts: how the output is to leave; default Shard(-1).
        use_local_output: give a plain tensor of this device's part instead of a DTensor.

    Raises (when it is applied, on every rank):
        LinearQuantTypeError: the module is of another kind.
        LinearQuantValueError: n does not split into equal parts (int4: multiples of 8), the weight
            has batch dims or is FRACTAL_NZ, or the ranks hold different layers.

    Source: torch.distributed.tensor.parallel.ColwiseParallel.
    """

    weight_dim = 0
    splits_vectors = True
    desired_input = Replicate()

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts or Replicate(), output_layouts or Shard(-1), use_local_output
        )


class RowwiseLinearQuant(LinearQuantStyle):
    """Split a LinearQuant or QuantizedLinear on k, its input channels; the parts are summed.

    Each device multiplies its part of k. The bias is added on one device, so it is added once
    whether or not the output is summed; scale, offset and pertoken_scale are whole on each.

    Args:
        input_layouts: how the input comes; default Shard(-1), as ColwiseLinearQuant leaves it.
        output_layouts: Replicate() (all-reduce, the default) or Shard(dim) (reduce-scatter).
        use_local_output: give a plain tensor instead of a DTensor.
        exact: sum the int32 accumulators and scale after the sum. The result equals one device's
            bit for bit, int8 output and offset included; 4 bytes for each element are moved where
            a float16 output moves 2, and the scaling runs beside the kernel, not in it. int8
            weights only: no row of the tables gives the accumulators of int4.

    A QuantizedLinear that quantizes its input as it comes takes the largest magnitude of a row over
    all devices, 4 bytes a row, so the quantized input is one device's.

    Raises (when it is applied, on every rank):
        LinearQuantTypeError: the module is of another kind, or exact is asked for int4, or on a
            product without int32 output.
        LinearQuantValueError: int8 output without exact; k does not split into equal parts; the
            weight has batch dims or is FRACTAL_NZ; or the ranks hold different layers.

    Source: torch.distributed.tensor.parallel.RowwiseParallel.
    """

    weight_dim = 1
    splits_vectors = False
    desired_input = Shard(-1)

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        exact: bool = False,
    ) -> None:
        super().__init__(
            input_layouts or Shard(-1), output_layouts or Replicate(), use_local_output
        )
        self.exact = exact

    def check(self, name: str, layer: LinearQuant, ranks: int) -> None:
        super().check(name, layer, ranks)
        if not self.exact:
            if (layer.output_dtype or _I8) == _I8:
                raise LinearQuantValueError(f"{name}: {NO_PARTIAL_INT8}")
            return
        if layer.weight.dtype != _I8:
            raise LinearQuantTypeError(
                f"{name}: exact is asked for, and weight is {dtype_name(layer.weight.dtype)} "
                "(int4); no row of the table gives int32 accumulators of int4. What to do: "
                "exact=False."
            )
        product = get_product()
        if all(row.output != _I32 for row in rows_of(product, _I8)):
            raise LinearQuantTypeError(
                f"{name}: exact is asked for, and {product} has no row with int32 output. What to "
                "do: exact=False, or shard on n (ColwiseLinearQuant)."
            )

    def placement(self, name: str, shape: tuple[int, ...]) -> Placement:
        if name == "bias" and not self.exact:
            return Partial()  # whole on one device, zeros on the others: added once
        return super().placement(name, shape)

    def _finish(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, QuantizedLinear) and module.dynamic:
            own: Any = module
            own.quantize_rows = partial(_quantize_rows_together, mesh)
        if self.exact:
            assert isinstance(module, LinearQuant | QuantizedLinear)
            layer: Any = layer_in(module)
            layer.register_buffer("_fixed_scale", None, persistent=False)
            layer.register_buffer("_fixed_offset", None, persistent=False)
            fold = layer.scale.dtype == torch.int64 or folds_scale(layer)
            _read_scale(layer, fold)
            layer.register_load_state_dict_post_hook(lambda own, _: _read_scale(own, fold))
            layer.forward = partial(_exact_forward, fold, layer)
        return super()._finish(module, mesh)


def _whole(tensor: Tensor | None) -> Tensor | None:
    """What a device holds of a replicated tensor: all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _read_scale(layer: Any, fold: bool) -> None:
    """Keep the scale as the kernel reads it: made once, not at every call."""
    scale, offset = _whole(layer.scale), _whole(layer.offset)
    assert scale is not None
    if fold:
        if scale.dtype == torch.float32:
            check_finite(scale, offset)
            scale = numerics.pack_scale(scale, offset)
        scale, offset = numerics.unpack_scale(scale)
    layer._fixed_scale, layer._fixed_offset = scale, offset if fold else None


def _exact_forward(
    fold: bool, layer: Any, x1: Tensor, pertoken_scale: Tensor | None = None
) -> Tensor:
    """Sum the int32 accumulators of every device, and do what follows once."""
    assert isinstance(x1, DTensor)
    mesh = x1.device_mesh
    ones = DTensor.from_local(
        torch.ones(1, device=x1.device), mesh, [Replicate()], run_check=False
    )  # int32 output takes a scale and does not read it
    partial_sum = _linear_quant(x1, layer.weight, ones, None, None, None, output_dtype=_I32)
    total = partial_sum.redistribute(placements=[Replicate()]).to_local()

    scale, bias = _whole(layer._fixed_scale), _whole(layer.bias)
    pertoken = _whole(layer.pertoken_scale if pertoken_scale is None else pertoken_scale)
    assert scale is not None
    out = numerics.epilogue(
        total,
        scale,
        folded=fold,
        offset=_whole(layer._fixed_offset),
        bias=bias,
        pertoken_scale=pertoken,
        output_dtype=layer.output_dtype or _I8,
    )
    return DTensor.from_local(out, mesh, [Replicate()], run_check=False)


def _quantize_rows_together(
    mesh: DeviceMesh, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dynamic_quant of rows whose k is split: the largest magnitude is that of all parts."""
    assert isinstance(rows, DTensor)
    part = rows.to_local()
    peaks = DTensor.from_local(numerics.row_peaks(part), mesh, [Partial("max")], run_check=False)
    peak = peaks.redistribute(placements=[Replicate()]).to_local()
    bits = 4 if dtype == _I32 else 8
    values, scale = numerics.quantize_rows(part, peak, bits)
    if bits == 4:
        values = numerics.pack_int4(values)
    return (
        DTensor.from_local(values, mesh, [Shard(1)], run_check=False),
        DTensor.from_local(scale, mesh, [Replicate()], run_check=False),
    )
