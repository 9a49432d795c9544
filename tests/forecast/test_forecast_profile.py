"""Profiles of the user's own, with the quirks that torch_npu.profiler and msprof have."""

from __future__ import annotations

from pathlib import Path

import pytest

import lq_graph
from lq_graph import LinearQuantValueError
from lq_graph.forecast import kernel_cost
from lq_graph.forecast.cost import fitted
from lq_graph.forecast.profile import fit_profile, read_profile
from lq_graph.rules.chips import chip_of

KERNELS = (
    "Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Num,"
    "Input Shapes,Input Data Types,Input Formats,Output Shapes,Output Data Types,Output Formats"
)
OP_SUMMARY = (
    "Device_id,Op Name,OP Type,Task Type,Task Start Time(us),Task Duration(us),Task Wait Time(us),"
    "Block Num,Input Shapes,Input Data Types,Input Formats,Output Shapes,Output Data Types,"
    "Output Formats"
)


def row(
    kind: str, us: float, inputs: str, dtypes: str, output: str, out_dtype: str, *, start: int = 0,
    name: str = "kernel", formats: str = "",
) -> str:  # fmt: skip
    shapes = ",".join(f'"""{text}"""' for text in (inputs,))
    head = f"0,{name},{kind},AI_CORE,{start}.5\t,{us},0.1,24,{shapes}"
    return f'{head},{dtypes},{formats},"""{output}""",{out_dtype},ND'


def product(m: int, k: int, n: int, us: float, kind: str = "QuantBatchMatmulV3") -> str:
    """An int8 product whose weight (k, n) is in FRACTAL_NZ: (n/32, k/16, 16, 32)."""
    return row(
        kind, us, f"{m},{k};{n // 32},{k // 16},16,32;{n};;{m}", "INT8;INT8;FLOAT;;FLOAT",
        f"{m},{n}", "DT_BF16", formats="ND;FRACTAL_NZ;ND;;ND",
    )  # fmt: skip


def written(folder: Path, *rows: str, head: str = KERNELS) -> Path:
    file = folder / "kernel_details.csv"
    file.write_text("\n".join([head, *rows]) + "\n")
    return file


def test_shapes_dtypes_and_formats(tmp_path: Path) -> None:
    (call,) = read_profile(written(tmp_path, product(16, 2048, 7168, 22.5)))
    assert call.op_type == "QuantBatchMatmulV3"
    assert call.seconds == pytest.approx(22.5e-6)
    assert call.inputs == (
        ("int8", (16, 2048)),
        ("int8", (2048, 7168)),
        ("float32", (7168,)),
        ("float32", (16,)),
    )
    assert call.outputs == (("bfloat16", (16, 7168)),)


def test_float_weights_are_printed_the_other_way_round(tmp_path: Path) -> None:
    line = row("MatMulV2", 32, "16,5120;320,200,16,16", "DT_BF16;DT_BF16", "16,3200", "DT_BF16",
               formats="ND;FRACTAL_NZ")  # fmt: skip
    (call,) = read_profile(written(tmp_path, line))
    assert call.inputs[1] == ("bfloat16", (3200, 5120))


def test_collectives_are_counted_once(tmp_path: Path) -> None:
    twice = [
        row("hcom_allReduce_", 20.0, "", "", "", "", start=start, name="hcom_allReduce__1")
        for start in (10, 10, 50, 50)
    ]
    again = row("AivKernel", 20.0, "", "", "", "", start=50, name="AivKernel")
    without = row("Add", "N/A", "", "", "", "")  # type: ignore[arg-type]
    assert len(read_profile(written(tmp_path, *twice, again, without, ""))) == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aclnnQuantMatmulV4_QuantBatchMatmulV3_QuantBatchMatmulV3", "QuantBatchMatmulV3"),
        ("DynamicQuant_1a2b3c4d_12", "DynamicQuant"),
        ("MatMulV2_7", "MatMulV2"),
    ],
)
def test_types_that_a_level_leaves_out(name: str, kind: str, tmp_path: Path) -> None:
    (call,) = read_profile(written(tmp_path, row("N/A", 3, "", "", "", "", name=name)))
    assert call.op_type == kind


def test_op_summary_of_msprof(tmp_path: Path) -> None:
    file = written(tmp_path, product(1, 512, 768, 9.0), head=OP_SUMMARY)
    (call,) = read_profile(file)
    assert (call.op_type, call.seconds) == ("QuantBatchMatmulV3", pytest.approx(9e-6))


SHAPES = [(1, 4096, 6144), (1, 4096, 4096), (1, 4096, 24576), (1, 12288, 4096)]


def test_a_slower_device_is_fitted(tmp_path: Path) -> None:
    """Times of 6 us and 1.5 of what bytes and operations ask for: the fit finds both, and medians
    do not see an interrupted call."""
    base, chip = fitted(), chip_of("A3")
    rows = []
    for m, k, n in SHAPES:
        cost = kernel_cost("QuantBatchMatmulV3", [("int8", (m, k)), ("int8", (k, n))],
                           [("bf16", (m, n))])  # fmt: skip
        us = 6 + 1.5e6 * (cost.memory_seconds + cost.compute_seconds)
        rows += [product(m, k, n, us), product(m, k, n, us), product(m, k, n, 900.0)][:3]
        rows.append(product(m, k, n, us))
    found = fit_profile(written(tmp_path, *rows), chip, base)
    assert (found.rows, found.used) == (16, 16)
    name = "QuantBatchMatmul int8"
    assert found.parameters.launches[name] == pytest.approx(6e-6, rel=1e-6)
    old, new = base.rates["int8 product"], found.parameters.rates[name]
    assert new.bandwidth == pytest.approx(old.bandwidth / 1.5)
    assert new.compute == pytest.approx(old.compute / 1.5)
    assert found.operators[name] < 1e-6
    assert found.parameters.launches["MatMul"] == base.launches["MatMul"]
    assert str(found) == (
        "profile: 16 of 16 kernels used; fitted, with residual: QuantBatchMatmul int8 (0%)"
    )


def test_one_shape_gives_one_factor(tmp_path: Path) -> None:
    base = fitted()
    line = row("SwiGlu", 20.0, "16,3200", "DT_BF16", "16,1600", "DT_BF16")
    found = fit_profile(written(tmp_path, *[line] * 5), chip_of("A3"), base)
    before = kernel_cost("SwiGlu", [("bf16", (16, 3200))], [("bf16", (16, 1600))])
    factor = 20e-6 / (before.seconds - base.gap)
    assert found.parameters.launches["SwiGlu"] == pytest.approx(base.launches["SwiGlu"] * factor)
    assert found.parameters.profiled == {"SwiGlu"}


@pytest.mark.parametrize("times", [[30.0, 30.0, 30.0], [60.0, 30.0, 15.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("shapes", [1, 3])
def test_no_profile_exceeds_a_peak(times: list[float], shapes: int, tmp_path: Path) -> None:
    """Times that do not grow with the shape say nothing about larger shapes."""
    sizes = [(1, 4096, 1536), (1, 4096, 3072), (1, 4096, 6144)]
    rows = [product(*s, us) for s, us in zip(sizes, times, strict=True)][:shapes]
    found = fit_profile(written(tmp_path, *rows * 5), chip_of("A3"), fitted())
    rate = found.parameters.rates["QuantBatchMatmul int8"]
    assert 0 < rate.bandwidth <= 1 + 1e-9
    assert 0 < rate.compute <= 1 + 1e-9
    m, k, n = 1, 4096, 151_936
    cost = kernel_cost("QuantBatchMatmulV3", [("int8", (m, k)), ("int8", (k, n))],
                       [("bf16", (m, n))], parameters=found.parameters)  # fmt: skip
    assert cost.seconds > k * n / 1.6e12


@pytest.mark.parametrize(
    ("rows", "used"),
    [
        # a transposed x1, and int4 in int32: rows and columns are not known
        ([row("MatMulV2", 3, "64,16;64,128", "DT_BF16;DT_BF16", "16,128", "DT_BF16")] * 9, 0),
        ([row("QuantBatchMatmulV3", 9, "1,4096;4096,64", "INT4;INT32", "1,512", "DT_BF16")] * 9, 0),
        ([product(1, 512, 768, 9.0)] * 4, 0),  # too few
        ([row("Unknown", 9.0, "1,2", "FLOAT", "1,2", "FLOAT")] * 9, 0),
        ([row("N/A", 9.0, "", "", "", "", name="MatMulV2_1")] * 9, 0),  # without shapes
    ],
)
def test_rows_that_do_not_help_are_left(rows: list[str], used: int, tmp_path: Path) -> None:
    found = fit_profile(written(tmp_path, *rows), chip_of("A3"), fitted())
    assert (found.rows, found.used) == (len(rows), used)
    assert "nothing was fitted" in str(found)


def test_a_forecast_says_what_it_was_fitted_to(tmp_path: Path) -> None:
    rows = [product(*shape, us=80.0) for shape in SHAPES for _ in range(3)]
    file = written(tmp_path, *rows)
    found = lq_graph.forecast_model("qwen3-8b", profile=file, quants=("w8a8",))
    assert "profile: 12 of 12 kernels used" in str(found)
    plain = lq_graph.forecast_model("qwen3-8b", quants=("w8a8",))
    decode, before = found.forecasts[0].decode, plain.forecasts[0].decode
    assert decode and before and decode.seconds > before.seconds


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n", "neither a kernel_details.csv nor .* no column Name or Op Name, Duration"),
        ("", "no column"),
        (f"{KERNELS}\n0,x,Add,AI_CORE,1,soon,1,1,,,,,,\n", "line 2: the duration 'soon' is no"),
        (f"{KERNELS}\n0,x,Add,AI_CORE,1,inf,1,1,,,,,,\n", "line 2: the duration 'inf' is no"),
        (f"{KERNELS}\n0,x,Add,AI_CORE,1,-2,1,1,,,,,,\n", "line 2: the duration '-2' is no"),
    ],
)
def test_other_files_are_refused(text: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    file.write_text(text)
    with pytest.raises(LinearQuantValueError, match=match) as refused:
        read_profile(file)
    assert "\n" not in str(refused.value)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    file.write_bytes(b"\xff\xfe\x00\x01" * 9)
    with pytest.raises(LinearQuantValueError, match="cannot be read"):
        read_profile(file)
