"""Compares cann_host's refusals with CANN's own public tests; run by hand:

    python tests/support/cann_tables.py CHECKOUT

CHECKOUT is your clone of the public repository hicann/ops-nn. Its unit tests say, call by call,
whether an operator takes it: tables of the quantized matmul (csv), and C++ for the others, read by
cann_ut.py. This program makes the same calls with cann_host.rules, the checks of cann_host.aclnn
and the GE operators of cann_host. It prints for each file how many rows were compared, how many
have the same result, and every row with another result. Rows that torch_npu and torchair cannot
send, and rows whose result the test does not check, are counted separately, with the reason. The
exit status is 1 if a row that differs has no reason in EXCEPTIONS.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests
sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # nothing is run
import torch

from cann_host import aclnn as operators
from cann_host.graph import executor, ops  # noqa: F401 - ops registers the operators
from cann_host.graph.executor import GraphError, ShapeUnknownError, find_op, run_op
from cann_host.rules import (
    ND,
    NZ,
    QUANT_MODES,
    QuantMatmulCall,
    TensorDesc,
    check_quant_matmul,
    soc_family,
)
from cann_host.rules.quant_matmul import Entry
from support import cann_ut

MATMUL = Path("matmul")
V3 = MATMUL / "quant_batch_matmul_v3/tests/ut"
V4 = MATMUL / "quant_batch_matmul_v4/tests/ut"

# rows whose answer differs and should: case, reason
EXCEPTIONS = {
    "QUANTMM910B/137": "x1 in FRACTAL_NZ has kernels; LinearQuant's input is ND, and cann_host "
    "does not model it",
    "QUANTMM950/65": "about the chip's number of cores, which is not asked here",
    "ascend910B2_A8W8_nz_c0_32_format_ok": "FRACTAL_NZ_C0_32 is another format; torch_npu makes "
    "int8 weights FRACTAL_NZ (29), which is taken",
    "test_tiling_failed_empty_tensor_008": "Relu of nothing: whether GE asks a kernel for it is "
    "not public; here it gives nothing",
}

_DTYPES = {
    "BF16": "bfloat16",
    "FLOAT": "float32",
    "FLOAT32": "float32",
    "FLOAT16": "float16",
    "INT8": "int8",
    "INT4": "int4",
    "INT32": "int32",
    "INT64": "int64",
    "UINT64": "uint64",
}


class Row(NamedTuple):
    """One row of a table: a name, the call, and CANN's answer; or why it is not compared."""

    name: str
    call: QuantMatmulCall | None
    accepted: bool
    apart: str = ""


def apart(name: str, reason: str) -> Row:
    return Row(name, None, False, reason)


OTHER_DTYPES = "dtypes beside int8 and int4, no part of LinearQuant"
GROUPS = "scales for groups or blocks, no part of LinearQuant"
OTHER_CHIP = "a chip cann_host does not pretend"
NOT_LOOKED_AT = "the test does not check the result"


class Answer(NamedTuple):
    """The result of one row.

    Attributes:
        name: of the case.
        soc: chip.
        agrees: whether CANN and cann_host agree; None if the row is not compared.
        text: why not compared, or the difference.
    """

    name: str
    soc: str
    agrees: bool | None
    text: str = ""


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [
            {key.strip(): (value or "").strip() for key, value in row.items() if key}
            for row in csv.DictReader(file)
        ]


def dtype(text: str) -> str:
    return _DTYPES.get(text.removeprefix("ACL_"), text)


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


def tiling(path: Path) -> Iterator[Row]:
    """The table of the graph operator's tiling."""
    for row in rows_of(path):
        number = {k: int(row[k]) for k in ("m", "k", "n", "batchA", "batchB", "quantMode")}
        x1_dtype, x2_dtype = dtype(row["x1Dtype"]), dtype(row["x2Dtype"])
        soc = row["socVersion"]
        if soc_family(soc) is None:
            yield apart(row["caseName"], OTHER_CHIP)
            continue
        if {x1_dtype, x2_dtype} - {"int8", "int4"}:
            yield apart(row["caseName"], OTHER_DTYPES)
            continue
        if number["quantMode"] > 1:
            yield apart(row["caseName"], GROUPS)
            continue
        m, k, n = number["m"], number["k"], number["n"]
        transposed = {name: row[name] == "1" for name in ("transA", "transB")}

        def shape(dims: str, batch: int, matrix: tuple[int, ...]) -> tuple[int, ...]:
            count = int(dims)
            return (*(batch,) * (count - 2), *matrix) if count > 1 else matrix[:1]

        scale = (n,) if number["quantMode"] == 1 else (1,)
        x1 = shape(row["x1dim"], number["batchA"], (k, m) if transposed["transA"] else (m, k))
        x2 = shape(row["x2dim"], number["batchB"], (n, k) if transposed["transB"] else (k, n))
        scale_dtype = dtype(row["scaleDtype"])
        call = QuantMatmulCall(
            soc,
            TensorDesc(x1_dtype, x1, format_of(row["x1Format"]), transposed["transA"]),
            TensorDesc(x2_dtype, x2, format_of(row["x2Format"]), transposed["transB"]),
            TensorDesc(scale_dtype, scale),
            dtype(row["yDtype"]),
            entry="graph",
        )
        if row["offsetFlag"] == "1":
            call = call._replace(offset=TensorDesc("float32", scale))
        if row["pertokenFlag"] == "1":
            pertoken = TensorDesc(dtype(row["perTokenScaleDtype"]), (m,))
            call = call._replace(pertoken_scale=pertoken)
        if row["biasFlag"] == "1":
            call = call._replace(bias=TensorDesc(dtype(row["biasDtype"]), (n,)))
        suite, _, case = row["caseName"].partition("/")
        yield Row(f"{suite}/{case.rpartition('/')[2]}", call, row["result"] == "TRUE")


def format_of(text: str) -> str:
    text = text.removeprefix("ACL_FORMAT_") or ND
    return NZ if text == "NZ" else text


def matrix(shape: str, strides: str, kind: str, flag: str, form: str) -> TensorDesc:
    """x1 or x2 of an aclnn table."""
    dims, steps, name = sizes(shape), sizes(strides), dtype(kind)
    swapped = flag.lower() == "true"
    if len(dims) > 1 and len(steps) == len(dims) and steps[-2] == 1 and steps[-1] == dims[-2] > 1:
        dims, swapped = (*dims[:-2], dims[-1], dims[-2]), not swapped
    if name == "int32":  # eight int4 each
        name, dims = "int4", (*dims[:-1], dims[-1] * 8)
    return TensorDesc(name, dims, format_of(form), swapped)


def aclnn(path: Path, names: dict[str, str], entry: Entry) -> Iterator[Row]:
    """A table of an aclnn function. names: our column names to the table's."""
    for row in rows_of(path):

        def cell(name: str, row: dict[str, str] = row) -> str:
            return row.get(names.get(name, name), "")

        soc = cell("soc") or cann_ut.soc_of(row.get("arch") or cell("name")) or "Ascend910B2"
        soc = {"Ascend910_93": "Ascend910_9391"}.get(soc, soc)
        if soc_family(soc) is None:
            yield apart(cell("name"), OTHER_CHIP)
            continue
        if row.get("caseGroup") == "general":  # called, and compared with nothing
            yield apart(cell("name"), NOT_LOOKED_AT)
            continue
        if not cell("x1_type") or not sizes(cell("x1")):
            yield apart(cell("name"), "a row without the dtype or the shape of x1")
            continue
        if any(cell(name).startswith("ACL") for name in ("x1_stride", "x2_stride")):
            yield apart(cell("name"), "a row with a column too few")
            continue
        x1, x2 = (
            matrix(
                cell(name),
                cell(f"{name}_stride"),
                cell(f"{name}_type"),
                cell(f"transpose{name.upper()}"),
                cell(f"{name}_format"),
            )
            for name in ("x1", "x2")
        )
        if {x1.dtype, x2.dtype} - {"int8", "int4"}:
            yield apart(cell("name"), OTHER_DTYPES)
            continue
        if cell("groupSize") not in ("", "0"):
            yield apart(cell("name"), GROUPS)
            continue
        if cell("checkRet").lower() == "false":
            yield apart(cell("name"), NOT_LOOKED_AT)
            continue
        if any(sizes(cell(name)) for name in ("yScaleShape", "x1OffsetShape", "yOffsetShape")):
            yield apart(cell("name"), "arguments torch_npu never passes for these dtypes")
            continue
        optional: dict[str, TensorDesc | None] = {"offset": None, "pertoken": None, "bias": None}
        for name in optional:
            absent = cell(f"{name}_null").lower() == "true"
            if sizes(cell(name)) and not absent:
                kind = dtype(cell(f"{name}_type") or "FLOAT")
                optional[name] = TensorDesc(kind, sizes(cell(name)))
        call = QuantMatmulCall(
            soc,
            x1,
            x2._replace(storage_shape=sizes(cell("x2StorageShape")) or None),
            TensorDesc(dtype(cell("scale_type")), sizes(cell("scale"))),
            dtype(cell("out_type")),
            optional["offset"],
            optional["bias"],
            optional["pertoken"],
            sizes(cell("out")),
            entry,
        )
        yield Row(cell("name"), call, cell("expectRet") == "ACLNN_SUCCESS")


_V4 = {
    "soc": "socVersion",
    "name": "caseName",
    "x1_stride": "x1Stride",
    "x2_stride": "x2Stride",
    "x1_type": "x1Type",
    "x2_type": "x2Type",
    "x1_format": "x1Format",
    "x2_format": "x2Format",
    "scale_type": "scaleType",
    "out_type": "outType",
    **{f"{name}_null": f"{name}Null" for name in ("offset", "pertoken", "bias")},
    **{f"{name}_type": f"{name}Type" for name in ("offset", "pertoken", "bias")},
}
_V5 = {
    **_V4,
    "x1": "x1Shape",
    "x2": "x2Shape",
    "scale": "scaleShape",
    "offset": "offsetShape",
    "pertoken": "pertokenScaleShape",
    "bias": "biasShape",
    "out": "outShape",
}
# aclnnQuantMatmulWeightNz. Its offset is x1Offset's neighbour, which no row has.
_WEIGHT_NZ = {
    "soc": "socVersion",
    "name": "caseName",
    "x1": "x1Shape",
    "x2": "x2Shape",
    "scale": "x2ScaleShape",
    "pertoken": "x1ScaleShape",
    "bias": "biasShape",
    "out": "outShape",
    "x1_stride": "x1Stride",
    "x2_stride": "x2Stride",
    "x1_type": "x1Type",
    "x2_type": "x2Type",
    "x1_format": "x1Format",
    "x2_format": "x2Format",
    "scale_type": "x2ScaleType",
    "pertoken_type": "x1ScaleType",
    "bias_type": "biasType",
    "out_type": "outType",
    "pertoken_null": "x1ScaleNull",
    "bias_null": "biasNull",
}
# aclnnQuantMatmulV3, on the checks of V4
_V3 = {
    "soc": "socVersion",
    "name": "caseName",
    "x1": "x1Shape",
    "x2": "x2Shape",
    "scale": "scaleShape",
    "offset": "offsetShape",
    "bias": "biasShape",
    "out": "outShape",
    "x1_stride": "x1Stride",
    "x2_stride": "x2Stride",
    "x1_type": "x1Type",
    "x2_type": "x2Type",
    "x1_format": "x1Format",
    "x2_format": "x2Format",
    "scale_type": "scaleType",
    "out_type": "outType",
    "offset_type": "offsetType",
    "bias_type": "biasType",
}


def matmul(rows: Iterator[Row]) -> Iterator[Answer]:
    """Rows of the quantized matmul beside check_quant_matmul."""
    for row in rows:
        call = row.call
        if call is None:
            yield Answer(row.name, "", None, row.apart)
            continue
        if call.x2.storage_shape and call.x2.format == NZ and not sent(call.x2):
            yield Answer(row.name, call.soc, None, "a storage shape torch_npu does not send")
            continue
        refusal = check_quant_matmul(call)
        said = "takes it" if refusal is None else f"refuses: {refusal}"
        text = f"CANN {'takes' if row.accepted else 'refuses'} it, cann_host {said}"
        yield Answer(row.name, call.soc, (refusal is None) == row.accepted, text)


def sent(x2: TensorDesc) -> bool:
    """Whether a FRACTAL_NZ storage is the one that npu_format_cast makes of the weight."""
    assert x2.storage_shape is not None
    *_, rows, columns = x2.shape
    c0 = 64 if x2.dtype == "int4" else 32
    return x2.storage_shape[-4:] == (-(-columns // c0), -(-rows // 16), 16, c0)


def descriptor(tensor: cann_ut.Tensor | Any) -> Any:
    """An aclTensor, contiguous; other arguments unchanged."""
    if not isinstance(tensor, cann_ut.Tensor):
        return tensor
    steps: list[int] = []
    step = 1
    for size in reversed(tensor.shape):
        steps.insert(0, step)
        step *= size
    shape = tensor.shape
    return operators.AclTensor(0, tensor.dtype, tensor.format, 0, shape, tuple(steps), shape)


def as_called(case: cann_ut.Case) -> tuple[str, list[Any]]:
    """The operator of cann_host.aclnn, and its arguments in csrc/aclnn.cpp's order."""
    name, given = case.function, [descriptor(one) for one in case.inputs]
    results = [descriptor(one) for one in case.outputs]
    if name == "aclnnDynamicQuant":  # torch_npu calls V2, whose checks these are
        return "aclnnDynamicQuantV2", [*given, None, 2, *results, None]
    if name in ("aclnnDynamicQuantV3", "aclnnDynamicQuantV4"):
        given[5] = QUANT_MODES.index(given[5]) if given[5] in QUANT_MODES else -1
        given.insert(6, 0.0) if name.endswith("V3") else None
    if name == "aclnnTransQuantParamV2":
        given.append(0)
    if name == "aclnnAscendQuantV3":
        given[4] = (
            operators.ROUND_MODES.index(given[4]) if given[4] in operators.ROUND_MODES else -1
        )
    return name, [*given, *results]


PARAMETERS = ("161001", "161002", "561000")


def op_api(path: Path) -> Iterator[Answer]:
    """aclnn calls beside the checks of cann_host.aclnn. They end before CANN's tiling."""
    for case in cann_ut.op_api(path):
        accepted = case.expected in ("ACLNN_SUCCESS", "ACL_SUCCESS")
        refused = case.expected.startswith("ACLNN_ERR")
        name, arguments = as_called(case)
        if name not in operators.OPERATORS:
            yield Answer(case.name, case.soc, None, f"{case.function}: torch_npu calls another")
            continue
        if not (accepted or refused):
            yield Answer(case.name, case.soc, None, NOT_LOOKED_AT)
            continue
        if any(isinstance(t, cann_ut.Tensor) and t.dtype in (29, 34) for t in case.outputs):
            yield Answer(case.name, case.soc, None, "torch has no such dtype: int4 goes as int32")
            continue
        # a test of V3, which is for 950 only, runs in an environment without that chip
        elsewhere = case.expected == "ACLNN_ERR_INNER"
        soc = "Ascend910B2" if elsewhere else case.soc
        operator = operators.OPERATORS[name]
        refusal = None
        try:
            operator.check(operator.arguments(*arguments), soc)
        except (operators.RefusedError, GraphError) as error:
            refusal = str(error)
        if refusal and accepted and "CANN error" not in refusal:
            yield Answer(case.name, case.soc, None, f"cann_host has it not: {refusal}")
            continue
        takes = refusal is None or not any(code in refusal for code in PARAMETERS)
        text = f"CANN {case.expected}, cann_host {refusal or 'takes it'}"
        yield Answer(case.name, case.soc, takes == accepted, text)


TORCH = {**executor.DTYPES, 35: torch.float8_e5m2, 36: torch.float8_e4m3fn}


UNKNOWN_VALUE = "a value decides a shape, and the test has none"


def run_meta(case: cann_ut.Case, inputs: dict[str, Any]) -> tuple[str | None, list[Any]]:
    """Infer a GE operator on shapes: the refusal, and the results."""
    op = find_op(case.function)
    attrs = {name: value for name, value in case.attrs.items() if name in op.attrs}
    executor.soc_name = lambda: case.soc
    given = {
        name: torch.empty(t.shape, dtype=TORCH[t.dtype], device="meta")
        for name, t in inputs.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cautions: it is taken
            return None, run_op(op, given, attrs)
    except ShapeUnknownError:
        return UNKNOWN_VALUE, []
    except GraphError as error:
        return str(error), []


def tiling_cases(path: Path) -> Iterator[Answer]:
    """Tiling of other graph operators beside those of cann_host.graph.ops."""
    for case in cann_ut.tiling(path):
        accepted = case.expected == "GRAPH_SUCCESS"
        if not case.expected:
            yield Answer(case.name, case.soc, None, NOT_LOOKED_AT)
            continue
        op = find_op(case.function)
        names = [n for n, t in zip(op.inputs, case.inputs, strict=False) if t is not None]
        inputs = dict(zip(names, [t for t in case.inputs if t is not None], strict=True))
        unknown = {t.dtype for t in inputs.values()} - set(TORCH)
        if unknown:
            yield Answer(case.name, case.soc, None, f"torch has no dtype {unknown}")
            continue
        refusal, results = run_meta(case, inputs)
        if refusal == UNKNOWN_VALUE:
            yield Answer(case.name, case.soc, None, refusal)
            continue
        if refusal and accepted and "CANN error" not in refusal:
            yield Answer(case.name, case.soc, None, f"cann_host has it not: {refusal}")
            continue
        declared = [tuple(r.shape) for r in results]
        theirs = [t.shape for t in case.outputs if t is not None]
        y = case.outputs[0].dtype if case.outputs[0] is not None else None
        if refusal is None and not accepted and declared != theirs[: len(declared)]:
            text = f"results {theirs} where InferShape gives {declared}: no graph has them"
            yield Answer(case.name, case.soc, None, text)
            continue
        dtypes = [t.dtype for t in case.outputs if t is not None]
        inferred = [29 if isinstance(r, executor.Int4) else entry_code(r.dtype) for r in results]
        if refusal is None and not accepted and dtypes != inferred[: len(dtypes)]:
            text = f"results of {dtypes} where InferDataType gives {inferred}: no graph has them"
            yield Answer(case.name, case.soc, None, text)
            continue
        del y
        text = f"CANN {case.expected}, cann_host {refusal or 'takes it'}"
        yield Answer(case.name, case.soc, (refusal is None) == accepted, text)


def entry_code(dtype: torch.dtype) -> int:
    return next(code for code, known in TORCH.items() if known == dtype)


def infer_shape(path: Path) -> Iterator[Answer]:
    """InferShape of graph operators beside the shapes those of cann_host.graph.ops give."""
    for case in cann_ut.infer_shape(path):
        inputs = case.attrs.pop("__inputs__") or dict(
            zip(find_op(case.function).inputs, case.inputs, strict=False)
        )
        if not case.expected:
            yield Answer(case.name, case.soc, None, NOT_LOOKED_AT)
            continue
        if not inputs or any(size < 0 for t in inputs.values() for size in t.shape):
            yield Answer(case.name, case.soc, None, "a shape that is not known at compile time")
            continue
        refusal, results = run_meta(case, inputs)
        if refusal == UNKNOWN_VALUE:
            yield Answer(case.name, case.soc, None, refusal)
            continue
        accepted = case.expected == "GRAPH_SUCCESS"
        shapes = [tuple(r.shape) for r in results]
        same = (refusal is None) == accepted and (not case.shapes or shapes == case.shapes)
        text = f"CANN {case.expected} {case.shapes}, cann_host {refusal or shapes}"
        yield Answer(case.name, case.soc, same, text)


def add_rms_norm(path: Path) -> Iterator[Answer]:
    """aclnnAddRmsNorm's tests call one function of theirs with shapes, a dtype and the answer."""
    for name, text in cann_ut.cases_of(path):
        for call in re.findall(r"CommonTest\((.*?)\);", text):
            x, gamma, rstd, dtype_, expected = cann_ut.split(call)
            code = cann_ut.constant(dtype_)
            one, last, out = (
                descriptor(cann_ut.Tensor(kind, cann_ut.sizes(dims)))
                for kind, dims in ((code, x), (code, gamma), (0, rstd))
            )
            soc = cann_ut.soc_of(name) or "Ascend910B2"
            operator = operators.OPERATORS["aclnnAddRmsNorm"]
            refusal = None
            try:
                operator.check(operator.arguments(one, one, last, 1e-5, one, out, one), soc)
            except operators.RefusedError as error:
                refusal = str(error)
            accepted = expected == "ACLNN_SUCCESS"
            said = f"CANN {expected}, cann_host {refusal or 'takes it'}"
            yield Answer(f"{name} {call}", soc, (refusal is None) == accepted, said)


QUANT, NORM = Path("quant"), Path("norm")
# folders of the other operators of cann_host; the tests of tiling and InferShape are looked for
OTHERS = (
    *(Path("activation") / name for name in ("gelu", "gelu_v2", "log_softmax_v2", "relu")),
    *(
        Path("activation") / name
        for name in ("sigmoid", "softmax_v2", "softplus", "swi_glu", "swish")
    ),
    *(Path("index") / name for name in ("gather_elements", "gather_v2")),
    NORM / "layer_norm_v4",
)


def _ut(operator: Path, rest: str) -> Path:
    return operator / "tests/ut" / rest


def tables(root: Path) -> Iterator[tuple[str, Iterator[Answer]]]:
    """Every file that is read: its name, its answers."""

    yield (
        "QuantBatchMatmulV3 tiling",
        matmul(tiling(root / V3 / "op_host/test_quant_batch_matmul_v3.csv")),
    )
    files: tuple[tuple[str, Path, dict[str, str], Entry], ...] = (
        ("aclnnQuantMatmulV3", V3 / "op_api/test_aclnn_quant_matmul_v3.csv", _V3, "v4"),
        ("aclnnQuantMatmulV4", V3 / "op_api/test_aclnn_quant_matmul_v4.csv", _V4, "v4"),
        (
            "aclnnQuantMatmulWeightNz",
            V3 / "op_api/test_aclnn_quant_matmul_weight_nz.csv",
            _WEIGHT_NZ,
            "nz",
        ),
        ("aclnnQuantMatmulV5", V4 / "op_host/test_aclnn_quant_matmul_v5_api.csv", _V5, "v5"),
    )
    for title, path, names, entry in files:
        yield title, matmul(aclnn(root / path, names, entry))
    for title, read, path in (
        (
            "aclnnTransQuantParamV2",
            op_api,
            _ut(
                QUANT / "trans_quant_param_v2", "op_host/op_api/test_aclnn_trans_quant_param_v2.cpp"
            ),
        ),
        (
            "aclnnTransQuantParamV3",
            op_api,
            _ut(
                QUANT / "trans_quant_param_v2", "op_host/op_api/test_aclnn_trans_quant_param_v3.cpp"
            ),
        ),
        (
            "TransQuantParamV2 InferShape",
            infer_shape,
            _ut(QUANT / "trans_quant_param_v2", "op_host/test_TransQuantParamV2_infershape.cpp"),
        ),
        (
            "aclnnDynamicQuant",
            op_api,
            _ut(QUANT / "dynamic_quant", "op_host/op_api/test_aclnn_dynamic_quant.cpp"),
        ),
        (
            "aclnnDynamicQuantV2",
            op_api,
            _ut(QUANT / "dynamic_quant_v2", "op_host/test_aclnn_dynamic_quant_v2.cpp"),
        ),
        (
            "aclnnDynamicQuantV3",
            op_api,
            _ut(QUANT / "dynamic_quant", "op_host/op_api/test_aclnn_dynamic_quant_v3.cpp"),
        ),
        (
            "DynamicQuant tiling",
            tiling_cases,
            _ut(QUANT / "dynamic_quant", "op_host/test_dynamic_quant_tiling.cpp"),
        ),
        (
            "DynamicQuantV2 tiling",
            tiling_cases,
            _ut(QUANT / "dynamic_quant_v2", "op_host/test_dynamic_quant_v2_tiling.cpp"),
        ),
        (
            "DynamicQuant InferShape",
            infer_shape,
            _ut(QUANT / "dynamic_quant", "op_host/test_dynamic_quant_infershape.cpp"),
        ),
        (
            "DynamicQuantV2 InferShape",
            infer_shape,
            _ut(QUANT / "dynamic_quant_v2", "op_host/test_dynamic_quant_v2_infershape.cpp"),
        ),
        (
            "aclnnAscendQuantV3",
            op_api,
            _ut(QUANT / "ascend_quant_v2", "op_host/op_api/test_aclnn_ascend_quant_v3.cpp"),
        ),
        (
            "AscendQuantV2 tiling",
            tiling_cases,
            _ut(QUANT / "ascend_quant_v2", "op_host/test_ascend_quant_v2_tiling.cpp"),
        ),
        (
            "AscendQuantV2 InferShape",
            infer_shape,
            _ut(QUANT / "ascend_quant_v2", "op_host/test_AscendQuantV2_infershape.cpp"),
        ),
        ("aclnnQuantize", op_api, _ut(QUANT / "quantize", "op_api/test_aclnn_quantize.cpp")),
        (
            "RmsNorm tiling",
            tiling_cases,
            _ut(NORM / "rms_norm", "op_host/test_rms_norm_tiling.cpp"),
        ),
        (
            "RmsNorm InferShape",
            infer_shape,
            _ut(NORM / "rms_norm", "op_host/test_RmsNorm_infershape.cpp"),
        ),
        (
            "aclnnAddRmsNorm",
            add_rms_norm,
            _ut(NORM / "add_rms_norm", "op_host/op_api/test_aclnn_add_rms_norm.cpp"),
        ),
        (
            "AddRmsNorm tiling",
            tiling_cases,
            _ut(NORM / "add_rms_norm", "op_host/test_add_rms_norm_tiling.cpp"),
        ),
        (
            "AddRmsNorm InferShape",
            infer_shape,
            _ut(NORM / "add_rms_norm", "op_host/test_AddRmsNorm_infershape.cpp"),
        ),
    ):
        yield title, read(root / path)
    for folder in OTHERS:
        for path in sorted((root / folder / "tests/ut/op_host").rglob("test_*.cpp")):
            if "tiling" in path.name:
                yield path.stem.removeprefix("test_"), tiling_cases(path)
            elif "infershape" in path.name.lower():
                yield path.stem.removeprefix("test_"), infer_shape(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="a clone of hicann/ops-nn")
    root: Path = parser.parse_args().checkout
    if not (root / "matmul").is_dir():
        parser.error(f"{root} is not a clone of hicann/ops-nn: it has no folder matmul")
    unexplained = 0
    total: Counter[str] = Counter()
    print(f"{'':32}{'rows':>6}{'compared':>10}{'agree':>8}{'differ':>8}")
    for title, answers in tables(root):
        rows = list(answers)
        compared = [row for row in rows if row.agrees is not None]
        differing = [row for row in compared if not row.agrees]
        counts = (len(rows), len(compared), len(compared) - len(differing), len(differing))
        total.update(dict(zip(("rows", "compared", "agree", "differ"), counts, strict=True)))
        print(f"{title:32}{counts[0]:>6}{counts[1]:>10}{counts[2]:>8}{counts[3]:>8}")
        apart = Counter(row.text for row in rows if row.agrees is None)
        for reason, count in apart.items():
            print(f"    {count} not compared: {reason}")
        for row in differing:
            why = EXCEPTIONS.get(row.name)
            unexplained += why is None
            print(f"    {row.name} ({row.soc}): {row.text}")
            print(f"        {why or 'UNEXPLAINED'}")
    print(
        f"{'all':32}"
        + "".join(f"{n:>{w}}" for n, w in zip(total.values(), (6, 10, 8, 8), strict=True))
    )
    print(f"{unexplained} without a reason")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
