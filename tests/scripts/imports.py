"""Imports in an order of the user's: `imports.py FUNCTION [ARGUMENTS]`."""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder


def on_the_device() -> None:
    if os.environ.get("LQ_GRAPH_TEST_NPU") != "1":
        import cann_host

        cann_host.activate()


def without_torch_npu() -> None:
    sys.modules["torch_npu"] = sys.modules["torchair"] = None  # type: ignore[assignment]
    import torch

    import lq_graph

    layer, x = lq_graph.LinearQuant(16, 8), torch.ones(2, 16, dtype=torch.int8)
    assert layer(x).shape == (2, 8)
    assert torch.compile(layer, fullgraph=True)(x).shape == (2, 8)


def lowers() -> None:
    """A layer compiled by torchair computes what it computes eagerly."""
    import torch
    import torchair

    import lq_graph

    layer = lq_graph.LinearQuant(16, 8).npu()
    x = torch.ones(2, 16, dtype=torch.int8).npu()
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    compiled = torch.compile(layer, backend=backend, dynamic=False, fullgraph=True)
    assert torch.equal(compiled(x).cpu(), layer(x).cpu())


def in_order(*names: str) -> None:
    on_the_device()
    for name in names:
        importlib.import_module(name)
    lowers()


def beside(folder: str, imported: str) -> None:
    """With a `converters` of the user's own in FOLDER, which is found first.

    Args:
        folder: of the user's.
        imported: "True" if the user imports it too.
    """

    class First:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return PathFinder.find_spec(name, [folder]) if name == "converters" else None

    sys.meta_path.insert(0, First)
    if imported == "True":
        importlib.import_module("converters")
    on_the_device()
    lowers()
    import torch

    import lq_graph

    x = torch.ones(2, 16, dtype=torch.int8)
    story = lq_graph.explain(lq_graph.LinearQuant(16, 8), (x,))
    assert story.layers[0].ours.ops() == ["QuantBatchMatmulV3"]
    mine = sys.modules.get("converters")
    assert (mine is not None) == (imported == "True")
    assert not hasattr(mine, "register")


def command_line() -> None:
    """What `python -m lq_graph check` leaves in the environment, and what the package has then."""
    sys.argv, sys.orig_argv = ["-m", "check"], ["python", "-m", "lq_graph", "check"]
    import lq_graph

    assert "torch" not in sys.modules
    lq_graph._start()
    assert vars(lq_graph)["linear_quant"] is sys.modules["lq_graph.ops"].linear_quant
    print(os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
