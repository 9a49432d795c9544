"""cann_host's refusals beside CANN's own acceptance tables, by hand:

    python tests/cann_tables.py CHECKOUT

CHECKOUT is your clone of the public repository hicann/ops-nn. Its tables are test data of CANN's
operators: for each row, whether the operator takes it. This prints, for each table, how many of its
int8 and int4 rows get the same answer from cann_host.rules, and every row that does not. Exit
status 1 if one of those is not in EXCEPTIONS below.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from cann_host.rules import check_quant_matmul, soc_family

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
    """One row of a table: a name, the question in cann_host's words, and CANN's answer."""

    name: str
    question: dict[str, Any]
    accepted: bool


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
        if {x1_dtype, x2_dtype} - {"int8", "int4"} or soc_family(soc) is None:
            continue
        if number["quantMode"] > 1:
            continue  # per-group and per-block scales: no part of LinearQuant
        m, k, n = number["m"], number["k"], number["n"]
        transposed = {name: row[name] == "1" for name in ("transA", "transB")}

        def shape(dims: str, batch: int, matrix: tuple[int, ...]) -> tuple[int, ...]:
            count = int(dims)
            return (*(batch,) * (count - 2), *matrix) if count > 1 else matrix[:1]

        scale = (n,) if number["quantMode"] == 1 else (1,)
        x1 = shape(row["x1dim"], number["batchA"], (k, m) if transposed["transA"] else (m, k))
        x2 = shape(row["x2dim"], number["batchB"], (n, k) if transposed["transB"] else (k, n))
        question: dict[str, Any] = {
            "soc": soc,
            "x1_dtype": x1_dtype,
            "x1_shape": x1,
            "x2_dtype": x2_dtype,
            "x2_shape": x2,
            "scale_dtype": dtype(row["scaleDtype"]),
            "scale_shape": scale,
            "out_dtype": dtype(row["yDtype"]),
            "transpose_x1": transposed["transA"],
            "transpose_x2": transposed["transB"],
            "x1_format": "FRACTAL_NZ" if row["x1Format"] == "NZ" else "ND",
            "x2_format": "FRACTAL_NZ" if row["x2Format"] == "NZ" else "ND",
            "graph": True,
        }
        if row["offsetFlag"] == "1":
            question |= {"offset_dtype": "float32", "offset_shape": scale}
        if row["pertokenFlag"] == "1":
            question |= {"pertoken_dtype": dtype(row["perTokenScaleDtype"]), "pertoken_shape": (m,)}
        if row["biasFlag"] == "1":
            question |= {"bias_dtype": dtype(row["biasDtype"]), "bias_shape": (n,)}
        suite, _, case = row["caseName"].partition("/")
        yield Row(f"{suite}/{case.rpartition('/')[2]}", question, row["result"] == "TRUE")


def matrix(shape: str, strides: str, kind: str, flag: str) -> tuple[str, tuple[int, ...], bool]:
    """dtype, stored shape and transposition of x1 or x2 in an aclnn table."""
    dims, steps, name = sizes(shape), sizes(strides), dtype(kind)
    swapped = flag.lower() == "true"
    if len(dims) > 1 and len(steps) == len(dims) and steps[-2] == 1 and steps[-1] == dims[-2] > 1:
        dims, swapped = (*dims[:-2], dims[-1], dims[-2]), not swapped
    if name == "int32":  # eight int4 each
        name, dims = "int4", (*dims[:-1], dims[-1] * 8)
    return name, dims, swapped


def aclnn(path: Path, names: dict[str, str]) -> Iterator[Row]:
    """A table of an aclnn function. names: our column names to the table's."""
    for row in rows_of(path):

        def cell(name: str, row: dict[str, str] = row) -> str:
            return row.get(names.get(name, name), "")

        soc = cell("soc") or "Ascend" + re.sub(r"^[Aa]scend|_.*$", "", cell("name"))
        soc = {"Ascend910_93": "Ascend910_9391"}.get(soc, soc)
        if soc_family(soc) is None or not cell("x1_type") or not sizes(cell("x1")):
            continue
        x1_dtype, x1, transpose_x1 = matrix(
            cell("x1"), cell("x1_stride"), cell("x1_type"), cell("transposeX1")
        )
        x2_dtype, x2, transpose_x2 = matrix(
            cell("x2"), cell("x2_stride"), cell("x2_type"), cell("transposeX2")
        )
        if {x1_dtype, x2_dtype} - {"int8", "int4"} or cell("groupSize") not in ("", "0"):
            continue
        if cell("checkRet").lower() == "false":
            continue  # CANN's own test does not look at the answer
        if any(sizes(cell(name)) for name in ("yScaleShape", "x1OffsetShape", "yOffsetShape")):
            continue  # arguments torch_npu never passes for these dtypes
        question: dict[str, Any] = {
            "soc": soc,
            "x1_dtype": x1_dtype,
            "x1_shape": x1,
            "x2_dtype": x2_dtype,
            "x2_shape": x2,
            "scale_dtype": dtype(cell("scale_type")),
            "scale_shape": sizes(cell("scale")),
            "out_dtype": dtype(cell("out_type")),
            "out_shape": sizes(cell("out")),
            "transpose_x1": transpose_x1,
            "transpose_x2": transpose_x2,
            "x1_format": cell("x1_format").removeprefix("ACL_FORMAT_") or "ND",
            "x2_format": cell("x2_format").removeprefix("ACL_FORMAT_") or "ND",
        }
        if sizes(cell("x2StorageShape")):
            question["x2_storage_shape"] = sizes(cell("x2StorageShape"))
        for name in ("offset", "pertoken", "bias"):
            absent = cell(f"{name}_null").lower() == "true"
            if sizes(cell(name)) and not absent:
                question[f"{name}_dtype"] = dtype(cell(f"{name}_type") or "FLOAT")
                question[f"{name}_shape"] = sizes(cell(name))
        yield Row(cell("name"), question, cell("expectRet") == "ACLNN_SUCCESS")


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
TABLES = {
    "tiling": lambda root: tiling(root / V3 / "op_host/test_quant_batch_matmul_v3.csv"),
    "aclnnQuantMatmulV4": lambda root: aclnn(
        root / V3 / "op_api/test_aclnn_quant_matmul_v4.csv", _V4
    ),
    "aclnnQuantMatmulV5": lambda root: aclnn(
        root / V4 / "op_host/test_aclnn_quant_matmul_v5_api.csv", _V5
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="a clone of hicann/ops-nn")
    root: Path = parser.parse_args().checkout
    if not (root / "matmul").is_dir():
        parser.error(f"{root} is not a clone of hicann/ops-nn: it has no folder matmul")
    unexplained = 0
    for table, read in TABLES.items():
        rows = list(read(root))
        differing = []
        for row in rows:
            refusal = check_quant_matmul(**row.question)
            if (refusal is None) != row.accepted:
                differing.append((row, refusal))
        by_soc: dict[str, int] = {}
        for row in rows:
            by_soc[row.question["soc"]] = by_soc.get(row.question["soc"], 0) + 1
        counts = ", ".join(f"{soc} {count}" for soc, count in by_soc.items())
        print(f"{table}: {len(rows)} rows ({counts}), {len(rows) - len(differing)} agree")
        for row, refusal in differing:
            reason = EXCEPTIONS.get(row.name)
            unexplained += reason is None
            said = "takes it" if refusal is None else f"refuses: {refusal}"
            print(
                f"  {row.name}: CANN {'takes' if row.accepted else 'refuses'} it, cann_host {said}"
            )
            print(f"    {reason or 'UNEXPLAINED'}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
