"""Each format of checkpoints is complete: it writes the tensors that it declares and reads them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lq_graph import A8W8Dynamic, A8W8Static, QuantizedLinear, quantize
from lq_graph.checkpoints.base import Format
from lq_graph.checkpoints.formats import FORMATS
from lq_graph.modules.supported import A8W8_DYNAMIC, A8W8_STATIC

N, K = 24, 40


def quantized(dynamic: bool, dtype: torch.dtype) -> QuantizedLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).to(dtype)
    data = [torch.randn(4, K, dtype=dtype) for _ in range(3)]
    if dynamic:
        quantize(model, A8W8Dynamic())
    else:
        quantize(model, A8W8Static(symmetric=True), data)
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_what_is_written_is_what_is_declared(
    format: Format, dynamic: bool, dtype: torch.dtype
) -> None:
    layer = quantized(dynamic, dtype)
    kind = A8W8_DYNAMIC if dynamic else A8W8_STATIC
    state = layer.state_dict()
    inexact = ""
    if dynamic:
        tensors = format.dynamic_parts(state)
    else:
        tensors, inexact, _ = format.static_parts(layer, state)
    declared = {part.name: part for part in format.parts[kind]}
    assert tensors.keys() <= declared.keys()
    for name, part in declared.items():
        if name not in tensors:
            assert not part.required, name
            continue
        sizes = {"n": N, "k": K}
        shapes = [tuple(sizes.get(str(size), size) for size in shape) for shape in part.shapes]
        assert tensors[name].dtype in part.dtypes, name
        assert tuple(tensors[name].shape) in shapes, name
    for name, outputs in format.output_decided_by.items():
        assert name not in tensors or outputs[tensors[name].dtype] == dtype
    if not inexact:
        again = format.build(kind, dtype, tensors.get)
        x = torch.randn(5, K, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(again(x), layer(x))


def test_formats_do_not_share_files() -> None:
    files = [name for format in FORMATS.values() for name in (format.stem, format.json_file)]
    assert len(set(files)) == len(files)
    assert all(FORMATS[name].name == name for name in FORMATS)
