"""cann_host/README.md: its tables are the generated ones, its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cann_host
from cann_host import surface
from cann_host.graph import executor
from cann_host.options import VARIABLES

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")

FOLDER = Path(__file__).parents[2] / "cann_host"
README = (FOLDER / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_tables_are_the_generated_ones() -> None:
    shown = README.split("<!-- surface -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == surface.table()


def test_the_options_are_all_there() -> None:
    for option, (variable, _, _) in VARIABLES.items():
        assert f"--{option.replace('_', '-')} " in README
        assert f"`{variable}`" in README


def test_the_line_of_the_aclnn_function_is_that_of_the_source() -> None:
    (code,) = blocks("cpp")
    assert code in (FOLDER / "csrc" / "aclnn.cpp").read_text()


def test_a_ge_operator_can_be_added_while_it_is_active(monkeypatch) -> None:
    torchair = pytest.importorskip("torchair")
    monkeypatch.setattr(executor, "OPS", dict(executor.OPS))
    x = torch.tensor([0.0, 1.0, -2.0]).npu()

    def run() -> torch.Tensor:
        torch._dynamo.reset()
        backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
        return torch.compile(torch.cosh, backend=backend, dynamic=False)(x).cpu()

    with pytest.raises(RuntimeError, match="op type Cosh, node Cosh"):
        run()
    (code,) = (block for block in blocks("python") if '@op("Cosh")' in block)
    exec(compile(code, "README.md", "exec"), {})
    torch.testing.assert_close(run(), torch.cosh(x.cpu()))


def test_the_map_of_the_sources_is_complete() -> None:
    folder = FOLDER / "csrc"
    rows = re.findall(r"^\| (`[^|]*`) \|", (folder / "README.md").read_text(), re.M)
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    there = {path.name for path in folder.iterdir() if path.suffix in (".cpp", ".h")}
    headers = {"aclnn.h", "ge.h", "ge_abi.h", "hccl.h", "hccl_io.h", "stream.h"}  # of their .cpp
    assert len(listed) == len(set(listed))
    assert set(listed) == there - headers
