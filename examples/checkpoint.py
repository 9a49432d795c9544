"""From a W8A8 checkpoint on disk to a compiled model.

With an NPU and CANN:   python examples/checkpoint.py [FOLDER]
Anywhere else:          python -m cann_host examples/checkpoint.py

FOLDER is a checkpoint of the model below; without one, a small one is made.
"""

from __future__ import annotations

import lq_graph  # first: if CANN is missing, its error says what to do

# isort: split
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
import torch_npu  # noqa: F401  (makes the name `torchair` importable)
import torchair as tng
from torch import Tensor, nn

from lq_graph import A8W8Dynamic, converters

torch.npu.config.allow_internal_format = True  # FRACTAL_NZ weights


class Block(nn.Module):
    """The feed-forward half of a transformer layer."""

    def __init__(self, width: int = 256, inner: int = 512) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=torch.float16)
        self.up = nn.Linear(width, inner, dtype=torch.float16)
        self.down = nn.Linear(inner, width, dtype=torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def make_checkpoint(folder: Path) -> Block:
    """Write a checkpoint as msmodelslim does; returns the float model that was quantized."""
    torch.manual_seed(0)
    model, source = Block(), Block()
    source.load_state_dict(model.state_dict())
    lq_graph.quantize(source, A8W8Dynamic())
    lq_graph.save_checkpoint(source, folder, "msmodelslim")
    return model


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else made)
        if not folder.is_dir():
            sys.exit(f"checkpoint.py: there is no folder {folder}")
        original = make_checkpoint(folder) if len(sys.argv) < 2 else None
        print("files")
        for file in sorted(folder.iterdir()):
            print(f"   {file.name:42s} {file.stat().st_size:>9,} bytes")

        with torch.device("meta"):  # no memory until the file is read
            model = Block()
        print("\nloaded")
        print(textwrap.indent(str(lq_graph.load_checkpoint(model, folder)), "   "))

    x = torch.randn(16, 256, dtype=torch.float16)
    with torch.no_grad():
        on_cpu = model(x)
    model = model.npu()
    print("\nprepared")
    print(textwrap.indent(str(lq_graph.use_internal_format_weight(model)), "   "))

    config = tng.CompilerConfig()
    backend = tng.get_npu_backend(compiler_config=config)
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    with converters.graph.capture(config) as graphs, torch.no_grad():
        out = compiled(x.npu()).cpu()
    ops = graphs[0].ops()
    print(f"\ncompiled to {len(ops)} GE nodes, {ops.count('QuantBatchMatmulV3')} of them matmuls")
    print(f"   largest difference to the same model on the CPU: {(out - on_cpu).abs().max():.1e}")
    if original is not None:
        with torch.no_grad():
            want = original.float()(x.float())
        cosine = nn.functional.cosine_similarity(out.float(), want).min()
        print(f"   lowest cosine similarity to the float model:     {cosine:.5f}")
        if cosine < 0.999:
            raise SystemExit("the quantized model is not the float one")


if __name__ == "__main__":
    try:
        main()
    except lq_graph.CheckpointError as error:
        sys.exit(f"checkpoint.py: {error}")
