"""What the reader sees if the stand-in lacks what a program calls."""

from __future__ import annotations

import pytest
import torch

import cann_host
from support.processes import start

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


@pytest.mark.slow
def test_a_missing_aclnn_function_is_named_last() -> None:
    done = start("calls_gelu.py")
    *_, torch_npu_s, ours = done.stderr.rstrip().splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert "ERR01004 OPS invalid pointer" in torch_npu_s
    assert ours.startswith("cann_host: libopapi is here and does not have aclnnGeluV2. With CANN")


MISSING = {
    "mine::foo": (lambda x: torch.ops.cann_host_test.foo(x), "Foo", "register a converter"),
    "attention": (
        lambda x: torch.ops.npu.npu_fusion_attention_v3(x, x, x, 2, "BNSD")[0],
        "NpuFusionAttentionV3",
        'attn_implementation="eager" for a model of transformers',
    ),
}


@pytest.fixture(scope="module")
def library() -> torch.library.Library:
    made = torch.library.Library("cann_host_test", "FRAGMENT")
    made.define("foo(Tensor x) -> Tensor")
    made.impl("foo", lambda x: x * 2, "PrivateUse1")
    made.impl("foo", lambda x: torch.empty_like(x), "Meta")
    return made


@pytest.mark.parametrize("case", MISSING)
def test_an_operator_without_a_converter_is_named(
    case: str, library: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchair = pytest.importorskip("torchair")
    converters = pytest.importorskip("torchair._ge_concrete_graph.fx2ge_converter")
    if not hasattr(converters, "_validate_ascend_ir"):
        pytest.skip("this torchair does not ask CANN for definitions")
    call, name, todo = MISSING[case]
    if case == "attention":
        if not hasattr(torch.ops.npu, "npu_fusion_attention_v3"):
            pytest.skip("a torch_npu without npu_fusion_attention_v3")
        # as without cann_host's own converter, which another test may have registered
        target = torch.ops.npu.npu_fusion_attention_v3.default
        monkeypatch.setattr(target, "_ge_converter", None, raising=False)
        monkeypatch.delattr(target, "_ge_converter")
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    x = torch.randn(1, 2, 8, 64, dtype=torch.float16).npu()
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"cann_host: the graph has {name}, for") as caught:
        torch.compile(call, backend=backend, dynamic=False)(x)
    assert todo in str(caught.value) and "installed correctly" not in str(caught.value)
    torch._dynamo.reset()
