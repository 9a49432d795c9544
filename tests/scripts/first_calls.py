"""The first call of an operator imports its kernel. Here it is made in every situation it may come
in, each in a forked process, in which no kernel is loaded yet."""

from __future__ import annotations

import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable

import pytest
import torch
import torch._dynamo  # once, for every process
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lq_graph

OP = torch.ops.lq_graph.linear_quant.default
QUANT = torch.ops.lq_graph.dynamic_quant.default
X1 = (torch.arange(48, dtype=torch.int32) % 17 - 8).to(torch.int8).reshape(3, 16)
WEIGHT = (torch.arange(128, dtype=torch.int32) % 13 - 6).to(torch.int8).reshape(8, 16)
SCALE = torch.ones(8)
PRODUCT = X1.int() @ WEIGHT.int().T
X = torch.arange(48, dtype=torch.float32).reshape(3, 16) - 20
PEAKS = X.abs().amax(-1) / 127  # whole numbers: bfloat16 holds them


def call(x1: Tensor = X1) -> Tensor:
    out: Tensor = OP(x1, WEIGHT, SCALE, output_dtype=torch.int32)
    return out


def eager() -> None:
    assert torch.equal(call(), PRODUCT)


def by_the_public_name() -> None:
    out = lq_graph.linear_quant(X1, WEIGHT, SCALE, output_dtype=torch.int32)
    assert torch.equal(out, PRODUCT)


def from_many_threads() -> None:
    found: list[bool] = []
    start = threading.Barrier(8)

    def run() -> None:
        start.wait()
        found.append(torch.equal(call(), PRODUCT))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def in_inference_mode() -> None:
    with torch.inference_mode():
        eager()
    eager()


def meta() -> None:
    out = OP(X1.to("meta"), WEIGHT.to("meta"), SCALE.to("meta"), output_dtype=torch.int32)
    assert (out.shape, out.device.type) == ((3, 8), "meta")
    eager()


def under_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(t) for t in (X1, WEIGHT, SCALE)]
        assert OP(*given, output_dtype=torch.int32).shape == (3, 8)
    eager()  # nothing was made a fake tensor that lasts


def with_symbolic_sizes() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x1, weight, scale = (mode.from_tensor(t) for t in (X1, WEIGHT, SCALE))
        torch._dynamo.maybe_mark_dynamic(x1, 0)
        assert OP(x1, weight, scale, output_dtype=torch.int32).shape[1] == 8
    eager()


def in_vmap() -> None:
    assert torch.equal(torch.vmap(call)(X1[:, None])[:, 0], PRODUCT)


def in_grad() -> None:
    x = X.to(torch.float16)
    with pytest.raises(TypeError, match="quantization has no derivative"):
        torch.func.grad(lambda a: QUANT(a)[1].sum())(x)


def with_an_input_that_requires_grad() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, scale = QUANT(X.to(torch.bfloat16).requires_grad_())
    assert torch.equal(scale, PEAKS) and not scale.requires_grad
    assert ["no gradient passes" in str(one.message) for one in caught] == [True]


def under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, scale = QUANT(X)
    assert torch.equal(scale, PEAKS)


def refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        OP(X1, WEIGHT[:, :8], SCALE)


def compiled() -> None:
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(X1), PRODUCT)


def compiled_by_the_public_name() -> None:
    def run(x1: Tensor) -> Tensor:
        return lq_graph.linear_quant(x1, WEIGHT, SCALE, output_dtype=torch.int32)

    for dynamic in (False, True):
        torch._dynamo.reset()
        out = torch.compile(run, backend="eager", fullgraph=True, dynamic=dynamic)(X1)
        assert torch.equal(out, PRODUCT)


def compiled_around_a_name_not_read_yet() -> None:
    def run(x1: Tensor) -> Tensor:
        words = lq_graph.pack_int4(x1.clamp(-8, 7))
        return lq_graph.unpack_int4(words)

    assert torch.equal(torch.compile(run, backend="eager")(X1), X1.clamp(-8, 7))


def exported() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = (torch.nn.Buffer(t) for t in (WEIGHT, SCALE))

        def forward(self, x1: Tensor) -> Tensor:
            out: Tensor = OP(x1, self.weight, self.scale, output_dtype=torch.int32)
            return out

    program = torch.export.export(Model(), (X1,))
    assert torch.equal(program.module()(X1), PRODUCT)


SITUATIONS: tuple[Callable[[], None], ...] = (
    eager,
    by_the_public_name,
    from_many_threads,
    in_inference_mode,
    meta,
    under_fake_tensors,
    with_symbolic_sizes,
    in_vmap,
    in_grad,
    with_an_input_that_requires_grad,
    under_autocast,
    refused,
    compiled,
    compiled_by_the_public_name,
    compiled_around_a_name_not_read_yet,
    exported,
)


def in_a_process(situation: Callable[[], None]) -> bool:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    status = 1
    try:
        situation()
        status = 0
    except BaseException:
        print(f"---- {situation.__name__} ----", file=sys.stderr)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    loaded = {name for name in sys.modules if name.partition(".")[0] == "lq_graph"}
    assert loaded == {f"lq_graph{m}" for m in ("", "._import_torch", ".errors", ".ops")}, loaded
    failed = [s.__name__ for s in SITUATIONS if not in_a_process(s)]
    assert not failed, failed
    print(len(SITUATIONS), "situations")


if __name__ == "__main__":
    main()
