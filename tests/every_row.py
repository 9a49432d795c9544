"""Every row of one product's table on its device, against the golden: CPU, eager, graph.

A device is chosen when a process starts, so tests/test_products.py runs this file once for each:
    CANN_HOST_SOC=Ascend950PR_9579 python -m cann_host tests/every_row.py
"""

from __future__ import annotations

import cases
import torch
from test_converter import lower
from test_module import module_for

import lq_graph


def main() -> None:
    torch.npu.config.allow_internal_format = True
    product = lq_graph.get_product()
    rows = cases.ROW_CASES
    for case in rows:
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
        assert graph.ops()[-1] == product.ge_op, graph.ops()
    if product.empty_m:
        layer = lq_graph.LinearQuant(16, 8).npu()
        assert layer(torch.empty(0, 16, dtype=torch.int8).npu()).shape == (0, 8)
    print(f"{product.key}: {len(rows)} of {len(rows)} rows, eager and graph, equal the golden")


if __name__ == "__main__":
    main()
