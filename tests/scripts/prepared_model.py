"""README's "Use it" with a model: `prepared_model.py README`.

Nothing but the block itself sets anything.
"""

import re
import sys
from pathlib import Path

import cann_host

cann_host.activate()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import lq_graph  # noqa: E402


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = lq_graph.LinearQuant(64, 96)
        self.down = lq_graph.LinearQuant(96, 32, output_dtype=torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x))
        return out


torch.manual_seed(0)
other = MyModel()
for layer in (other.up, other.down):
    layer.weight.data = torch.randint(-128, 128, layer.weight.shape, dtype=torch.int8)
    layer.scale.data = torch.rand(layer.out_features) * 1e-3
checkpoint = other.state_dict()

block = re.search(r"## Use it\n\n```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
assert block, "there is no such block"
names = {"MyModel": MyModel, "checkpoint": checkpoint}
exec(block[1], names)

model, torch_npu = names["model"], names["torch_npu"]
x = torch.randint(-128, 128, (4, 64), dtype=torch.int8)
assert torch.equal(model(x.npu()).cpu(), other(x))
for layer in (model.up, model.down):
    print(torch_npu.get_npu_format(layer.weight).name, layer.scale.dtype)
