"""Errors of a model's call: the class that is caught, the layer and the tensor that are named.

Compiled calls raise while Dynamo traces, so most cases need no backend that compiles.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchair
from torch import Tensor, nn

import lq_graph
from lq_graph import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
from support.processes import run
from support.two_blocks import Model

F16, I8, I32 = torch.float16, torch.int8, torch.int32
K, N = 32, 16
UP, DOWN = "layers.0.mlp.up_proj", "layers.1.mlp.down_proj"
ON_NPU = os.environ.get("LQ_GRAPH_TEST_NPU") == "1"


def quantized(static: bool = False) -> Any:
    torch.manual_seed(0)
    model, x = Model(K, N), torch.randn(4, K, dtype=F16)
    if static:
        lq_graph.quantize(model, lq_graph.A8W8Static(), [x])
    else:
        lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    return model


def floats(rows: int = 4, k: int = K) -> Tensor:
    return torch.randn(rows, k, dtype=F16)


class Own(nn.Module):
    """A model with a LinearQuant of the user's own at DOWN."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        mlp = nn.Module()
        mlp.down_proj = linear
        block = nn.Module()
        block.mlp = mlp
        self.layers = nn.ModuleList([nn.Identity(), block])

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = self.layers[1].mlp.down_proj(*args)
        return out


def own(dtype: torch.dtype = I8, **settings: Any) -> Own:
    settings = {"bias": False, "output_dtype": F16, **settings}
    return Own(lq_graph.LinearQuant(K, N, dtype=dtype, **settings))


def ints(rows: int = 4, k: int = K, dtype: torch.dtype = I8) -> Tensor:
    return torch.ones(rows, k, dtype=dtype)


# ---- the modes: how a model is called ----


def compiled(**settings: Any) -> Callable[..., Any]:
    return lambda model, *args: torch.compile(model, **settings)(*args)


def on_ge(model: nn.Module, *args: Tensor) -> Any:
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    return torch.compile(model, backend=backend, dynamic=False)(*args)


MODES: dict[str, Callable[..., Any]] = {
    "eager": lambda model, *args: model(*args),
    "compile": compiled(backend="eager"),
    "fullgraph": compiled(backend="eager", fullgraph=True),
    "dynamic": compiled(backend="aot_eager", dynamic=True),
    "inductor": compiled(),
    "GE": on_ge,
    "npugraph_ex": compiled(backend="npugraph_ex", dynamic=False),
    "export": lambda model, *args: torch.export.export(model, args, strict=False),
}
FEW = ("eager", "compile", "fullgraph")
IN_DYNAMO = set(MODES) - {"eager", "export"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def refused(mode: str, model: nn.Module, *args: Tensor) -> LinearQuantError:
    with pytest.raises(LinearQuantError) as caught:
        MODES[mode](model, *args)
    return caught.value


def above(error: BaseException) -> int:
    """Lines of Python's traceback above the sentence, below this file's."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return next(at for at, line in enumerate(lines) if "What to do:" in line)


# ---- mistakes ----

Case = tuple[nn.Module, tuple[Tensor, ...]]


def bad_scale() -> Case:
    model = quantized()
    linear = model.get_submodule(DOWN).linear
    linear.scale.data = linear.scale.data.half()
    return model, (floats(),)


def transposed() -> Case:
    model = quantized()
    linear = model.get_submodule(DOWN).linear
    linear.weight.data = linear.weight.data.t().contiguous()
    return model, (floats(),)


MISTAKES: dict[str, tuple[Callable[[], Case], type, str, str]] = {
    "x dtype, static": (
        lambda: (quantized(static=True), (floats().float(),)),
        LinearQuantTypeError,
        UP,
        "QuantizedLinear: x is float32; this static layer was made for float16.",
    ),
    "x dtype, dynamic": (
        lambda: (quantized(), (floats().double(),)),
        LinearQuantTypeError,
        UP,
        "dynamic_quant: x is float64;",
    ),
    "int8 x into a float layer": (
        lambda: (quantized(), (ints(),)),
        LinearQuantTypeError,
        UP,
        "QuantizedLinear: x is int8,",
    ),
    "scale dtype": (bad_scale, LinearQuantTypeError, DOWN, "linear_quant: scale is float16;"),
    "transposed weight": (
        transposed,
        LinearQuantValueError,
        DOWN,
        "linear_quant: x1 .* and weight .* the weight looks transposed",
    ),
    "another k": (
        lambda: (own(), (ints(k=K // 2),)),
        LinearQuantValueError,
        DOWN,
        r"linear_quant: .*x1",
    ),
    "float into LinearQuant": (
        lambda: (own(), (floats(),)),
        LinearQuantTypeError,
        DOWN,
        "linear_quant: x1 is float16",
    ),
    "stated dtype": (
        lambda: (own(x1_dtype=I8), (ints(dtype=I32),)),
        LinearQuantTypeError,
        DOWN,
        "x1 is int32",
    ),
    "int4 not packed": (
        lambda: (own(I32), (ints(dtype=I32),)),
        LinearQuantValueError,
        DOWN,
        r"linear_quant: .*x1",
    ),
    "pertoken_scale too short": (
        lambda: (own(pertoken_scale=True), (ints(), torch.ones(3))),
        LinearQuantValueError,
        DOWN,
        "linear_quant: pertoken_scale",
    ),
    "offset with float16 output": (
        lambda: (own(offset=True), (ints(),)),
        LinearQuantTypeError,
        DOWN,
        "linear_quant: offset is float32;",
    ),
}


@pytest.mark.parametrize("mode", FEW)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_the_layer_and_the_tensor_are_named(mistake: str, mode: str, device: str) -> None:
    make, kind, layer, said = MISTAKES[mistake]
    model, args = make()
    error = refused(mode, model.to(device), *(arg.to(device) for arg in args))
    assert isinstance(error, kind)
    assert error.layer == layer
    assert str(error).startswith(f"{layer}: ")
    with pytest.raises(kind, match=said):
        raise error


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_raises_the_same_sentence(mode: str) -> None:
    device = "npu" if mode in ("GE", "npugraph_ex") else "cpu"
    model, args = bad_scale()
    error = refused(mode, model.to(device), *(arg.to(device) for arg in args))
    assert type(error).__name__ == "LinearQuantTypeError"
    sentence = str(error).split("\n")[0]
    assert sentence == str(refused("eager", bad_scale()[0], *args)) and error.refusal is not None
    assert error.refusal.arguments == ("scale",) and error.refusal.layer == DOWN
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is LinearQuantTypeError and str(again) == str(error)
    assert again.layer == DOWN
    if mode in IN_DYNAMO:  # the call, and five frames of torch's wrappers at most
        assert above(error) <= 25


def test_a_call_that_is_corrected_compiles() -> None:
    """A refused call leaves no mark: the next one has a whole graph."""
    model, (x,) = bad_scale()
    counter = torch._dynamo.testing.CompileCounter()
    run_compiled = torch.compile(model, backend=counter, fullgraph=True)
    with pytest.raises(LinearQuantTypeError):
        run_compiled(x)
    linear = model.get_submodule(DOWN).linear
    linear.scale.data = linear.scale.data.float()
    assert torch.equal(run_compiled(x), model(x)) and counter.frame_count == 1


def test_suppressed_errors_of_dynamo_run_the_model_eagerly() -> None:
    model, (x,) = bad_scale()
    with torch._dynamo.config.patch(suppress_errors=True):
        error = refused("compile", model, x)
    assert type(error) is LinearQuantTypeError and error.layer == DOWN


@pytest.mark.parametrize(
    ("device", "mode"),
    [("cpu", "compile"), ("cpu", "fullgraph"), ("cpu", "inductor"), ("npu", "fullgraph")],
)
@pytest.mark.parametrize("dtype", [F16, torch.bfloat16])
def test_autocast_makes_a_float32_input_legal(dtype: torch.dtype, device: str, mode: str) -> None:
    model, x = quantized().to(device), torch.randn(4, K).to(device)
    wanted = lq_graph.dynamic_quant(x.to(dtype))

    def call(x: Tensor) -> Any:
        with torch.autocast(device, dtype=dtype):
            return model(x), *lq_graph.dynamic_quant(x)

    out, *quantized_x = MODES[mode](call, x)
    assert torch.equal(out, layer_by_layer(model, x, dtype))
    assert all(map(torch.equal, quantized_x, wanted))


def layer_by_layer(model: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The model's output, each layer given its input as autocast casts it."""
    for block in model.layers:
        rows = torch.relu(block.mlp.up_proj(x.to(dtype)))
        x = x + block.mlp.down_proj(rows.to(dtype))
    return x


def test_a_refused_call_keeps_no_tensor() -> None:
    """Without the garbage collector: until it runs, memory of a device would stay taken."""

    def call(model: nn.Module, x: Tensor) -> None:
        with contextlib.suppress(LinearQuantError):
            model(x)

    model, (x,) = bad_scale()
    call(model, x)  # imports
    for make in (bad_scale, MISTAKES["float into LinearQuant"][0]):
        model, (x,) = make()
        gc.collect()
        gc.disable()
        try:
            call(model, x)
            held = weakref.ref(model), weakref.ref(x)
            del model, x
            assert [one() for one in held] == [None, None]
        finally:
            gc.enable()


def test_a_function_that_catches_the_error_can_free_its_tensors() -> None:
    model, (x,) = bad_scale()

    def main(model: nn.Module, x: Tensor) -> Any:
        rows = x.clone()
        held = weakref.ref(rows)
        with contextlib.suppress(LinearQuantError):
            model(rows)
        del rows
        return held()

    assert main(model, x) is None


# ---- devices ----


def left_on_cpu(parameter: str) -> Own:
    model = own(I8, bias=True, pertoken_scale=True).npu()
    linear: Any = model.layers[1].mlp.down_proj
    setattr(linear, parameter, nn.Parameter(getattr(linear, parameter).data.cpu(), False))
    return model


@pytest.mark.parametrize("mode", [*FEW, "GE", "npugraph_ex"])
@pytest.mark.parametrize(
    ("make", "on", "layer", "said"),
    [
        (quantized, "npu", UP, "weight is on cpu and x1 on npu:0"),
        (lambda: quantized().npu(), "cpu", UP, "weight is on npu:0 and x1 on cpu"),
        (lambda: quantized(static=True), "npu", UP, "scale_reciprocal is on cpu and x on npu:0"),
        (lambda: left_on_cpu("weight"), "npu", DOWN, "weight is on cpu and x1 on npu:0"),
        (lambda: left_on_cpu("scale"), "npu", DOWN, "scale is on cpu and x1 on npu:0"),
        (lambda: left_on_cpu("bias"), "npu", DOWN, "bias is on cpu and x1 on npu:0"),
    ],
)
def test_tensors_on_two_devices_are_refused(
    make: Callable[[], nn.Module], on: str, layer: str, said: str, mode: str
) -> None:
    model = make()
    args = (ints(), torch.ones(4)) if isinstance(model, Own) else (floats(),)
    error = refused(mode, model, *(arg.to(on) for arg in args))
    assert error.layer == layer and f": {said}; " in str(error)


@pytest.mark.parametrize("mode", [*FEW, "GE"])
def test_a_pertoken_scale_on_another_device(mode: str) -> None:
    model = own(pertoken_scale=True).npu()
    error = refused(mode, model, ints().npu(), torch.ones(4))
    assert error.layer == DOWN and "pertoken_scale is on cpu and x1 on npu:0" in str(error)


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("mode", FEW)
def test_a_layer_still_on_meta_is_refused(mode: str, device: str) -> None:
    """An eager call on the NPU does not return a tensor without values."""
    linear = lq_graph.LinearQuant(K, N, bias=False, output_dtype=F16, device="meta")
    error = refused(mode, Own(linear), ints().to(device))
    assert error.layer == DOWN and "weight is on meta" in str(error)
    assert "load the checkpoint first" in str(error)


# ---- names ----


def wrong(**settings: Any) -> lq_graph.LinearQuant:
    """A layer that every call of int8 refuses."""
    return lq_graph.LinearQuant(K, N, bias=False, offset=True, output_dtype=F16, **settings)


class Calls(nn.Module):
    """Calls its children by name."""

    def __init__(self, *names: str, **children: nn.Module) -> None:
        super().__init__()
        self.names = names
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Any:
        return [self._modules[name](x) for name in self.names][-1]


def renamed() -> nn.Module:
    model = Calls("b", a=wrong())
    model.b = model.a
    del model.a
    return model


def shared_by_parents() -> nn.Module:
    """One layer in two blocks; the second calls it."""
    layer = wrong()
    return Calls("two", one=Calls("q", q=layer), two=Calls("k", k=layer))


class Unregistered(nn.Module):
    """Holds a block where named_modules does not look."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.hidden = [block]

    def forward(self, x: Tensor) -> Any:
        return self.hidden[0](x)


def wrapped(model: nn.Module) -> nn.Module:
    """As DataParallel and DistributedDataParallel hold a model."""
    return Calls("module", module=model)


NAMES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "alone": (wrong, ""),
    "in a Sequential": (lambda: nn.Sequential(nn.Identity(), wrong()), "1"),
    "a copy": (lambda: copy.deepcopy(nn.Sequential(nn.Identity(), wrong())), "1"),
    "a copy in another model": (lambda: Calls("x", x=copy.deepcopy(Own(wrong()))), f"x.{DOWN}"),
    "renamed": (renamed, "b"),
    "shared by two parents": (shared_by_parents, "two.k"),
    "wrapped": (lambda: wrapped(Own(wrong())), f"module.{DOWN}"),
    "compiled inside": (lambda: Calls("m", m=torch.compile(Own(wrong()))), f"m.{DOWN}"),
    "a name with a dash": (lambda: Calls("gate-proj", **{"gate-proj": wrong()}), "gate-proj"),
    "a list in a dict": (
        lambda: nn.Sequential(nn.ModuleDict({"e": wrong()})["e"], nn.Identity()),
        "0",
    ),
}


@pytest.mark.parametrize("mode", FEW)
@pytest.mark.parametrize("case", NAMES)
def test_the_name_is_the_one_of_the_call(case: str, mode: str) -> None:
    make, name = NAMES[case]
    error = refused(mode, make(), ints())
    assert error.layer == name
    assert str(error).startswith(f"{name}: linear_quant: offset" if name else "linear_quant: offs")


def test_a_block_that_is_not_registered_is_left_out_of_the_name() -> None:
    model = Unregistered(Calls("q", q=wrong()))
    assert refused("eager", model, ints()).layer == "q"
    assert refused("compile", model, ints()).layer == "hidden.0.q"  # Dynamo sees the attribute


def test_a_part_of_a_model_compiled_alone_has_its_whole_name() -> None:
    model, (x,) = bad_scale()
    model.layers[1].compile(backend="eager")
    assert refused("eager", model, x).layer == DOWN


def test_a_function_that_is_compiled_names_the_layer_of_its_model() -> None:
    model, (x,) = bad_scale()

    def step(net: nn.Module, x: Tensor) -> Any:
        return net(x)

    assert refused("compile", step, model, x).layer == DOWN  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", FEW)
def test_a_function_without_a_module_has_no_name(mode: str) -> None:
    def call(x: Tensor) -> Tensor:
        return lq_graph.linear_quant(x, ints(N, K), torch.ones(N).half(), output_dtype=F16)

    error = refused(mode, call, ints())  # type: ignore[arg-type]
    assert error.layer == "" and str(error).startswith("linear_quant: scale is float16;")


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "linear_quant": lambda x: lq_graph.linear_quant(x, x, torch.ones(4).half()),
    "dynamic_quant": lambda x: lq_graph.dynamic_quant(x),
    "static_quant": lambda x: lq_graph.static_quant(x, torch.ones(1)),
    "trans_quant_param": lambda x: lq_graph.trans_quant_param(x),
}


@pytest.mark.parametrize("mode", FEW)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_in_a_module_names_the_module(function: str, mode: str) -> None:
    class Uses(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return FUNCTIONS[function](x)

    error = refused(mode, Calls("own", own=Uses()), ints())
    assert error.layer == "own" and str(error).startswith(f"own: {function}: ")


# ---- no_grad, 310P ----


@pytest.mark.parametrize("mode", ["eager", "compile", "dynamic"])
def test_a_call_without_no_grad_says_what_to_do(mode: str) -> None:
    with torch.enable_grad(), pytest.warns(UserWarning, match=r"x requires grad, .*no_grad\(\)"):
        out = MODES[mode](quantized(), floats().requires_grad_())
    assert out.shape == (4, K)


@pytest.mark.slow
@pytest.mark.skipif(ON_NPU, reason="a card is one product")
def test_a_graph_on_310p_asks_for_prepared_weights() -> None:
    said = run("unprepared.py", CANN_HOST_SOC="Ascend310P3")
    assert "eager: right" in said and "prepared: right" in said
    assert (
        "GE: LinearQuantValueError layers.0: linear_quant: weight is ND, in a GE graph; Atlas "
        "inference (310P) allows FRACTAL_NZ. What to do: set "
        "torch.npu.config.allow_internal_format = True and call "
        "lq_graph.use_internal_format_weight(model) before the first call. (GE would report 561002)"
    ) in said
