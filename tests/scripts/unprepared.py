"""A model on 310P, eagerly and in a GE graph, before and after it is prepared."""

from __future__ import annotations

import torch
import torchair
from torch import nn

import lq_graph
from lq_graph import LinearQuantError

F16, K, N = torch.float16, 64, 32


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([lq_graph.LinearQuant(K, N, bias=False, output_dtype=F16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers[0](x)
        return out


torch.npu.config.allow_internal_format = True
model = Model()
weight: torch.Tensor = model.get_parameter("layers.0.weight").data
weight.copy_(torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(0)))
x = torch.randint(-8, 8, (4, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
want = (x.long() @ weight.long().T).to(F16)
model.npu()
backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
compiled = torch.compile(model, backend=backend, dynamic=False)
with torch.no_grad():
    print("eager:", "right" if torch.equal(model(x.npu()).cpu(), want) else "wrong")
    try:
        compiled(x.npu())
    except LinearQuantError as error:
        print(f"GE: {type(error).__name__} {error}")
    lq_graph.use_internal_format_weight(model)
    print("prepared:", "right" if torch.equal(compiled(x.npu()).cpu(), want) else "wrong")
