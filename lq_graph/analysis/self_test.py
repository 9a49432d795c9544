"""Every row of the product's table, and the examples' layers, against an integer reference: on the
CPU, eagerly on the NPU, and in one GE graph. `python -m lq_graph doctor` runs it."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LinearQuantError
from ..modules.linear_quant import LinearQuant
from ..modules.prepare import use_internal_format_weight
from ..ops import dynamic_quant, static_quant, trans_quant_param
from ..rules.tables import Product, QuantRow, Row, dtype_name, quant_rows_of, rows_of
from . import integer_reference as reference

__all__ = ["LAYERS", "Case", "Result", "cases_of", "run_compiled", "run_eagerly"]

LAYERS = "layers of the examples"
_M, _K, _N = 16, 128, 64
_FOLDING = "trans_quant_param: scale fp32, offset fp32|-"
_CHOICES = ("scale", "offset", "bias", "pertoken_scale")


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        group: the row of the support table, or LAYERS.
        name: which of the group's calls: the dtypes of its tensors.
        module: computes it.
        inputs: on the CPU.
        misses: from the outputs, on the CPU: for every number, how far it is off; 0 if it is right.
        needs: what this machine lacks for it, such as "CANN 9.0.0"; empty if nothing.
    """

    group: str
    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    misses: Callable[..., Tensor]
    needs: str = ""


@dataclass(frozen=True)
class Result:
    """What a case gave in one mode.

    Attributes:
        group, name: of the case.
        wrong: how many numbers differ from the reference.
        count: of how many.
        largest: the largest difference.
        error: the error instead of numbers; empty if there is none.
        left_out: why it did not run; empty if it did.
    """

    group: str
    name: str
    wrong: int = 0
    count: int = 0
    largest: float = 0.0
    error: str = ""
    left_out: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran and every number is right."""
        return not (self.left_out or self.error or self.wrong)


# ---- the cases ----


class _Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def cases_of(product: Product) -> list[Case]:
    """All cases of a product: every combination of dtypes of every row of its tables."""
    generator = torch.Generator().manual_seed(0)
    found = _layers(product, generator)
    for row in rows_of(product):
        for dtypes in itertools.product(*(row.choices(column) for column in _CHOICES)):
            found.append(_row_case(row, dict(zip(_CHOICES, dtypes, strict=True)), generator))
    for op in ("dynamic_quant", "static_quant"):
        for quant_row in quant_rows_of(product, op):
            for dtype in quant_row.x:
                found.append(_activation_case(quant_row, dtype, generator))
    scale = torch.rand(_N, generator=generator)
    offset = torch.randn(_N, generator=generator) * 90
    for inputs in ((scale,), (scale, offset)):
        want = reference.trans_quant_param(*inputs)
        name = "scale, offset" if len(inputs) > 1 else "scale"
        call = _Call(trans_quant_param)
        found.append(Case(_FOLDING, name, call, inputs, _differences(want)))
    return [replace(case, needs=_needs(case)) for case in found]


def _needs(case: Case) -> str:
    """The release of CANN that a call needs, if the one in force is older and the rules say so."""
    try:
        with torch.no_grad():
            case.module(*case.inputs)
    except LinearQuantError as error:
        since = getattr(error.refusal, "since", None)
        return f"CANN {since}" if since else ""
    return ""


def label_of(row: Row | QuantRow) -> str:
    """A row in a line: "linear_quant int8 to fp16: scale int64|fp32, bias int32|-"."""
    if isinstance(row, QuantRow):
        return f"{row.op} to {_storage(row.output_dtype)}: x {_choices(row.x)}"
    parts = [
        f"{short} {_choices(row.choices(column))}"
        for column, short in zip(_CHOICES, ("scale", "offset", "bias", "pertoken"), strict=True)
        if row.choices(column) != (None,)
    ]
    return f"linear_quant {_storage(row.storage)} to {_short(row.output)}: {', '.join(parts)}"


def _choices(dtypes: Sequence[torch.dtype | None]) -> str:
    return "|".join(map(_short, dtypes))


def _short(dtype: torch.dtype | None) -> str:
    return dtype_name(dtype).replace("bfloat", "bf").replace("float", "fp")


def _storage(dtype: torch.dtype) -> str:
    return "int4" if dtype == torch.int32 else dtype_name(dtype)


def _row_case(row: Row, dtypes: dict[str, torch.dtype | None], generator: torch.Generator) -> Case:
    int4 = row.storage == torch.int32
    layer, x1 = _layer(_M, _K, _N, int4, row.output, dtypes, generator)
    inputs = (x1,)
    if layer.pertoken_scale is not None:
        layer.pertoken_scale.data = torch.rand(_M, generator=generator) + 0.5
    shown = [f"{name} {_short(dtype)}" for name, dtype in dtypes.items() if dtype]
    return Case(label_of(row), ", ".join(shown), layer, inputs, _differences(_want(layer, x1)))


def _layer(
    m: int,
    k: int,
    n: int,
    int4: bool,
    output: torch.dtype,
    dtypes: dict[str, torch.dtype | None],
    generator: torch.Generator,
) -> tuple[LinearQuant, Tensor]:
    """A layer with random tensors of these dtypes, and an input. Most int8 results are inside the
    range of int8, some outside, so that clamping is met too."""
    storage, high = (torch.int32, 8) if int4 else (torch.int8, 128)

    def integers(rows: int) -> Tensor:
        if int4:  # any 32 bits are eight int4 values
            low, above = -(2**31), 2**31
            size = (rows, k // 8)
            return torch.randint(low, above, size, dtype=torch.int64, generator=generator).int()
        return torch.randint(-high, high, (rows, k), dtype=torch.int8, generator=generator)

    layer = LinearQuant(
        k,
        n,
        dtype=storage,
        output_dtype=output,
        offset=dtypes["offset"] is not None,
        bias=dtypes["bias"] is not None,
        pertoken_scale=dtypes["pertoken_scale"] is not None,
    )
    layer.weight.data = integers(n)
    spread = 60.0 / (high * high / 3 * k**0.5)
    scale = torch.rand(n, generator=generator) * spread + spread / 2
    scale[::3] *= -1
    if layer.offset is not None:
        layer.offset.data = torch.randn(n, generator=generator) * 60
    if dtypes["scale"] == torch.int64:  # with the offset inside
        layer.scale.data = reference.trans_quant_param(scale, layer.offset)
    else:
        layer.scale.data = scale.to(dtypes["scale"])
    if layer.bias is not None:
        bias = torch.randn(n, generator=generator)
        dtype = dtypes["bias"]
        layer.bias.data = (bias * 3000).int() if dtype == torch.int32 else (bias * 20).to(dtype)
    return layer, integers(m)


def _want(layer: LinearQuant, x1: Tensor) -> Tensor:
    return reference.linear_quant(
        x1,
        layer.weight,
        layer.scale,
        layer.offset,
        layer.pertoken_scale,
        layer.bias,
        output_dtype=layer.output_dtype or torch.int8,
    )


def _layers(product: Product, generator: torch.Generator) -> list[Case]:
    """The layers of examples/graph_mode.py."""
    made = []
    f32, i32, f16 = torch.float32, torch.int32, torch.float16
    for name, k, n, int4, output, dtypes in (
        ("up", 512, 1024, False, torch.int8, {"scale": f32, "offset": f32, "bias": i32}),
        ("down", 1024, 256, False, f16, {"scale": f32, "bias": i32}),
        ("a4w4", 512, 256, True, f16, {"scale": f32}),
    ):
        if int4 and not rows_of(product, torch.int32):
            continue
        given: dict[str, torch.dtype | None] = {**dict.fromkeys(_CHOICES), **dtypes}
        layer, x1 = _layer(16, k, n, int4, output, given, generator)
        made.append(Case(LAYERS, name, layer, (x1,), _differences(_want(layer, x1))))
    return made


def _activation_case(row: QuantRow, dtype: torch.dtype, generator: torch.Generator) -> Case:
    x = (torch.randn(_M, _K, generator=generator) * 3).to(dtype)
    if row.op == "dynamic_quant":
        module = _Call(lambda x: dynamic_quant(x, dtype=row.output_dtype))

        def misses(values: Tensor, scale: Tensor) -> Tensor:
            return reference.dynamic_quant_misses(x, values, scale)

        return Case(label_of(row), _short(dtype), module, (x,), misses)
    # powers of two and whole numbers: the result does not depend on the order of rounding
    scale, offset = torch.tensor([16.0], dtype=dtype), torch.tensor([3.0], dtype=dtype)
    want = reference.static_quant(x, scale, offset)
    inputs = (x, scale, offset)
    return Case(label_of(row), _short(dtype), _Call(static_quant), inputs, _differences(want))


def _differences(want: Tensor) -> Callable[[Tensor], Tensor]:
    def misses(got: Tensor) -> Tensor:
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"the result is {dtype_name(got.dtype)} {tuple(got.shape)}, and should be "
                f"{dtype_name(want.dtype)} {tuple(want.shape)}"
            )
        # equal infinities differ by NaN, which nan_to_num makes 0; a NaN in one of them stays wrong
        off = (got.double() - want.double()).abs().nan_to_num(nan=torch.inf)
        return torch.where(got == want, 0.0, off)

    return misses


# ---- running them ----


def run_eagerly(cases: Sequence[Case], device: str) -> Iterator[Result]:
    """Run each case by itself.

    Args:
        device: "cpu", or "npu", where the weights are prepared as for deployment.
    """
    for case in cases:
        if case.needs:
            yield _left_out(case, f"needs {case.needs}")
            continue
        try:
            module = case.module
            if device != "cpu":
                module = _prepared(case.module, device)
            with torch.no_grad():
                outputs = module(*(tensor.to(device) for tensor in case.inputs))
            result = _compared(case, outputs)
        except Exception as error:
            result = Result(case.group, case.name, error=_sentence(error))
        yield result


class _All(nn.Module):
    """Several cases as one model, so that one graph has them all."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(case.module for case in cases)
        self.counts = [len(case.inputs) for case in cases]

    def forward(self, *inputs: Tensor) -> list[Any]:
        outputs, start = [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            outputs.append(part(*inputs[start : start + count]))
            start += count
        return outputs


def run_compiled(
    cases: Sequence[Case], backend: Any, device: str, seconds: float
) -> Iterator[Result]:
    """Run all cases in one graph. If that fails, one graph for each group finds the cause.

    Args:
        backend: of torch.compile.
        seconds: after them, no other graph is begun; what is left has not run.
    """
    start = time.monotonic()
    yield from (_left_out(case, f"needs {case.needs}") for case in cases if case.needs)
    cases = [case for case in cases if not case.needs]
    try:
        yield from _in_one_graph(cases, backend, device)
        return
    except Exception:  # one of them spoils the graph of all
        pass
    for _, several in itertools.groupby(cases, key=lambda case: case.group):
        group = list(several)
        if time.monotonic() - start > seconds:
            yield from (_left_out(case, "there was no time for it") for case in group)
            continue
        try:
            yield from _in_one_graph(group, backend, device)
        except Exception as error:
            text = _sentence(error)
            yield from (Result(case.group, case.name, error=text) for case in group)


def _left_out(case: Case, why: str) -> Result:
    return Result(case.group, case.name, left_out=why)


def _in_one_graph(cases: Sequence[Case], backend: Any, device: str) -> list[Result]:
    torch._dynamo.reset()
    model = _prepared(_All(cases), device)
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    with torch.no_grad():
        outputs = compiled(*(tensor.to(device) for case in cases for tensor in case.inputs))
    return [_compared(case, output) for case, output in zip(cases, outputs, strict=True)]


def _prepared(module: nn.Module, device: str) -> nn.Module:
    module = copy.deepcopy(module).to(device)
    if any(isinstance(part, LinearQuant) for part in module.modules()):
        use_internal_format_weight(module)
    return module


def _compared(case: Case, outputs: Any) -> Result:
    given = outputs if isinstance(outputs, tuple | list) else (outputs,)
    misses = case.misses(*(output.cpu() for output in given))
    wrong = int((misses != 0).sum())
    return Result(case.group, case.name, wrong, misses.numel(), float(misses.max()))


def _sentence(error: BaseException) -> str:
    """An error in a line, without torch_npu's line of time and code. The innermost one, because
    torch.compile wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).partition("[ERROR]")[0].split())
    return f"{type(error).__name__}: {text}"[:400]
