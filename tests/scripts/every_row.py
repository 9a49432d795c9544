"""Every row of one product's table on its device, against the golden: CPU, eager, graph.

A device is chosen when a process starts, so ops/test_products.py runs this file once for each:
    CANN_HOST_SOC=Ascend950PR_9579 python -m cann_host tests/scripts/every_row.py
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests

import torch
import torch_npu
from torch import nn

import lq_graph
from lq_graph.rules.tables import Product, quant_rows_of
from support import cases, has
from support.activations import check_dynamic, check_static, make
from support.layers import module_for
from support.lowering import MATMUL, compiled, lower


def matmul_of(product: Product) -> str:
    """The GE node of a layer; Ascend 950 has V3 where torchair has no V4."""
    return product.ge_op if has.HAS_V4 else MATMUL


def run_activation_rows(product: Product) -> int:
    """dynamic_quant and static_quant, every dtype the product's table has."""
    count = 0
    arithmetic = {"310P": "half", "950": "divide"}.get(product.key, "multiply")
    for row in quant_rows_of(product, "dynamic_quant"):
        for dtype in row.x:
            x, count = make((500, 64), dtype), count + 1

            def dynamic(x: torch.Tensor, output: torch.dtype = row.output_dtype) -> Any:
                return lq_graph.dynamic_quant(x, dtype=output)

            for got in (dynamic(x), dynamic(x.npu()), compiled(dynamic, x.npu())[0]):
                check_dynamic(got, x, row.output_dtype == torch.int32, arithmetic)
    if product.key == "310P":  # its kernels take smooth_scales and never read them
        x, smooth = make((5, 64), torch.float16), torch.rand(64).half()
        check_dynamic(torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=smooth.npu()), x, False,
                      arithmetic)  # fmt: skip
    for row in quant_rows_of(product, "static_quant"):
        for dtype in row.x:
            args, count = (make((5, 64), dtype), torch.tensor([20.0], dtype=dtype)), count + 1
            on_npu = [tensor.npu() for tensor in args]
            graph, _ = compiled(lq_graph.static_quant, *on_npu)
            for got in (lq_graph.static_quant(*args), lq_graph.static_quant(*on_npu), graph):
                check_static(got, *args, 0.0)
    return count


def run_schemes(product: Product) -> int:
    """Every scheme of quantize that the product has, prepared and in a graph."""
    count = 0
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).half()
    x = make((5, 64), torch.float16, spread=1.0)
    schemes: list[Any] = [lq_graph.A8W8Static(), lq_graph.A8W8Dynamic(), lq_graph.A4W4Dynamic()]
    for config in schemes[: 1 if product.key == "310P" else 3]:
        model = copy.deepcopy(float_model)
        static = isinstance(config, lq_graph.A8W8Static)
        lq_graph.quantize(model, config, [x] if static else None)
        want = model(x)
        model.npu()
        lq_graph.use_internal_format_weight(model)
        assert torch.equal(model(x.npu()).cpu(), want), config
        got, graph = compiled(model, x.npu())
        assert torch.equal(got.cpu(), want), config
        assert graph.ops().count(matmul_of(product)) == 2, graph.ops()
        count += 1
    return count


def main() -> None:
    torch.npu.config.allow_internal_format = True
    product = lq_graph.get_product()
    rows = cases.ROW_CASES
    # a scale of one value too: Ascend 950 cuts a float32 one
    for case in [*rows, *(replace(case, scalar_scale=True) for case in rows)]:
        inputs = cases.make(case)
        cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)
        layer, x1 = module_for(inputs).npu(), inputs["x1"].npu()
        if product.key != "310P":  # every kernel there reads a FRACTAL_NZ weight
            cases.assert_equal(layer(x1), inputs)
            out, _ = lower(layer, x1)
            cases.assert_equal(out, inputs)
        lq_graph.use_internal_format_weight(layer)
        cases.assert_equal(layer(x1), inputs)
        out, graph = lower(layer, x1)
        cases.assert_equal(out, inputs)
        assert graph.ops()[-1] == matmul_of(product), graph.ops()
    if product.empty_m:
        layer = lq_graph.LinearQuant(16, 8).npu()
        assert layer(torch.empty(0, 16, dtype=torch.int8).npu()).shape == (0, 8)
    print(f"{product.key}: {len(rows)} of {len(rows)} rows, eager and graph, equal the golden")
    quantized = run_activation_rows(product)
    print(f"{quantized} dtypes of activations, {run_schemes(product)} schemes of quantize")


if __name__ == "__main__":
    main()
