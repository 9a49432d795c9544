"""merge: the same bits as before, eagerly and in graphs, in one product."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchair
from torch import Tensor, nn
from torch._functorch.compile_utils import fx_graph_cse
from torch.utils._python_dispatch import TorchDispatchMode

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, converters
from lq_graph.backends.npu import format_of
from lq_graph.rules.tables import FRACTAL_NZ, ND
from support import has
from support.lowering import MATMUL
from support.shared_input import Attention, Gated, inputs, pair, quantized

pytestmark = pytest.mark.skipif(not has.HAS_PASSES, reason="torchair has no register_replacement")

F16, BF16 = torch.float16, torch.bfloat16
CONFIGS = [A8W8Dynamic(), A4W4Dynamic(), A8W8Static(), A8W8Static(symmetric=True)]
EACH = pytest.mark.parametrize("config", CONFIGS, ids=repr)
ODD = {"q": 37, "k": 11, "v": 1}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.npu.config.allow_internal_format = True
    yield
    torch._dynamo.reset()


def merged_npu(model: nn.Module, config: Any, nz: bool, dtype: torch.dtype = F16) -> Any:
    lq_graph.merge(model, inputs(dtype=dtype))
    model.npu()
    if nz:
        lq_graph.use_internal_format_weight(model)
        is_int4 = isinstance(config, A4W4Dynamic)
        assert format_of(model.q.linear.merged.weight) == (ND if is_int4 else FRACTAL_NZ)
    return model


# ---- the same bits ----


@pytest.mark.parametrize("device", ["cpu", "npu", "npu NZ"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16])
@EACH
def test_eager(config: Any, dtype: torch.dtype, bias: bool, device: str) -> None:
    plain, model = pair(config, dtype, bias=bias)
    (group,) = lq_graph.merge(model, inputs(dtype=dtype))
    assert (group.names, group.sizes, group.changed) == (("q", "k", "v"), (40, 24, 8), True)
    if device != "cpu":
        plain, model = plain.npu(), model.npu()
    if device == "npu NZ":
        lq_graph.use_internal_format_weight(model)
    for m in (1, 5, 33):
        x = inputs(m, dtype).to(model.q.linear.merged.weight.device)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                own = x.clone()  # in inference mode, torch counts no versions of it
                assert torch.equal(model(own), plain(own))
                assert torch.equal(model.k(own), plain.k(own))


@pytest.mark.parametrize("config", [A8W8Dynamic(), A8W8Static()], ids=repr)
def test_sizes_that_fill_no_block(config: Any) -> None:
    plain, model = pair(config, sizes=ODD)
    lq_graph.merge(model, inputs())
    with torch.no_grad():
        assert torch.equal(model(inputs()), plain(inputs()))
        model = model.npu()
        lq_graph.use_internal_format_weight(model)
        assert torch.equal(model(inputs().npu()).cpu(), plain(inputs()))


def test_rows_of_n_cut_no_word_of_int4() -> None:
    plain, model = pair(A4W4Dynamic())
    lq_graph.merge(model, inputs())
    for name in ("q", "k", "v"):
        values = lq_graph.unpack_int4(getattr(plain, name).linear.weight.data)
        rows = lq_graph.unpack_int4(getattr(model, name).linear.weight * 1)
        assert torch.equal(rows, values) and values.unique().numel() > 8


def test_no_rows() -> None:
    plain, model = pair(A8W8Dynamic())
    lq_graph.merge(model, inputs())
    x = inputs()[:, :0]
    assert model(x).shape == plain(x).shape == (2, 0, 64)


def test_a_model_may_view_the_result() -> None:
    _, model = pair(A8W8Dynamic())
    lq_graph.merge(model, inputs())
    x = inputs()
    assert model.q(x).view(-1).shape == (2 * 5 * 40,)


# ---- graphs ----


def one_of_equals(module: Any, *_: Any) -> None:
    """What a pass that merges equal nodes does, by torch's own."""
    module.graph = fx_graph_cse(module.graph)
    module.recompile()


def backend(mode: str) -> Any:
    config = torchair.CompilerConfig()
    if not hasattr(config, "post_grad_custom_pre_pass"):
        pytest.skip("this torchair takes no passes")
    config.post_grad_custom_pre_pass = one_of_equals
    if mode != "ge":
        config.mode = mode
    return config, torchair.get_npu_backend(compiler_config=config)


@pytest.mark.parametrize(
    ("config", "dtype", "bias", "nz"),
    [
        (A8W8Dynamic(), F16, False, True),
        (A8W8Dynamic(), BF16, True, False),
        (A8W8Static(), F16, True, True),
        (A8W8Static(symmetric=True), BF16, False, False),
        (A4W4Dynamic(), F16, True, False),
    ],
    ids=repr,
)
def test_ge_graph_has_one_product(config: Any, dtype: torch.dtype, bias: bool, nz: bool) -> None:
    plain, model = pair(config, dtype, bias=bias)
    model = merged_npu(model, config, nz, dtype)
    options, compiler = backend("ge")
    with converters.graph.capture(options) as graphs:
        step = torch.compile(model, backend=compiler, dynamic=False, fullgraph=True)
        out = step(inputs(dtype=dtype).npu())
    assert torch.equal(out.cpu(), plain(inputs(dtype=dtype)))
    ops = Counter(graphs[0].ops())
    quantize = "AscendQuantV2" if isinstance(config, A8W8Static) else "DynamicQuant"
    # q, k and v, and out
    assert (ops[MATMUL], ops[quantize], ops["SplitV"] + ops["Split"]) == (2, 2, 1)
    # a part's input_scale is a tensor of its own again after a load
    model.load_state_dict(quantized(Attention(bias), config, dtype, seed=7).state_dict())
    other = quantized(Attention(bias), config, dtype, seed=7)
    assert torch.equal(step(inputs(dtype=dtype).npu()).cpu(), other(inputs(dtype=dtype)))


def test_int4_in_fractal_nz() -> None:
    if why := has.int4_nz():
        pytest.skip(why)
    plain, model = pair(A4W4Dynamic())
    lq_graph.merge(model, inputs())
    lq_graph.use_internal_format_weight(model.npu(), int4_nz=True)
    assert format_of(model.q.linear.merged.weight) == FRACTAL_NZ
    _, compiler = backend("ge")
    step = torch.compile(model, backend=compiler, dynamic=False, fullgraph=True)
    assert torch.equal(step(inputs().npu()).cpu(), plain(inputs()))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(("config", "nz"), [(A8W8Dynamic(), True), (A8W8Static(), False)], ids=repr)
def test_captured_graph(config: Any, nz: bool) -> None:
    plain, model = pair(config)
    model = merged_npu(model, config, nz)
    _, compiler = backend("reduce-overhead")
    step = torch.compile(model, backend=compiler, dynamic=False, fullgraph=True)
    for m in (5, 5, 1):
        assert torch.equal(step(inputs(m).npu()).cpu(), plain(inputs(m)))


@pytest.mark.slow
def test_graph_for_any_number_of_rows() -> None:
    plain, model = pair(A8W8Dynamic())
    model = merged_npu(model, A8W8Dynamic(), nz=True)
    _, compiler = backend("ge")
    step = torch.compile(model, backend=compiler, dynamic=True, fullgraph=True)
    for m in (2, 9):
        assert torch.equal(step(inputs(m).npu()).cpu(), plain(inputs(m)))


@EACH
def test_a_graph_for_the_cpu_computes_the_parts_rows(config: Any) -> None:
    plain, model = pair(config)
    lq_graph.merge(model, inputs())
    shapes = []

    def look(module: Any, example_inputs: Any) -> Any:
        del example_inputs
        nodes = module.graph.find_nodes(
            op="call_function", target=torch.ops.lq_graph.linear_quant.default
        )
        shapes.extend(node.meta["example_value"].shape[-1] for node in nodes)
        return module

    assert torch.equal(torch.compile(model, backend=look)(inputs()), plain(inputs()))
    assert shapes == [40, 24, 8, 64]


# ---- eagerly, one product for all layers that read the tensor ----


class Products(TorchDispatchMode):
    """Counts products, by n."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.lq_graph.linear_quant.default:
            self.sizes.append(out.shape[-1])
        return out


@pytest.fixture
def gated() -> tuple[Any, Any]:
    plain = quantized(Gated(), A8W8Dynamic())
    model = copy.deepcopy(plain)
    lq_graph.merge(model, inputs())
    return plain, model


def test_it_is_computed_once_and_not_kept(gated: tuple[Any, Any]) -> None:
    _, model = gated
    with Products() as products, torch.no_grad():
        x = inputs()
        model.gate(x)
        assert model.gate.linear.merged._remembered is not None
        model.up(x)
    assert products.sizes == [64]
    assert model.gate.linear.merged._remembered is None


def test_it_is_dropped_with_the_input(gated: tuple[Any, Any]) -> None:
    _, model = gated
    x = inputs()
    model.gate(x)
    del x
    gc.collect()
    assert model.gate.linear.merged._remembered is None


def change_input(model: Any, x: Tensor) -> None:
    x.add_(1)


def change_view(model: Any, x: Tensor) -> None:
    x[0].zero_()


def change_weight(model: Any, x: Tensor) -> None:
    model.load_state_dict(quantized(Gated(), A8W8Dynamic(), seed=5).state_dict())


def change_parameter(model: Any, x: Tensor) -> None:
    merged = model.gate.linear.merged
    merged.scale.data = merged.scale.data * 2


def change_product(model: Any, x: Tensor) -> None:
    lq_graph.set_product("950")  # whose dynamic_quant differs in a few last bits


@pytest.mark.parametrize(
    "change", [change_input, change_view, change_weight, change_parameter, change_product]
)
def test_a_change_between_the_layers_counts(change: Any, gated: tuple[Any, Any]) -> None:
    _, model = gated
    product = lq_graph.get_product()
    try:
        with torch.no_grad():
            x = inputs(2000)
            model.gate(x)
            change(model, x)
            out = model.up(x)
            assert torch.equal(out, model.up(x.clone()))
            assert torch.equal(out, copy.deepcopy(model).up(x))
    finally:
        lq_graph.set_product(product.name)


def test_a_second_call_has_memory_of_its_own(gated: tuple[Any, Any]) -> None:
    plain, model = gated
    x = inputs(1)[0]
    with torch.no_grad():
        one, two = model.gate(x), model.gate(x)
        one.zero_()
        up = model.up(x)
        up.zero_()
        assert torch.equal(two, plain.gate(x)) and torch.equal(model.up(x), plain.up(x))


def test_threads(gated: tuple[Any, Any]) -> None:
    plain, model = gated
    wrong = []

    def run(seed: int) -> None:
        x = inputs(3 + seed % 2)
        with torch.no_grad():
            want = plain(x)
            wrong.extend(1 for _ in range(40) if not torch.equal(model(x), want))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_static_layers_whose_scales_part_compute_their_own() -> None:
    plain, model = pair(A8W8Static())
    lq_graph.merge(model, inputs())
    for each in (plain, model):
        each.k.input_scale = each.k.input_scale * 2
        each.v.input_offset.add_(3)
    with torch.no_grad():
        assert torch.equal(model(inputs()), plain(inputs()))
        assert torch.equal(model.npu()(inputs().npu()).cpu(), plain(inputs()))
    _, compiler = backend("ge")
    step = torch.compile(model, backend=compiler, dynamic=False, fullgraph=True)
    assert torch.equal(step(inputs().npu()).cpu(), plain(inputs()))


# ---- copies ----


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        through_a_file,
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.npu().cpu(),
        lambda model: model.share_memory(),
    ],
    ids=["deepcopy", "pickle", "file", "half", "double", "npu and back", "shared"],
)
@EACH
def test_copies_are_merged(config: Any, copied: Any) -> None:
    plain, model = pair(config, bias=True)
    lq_graph.merge(model, inputs())
    model.q(inputs())  # what is remembered is not copied
    model = copied(model)
    with torch.no_grad():
        assert torch.equal(model(inputs()), plain(inputs()))
    assert model.q.linear.merged is model.v.linear.merged
    assert len({id(layer._offset) for layer in (model.q, model.k, model.v)}) == 1


@EACH
def test_the_weight_is_held_once(config: Any) -> None:
    plain, model = pair(config, bias=True)
    lq_graph.merge(model, inputs())

    def size(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    dynamic = not isinstance(config, A8W8Static)
    assert size(model) == size(plain) + 4 * dynamic  # pertoken_scale of the merged weight
    named = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    assert named == ["q.linear.merged.weight", "out.linear.weight"]
