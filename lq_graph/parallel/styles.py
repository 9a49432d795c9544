"""Tensor parallelism: LinearQuant over several devices, by torch.distributed.

    parallelize_module(model, mesh, {"up": ColwiseLinearQuant(), "down": RowwiseLinearQuant()})

Each process keeps its part of a layer's tensors and computes with it as with a layer of its own:
eagerly, in graphs, and prepared by `use_internal_format_weight`. State dicts hold DTensors, which
are whole layers to whoever loads or saves them. A layer is split whole or not at all: an error, or
Ctrl-C, leaves it as it was on this rank. `parallelize_module` goes layer by layer, so those before
the one that failed stay split.

A row-wise output is rounded on every device before the sum, so it is close to one device's, not
equal, and int8 output cannot be summed at all. `RowwiseLinearQuant(exact=True)` sums the int32
accumulators and scales after the sum: equal bit for bit.

Source: torch.distributed.tensor.parallel.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from ..backends.npu import format_of
from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..kernels import numerics
from ..kernels.native import refuse_not_finite
from ..kernels.numerics import INT4_PER_INT32, Arithmetic
from ..modules.linear_quant import PARAMETERS, SPLIT, LinearQuant
from ..modules.prepare import folds_scale
from ..modules.quantized_linear import QuantizedLinear
from ..modules.walk import all_or_nothing
from ..rules.activations import dynamic_arithmetic
from ..rules.plan import check_finite
from ..rules.products import get_product
from ..rules.tables import FRACTAL_NZ, STORAGE_DTYPES, dtype_name, rows_of
from .sharding import NO_PARTIAL_INT8

__all__ = ["ColwiseLinearQuant", "LinearQuantStyle", "RowwiseLinearQuant"]

_linear_quant = torch.ops.lq_graph.linear_quant.default
_I8, _I32 = torch.int8, torch.int32


class LinearQuantStyle(ParallelStyle):
    """What both plans share; use one of the two."""

    weight_dim: int  # of (n, k), the one that is split
    computes_from: Placement  # the input, as the layer's part needs it
    computes_to: Placement  # the output, as it comes out of the part

    def __init__(
        self,
        input_layouts: Placement | None,
        output_layouts: Placement,
        use_local_output: bool,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or self.computes_from
        self.output_layouts = output_layouts
        self.use_local_output = use_local_output

    def placement(self, name: str, shape: tuple[int, ...]) -> Placement:
        """Where a parameter goes.

        Args:
            name: weight, scale, offset, pertoken_scale or bias.
            shape: of the whole parameter.
        """
        raise NotImplementedError

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

    def check_mesh(self, mesh: DeviceMesh) -> None:
        """Refuse a mesh of several dims."""
        if mesh.ndim != 1:
            raise LinearQuantValueError(
                f"{type(self).__name__}: the mesh has {mesh.ndim} dims; a plan takes one. What to "
                'do: pass a part of it, such as mesh["tp"].'
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
        layer = _layer_in(module)
        if SPLIT in vars(layer):
            raise LinearQuantValueError(
                f"{name}: the layer is split already, by load_checkpoint or another plan. What to "
                "do: leave it out of this one."
            )
        _check_same(name, layer, device_mesh)
        self.check(name, layer, device_mesh.size())
        placements = {}
        parts: list[tuple[Tensor, Tensor]] = []
        for parameter, whole in _parameters(layer):
            placement = placements[parameter] = self.placement(parameter, tuple(whole.shape))
            parts.append((whole, _part(whole.data, device_mesh, placement, self.src_data_rank)))
        # what waits for other ranks is done; the rest is all or nothing
        with all_or_nothing() as undo:
            _keep(undo, module, layer)
            for whole, part in parts:
                undo.callback(setattr, whole, "data", whole.data)
                whole.data = part
            return self._finish(module, device_mesh, placements)

    def adopt(self, module: QuantizedLinear, mesh: DeviceMesh) -> nn.Module:
        """Apply the plan to a layer whose parameters are this device's parts already, as
        `placement` says."""
        # vectors are per channel in checkpoints, also where a part is one channel
        placements = {
            name: self.placement(name, (2,) * part.dim())
            for name, part in _parameters(module.linear)
        }
        return self._finish(module, mesh, placements)

    def _finish(
        self,
        module: LinearQuant | QuantizedLinear,
        mesh: DeviceMesh,
        placements: dict[str, Placement],
    ) -> nn.Module:
        """Let a layer whose parameters are parts take, give, save and load what the plan says."""
        layer = _layer_in(module)
        vars(layer)[SPLIT] = (mesh, placements)
        n, words = layer.weight.shape
        layer.out_features, layer.in_features = n, words * STORAGE_DTYPES[layer.weight.dtype]
        layer._float_scale = None  # of the whole layer; state dicts hold the scale that is in use
        layer.register_state_dict_post_hook(_to_dtensors)
        layer.register_load_state_dict_pre_hook(_to_parts)
        module.register_forward_pre_hook(partial(self._take, mesh))
        module.register_forward_hook(partial(self._give, mesh))
        return module

    def _take(self, mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        del module
        x, *rest = inputs
        if isinstance(x, DTensor):
            x = x.redistribute(placements=[_at(self.computes_from, x)]).to_local()
        else:
            x = _move(x, self.input_layouts, self.computes_from, mesh)
        # pertoken_scale: whole on each device
        return (x, *(t.full_tensor() if isinstance(t, DTensor) else t for t in rest))

    def _give(self, mesh: DeviceMesh, module: nn.Module, inputs: Any, out: Tensor) -> Any:
        del module, inputs
        out = _move(out, self.computes_to, self.output_layouts, mesh)
        if self.use_local_output:
            return out
        return DTensor.from_local(out, mesh, [_at(self.output_layouts, out)], run_check=False)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


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
    computes_from = Replicate()
    computes_to = Shard(-1)

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(input_layouts, output_layouts or Shard(-1), use_local_output)

    def placement(self, name: str, shape: tuple[int, ...]) -> Placement:
        if name == "weight":
            return Shard(0)
        is_per_channel = name != "pertoken_scale" and shape[-1] != 1
        return Shard(len(shape) - 1) if is_per_channel else Replicate()


class RowwiseLinearQuant(LinearQuantStyle):
    """Split a LinearQuant or QuantizedLinear on k, its input channels; the parts are summed.

    Each device multiplies its part of k. The bias is kept on one device, zeros on the others, so it
    is added once whether or not the output is summed; scale, offset and pertoken_scale are whole on
    each.

    Args:
        input_layouts: how the input comes; default Shard(-1), as ColwiseLinearQuant leaves it.
        output_layouts: Replicate() (all-reduce, the default), Shard(dim) (reduce-scatter), or
            Partial() to be summed later; with exact always an all-reduce first.
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
    computes_from = Shard(-1)
    computes_to: Placement = Partial()

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        exact: bool = False,
    ) -> None:
        super().__init__(input_layouts, output_layouts or Replicate(), use_local_output)
        self.exact = exact
        if exact:
            self.computes_to = Replicate()  # the sum is inside

    def placement(self, name: str, shape: tuple[int, ...]) -> Placement:
        del shape
        if name == "weight":
            return Shard(1)
        return Partial() if name == "bias" and not self.exact else Replicate()

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

    def _finish(
        self,
        module: LinearQuant | QuantizedLinear,
        mesh: DeviceMesh,
        placements: dict[str, Placement],
    ) -> nn.Module:
        super()._finish(module, mesh, placements)
        if isinstance(module, QuantizedLinear) and module.dynamic:
            # k of the whole layer: what one device alone would compute with it
            arithmetic = dynamic_arithmetic(get_product(), module.in_features)
            vars(module)["quantize_rows"] = partial(_quantize_rows_together, mesh, arithmetic)
        if self.exact:
            layer: Any = _layer_in(module)
            fold = layer.scale.dtype == torch.int64 or folds_scale(layer)
            layer.register_buffer("_fixed_scale", None, persistent=False)
            layer.register_buffer("_fixed_offset", None, persistent=False)
            _read_scale(layer, fold)
            layer.register_load_state_dict_post_hook(lambda own, _: _read_scale(own, fold))
            # read by name and never written: int32 output takes a scale and ignores it
            layer.register_buffer(
                "_ones", torch.ones(1, dtype=torch.float32, device=layer.weight.device), False
            )
            cuts = not fold and get_product().cuts_scale
            vars(layer)["forward"] = partial(_exact_forward, mesh, fold, cuts, layer)
        return module


# ---- what a layer knows of its split ----


def _keep(undo: ExitStack, *modules: nn.Module) -> None:
    """Take back whatever is set on the modules, hooks and buffers included."""
    for module in modules:
        own = vars(module)
        undo.callback(_put_back, own, {**own})
        for held in own.values():
            # not replaced by a copy: handles of hooks find theirs in it
            if isinstance(held, dict):
                undo.callback(_put_back, held, {**held})


def _put_back(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    held.clear()
    held.update(before)


def _layer_in(module: LinearQuant | QuantizedLinear) -> LinearQuant:
    return module.linear if isinstance(module, QuantizedLinear) else module


def _parameters(layer: LinearQuant) -> list[tuple[str, Tensor]]:
    found = ((name, getattr(layer, name)) for name in PARAMETERS)
    return [(name, tensor) for name, tensor in found if tensor is not None]


def _part(
    whole: Tensor, mesh: DeviceMesh, placement: Placement, source: int | None = None
) -> Tensor:
    """This device's part of a tensor; `source`: the rank whose values count, None for one's own."""
    if not isinstance(placement, Partial):
        placed = distribute_tensor(whole, mesh, [placement], src_data_rank=source)
        return placed.to_local().contiguous()
    everywhere = distribute_tensor(whole, mesh, [Replicate()], src_data_rank=source).to_local()
    return everywhere if mesh.get_local_rank() == 0 else torch.zeros_like(everywhere)


def _to_dtensors(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict holds the whole layer, each device its part of it."""
    del metadata
    mesh, placements = vars(layer)[SPLIT]
    for name, placement in placements.items():
        key = prefix + name
        if key in state:
            state[key] = DTensor.from_local(state[key], mesh, [placement], run_check=False)


def _to_parts(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """And loads one: its DTensors, or whole tensors, of which it takes its parts."""
    mesh, placements = vars(layer)[SPLIT]
    for name, placement in placements.items():
        given = state.get(prefix + name)
        if isinstance(given, DTensor):
            same = given.device_mesh == mesh and tuple(given.placements) == (placement,)
            state[prefix + name] = (
                given.to_local() if same else _part(given.full_tensor(), mesh, placement)
            )
        elif given is not None:
            state[prefix + name] = _part(given, mesh, placement)


def _check_same(style_name: str, layer: LinearQuant, mesh: DeviceMesh) -> None:
    """Every rank must split the same layer: a rank with another checkpoint or another model is told
    so, on all ranks, before anything is split."""
    everyone = [""] * mesh.size()
    mine = f"{layer.extra_repr()}, weight format {format_of(layer.weight)}"
    dist.all_gather_object(everyone, mine, group=mesh.get_group())
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise LinearQuantValueError(
                f"{style_name}: the ranks hold different layers. Rank 0 has ({everyone[0]}), rank "
                f"{rank} has ({theirs}). What to do: load the same checkpoint into the same model "
                "on every rank."
            )


# ---- what moves between devices ----


def _at(placement: Placement, tensor: Tensor) -> Placement:
    """A placement with a dim counted from the end, counted from the front."""
    if isinstance(placement, Shard) and placement.dim < 0:
        return Shard(placement.dim + tensor.dim())
    return placement


def _done(x: Any) -> Tensor:
    """A collective's result, waited for: a rank that is gone is an error here, not at some later
    use. In a graph it is a plain tensor already."""
    out: Tensor = x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x
    return out


def _move(x: Tensor, have: Placement, want: Placement, mesh: DeviceMesh) -> Tensor:
    """A plain tensor from one layout to another."""
    have, want = _at(have, x), _at(want, x)
    if have == want or mesh.size() == 1:
        return x
    if isinstance(want, Shard) and x.shape[want.dim] % mesh.size():
        raise LinearQuantValueError(
            f"dim {want.dim} of {tuple(x.shape)} is to be split over {mesh.size()} devices; each "
            "takes an equal part. What to do: pad it, or use Replicate()."
        )
    group = mesh.get_group()
    if isinstance(have, Partial):
        if isinstance(want, Shard):
            return _done(collectives.reduce_scatter_tensor(x, "sum", want.dim, group))
        return _done(collectives.all_reduce(x, "sum", group))
    if isinstance(have, Shard):
        x = _done(collectives.all_gather_tensor(x.contiguous(), have.dim, group))
    if isinstance(want, Shard):
        return x.chunk(mesh.size(), want.dim)[mesh.get_local_rank()].contiguous()
    return x


def _read_scale(layer: Any, fold: bool) -> None:
    """Keep the scale as the kernel reads it: made once, not at every call."""
    scale, offset = layer.scale, layer.offset
    if fold:
        if scale.dtype == torch.float32:
            check_finite(scale, offset)
            scale = numerics.pack_scale(scale, offset)
        scale, offset = numerics.unpack_scale(scale)
        if not bool(scale.isfinite().all()):
            refuse_not_finite()
    layer._fixed_scale, layer._fixed_offset = scale.data, offset if fold else None


def _exact_forward(
    mesh: DeviceMesh,
    fold: bool,
    cuts: bool,
    layer: Any,
    x1: Tensor,
    pertoken_scale: Tensor | None = None,
) -> Tensor:
    """Sum the int32 accumulators of every device, and do what follows once."""
    part = _linear_quant(x1, layer.weight, layer._ones, None, None, None, output_dtype=_I32)
    pertoken = layer.pertoken_scale if pertoken_scale is None else pertoken_scale
    scale, output = layer._fixed_scale, layer.output_dtype or _I8
    if cuts and numerics.is_cut(
        scale, pertoken, layer.bias, output, per_tensor=scale.shape[-1] == 1
    ):
        scale = numerics.s19(scale)
    return numerics.epilogue(
        _move(part, Partial(), Replicate(), mesh),
        scale,
        folded=fold,
        offset=layer._fixed_offset,
        bias=layer.bias,
        pertoken_scale=pertoken,
        output_dtype=output,
    )


def _quantize_rows_together(
    mesh: DeviceMesh, arithmetic: Arithmetic, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dynamic_quant of rows whose k is split: the largest magnitude is that of all parts."""
    peak = rows.to(torch.float32).abs().max(-1).values  # torchair has no converter for amax
    if mesh.size() > 1:
        # A backend's maximum may lose NaN; it keeps infinity, and the row is NaN all the same.
        peak = peak.nan_to_num(torch.inf, torch.inf, 0.0)
        peak = _done(collectives.all_reduce(peak, "max", mesh.get_group()))
    bits = 4 if dtype == _I32 else 8
    values, scale = numerics.quantize_rows(rows, peak, bits, arithmetic)
    return (_pack_int4(values) if bits == 4 else values), scale


def _pack_int4(values: Tensor) -> Tensor:
    """`numerics.pack_int4`, of operators that torch.compile and torchair take."""
    nibbles = values.to(torch.int32).reshape(*values.shape[:-1], -1, INT4_PER_INT32)
    packed = nibbles[..., -1]  # the last one is the highest and holds the sign
    for i in range(INT4_PER_INT32 - 2, -1, -1):
        packed = packed * 16 + nibbles[..., i].remainder(16)
    return packed
