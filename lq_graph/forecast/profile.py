"""A profile of the user's own device, and the cost model fitted to it.

Two files are read: kernel_details.csv of torch_npu.profiler, and op_summary_*.csv of msprof.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import LinearQuantValueError
from ..rules.chips import Chip
from .cost import Parameters, Rate, of_work
from .fit import Point
from .least_squares import fit, relative_error
from .operators import Tensors, dtype_of, operator_of, work_of

__all__ = ["Call", "ProfileFit", "fit_profile", "read_profile"]

# The first of these that a file has. Both tools leave columns out, by level.
_COLUMNS = {
    "type": ("Type", "OP Type"),
    "name": ("Name", "Op Name"),
    "duration": ("Duration(us)", "Task Duration(us)"),
    "start": ("Start Time(us)", "Task Start Time(us)"),
    "input shapes": ("Input Shapes",),
    "input dtypes": ("Input Data Types",),
    "input formats": ("Input Formats",),
    "output shapes": ("Output Shapes",),
    "output dtypes": ("Output Data Types",),
}
_NEEDED = ("name", "duration")
_DTYPES = {"DT_BF16": "bfloat16", "FLOAT": "float32", "DOUBLE": "float64"}
_SHAPES = 3  # different ones of an operator, from which more than its scale is fitted
_FEWEST = 5  # rows of an operator

Shape = tuple[str, Tensors, Tensors]  # op type, inputs, outputs


@dataclass(frozen=True)
class Call:
    """A kernel of a profile."""

    op_type: str
    inputs: Tensors
    outputs: Tensors
    seconds: float


@dataclass(frozen=True)
class ProfileFit:
    """Parameters fitted to a profile.

    Attributes:
        parameters: those of `fitted()`, those of the operators named replaced.
        rows: kernels in the file, without the second rows of collectives.
        used: of them, what the fit used.
        operators: fitted, each with its relative error.
    """

    parameters: Parameters
    rows: int
    used: int
    operators: Mapping[str, float]

    def __str__(self) -> str:
        named = ", ".join(f"{name} ({error:.0%})" for name, error in self.operators.items())
        left = "" if named else "; no operator has enough of them, so nothing was fitted"
        said = f"; fitted, with residual: {named}" if named else left
        return f"profile: {self.used} of {self.rows} kernels used{said}"


def read_profile(path: str | Path) -> list[Call]:
    """The kernels of a file.

    Raises:
        LinearQuantValueError: it cannot be read, or is no such file.
    """
    file = Path(path).expanduser()
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            head = [name.strip() for name in rows.fieldnames or ()]
            rows.fieldnames = head
            columns = {
                what: next((name for name in names if name in head), "")
                for what, names in _COLUMNS.items()
            }
            missing = [" or ".join(_COLUMNS[what]) for what in _NEEDED if not columns[what]]
            if missing:
                raise LinearQuantValueError(
                    f"forecast: {file} is neither a kernel_details.csv nor an op_summary csv: it "
                    f"has no column {', '.join(missing)}"
                )
            return list(_calls(rows, columns, file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LinearQuantValueError(f"forecast: {file} cannot be read: {error}") from None


def _calls(
    rows: Iterable[Mapping[str, str | None]], columns: Mapping[str, str], file: Path
) -> Iterator[Call]:
    seen: set[tuple[str, float]] = set()
    for number, row in enumerate(rows, 2):

        def cell(what: str, row: Mapping[str, str | None] = row) -> str:
            return (row.get(columns[what]) or "").strip() if columns[what] else ""

        name, kind, duration = cell("name"), cell("type"), cell("duration")
        if duration in ("", "N/A"):
            continue
        try:
            seconds = float(duration) * 1e-6
            if not 0 <= seconds < math.inf:
                raise ValueError
        except ValueError:
            raise LinearQuantValueError(
                f"forecast: {file}, line {number}: the duration {duration!r} is no number"
            ) from None
        if re.search("hcom|aivkernel", f"{name} {kind}", re.IGNORECASE):
            # each is there twice, the second time as the kernel of a stream
            key = (cell("start"), seconds)
            if key in seen:
                continue
            seen.add(key)
        if kind in ("", "N/A"):
            kind = _type_of(name)
        inputs = _tensors(cell("input shapes"), cell("input dtypes"), cell("input formats"))
        outputs = _tensors(cell("output shapes"), cell("output dtypes"), "")
        yield Call(kind, inputs, outputs, seconds)


def _type_of(name: str) -> str:
    """Level 0 has no types: aclnnMatmul_MatMulV2_MatMulV2, or MatMulV2_1a2b3c_12 in graphs."""
    if name.startswith("aclnn"):
        return name.rpartition("_")[2]
    return re.sub(r"(_[0-9a-f]+)?_\d+$", "", name)


def _tensors(shapes: str, dtypes: str, formats: str) -> Tensors:
    """What a cell holds: \"\"\"16,5120;320,200,16,16\"\"\". An absent input is empty."""
    found = []
    names, layouts = dtypes.strip('"').split(";"), formats.strip('"').split(";")
    for i, text in enumerate(shapes.strip('"').split(";")):
        dtype = names[i].strip() if i < len(names) else ""
        if not dtype or not re.fullmatch(r"[\d,\s]*", text) or not text.strip(" ,"):
            continue
        sizes = tuple(int(size) for size in text.split(",") if size.strip())
        try:
            known = dtype_of(_DTYPES.get(dtype.upper(), dtype.upper().removeprefix("DT_")))
        except LinearQuantValueError:
            continue
        is_nz = i < len(layouts) and layouts[i].strip() == "FRACTAL_NZ"
        found.append((known, _logical(sizes) if is_nz else sizes))
    return tuple(found)


def _logical(sizes: Sequence[int]) -> tuple[int, ...]:
    """FRACTAL_NZ is printed as (..., a, b, 16, c) for a matrix of b x 16 and a x c."""
    if len(sizes) < 4:
        return tuple(sizes)
    *batch, a, b, rows, columns = sizes
    return (*batch, b * rows, a * columns)


def fit_profile(path: str | Path, chip: Chip, base: Parameters) -> ProfileFit:
    """The parameters, with those of a profile's operators fitted to it.

    A launch of its own and a factor on what depends on the shape, if an operator has three
    different shapes or more; else one factor on both. Less than five rows of an operator are left
    alone, and so are the attention and writes of the cache, whose shapes in a profile are those of
    the whole cache.

    Raises:
        LinearQuantValueError: the file cannot be read, or is no such file.
    """
    calls = read_profile(path)
    groups: dict[str, dict[Shape, list[float]]] = defaultdict(lambda: defaultdict(list))
    for call in calls:
        operator, known = operator_of(call.op_type, call.inputs, call.outputs)
        fits = known and operator.kind in ("product", "elementwise")
        if fits and call.inputs and call.outputs and call.seconds > 0:
            groups[operator.name][call.op_type, call.inputs, call.outputs].append(call.seconds)
    launches, rates, errors = dict(base.launches), dict(base.rates), dict(base.errors)
    used, named = 0, {}
    for name, shapes in groups.items():
        points = _points(shapes, chip)
        rows = sum(len(shapes[shape]) for shape, _ in points)
        if rows < _FEWEST:
            continue
        launch, rate, error = _fit_one([point for _, point in points], base)
        launches[name], rates[name], errors[name], named[name] = launch, rate, error, error
        used += rows
    parameters = replace(
        base, launches=launches, rates=rates, errors=errors, profiled=frozenset(named)
    )
    return ProfileFit(parameters, len(calls), used, named)


def _points(shapes: Mapping[Shape, list[float]], chip: Chip) -> list[tuple[Shape, Point]]:
    """One for each shape, at the median of its times: a few calls are interrupted."""
    points = []
    for shape, seconds in shapes.items():
        op_type, inputs, outputs = shape
        operator, _ = operator_of(op_type, inputs, outputs)
        if operator.kind == "product" and len(inputs) < 2:
            continue  # level 0 does not say what it reads
        try:
            work = work_of(operator, inputs, outputs, chip, {})
        except LinearQuantValueError:  # a transposed x1, or int4 in int32
            continue
        points.append((shape, Point(operator, work, chip, statistics.median(seconds))))
    return points


def _fit_one(points: Sequence[Point], base: Parameters) -> tuple[float, Rate, float]:
    """Launch, rate and relative error of an operator."""
    operator = points[0].operator
    before = replace(base, gap=0.0)
    parts = [of_work(operator, True, p.work, p.chip, before) for p in points]
    measured = [point.seconds for point in points]
    depends = [part.memory_seconds + part.compute_seconds for part in parts]
    launch, free = base.launches[operator.name], (0.0, math.inf)
    old = base.rates[operator.family]
    # no peak is exceeded, whatever small shapes or noise say
    least = max(
        old.bandwidth if any(part.memory_seconds for part in parts) else 0.0,
        old.compute if any(part.compute_seconds for part in parts) else 0.0,
    )
    rows, unknowns = [[1.0, one] for one in depends], 2
    if len(points) >= _SHAPES:
        launch, factor = fit(rows, measured, [free, (least, math.inf)])
    else:
        (factor,) = fit([[launch + one] for one in depends], measured, [free])
        launch, unknowns = launch * factor, 1
        if factor < least:
            launch, factor = fit(rows, measured, [free, (least, least)])
    forecast = [launch + factor * one for one in depends]
    error = relative_error(forecast, measured, unknowns)
    error = base.errors[operator.name] if math.isinf(error) else error
    factor = factor if any(depends) else 1.0
    return launch, Rate(old.bandwidth / factor, old.compute / factor), error
