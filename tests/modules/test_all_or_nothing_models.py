"""Whatever changes a model changes all of it or nothing: a fault or Ctrl-C at each of 200 random
points, and afterwards the model is bit for bit as before, or complete."""

from __future__ import annotations

import contextlib
import io
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import lq_graph
from lq_graph import LinearQuant
from lq_graph.backends.npu import format_of
from lq_graph.parallel import ColwiseLinearQuant, RowwiseLinearQuant
from lq_graph.rules.tables import FRACTAL_NZ
from support import cases
from support.cases import BF16, F16, I32, Case
from support.injection import STRIKES, model_state, modes, points, rehearse
from support.layers import module_for, vendor_for
from support.processes import output_of, python, script

TRIALS = 200


@pytest.fixture(autouse=True)
def internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    # torchair, where a test has imported it, leaves a handler that ends in ignoring Ctrl-C
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


# ---- what must be equal ----


def bits(value: object) -> object:
    if not isinstance(value, Tensor):
        return None if value is None else repr(value)
    plain = value.detach().cpu().contiguous().reshape(-1)
    return str(value.dtype), tuple(value.shape), plain.view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, object]:
    """Everything of a model: `model_state`, and formats, attributes and state dicts."""
    found: dict[str, object] = dict(model_state(model))
    for name, module in model.named_modules():
        found[f"{name} attributes"] = sorted(vars(module))
        for attribute in ("in_features", "out_features", "_weight_format", "_float_scale"):
            found[f"{name} {attribute}"] = bits(vars(module).get(attribute))
    for name, parameter in model.named_parameters():
        found[f"{name} format"] = format_of(parameter)
    with contextlib.suppress(NotImplementedError):  # a whole DTensor of one rank is its part
        for name, tensor in model.state_dict().items():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            found[f"{name} saved"] = bits(local)
    return found


def objects(model: nn.Module) -> list[tuple[str, int]]:
    """Which modules and parameters a model has, and which objects they are."""
    return [(name, id(thing)) for kind in ("named_modules", "named_parameters")
            for name, thing in getattr(model, kind)(remove_duplicate=False)]  # fmt: skip


# ---- what changes models ----


class Action(NamedTuple):
    """make: a new model, always the same. act: changes it. keeps: module and parameter objects."""

    make: Callable[[], nn.Module]
    act: Callable[[nn.Module], object]
    keeps: bool


class Floats(nn.Module):
    """nn.Linear in a Sequential, alone, held twice and with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.alone = nn.Linear(16, 16, bias=False)
        self.again = self.alone
        self.tied = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.tied[1].weight = self.tied[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(self.tied[1](self.tied[0](self.again(self.alone(x)))))


def floats() -> nn.Module:
    torch.manual_seed(0)
    return Floats().to(F16).eval()


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).to(F16).eval()


CALIBRATION = [torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(F16)]
INPUTS = [cases.make(Case(offset=True, bias=I32)), cases.make(Case(output=BF16)),
          cases.make(Case(x=I32, output=F16)), cases.make(Case(output=F16), seed=1)]  # fmt: skip


def quantized(kind: str) -> nn.Module:
    """Layers of ours or of the vendor's; one is held twice, two share weight and scale."""
    layers = [module_for(i) if kind == "ours" else vendor_for(i) for i in INPUTS]
    twin = module_for(INPUTS[3]) if kind == "ours" else vendor_for(INPUTS[3])
    twin.weight, twin.scale = layers[3].weight, layers[3].scale
    torch.manual_seed(0)
    rest = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48)).to(F16)
    return nn.ModuleDict({"layers": nn.ModuleList([*layers, twin, layers[0]]), "rest": rest}).npu()


@contextlib.contextmanager
def one_rank() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def split(style: Callable[[], Any]) -> Callable[[nn.Module], object]:
    def act(model: nn.Module) -> object:
        return parallelize_module(model, split.mesh, {"layer": style()})

    return act


def to_split(dynamic: bool = False, case: int = 3) -> nn.Module:
    if not dynamic:
        return nn.ModuleDict({"layer": module_for(INPUTS[case])})
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(16, 8).to(F16)})
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    return model


ACTIONS = {
    "quantize dynamic": Action(
        floats, lambda m: lq_graph.quantize(m, lq_graph.A8W8Dynamic()), False
    ),
    "quantize static": Action(
        chain, lambda m: lq_graph.quantize(m, lq_graph.A8W8Static(), CALIBRATION), False
    ),
    "quantize int4": Action(floats, lambda m: lq_graph.quantize(m, lq_graph.A4W4Dynamic()), False),
    "convert": Action(lambda: quantized("vendor"), lq_graph.convert, False),
    "convert back": Action(
        lambda: quantized("ours"), lambda m: lq_graph.convert(m, to="torch_npu"), False
    ),
    "prepare": Action(lambda: quantized("ours"), lq_graph.use_internal_format_weight, True),
    "prepare vendor's": Action(
        lambda: quantized("vendor"), lq_graph.use_internal_format_weight, True
    ),
    "split n": Action(to_split, split(ColwiseLinearQuant), True),
    "split k": Action(lambda: to_split(True), split(RowwiseLinearQuant), True),
    "split k exactly": Action(
        lambda: to_split(case=0), split(lambda: RowwiseLinearQuant(exact=True)), True
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:use_internal_format_weight. formats")
@pytest.mark.parametrize("kind", ["ctrl_c", "op_fault"])
@pytest.mark.parametrize("name", ACTIONS)
def test_struck_anywhere_a_model_is_as_before_or_complete(name: str, kind: str) -> None:
    action, (strike, error) = ACTIONS[name], STRIKES[kind]
    with one_rank() if name.startswith("split") else contextlib.nullcontext() as split.mesh:
        complete = action.make()
        action.act(complete)
        whole = state(complete)
        count = rehearse(strike, lambda: action.act(action.make()))
        before = state(action.make())
        assert before != whole
        seen, around = set(), modes()
        for at in points(count, TRIALS):
            model = action.make()
            same = objects(model)
            # Ctrl-C while cann_host computes may come as torch_npu's RuntimeError
            with contextlib.suppress(error, RuntimeError), strike(at):
                action.act(model)
            assert modes() == around, at
            now = state(model)
            assert now in (before, whole), (at, differences(now, before), differences(now, whole))
            seen.add(now == whole)
            if now == before or action.keeps:
                assert objects(model) == same, at
        # a Ctrl-C that comes before the first step may not be among the points
        assert False in seen or kind == "ctrl_c"


def differences(now: dict[str, object], then: dict[str, object]) -> list[str]:
    return [key for key in {**now, **then} if now.get(key) != then.get(key)]


# ---- threads, copies and shared scales ----


def test_three_threads_prepare_one_model_once() -> None:
    wanted = quantized("ours")
    changed = sum(r.changed for r in lq_graph.use_internal_format_weight(wanted))
    whole = state(wanted)
    for _ in range(5):
        model = quantized("ours")
        start, reports = threading.Barrier(3), []

        def prepare(model=model, start=start, reports=reports) -> None:
            start.wait()
            reports.append(lq_graph.use_internal_format_weight(model))

        threads = [threading.Thread(target=prepare, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert sorted(sum(r.changed for r in report) for report in reports) == [0, 0, changed]
        assert state(model) == whole


def test_state_dicts_taken_while_a_model_is_prepared_are_whole() -> None:
    model = quantized("ours")
    wanted = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    thread = threading.Thread(target=lq_graph.use_internal_format_weight, args=(model,))
    thread.start()
    for _ in range(20):
        assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == wanted
    thread.join()
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == wanted


def through_a_file(layer: LinearQuant) -> LinearQuant:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_prepared_layer_from_a_file_keeps_its_float_scale() -> None:
    layer = module_for(INPUTS[0]).npu()
    lq_graph.use_internal_format_weight(layer)
    copied = through_a_file(layer)
    cases.assert_equal(copied(INPUTS[0]["x1"].npu()), INPUTS[0])
    assert torch.equal(copied.state_dict()["scale"].cpu(), INPUTS[0]["scale"])
    assert copied._weight_format == format_of(copied.weight)
    lq_graph.use_internal_format_weight(copied)
    assert format_of(copied.weight) == FRACTAL_NZ
    cases.assert_equal(copied(INPUTS[0]["x1"].npu()), INPUTS[0])


@pytest.mark.parametrize("kind", ["ours", "vendor"])
def test_a_scale_that_layers_read_differently_stays_float(kind: str) -> None:
    make = module_for if kind == "ours" else vendor_for
    offsets = [cases.make(Case(offset=True), seed=seed) for seed in (0, 1)]
    to_bf16 = cases.make(Case(output=BF16))
    for inputs in (*offsets, to_bf16):
        inputs["scale"] = offsets[0]["scale"]
    plain = cases.make(Case(output=F16), seed=2)
    layers = nn.ModuleList([make(i) for i in (*offsets, to_bf16, plain, plain)]).npu()
    layers[1].scale = layers[2].scale = layers[0].scale
    layers[4].scale = layers[3].scale
    report = lq_graph.use_internal_format_weight(layers)
    assert [str(r.after).split()[-1] for r in report] == ["float32"] * 3 + ["int64"] * 2
    assert all("share it and read it differently" in r.note for r in report[:3])
    for layer, inputs in zip(layers, (*offsets, to_bf16, plain, plain), strict=True):
        cases.assert_equal(layer(inputs["x1"].npu()), inputs)
    for name, tensor in layers.state_dict().items():
        if kind == "ours" and name.endswith("scale"):
            assert tensor.dtype == torch.float32, name


def test_ctrl_c_waits_for_the_end_of_a_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("ours")
    whole = quantized("ours")
    lq_graph.use_internal_format_weight(whole)
    real = torch_npu.npu_format_cast

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch_npu, "npu_format_cast", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lq_graph.use_internal_format_weight(model)
    monkeypatch.undo()
    assert state(model) == state(whole)
    done = threading.Thread(target=lq_graph.use_internal_format_weight, args=(model,), daemon=True)
    done.start()  # no lock is left locked
    done.join(timeout=60)
    assert not done.is_alive()


@pytest.mark.slow
def test_preparing_leaves_ctrl_c_as_it_was() -> None:
    output_of(python(*script("handler_kept.py")))
