"""quantize(): refusals, and failures that leave the model as it was."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuantTypeError,
    LinearQuantValueError,
    QuantizedLinear,
    quantize,
)
from lq_graph.quantization.layer import LayerToQuantize
from support.float_models import CONFIGS, Net, assert_unchanged, data, make, run, state
from support.processes import output_of, python, script

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


# ---- all or nothing ----


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["up.weight", "down.bias"])
def test_weights_that_are_no_numbers_are_refused(where: str, bad: float, config: Any) -> None:
    model = make()
    model.get_parameter(where).data.view(-1)[5] = bad
    before = {name: tensor.nan_to_num() for name, tensor in state(model).items()}
    with pytest.raises(LinearQuantValueError, match=f"quantize: {where} holds NaN or infinity"):
        run(model, config)
    model.get_parameter(where).data.nan_to_num_()
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", [A8W8Dynamic(output_dtype=F16), A8W8Static(output_dtype=F16)])
@pytest.mark.parametrize("what", ["bias", "weight"])
def test_values_beyond_the_output_dtype_are_refused(config: Any, what: str) -> None:
    model = make(BF16)
    getattr(model.down, what).data[1] = 1e8
    before = state(model)
    with pytest.raises(LinearQuantValueError, match=rf"down: output_dtype is float16, .*{what}.*"):
        run(model, config, data(dtype=BF16))
    assert_unchanged(model, before)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size", "text"),
    [
        (F16, 1e-4, "up: its activations are too small for float16, from -"),
        (F16, 0.0, "up: calibration gave it only zeros"),
        (BF16, 1e-4, ""),
        (BF16, 1e-20, ""),
        (BF16, 1e-37, "up: its activations are too small for bfloat16, from -"),
        (BF16, 0.0, "up: calibration gave it only zeros"),
    ],
)
def test_small_activations(dtype: torch.dtype, size: float, text: str, symmetric: bool) -> None:
    model = make(dtype)
    model.up.bias.data.zero_()
    batches = [(batch.double() * size).to(dtype) for batch in data()]
    want = model.up(batches[0])
    other = model.down.bias.detach().new_ones(4, 32)
    up, down = model.up, model.down
    both = nn.ModuleDict({"up": up, "down": down})
    both.forward = lambda x: (both["up"](x), both["down"](other))  # type: ignore[method-assign]
    report = {r.name: r for r in run(both, A8W8Static(symmetric=symmetric), batches)}
    assert report["down"].changed and report["up"].changed == (not text)
    assert report["up"].note.startswith(text[4:])
    got = both["up"](batches[0])
    assert (got - want).abs().max() <= 0.03 * want.abs().max()


def test_a_weight_whose_memory_was_freed_stays_float() -> None:
    model = make()
    model.down.weight.untyped_storage().resize_(0)
    report = quantize(model, A8W8Dynamic())
    assert [r.changed for r in report] == [True, False]
    assert report[1].note == "the memory of its weight was freed: gather or load the model first"


def test_tensors_in_plain_attributes_count_as_float() -> None:
    model = make()
    model.w, model.v = [torch.ones(64, 64, dtype=F16)], torch.ones(64, 32, dtype=F16)
    model.ints, model.again = torch.ones(4, dtype=torch.int64), model.v
    report = quantize(model, A8W8Dynamic())
    floats = 2 * sum(t.numel() for t in make().parameters())
    total = floats + 2 * (64 * 64 + 64 * 32) + 32
    assert [(left.name, left.kind, left.shape, left.bytes) for left in report.stays_float] == [
        ("w", "Net", (64, 64), 2 * 64 * 64),
        ("v", "Net", (64, 32), 2 * 64 * 32),
    ]
    assert [left.share * total for left in report.stays_float] == pytest.approx([8192, 4096])


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["quantization.quantize _LOCK", "modules.merge _ONE_AT_A_TIME"])
def test_a_fork_while_another_thread_holds_the_lock(lock: str) -> None:
    output_of(python(*script(f"locks.py fork lq_graph.{lock}"), TORCH_DEVICE_BACKEND_AUTOLOAD="0"))


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_ctrl_c_ends_a_process_that_has_no_handler(inside: bool) -> None:
    done = python(*script(f"locks.py ctrl_c {inside}"), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "waited\n"), done.stderr


def test_activations_that_are_no_numbers_are_refused() -> None:
    model = make()
    before = state(model)
    batches = data()
    batches[1][0, 0] = float("inf")
    with pytest.raises(LinearQuantValueError, match="the input of up holds NaN or infinity"):
        quantize(model, A8W8Static(), batches)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_calibration_leaves_the_model(error: type[BaseException]) -> None:
    model = make().train()
    before = state(model)

    def batches() -> Iterator[Tensor]:
        yield data()[0]
        assert not model.training
        raise error

    with pytest.raises(error):
        quantize(model, A8W8Static(), batches())
    assert_unchanged(model, before)
    assert model.training and model.up.training


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("at", [0, 1])
def test_failure_while_building_leaves_the_model(
    at: int, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    before = state(model)
    built = []
    build = LayerToQuantize.build

    def failing(layer: LayerToQuantize, shared: Any) -> Any:
        built.append(layer.name)
        if len(built) == at + 1:
            raise MemoryError
        return build(layer, shared)

    monkeypatch.setattr(LayerToQuantize, "build", failing)
    with pytest.raises(MemoryError):
        run(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_failure_while_replacing_is_made_up_for(
    config: Any, at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = make(), make()
    run(plain, config)
    build, built = LayerToQuantize.build, []

    def failing(layer: LayerToQuantize, shared: Any) -> Any:
        built.append(layer.name)
        if len(built) == 2 + at + 1:  # each is built once before the first is put in place
            raise error
        return build(layer, shared)

    monkeypatch.setattr(LayerToQuantize, "build", failing)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            run(model, config)
    else:
        run(model, config)
    assert torch.equal(model(data()[0]), plain(data()[0]))


def test_ctrl_c_while_replacing_waits_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    put = LayerToQuantize.put_in_place

    def interrupted(layer: LayerToQuantize, shared: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        put(layer, shared)

    monkeypatch.setattr(LayerToQuantize, "put_in_place", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # torchair has its own
    try:
        with pytest.raises(KeyboardInterrupt):
            quantize(model, A8W8Dynamic())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(model.up, QuantizedLinear) and isinstance(model.down, QuantizedLinear)


def test_off_the_main_thread() -> None:
    model = make()
    thread = threading.Thread(target=lambda: quantize(model, A8W8Dynamic()))
    thread.start()
    thread.join()
    assert isinstance(model.down, QuantizedLinear)


def test_memory_peak_is_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model: one int8 weight, and what one slice of its rows needs."""
    width, layers = 2048, 8
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).half()
    peak = _PeakOfAllocations()
    for layer in model:
        weakref.finalize(layer.weight.untyped_storage(), peak.gone, layer.weight.nbytes)
    del layer
    with peak:
        quantize(model, A8W8Dynamic())
    one = width * width
    # 8 MiB a float weight, 4 MiB an int8 one; a slice is 2**20 values in a few float32 copies
    assert peak.bytes <= one + 16 * 2**20
    assert all(isinstance(layer, QuantizedLinear) for layer in model)


class _PeakOfAllocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes alive at once of the tensors made inside, less those that went."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() in inputs:
                    continue
                size = storage.nbytes()
                self.alive += size
                self.bytes = max(self.bytes, self.alive)
                weakref.finalize(storage, self.gone, size)
        return out

    def gone(self, size: int) -> None:
        self.alive -= size


# ---- refusals ----


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (("int8",), LinearQuantTypeError, "scheme is 'int8'; allowed are A8W8Dynamic"),
        ((A8W8Static(),), LinearQuantValueError, "calibration is absent; A8W8Static needs"),
        ((A8W8Static(), []), LinearQuantValueError, "calibration has no inputs"),
        ((A8W8Static(), torch.ones(2, 64)), LinearQuantTypeError, "calibration is a Tensor; allow"),
        ((A8W8Static(), {"x": 1}), LinearQuantTypeError, "calibration is a dict; allowed is"),
        ((A8W8Static(), 3), LinearQuantTypeError, "calibration is a int; allowed is"),
        ((A8W8Static(), ["text"]), LinearQuantTypeError, "inputs hold a str; allowed are"),
        (
            (A8W8Dynamic(), None, {"example_inputs": torch.ones(2, 64)}),
            LinearQuantTypeError,
            r"example_inputs is a Tensor; allowed is an iterable.*pass \[inputs\]",
        ),
        (
            (A8W8Dynamic(), None, {"example_inputs": []}),
            LinearQuantValueError,
            "example_inputs has no inputs",
        ),
        (
            (A8W8Dynamic(), [1]),
            LinearQuantValueError,
            "calibration is given; A8W8 dynamic",
        ),
        (
            (A8W8Dynamic(output_dtype=F32),),
            LinearQuantValueError,
            "none of the 2 nn.Linear layers can be quantized: 2 x linear_quant: output_dtype is f",
        ),
    ],
)
def test_refusals(args: tuple[Any, ...], error: type[Exception], text: str) -> None:
    model = make()
    before = state(model)
    options = args[2] if len(args) > 2 else {}
    with pytest.raises(error, match=text):
        quantize(model, *args[:2], **options)
    assert_unchanged(model, before)


def test_float32_models_and_lone_layers_are_told_what_to_do() -> None:
    with pytest.raises(LinearQuantValueError, match=r"2 x its weight is float32.*call model.half"):
        quantize(make(F32), A8W8Dynamic())
    with pytest.raises(LinearQuantValueError, match=r"put it in an nn\.Sequential"):
        quantize(nn.Linear(8, 8).half(), A8W8Dynamic())
    with torch.device("meta"):
        model = Net().half()
    with pytest.raises(LinearQuantValueError, match="its weight is on meta"):
        quantize(model, A8W8Dynamic())


@pytest.mark.parametrize(
    ("config", "dtype", "text"),
    [
        (A8W8Dynamic(), F16, "pertoken_scale"),
        (A4W4Dynamic(), F16, "dtype is int32; Atlas inference"),
        (A8W8Static(), BF16, "x is bfloat16; Atlas inference"),
    ],
)
def test_the_product_decides(config: Any, dtype: torch.dtype, text: str) -> None:
    lq_graph.set_product("310P")
    try:
        with pytest.raises(LinearQuantValueError, match=text):
            run(make(dtype), config, data(dtype=dtype))
        run(make(), A8W8Static())
    finally:
        lq_graph.set_product(None)
