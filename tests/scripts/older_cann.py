"""What the CANN version that torch_npu finds takes of an int4 layer and of trans_quant_param: the
release that each way asks for."""

from collections.abc import Callable
from typing import Any

import torch
import torch_npu  # noqa: F401
import torchair

import lq_graph


def needed(call: Callable[[], Any]) -> str:
    """The release of the refusal, which torch.compile wraps; "taken" without one."""
    try:
        call()
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, lq_graph.LinearQuantError):
            found = found.__cause__ or found.__context__
        if found is None or found.refusal is None:
            raise
        return found.refusal.since
    return "taken"


layer = lq_graph.LinearQuant(
    64, 16, bias=False, output_dtype=torch.float16, x1_dtype=torch.int32, x2_dtype=torch.int32
).npu()
product = lq_graph.get_product()
x1 = torch.randint(-(2**31), 2**31, (4, 8), dtype=torch.int32).npu()
backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
compiled = torch.compile(layer, backend=backend, dynamic=False)


def checked() -> None:
    answer = lq_graph.check(torch.int32, output_dtype=torch.float16, product=product)
    (verdict,) = answer.verdicts
    if verdict.error is not None:
        raise verdict.error


with torch.no_grad():
    answers = [
        needed(lambda: layer(x1)),
        needed(lambda: compiled(x1)),
        needed(checked),
        needed(lambda: lq_graph.use_internal_format_weight(layer, int4_nz=product.key == "A2")),
        needed(lambda: lq_graph.trans_quant_param(torch.rand(16).npu(), round_mode=1)),
    ]
print(f"{lq_graph.get_cann_version()} {product.key}: {' '.join(answers)}")
