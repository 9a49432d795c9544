"""A model run through torchair's cache_compile: `cached.py FUNCTION CACHE ARGUMENTS`."""

import sys

import torch
import torch_npu
import torchair
from torch import Tensor

import lq_graph


class Model(torch.nn.Module):
    """One layer, int8 (n, k) = (32, 64), cached in a folder."""

    def __init__(
        self, kind: type[torch.nn.Module], output_dtype: torch.dtype, cache: str, prepared: bool
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(64, 32, bias=False, output_dtype=output_dtype).npu()
        self.layer.weight.data = torch.randint(-128, 128, (32, 64), dtype=torch.int8).npu()
        self.layer.scale.data = (torch.rand(32) * 1e-2).npu()
        if prepared:
            lq_graph.use_internal_format_weight(self)
        self.run = torchair.inference.cache_compile(
            self.prompt, config=torchair.CompilerConfig(), dynamic=False, cache_dir=cache
        )

    def prompt(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def x1() -> Tensor:
    return torch.randint(-128, 128, (4, 64), dtype=torch.int8).npu()


def dtype(cache: str, output_dtype: str) -> None:
    model, x = Model(lq_graph.LinearQuant, getattr(torch, output_dtype), cache, False), x1()
    out = model.run(x)
    assert torch.equal(out.cpu(), model.layer(x).cpu())
    print(out.dtype)


def formats(cache: str, kind: str, state: str) -> None:
    """Prints what is said when a prepared model's weight is cast back to ND."""
    torch.npu.config.allow_internal_format = True
    kinds = {"ours": lq_graph.LinearQuant, "vendor": torch_npu.contrib.module.LinearQuant}
    prepared = state == "prepared"
    model, x = Model(kinds[kind], torch.bfloat16, cache, prepared), x1()
    assert torch.equal(model.run(x).cpu(), model.layer(x).cpu())
    if prepared:
        model.layer.weight.data = torch_npu.npu_format_cast(model.layer.weight.data, 2)
        try:
            model.run(x)
        except RuntimeError as error:
            print(error)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
