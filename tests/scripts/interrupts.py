"""Signals and exceptions in Python that the library calls: `interrupts.py FUNCTION`."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch


def sent(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


SIGNALS = [sent(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]


def in_the_middle() -> None:
    """Each signal, in each of the three places where Python is called from C++."""
    import torchair

    from cann_host import aclnn, runtime
    from cann_host.graph.compiled import CompiledGraph

    def ends(*_: object) -> None:
        raise SystemExit(3)

    def late(*_: object) -> None:
        raise TimeoutError("now")

    # torchair's own handlers ignore a Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, ends)
    signal.signal(signal.SIGALRM, late)
    x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
    compiled = torch.compile(
        lambda t: y.copy_(t + 1), backend=torchair.get_npu_backend(), dynamic=False
    )
    compiled(x)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y.add_(x)
    happens: list[Callable[[], None]] = []

    def hook(function: Any) -> Any:
        def hooked(*arguments: Any) -> Any:
            if happens:
                happens.pop()()
            return function(*arguments)

        return hooked

    def replay() -> None:
        graph.replay()
        torch.npu.synchronize()

    copy = aclnn.OPERATORS["aclnnInplaceCopy"]
    aclnn.OPERATORS["aclnnInplaceCopy"] = replace(copy, compute=hook(copy.compute))
    CompiledGraph.run = hook(CompiledGraph.run)  # type: ignore[method-assign]
    works = runtime.current().captures.works
    works.update((n, hook(work)) for n, work in list(works.items()))
    called: dict[str, Callable[[], object]] = {
        "operator": lambda: y.copy_(x),
        "graph": lambda: compiled(x),
        "replay": replay,
    }
    for name, call in called.items():
        for happening in SIGNALS:
            for _ in range(3):
                y.zero_()
                happens.append(happening)
                try:
                    call()
                    print("nothing")
                except BaseException as error:
                    said = f"{type(error).__name__} {error}".split("\n")[0].strip()
                    print(name, said, y.sum().item())


def exceptions() -> None:
    from cann_host import aclnn

    x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
    copy = aclnn.OPERATORS["aclnnInplaceCopy"]

    def forever(*_: object) -> None:
        while True:  # the first Ctrl-C waits for this to end, the second does not
            os.kill(os.getpid(), signal.SIGINT)

    def raises(error: BaseException) -> Callable[..., None]:
        def function(*_: object) -> None:
            raise error

        return function

    for function in (raises(SystemExit(4)), raises(GeneratorExit("x")), forever):
        aclnn.OPERATORS["aclnnInplaceCopy"] = replace(copy, compute=function)
        try:
            try:
                y.copy_(x)
            except RuntimeError as error:
                print("was interrupted by" in str(error))
            print("nothing")
        except BaseException as error:
            print(repr(error), repr(error.__context__)[:12])
        aclnn.OPERATORS["aclnnInplaceCopy"] = copy
        y.copy_(x)
    print(y.sum().item())


def anywhere() -> None:
    """An interrupt after a random time, 400 times."""
    x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    draw, seen = random.Random(1), []
    for _ in range(400):
        try:
            end = time.monotonic() + 30
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + draw.random() * 4e-4)
            while time.monotonic() < end:
                y.copy_(x)
            seen.append("lost")
        except KeyboardInterrupt:
            seen.append("seen")
        except RuntimeError as error:
            seen.append(str(error))
    print(seen.count("seen"), {text for text in seen if text != "seen"} or "")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
