"""What GE operators compute: `{op type: function}`, one short function per operator.

The functions are in the package `ops`, a file for each family; this module has what they share. A
function's signature is the operator's GE definition: positional parameters are its inputs,
keyword-only parameters are its attributes with GE's defaults. `run_op` calls it by those names, and
torchair's own checks read `OPS`. Tensors are plain CPU tensors, except

    Int4        int4 values
    FractalNZ   a tensor whose storage has the internal format FRACTAL_NZ

uint64 tensors (packed scales) are torch.int64 with the same bits. While a graph is compiled, the
same functions run on meta tensors, so every shape and refusal of a static graph is known before it
runs.

Sources: the operator documents of CANN (hicann/ops-nn, hicann/ops-math) and the prototypes in
torchair's `_ge_concrete_graph/auto_generated_ge_raw_ops.py`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from cann_host import runtime
from cann_host.rules import DEFINED, TensorDesc, check_definition
from lq_graph.kernels import NzWeight, logical_k, pack_int4, unpack_int4

__all__ = [
    "DTYPES",
    "OPS",
    "Dynamic",
    "FractalNZ",
    "GraphError",
    "Host",
    "Int4",
    "Op",
    "ShapeUnknownError",
    "Value",
    "as_list",
    "cautions",
    "compute_op",
    "describe",
    "dtype_name",
    "find_op",
    "ints",
    "is_meta",
    "op",
    "optional_desc",
    "plain",
    "promoted",
    "run_op",
    "soc_name",
    "takes",
    "to_meta",
    "torch_dtype",
]


class GraphError(Exception):
    """A graph that CANN, or this stand-in, refuses."""


class ShapeUnknownError(Exception):
    """A shape depends on values that are not known while a graph is compiled."""


@dataclass(frozen=True)
class Int4:
    """int4 values.

    Attributes:
        held: int8, one value in each; or int32, eight values of the last dim in each, which a
            matmul takes directly.
        swapped: whether `held` has the last two dims in the other order, so that a weight stays
            packed when it passes a Transpose.
    """

    held: Tensor
    swapped: bool = False

    @property
    def is_packed(self) -> bool:
        return self.held.dtype == torch.int32

    @property
    def shape(self) -> torch.Size:
        dims = list(self.held.shape)
        if self.is_packed:
            dims[-1] = logical_k(dims[-1], torch.int32)
        if self.swapped:
            dims[-2:] = dims[:-3:-1]
        return torch.Size(dims)

    @property
    def values(self) -> Tensor:
        """As int8, one value in each."""
        if self.held.is_meta:
            return torch.empty(self.shape, dtype=torch.int8, device="meta")
        values = unpack_int4(self.held) if self.is_packed else self.held
        return values.mT if self.swapped else values

    @property
    def packed(self) -> Tensor:
        """As int32, eight values of the last dim in each."""
        if self.is_packed and not self.swapped:
            return self.held
        return pack_int4(self.values.contiguous())


class FractalNZ:
    """A tensor stored as FRACTAL_NZ; an int4 tensor holds `Int4`.

    The conversion to ND moves every byte, so it happens only when an operator reads `nd`.

    Attributes:
        like: `nd` on meta.
        storage_shape: None if only the compiler knows it.
        weight: the storage as a matmul takes it, if its rows are still the rows of `like`; or the
            columns, if `swapped`.
    """

    def __init__(
        self,
        like: Tensor | Int4,
        storage_shape: tuple[int, ...] | None,
        nd: Callable[[], Tensor | Int4] | None = None,
        weight: NzWeight | None = None,
        swapped: bool = False,
    ) -> None:
        self.like, self.storage_shape = like, storage_shape
        self.weight, self.swapped = weight, swapped
        self._nd = nd

    @property
    def nd(self) -> Tensor | Int4:
        return self.like if self._nd is None else self._nd()

    @property
    def is_meta(self) -> bool:
        return self._nd is None

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    def map(
        self,
        function: Callable[[Any], Tensor | Int4],
        storage_shape: tuple[int, ...] | None,
        *,
        swaps: bool = False,
    ) -> FractalNZ:
        """Apply `function`, which keeps the order of the values or swaps the two dims."""
        like, nd = function(self.like), self._nd
        swapped = self.swapped != swaps
        weight = self.weight
        if weight is not None and ((swapped and not swaps) or like.shape[int(swapped)] != weight.n):
            weight = None
        return FractalNZ(
            like, storage_shape, None if nd is None else lambda: function(nd()), weight, swapped
        )


Value: TypeAlias = "Tensor | Int4 | FractalNZ | None"

# An input whose values, not only its shape, determine the shape of the result.
Host: TypeAlias = Tensor
# A dynamic input: any number of tensors, named x0, x1, ... in the graph.
Dynamic: TypeAlias = list[Tensor]

# GE dtype -> the torch dtype that represents it here
DTYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    10: torch.int64,  # uint64
    11: torch.float64,
    12: torch.bool,
    27: torch.bfloat16,
}
INT8, INT4 = 2, 29


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_name(value: Tensor | Int4) -> str:
    """The dtype as CANN's rules spell it."""
    return "int4" if isinstance(value, Int4) else _name(value.dtype)


def describe(value: Tensor | Int4) -> TensorDesc:
    """Dtype and shape, for CANN's rules."""
    return TensorDesc(dtype_name(value), tuple(value.shape))


def optional_desc(tensor: Tensor | Int4 | None) -> TensorDesc | None:
    """The descriptor of an optional tensor, for CANN's rules."""
    return None if tensor is None else describe(tensor)


def is_meta(value: Any) -> bool:
    """Whether only the shape and dtype of a value are known."""
    if isinstance(value, FractalNZ):
        return value.is_meta
    if isinstance(value, Int4):
        value = value.held
    return isinstance(value, Tensor) and value.is_meta


@dataclass(frozen=True)
class Op:
    """An operator: its function and what the function's signature says.

    Attributes:
        type: GE op type.
        function: the implementation.
        inputs: names of the inputs, in order.
        host: the inputs whose values decide the shape of the result.
        dynamic: the dynamic inputs.
        attrs: names of the attributes.
        accepts_internal_formats: whether the function takes Int4 and FractalNZ directly.
        only_at_run_time: whether it does more than to compute its results, such as to communicate
            with other processes; then it is never computed while a graph is compiled.
        writes: the inputs that the function writes into; its first outputs are these tensors. They
            are the caller's memory only if they come from an input of the graph or from a constant
            in the caller's memory; otherwise the function gets copies.
    """

    type: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    host: frozenset[str]
    dynamic: frozenset[str]
    attrs: frozenset[str]
    accepts_internal_formats: bool
    only_at_run_time: bool = False
    writes: tuple[str, ...] = ()


OPS: dict[str, Op] = {}


F = TypeVar("F", bound=Callable[..., Any])


def op(
    *types: str,
    accepts_internal_formats: bool = False,
    only_at_run_time: bool = False,
    writes: tuple[str, ...] = (),
) -> Callable[[F], F]:
    """Register a function under its GE op types, before or after the stand-in is active.

    Args:
        types: GE op types.
        accepts_internal_formats, only_at_run_time, writes: see `Op`.
    """

    def register(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        inputs = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        for type_ in types:
            OPS[type_] = Op(
                type=type_,
                function=function,
                inputs=tuple(_ge_name(p.name) for p in inputs),
                host=frozenset(_ge_name(p.name) for p in inputs if "Host" in str(p.annotation)),
                dynamic=frozenset(p.name for p in inputs if p.annotation == "Dynamic"),
                attrs=frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
                accepts_internal_formats=accepts_internal_formats,
                only_at_run_time=only_at_run_time,
                writes=writes,
            )
            if runtime.is_active():
                runtime.current().graphs.announce(OPS[type_])
        return function

    return register


def _ge_name(name: str) -> str:
    return name.removesuffix("_")  # else_ is `else` in the graph


def find_op(type_: str) -> Op:
    """The operator of a type.

    Raises:
        GraphError: there is none.
    """
    if type_ in OPS:
        return OPS[type_]
    raise GraphError(f"op type {type_} is not implemented by cann_host")


def run_op(
    op: Op, inputs: dict[str, Any], attrs: dict[str, Any], *, compiling: bool = False
) -> list[Any]:
    """Compute one operator.

    Args:
        op: what to compute.
        inputs: values by input name; a dynamic input is a list. Absent ones are left out.
        attrs: attributes by name.
        compiling: whether to compute only shapes, and the values that are already known.

    Returns:
        The outputs, in order.

    Raises:
        ShapeUnknownError: a value that decides a shape is not known yet.
        GraphError: the operator refuses.
    """
    return as_list(compute_op(op, inputs, attrs, compiling=compiling))


def as_list(result: Any) -> list[Any]:
    """The outputs of an operator, from what its function returned."""
    return list(result) if isinstance(result, list | tuple) else [result]


def takes(op: Op, values: Sequence[Any]) -> bool:
    """Whether the operator's function takes these values as they are."""
    return op.accepts_internal_formats or not any(
        isinstance(value, Int4 | FractalNZ) for value in values
    )


def compute_op(op: Op, inputs: dict[str, Any], attrs: dict[str, Any], *, compiling: bool) -> Any:
    """`run_op`, but what the operator's function returned."""
    if any(is_meta(inputs.get(name)) for name in op.host):
        raise ShapeUnknownError
    for name in op.writes:
        if not isinstance(inputs.get(name), Tensor):
            raise GraphError(f"{name} has an internal format, into which cann_host does not write")
    values = [v for value in inputs.values() for v in (value if type(value) is list else [value])]
    if not takes(op, values):
        inputs = {name: plain(op.type, value) for name, value in inputs.items()}
    first = inputs.get(op.inputs[0]) if op.type in DEFINED else None
    if isinstance(first, Tensor):
        refusal = check_definition(op.type, soc_name(), dtype_name(first))
        if refusal is not None:
            raise GraphError(refusal)
    if (compiling and op.only_at_run_time) or any(is_meta(value) for value in values):
        inputs = {k: v if k in op.host else to_meta(v) for k, v in inputs.items()}
    names = {"else": "else_"}
    return op.function(**{names.get(name, name): v for name, v in inputs.items()}, **attrs)


def plain(type_: str, value: Any) -> Any:
    """A value as ND: GE converts it before operators that take ND. It does not convert int4.

    Args:
        type_: of the operator, for the message.
        value: of an input.

    Raises:
        GraphError: it is int4.
    """
    if type(value) is list:
        return [plain(type_, v) for v in value]
    if isinstance(value, FractalNZ):
        value = value.nd
    if isinstance(value, Int4):
        raise GraphError(f"{type_} does not take int4 inputs")
    return value


def to_meta(value: Any) -> Any:
    """A value of which only the shape and dtype are known."""
    if type(value) is list:
        return [to_meta(v) for v in value]
    if isinstance(value, FractalNZ):
        return FractalNZ(value.like, value.storage_shape)
    if isinstance(value, Int4):
        return Int4(value.held.to("meta"), value.swapped)
    return value.to("meta") if isinstance(value, Tensor) else value


def torch_dtype(code: int, what: str = "an attribute") -> torch.dtype:
    """The torch dtype for a GE dtype.

    Args:
        code: GE's number of the dtype.
        what: what has this dtype, for the message.
    """
    if code not in DTYPES:
        raise GraphError(f"{what} has GE dtype {code}, which is not implemented by cann_host")
    return DTYPES[code]


def ints(value: Host) -> list[int]:
    flat = value if value.dim() == 1 else value.reshape(-1)
    return list(map(int, flat.tolist()))


def soc_name() -> str:
    """The chip that the stand-in reports."""
    return runtime.options().soc


def refuses_overruns() -> bool:
    """Whether to refuse a call whose kernel writes past its result: the option `overruns`."""
    return runtime.options().overruns == "refuse"


def overrun(text: str) -> None:
    """Warn that CANN's kernel writes past its result, or refuse, as the option `overruns` says.

    Raises:
        GraphError: overruns are refused.
    """
    if refuses_overruns():
        raise GraphError(f"{text} (refused by cann_host's option overruns)")
    caution(text)


# one entry for each
_cautioned: list[int] = []


def cautions() -> int:
    """How often this process was cautioned."""
    return len(_cautioned)


def caution(text: str) -> None:
    """Warn about something that the device does without an error. The warning says that it is
    cann_host's own."""
    _cautioned.append(1)
    if "cann_host" not in text:
        text = f"{text} (cann_host's caution; CANN reports nothing)"
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the dtype in which torch would compute."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
