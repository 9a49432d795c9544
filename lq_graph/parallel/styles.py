"""Tensor parallelism: LinearQuant over several devices, with torch.distributed.

    parallelize_module(model, mesh, {"up": ColwiseLinearQuant(), "down": RowwiseLinearQuant()})

Each process keeps its part of a layer's tensors and computes with it as with a whole layer:
eagerly, in graphs, and prepared by `use_internal_format_weight`. State dicts hold DTensors, which
load and save as the whole layer. Splitting one layer is atomic: after an error or Ctrl-C the layer
is unchanged on this rank. `parallelize_module` splits one layer after another, so if one fails, the
layers before it stay split.

The output of a layer split on k is rounded on every device before the sum. So it is close to one
device's result, not equal, and int8 output cannot be summed at all.
`RowwiseLinearQuant(exact=True)` sums the int32 accumulators and scales after the sum: its result
equals one device's bit for bit.

Source: torch.distributed.tensor.parallel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
)
from torch.distributed.tensor.parallel import ParallelStyle

from ..backends.npu import format_of
from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..kernels import logical_k
from ..modules.linear_quant import LinearQuant
from ..modules.quantized_linear import QuantizedLinear, merged_of
from ..modules.split import SPLIT, Split, SplitStyle
from ..modules.stated_dtypes import check_whole_words
from ..modules.supported import plan_of_layer
from ..modules.transaction import all_or_nothing
from ..rules.activations import dynamic_arithmetic
from ..rules.cann import rows_in
from ..rules.products import get_product, get_target
from ..rules.tables import FRACTAL_NZ, STORAGE_DTYPES, dtype_name, rows_of
from .exact import exact_forward, quantize_rows_together, read_scale
from .moves import at_front, move
from .sharding import NO_PARTIAL_INT8
from .state import check_same, keep_state, layer_in, parameters_of, part_of, to_dtensors, to_parts

__all__ = ["ColwiseLinearQuant", "LinearQuantStyle", "RowwiseLinearQuant"]

_I8, _I32 = torch.int8, torch.int32


class LinearQuantStyle(SplitStyle, ParallelStyle):
    """The common part of ColwiseLinearQuant and RowwiseLinearQuant; use one of those."""

    weight_dim: int  # the dim of (n, k) that is split
    computes_from: Placement  # of the input that a layer's part needs
    computes_to: Placement  # of the output that it returns

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

    def check(self, name: str, layer: LinearQuant, ranks: int) -> None:
        weight = layer.weight
        if weight.dim() != 2:
            raise LinearQuantValueError(
                f"{name}: weight has {weight.dim()} dims; a plan splits (n, k). What to do: "
                "distribute the tensors yourself; DTensor knows how a batch may be sharded."
            )
        if format_of(weight) == FRACTAL_NZ:
            raise LinearQuantValueError(
                f"{name}: weight is FRACTAL_NZ, whose blocks of 16 x 32 bytes cannot be split. "
                "What to do: parallelize the model first, then call use_internal_format_weight."
            )
        check_whole_words(name, layer.in_features, weight)
        pack = STORAGE_DTYPES[weight.dtype]  # with int4, n and k of each part are multiples of 8
        what, size = (
            ("out_features (n)", weight.shape[0])
            if self.weight_dim == 0
            else ("in_features (k)", logical_k(weight.shape[1], weight.dtype))
        )
        if size % (ranks * pack):
            raise LinearQuantValueError(
                f"{name}: {what} is {size} and there are {ranks} devices; each takes an equal part"
                + (f", a multiple of {pack} for int4" if pack > 1 else "")
                + f". What to do: pad it with zeros to a multiple of {ranks * pack}, or use a mesh "
                "of another size."
            )

    def check_mesh(self, mesh: DeviceMesh) -> None:
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
        layer = layer_in(module)
        if (merged := merged_of(layer)) is not None:
            raise LinearQuantValueError(
                f"{name}: the layer is merged: {', '.join(merged.names)} have one weight. "
                "What to do: split the model before lq_graph.merge."
            )
        if SPLIT in vars(layer):
            raise LinearQuantValueError(
                f"{name}: the layer is split already, by load_checkpoint or another plan. What to "
                "do: leave it out of this one."
            )
        check_same(name, layer, device_mesh)
        self.check(name, layer, device_mesh.size())
        placements = {}
        parts: list[tuple[Tensor, Tensor]] = []
        for parameter, whole in parameters_of(layer):
            placement = placements[parameter] = self.placement(parameter, tuple(whole.shape))
            parts.append((whole, part_of(whole.data, device_mesh, placement, self.src_data_rank)))
        # nothing waits for other ranks from here on; the rest is atomic
        with all_or_nothing() as undo:
            keep_state(undo, module, layer)
            for whole, part in parts:
                undo.callback(setattr, whole, "data", whole.data)
                whole.data = part
            return self._finish(module, device_mesh, placements)

    def adopt(self, module: QuantizedLinear, mesh: DeviceMesh) -> nn.Module:
        # vectors in checkpoints are per channel, also where a part is one channel
        placements = {
            name: self.placement(name, (2,) * part.dim())
            for name, part in parameters_of(module.linear)
        }
        return self._finish(module, mesh, placements)

    def _finish(
        self,
        module: LinearQuant | QuantizedLinear,
        mesh: DeviceMesh,
        placements: dict[str, Placement],
    ) -> nn.Module:
        """Mark a layer whose parameters are parts, and install its hooks: for input and output, and
        to save and load the whole layer."""
        layer = layer_in(module)
        n, words = layer.weight.shape
        layer.out_features, layer.in_features = n, logical_k(words, layer.weight.dtype)
        layer._float_scale = None  # of the whole layer; state dicts hold the packed scale
        handles = (
            module.register_forward_pre_hook(partial(self._take, mesh)),
            module.register_forward_hook(partial(self._give, mesh)),
        )
        hooks = frozenset(handle.id for handle in handles)
        Split(mesh, placements, to_dtensors, to_parts, hooks).mark(layer)
        return module

    def _take(self, mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        del module
        x, *rest = inputs
        if isinstance(x, DTensor):
            x = x.redistribute(placements=[at_front(self.computes_from, x)]).to_local()
        else:
            x = move(x, self.input_layouts, self.computes_from, mesh)
        # pertoken_scale: whole on each device
        return (x, *(t.full_tensor() if isinstance(t, DTensor) else t for t in rest))

    def _give(self, mesh: DeviceMesh, module: nn.Module, inputs: Any, out: Tensor) -> Any:
        del module, inputs
        out = move(out, self.computes_to, self.output_layouts, mesh)
        if self.use_local_output:
            return out
        return DTensor.from_local(out, mesh, [at_front(self.output_layouts, out)], run_check=False)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class ColwiseLinearQuant(LinearQuantStyle):
    """Split a LinearQuant or QuantizedLinear on n, its output channels.

    The result equals one device's bit for bit. Weight (n, k), per-channel scale (packed or not),
    offset and bias are split; each device computes its own channels of every row, and nothing is
    summed.

    Args:
        input_layouts: placement of the input (..., k); default Replicate().
        output_layouts: placement of the output (..., n); default Shard(-1).
        use_local_output: return a plain tensor, this device's part, instead of a DTensor.

    Raises:
        LinearQuantTypeError: on every rank, when it is applied: the module is of another class.
        LinearQuantValueError: on every rank, when it is applied: n cannot be split into equal parts
            (int4: multiples of 8), the weight has batch dims or is FRACTAL_NZ, the layer is already
            split, the mesh has several dims, or the ranks hold different layers.

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
    """Split a LinearQuant or QuantizedLinear on k, its input channels, and sum the outputs.

    Each device multiplies its part of k. One device holds the bias and the others hold zeros, so
    that the bias is added once. Scale, offset and pertoken_scale are whole on each device.

    A dynamic QuantizedLinear takes the largest magnitude of a row over all devices (this moves 4
    bytes for each row), so its quantized input equals one device's bit for bit.

    Args:
        input_layouts: placement of the input (..., k); default Shard(-1), the output of
            ColwiseLinearQuant.
        output_layouts: placement of the output (..., n): Replicate() (all-reduce, the default),
            Shard(dim) (reduce-scatter), or Partial() to sum it later. With exact=True an all-reduce
            always comes first.
        use_local_output: return a plain tensor instead of a DTensor.
        exact: sum the int32 accumulators and scale after the sum. The result equals one device's
            bit for bit, int8 output and offset included. It moves 4 bytes for each element of the
            output instead of 2, and the scaling is a separate pass. int8 weights only: no row of
            the support table returns the accumulators of int4.

    Raises:
        LinearQuantTypeError: on every rank, when it is applied: the module is of another class; or
            exact=True with int4, or on a product without int32 output.
        LinearQuantValueError: on every rank, when it is applied: int8 output without exact=True; k
            cannot be split into equal parts; the weight has batch dims or is FRACTAL_NZ; the layer
            is already split; the mesh has several dims; or the ranks hold different layers.

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
            self.computes_to = Replicate()  # the forward sums

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
                f"{name}: exact is True and weight is {dtype_name(layer.weight.dtype)} (int4); no "
                "row of the support table gives int32 accumulators of int4. What to do: "
                "exact=False."
            )
        target = get_target()
        if all(row.output != _I32 for row in rows_in(target, _I8)):
            newer = any(row.output == _I32 for row in rows_of(target.product, _I8))
            raise LinearQuantTypeError(
                f"{name}: exact is True and {target.product} has no row with int32 output"
                f"{f' on CANN {target.cann}' if newer else ''}. What to do: exact=False, or shard "
                "on n (ColwiseLinearQuant)."
            )

    def _finish(
        self,
        module: LinearQuant | QuantizedLinear,
        mesh: DeviceMesh,
        placements: dict[str, Placement],
    ) -> nn.Module:
        super()._finish(module, mesh, placements)
        if isinstance(module, QuantizedLinear) and module.dynamic:
            # with k of the whole layer, as one device would compute
            arithmetic = dynamic_arithmetic(get_product(), module.in_features)
            vars(module)["quantize_rows"] = partial(quantize_rows_together, mesh, arithmetic)
        if self.exact:
            layer: Any = layer_in(module)
            fold = layer.scale.dtype == torch.int64 or plan_of_layer(layer).fold_scale
            layer.register_buffer("_fixed_scale", None, persistent=False)
            layer.register_buffer("_fixed_offset", None, persistent=False)
            read_scale(layer, fold)
            layer.register_load_state_dict_post_hook(lambda own, _: read_scale(own, fold))
            # a scale, which int32 output takes and ignores
            layer.register_buffer(
                "_ones", torch.ones(1, dtype=torch.float32, device=layer.weight.device), False
            )
            cuts = not fold and get_product().cuts_scale
            vars(layer)["forward"] = partial(exact_forward, mesh, fold, cuts, layer)
        return module
