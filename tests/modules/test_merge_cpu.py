"""merge for the CPU: the same bits in fewer products, eagerly and by Inductor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static
from lq_graph.modules import merge as merging
from lq_graph.modules import merged as parts
from support import has
from support.shared_input import Attention, Gated, inputs, pair, quantized

F16, BF16 = torch.float16, torch.bfloat16
CONFIGS = [A8W8Dynamic(), A4W4Dynamic(), A8W8Static(), A8W8Static(symmetric=True)]
EACH = pytest.mark.parametrize("config", CONFIGS, ids=repr)
MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
TOO_OLD = "torchair of torch_npu 2.7.1 runs no passes of other libraries"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def products_of(calls: Any) -> list[int]:
    """n of the products among calls: pairs of an operator and its result."""
    return [
        out.shape[-1]
        for op, out in calls
        if isinstance(op, torch._ops.OpOverload)
        and op.namespace == "lq_graph"
        and "weight" in {argument.name for argument in op._schema.arguments}
    ]


class Calls(TorchDispatchMode):
    """Notes the calls of operators and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made.append((func, out))
        return out


class Graphs:
    """Notes the operators of the graphs that Inductor makes, when its passes are done."""

    def __init__(self) -> None:
        self.nodes: list[tuple[Any, Any]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A block in which they are noted; no graph of an earlier run is taken.

        Inductor's option for a last pass does not serve: torch_npu takes it for itself, when the
        first program is compiled.
        """
        from torch._inductor import compile_fx  # some programs never import it

        passes = compile_fx.post_grad_passes

        def noted(module: torch.fx.GraphModule, *rest: Any) -> None:
            passes(module, *rest)
            self.nodes += [(node.target, node.meta.get("val")) for node in module.graph.nodes]

        seen = mock.patch.object(compile_fx, "post_grad_passes", noted)
        with inductor.patch(force_disable_caches=True), seen:
            yield


# ---- eagerly ----


def gated() -> tuple[Any, Any]:
    """Two equal quantized models, the second one merged."""
    plain = quantized(Gated(), A8W8Dynamic())
    merged = copy.deepcopy(plain)
    assert lq_graph.merge(merged, inputs())
    return plain, merged


def free(x: Tensor) -> None:
    x.untyped_storage().resize_(0)


def resized_wider(x: Tensor) -> None:
    x.resize_(*x.shape[:-1], 2 * x.shape[-1]).fill_(7)


@MODES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16])
@EACH
def test_eager(config: Any, dtype: torch.dtype, bias: bool, mode: Any) -> None:
    plain, model = pair(config, dtype, bias=bias)
    lq_graph.merge(model, inputs(dtype=dtype))
    for m in (0, 1, 5, 33):
        with mode():
            x = inputs(m, dtype) if m else inputs(dtype=dtype)[:, :0]
            want = plain(x)
            assert torch.equal(model(x), want)
            with Calls() as calls:
                assert torch.equal(model(x), want)
        assert products_of(calls.made) == [40 + 24 + 8, 64]
        assert model.q.linear.merged._remembered is None


def write_input(model: Any, x: Tensor) -> None:
    x.add_(1)


def write_view(model: Any, x: Tensor) -> None:
    x[0].zero_()


def write_data(model: Any, x: Tensor) -> None:
    x.data.mul_(-1)


def replace_data(model: Any, x: Tensor) -> None:
    x.data = torch.flip(x, (0,))


def load_weights(model: Any, x: Tensor) -> None:
    model.load_state_dict(quantized(Gated(), A8W8Dynamic(), seed=5).state_dict())


def write_weight(model: Any, x: Tensor) -> None:
    model.gate.linear.merged.weight.neg_()


def replace_scale(model: Any, x: Tensor) -> None:
    scale = model.gate.linear.merged.scale
    scale.data = scale.data * 2


def set_product(model: Any, x: Tensor) -> None:
    lq_graph.set_product("950")  # whose dynamic_quant differs in a few last bits


WRITES = [
    write_input, write_view, write_data, replace_data, load_weights, write_weight, replace_scale,
    set_product,
]  # fmt: skip


@pytest.mark.parametrize("change", WRITES)
def test_a_change_between_the_layers_counts_in_inference_mode(
    change: Callable[[Any, Tensor], None],
) -> None:
    model = quantized(Gated(), A8W8Dynamic())
    lq_graph.merge(model, inputs())
    product = lq_graph.get_product()
    try:
        with torch.inference_mode():
            x = inputs(2000)
            assert x.is_inference()
            before = copy.deepcopy(model).up(x.clone())
            model.gate(x)
            change(model, x)
            out = model.up(x)
            assert torch.equal(out, copy.deepcopy(model).up(x.clone()))
            assert not torch.equal(out, before)
    finally:
        lq_graph.set_product(product.name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
@MODES
@EACH
def test_values_that_are_not_like_others(config: Any, mode: Any, value: float) -> None:
    plain, model = pair(config)
    lq_graph.merge(model, inputs())
    with mode():
        x = inputs()
        x[0, 1, 3] = value
        assert torch.equal(model(x).nan_to_num(-7), plain(x).nan_to_num(-7))


@MODES
def test_parts_are_no_views_of_each_other(mode: Any) -> None:
    plain = quantized(Gated(), A8W8Dynamic())
    model = copy.deepcopy(plain)
    lq_graph.merge(model, inputs())
    with mode():
        x = inputs(1)[:1]
        gate = model.gate(x)
        gate.zero_()
        up = model.up(x)
        assert torch.equal(up, plain.up(x)) and not gate.any()
        assert gate._base is None and up._base is None


@pytest.mark.parametrize("write", [lambda t: t.untyped_storage().fill_(1), free, resized_wider])
def test_a_part_has_memory_of_its_own(write: Callable[[Tensor], object]) -> None:
    """Also for one row, where a part is contiguous as it is."""
    plain, merged = gated()
    x = inputs(1)[:1]
    with torch.no_grad():
        gate = merged.gate(x)
        assert gate.untyped_storage().nbytes() == gate.nbytes
        write(gate)
        assert torch.equal(merged.up(x), plain.up(x))


@pytest.mark.parametrize("change", [lambda t: t.view(10, -1), lambda t: t.transpose(0, 1)])
def test_the_shape_of_an_input_may_change(change: Callable[[Tensor], Tensor]) -> None:
    plain, merged = gated()
    x = inputs(5)
    with torch.no_grad():
        merged.gate(x)
        x.data = change(x.data)
        got, want = merged.up(x), plain.up(x)
    assert got.shape == want.shape and torch.equal(got, want)


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[0].zero_()])
def test_functionalize(write: Callable[[Tensor], Tensor]) -> None:
    def run(model: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def step(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.clone()
            gate = model.gate(x)
            write(x)
            return gate, model.up(x)

        return step

    plain, merged = gated()
    with torch.no_grad():
        want = run(plain)(inputs(5))
        for model in (plain, merged):
            got = torch.func.functionalize(run(model))(inputs(5))
            assert all(map(torch.equal, got, want))


def test_weights_of_inference_mode_have_no_versions() -> None:
    """So nobody knows whether they were written: each layer computes its own rows."""
    plain = quantized(Gated(), A8W8Dynamic())
    model = copy.deepcopy(plain)
    lq_graph.merge(model, inputs())
    merged = model.gate.linear.merged
    with torch.inference_mode():
        merged.weight = nn.Parameter(merged.weight.clone(), requires_grad=False)
        x = inputs()
        with Calls() as calls:
            assert torch.equal(model(x), plain(x.clone()))
    assert products_of(calls.made)[:2] == [32, 32]


def test_vmap() -> None:
    plain, model = pair(A8W8Dynamic())
    lq_graph.merge(model, inputs())
    with torch.no_grad():
        assert torch.equal(torch.vmap(model)(inputs()), plain(inputs()))


# ---- Inductor ----


@pytest.mark.parametrize(
    ("config", "dtype", "bias", "mode", "dynamic"),
    [
        (A8W8Dynamic(), F16, False, torch.no_grad, False),
        (A8W8Dynamic(), BF16, True, torch.inference_mode, True),
        (A8W8Dynamic(), F16, True, torch.enable_grad, False),
        (A4W4Dynamic(), BF16, True, torch.inference_mode, False),
        (A8W8Static(), F16, True, torch.no_grad, True),
        (A8W8Static(symmetric=True), BF16, False, torch.inference_mode, False),
    ],
    ids=repr,
)
def test_inductor(config: Any, dtype: torch.dtype, bias: bool, mode: Any, dynamic: bool) -> None:
    has.need_inductor()
    plain, model = pair(config, dtype, bias=bias)
    lq_graph.merge(model, inputs(dtype=dtype))
    graphs = Graphs()
    step = torch.compile(model, dynamic=dynamic, fullgraph=True)
    with mode(), graphs.watched():
        for m in (5, 33) if dynamic else (1, 5):
            assert torch.equal(step(inputs(m, dtype)), plain(inputs(m, dtype)))
    assert products_of(graphs.nodes) == [40 + 24 + 8, 64] * (1 if dynamic else 2)


class Returned(Attention):
    """The layers' outputs, which somebody may write into or view."""

    def forward(self, x: Tensor) -> Any:
        return self.q(x), self.k(x).view(-1), self.v(x)


class Written(Attention):
    """The input changes between the layers."""

    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        x = x.add_(1)
        return q, self.k(x), self.v(x)


class WrittenOutput(Attention):
    """An output changes before the others are computed."""

    def forward(self, x: Tensor) -> Any:
        return self.q(x).mul_(2), self.k(x), self.v(x)


class Strided(Attention):
    """Reads an output by the strides that it has eagerly."""

    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        turned = torch.as_strided(q, (40, 10), (1, 40))
        return turned + 1, self.k(x), self.v(x)


class Twice(Attention):
    """One layer runs twice."""

    def forward(self, x: Tensor) -> Any:
        return self.q(x), self.k(x), self.v(x), self.v(x) + 1


WHOLE, OWN = [40 + 24 + 8], [40, 24, 8]


@pytest.mark.parametrize(
    ("model", "products"),
    [
        (Returned, WHOLE),
        (Written, OWN),
        (WrittenOutput, WHOLE),
        (Strided, WHOLE),
        (Twice, [*OWN, 8]),
    ],
)
def test_inductor_with_what_a_model_may_do(model: type[nn.Module], products: list[int]) -> None:
    has.need_inductor()
    plain = quantized(model(), A8W8Dynamic())
    merged = quantized(Attention(), A8W8Dynamic())
    lq_graph.merge(merged, inputs())
    merged.__class__ = model  # its own run could tell merge to leave layers alone
    graphs = Graphs()
    with torch.no_grad(), graphs.watched():
        got = torch.compile(merged, fullgraph=True)(inputs())
    for one, want in zip(got, plain(inputs()), strict=True):
        assert torch.equal(one, want) and one.stride() == want.stride()
    assert sorted(products_of(graphs.nodes)) == sorted(products)


def test_other_backends_compute_no_row_twice() -> None:
    plain, model = pair(A8W8Dynamic())
    lq_graph.merge(model, inputs())
    seen: list[tuple[Any, Any]] = []

    def look(module: Any, example_inputs: Any) -> Any:
        del example_inputs
        seen.extend((node.target, node.meta.get("val")) for node in module.graph.nodes)
        return make_boxed_func(module.forward)

    step = torch.compile(model, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(step(inputs()), plain(inputs()))
    assert products_of(seen) == [*OWN, 64]


def test_a_prepared_weight() -> None:
    has.need_inductor()
    plain, model = pair(A8W8Dynamic())
    lq_graph.merge(model, inputs())
    lq_graph.prepare_for_cpu(model)
    with torch.no_grad():
        assert torch.equal(model(inputs(33)), plain(inputs(33)))
        assert torch.equal(torch.compile(model)(inputs(33)), plain(inputs(33)))


# ---- a decoder ----


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    configuration = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = transformers.LlamaModel(configuration).half().eval().requires_grad_(False)
    lq_graph.quantize(model, A8W8Dynamic())
    return model


A_LAYER = [64 + 32 + 32, 64, 96 + 96, 64]  # q, k and v; o; gate and up; down


@pytest.mark.parametrize(
    ("backend", "mode"),
    [("", torch.no_grad), ("", torch.inference_mode), ("inductor", torch.inference_mode)],
)
def test_products_of_a_decoder_layer(backend: str, mode: Any) -> None:
    has.need_inductor(backend)
    plain = llama()
    model = copy.deepcopy(plain)
    ids = torch.arange(5, 12)[None]
    assert len(lq_graph.merge(model, ids)) == 4
    with mode():
        if not backend:
            with Calls() as calls:
                got = model(ids).last_hidden_state
            assert torch.equal(got, plain(ids).last_hidden_state)
            assert products_of(calls.made) == A_LAYER * 2
            return
        graphs = Graphs()
        with graphs.watched():
            got = torch.compile(model, dynamic=False)(ids).last_hidden_state
        want = torch.compile(plain, dynamic=False)(ids).last_hidden_state
        assert torch.equal(got, want)
        assert products_of(graphs.nodes) == A_LAYER * 2


# ---- a torchair that is too old ----


@pytest.fixture
def too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (merging, parts):
        monkeypatch.setattr(module, "why_no_passes", lambda: TOO_OLD)


@pytest.mark.usefixtures("too_old")
def test_layers_on_the_cpu_need_no_torchair() -> None:
    plain, model = pair(A8W8Dynamic())
    report = lq_graph.merge(model, inputs())
    assert [group.names for group in report] == [("q", "k", "v")] and not report.left_alone
    model.npu()
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.warns(UserWarning, match=f"merge: {TOO_OLD}, so a graph"):
        assert torch.equal(step(inputs().npu()).cpu(), plain(inputs()))


@pytest.mark.usefixtures("too_old")
def test_layers_on_the_npu_are_left_alone() -> None:
    _, model = pair(A8W8Dynamic())
    report = lq_graph.merge(model.npu(), inputs())
    assert not report and [one.name for one in report.left_alone] == [*"qkv"]
    assert all(one.why.startswith(TOO_OLD) for one in report.left_alone)


class OnTwoDevices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cpu_part = quantized(Gated(), A8W8Dynamic())
        self.npu_part = quantized(Gated(), A8W8Dynamic()).npu()

    def forward(self, x: Tensor) -> Any:
        return self.cpu_part(x.cpu()), self.npu_part(x.npu())


@pytest.mark.usefixtures("too_old")
def test_only_layers_on_the_npu_are_left_alone() -> None:
    report = lq_graph.merge(OnTwoDevices(), inputs())
    assert [group.names for group in report] == [("cpu_part.gate", "cpu_part.up")]
    assert [one.name for one in report.left_alone] == ["npu_part.gate", "npu_part.up"]
