"""Captured graphs: `captures.py FUNCTION [ARGUMENTS]`."""

import gc
import sys

import torch
import torch_npu
from torch import Tensor


def two_streams() -> None:
    a, b, c = (torch.full((4,), float(i), device="npu") for i in range(3))
    side = torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        main = torch.npu.current_stream()
        b.copy_(a)
        side.wait_stream(main)
        with torch.npu.stream(side):
            c.copy_(b)
        main.wait_stream(side)
    print(b.tolist()[0], c.tolist()[0])  # only captured
    for value in (5.0, 6.0):
        a.fill_(value)
        graph.replay()
        torch.npu.synchronize()
        print(b.tolist()[0], c.tolist()[0])
    other = torch.npu.NPUGraph()
    try:
        with torch.npu.graph(other):
            b.copy_(a)
            b.cpu()  # waits for what is only being captured
    except RuntimeError:
        print("refused")
    print(int(a.sum()))


def compute(x: Tensor, w: Tensor, seen: Tensor, out: Tensor) -> list[Tensor]:
    h = torch.relu(x.t() @ w + 1.5) * 2
    peak, at = h.max(dim=1)
    seen.add_(h.sum(0))  # in place
    torch.add(h, 1, out=out)
    more = torch._foreach_mul([h, peak], 3.0)
    like = torch.arange(3, device=x.device) + torch.ones(3, device=x.device)
    return [h, peak, at, h.softmax(-1), *more, like, h.view(-1)[2:] - 1, h.half()]


def tensors(device: str) -> list[Tensor]:
    shapes = (8, 4), (8, 3), (3,), (4, 3)
    sizes = [torch.Size(shape) for shape in shapes]
    return [torch.linspace(-1, 1, size.numel()).view(size).to(device) for size in sizes]


def ordinary_operators() -> None:
    from cann_host import runtime

    torch.manual_seed(0)
    on_npu, on_cpu = tensors("npu"), tensors("cpu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        got = compute(*on_npu)
    for scale in (1.0, -3.0, 0.5):
        on_npu[0].fill_(scale)
        on_cpu[0].fill_(scale)
        graph.replay()
        torch.npu.synchronize()
        want = compute(*on_cpu)
        for a, b in zip(got + on_npu, want + on_cpu, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.cpu(), b)
    held = len(runtime.current().captures.works)
    del graph
    with torch.npu.graph(torch.npu.NPUGraph()):
        on_npu[0].abs()
    print(held > 10, len(runtime.current().captures.works) <= 1)


def not_captured(*expressions: str) -> None:
    torch.npu.config.allow_internal_format = True
    x, small, one = (torch.ones(n, device="npu") for n in (4, 2, 1))
    blocks = torch_npu.npu_format_cast(torch.ones(32, 32, device="npu").half(), 29)
    names = {"torch": torch, "x": x, "small": small, "one": one, "blocks": blocks}
    for expression in expressions:
        try:
            with torch.npu.graph(torch.npu.NPUGraph()):
                eval(expression, names)
        except RuntimeError as error:
            print(str(error).replace("\n", " "))
        assert x.sum().item() == 4  # nothing is left of the capture


def memory_that_is_gone(statement: str) -> None:
    names = {name: torch.ones(1 << 24, device="npu") for name in ("big", "y")}
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        exec(statement, names)
    graph.replay()
    torch.npu.synchronize()
    print("replayed")
    del names["big"]
    gc.collect()
    torch.npu.empty_cache()
    try:
        graph.replay()
        torch.npu.synchronize()
    except RuntimeError as error:
        print(str(error).replace("\n", " "))
    print(names["y"][0].item() >= 1)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
