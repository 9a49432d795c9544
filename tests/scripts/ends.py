"""How a process can end: `ends.py WHAT`. All at the top, for names there outlive the program."""

import atexit
import os
import sys
import threading
import time

import torch
import torch_npu  # noqa: F401 - what has to end cleanly

what = sys.argv[1]
x = torch.ones(64, 64, device="npu")
stream, event = torch.npu.Stream(), torch.npu.Event(enable_timing=True)

if what.startswith("captured graph"):
    graph = torch.npu.NPUGraph()
    y = torch.empty_like(x)
    with torch.npu.graph(graph):
        y.copy_(x)
if what.startswith("compiled graph"):
    import torchair

    compiled = torch.compile(lambda t: t + 1, backend=torchair.get_npu_backend(), dynamic=False)
    compiled(x)


def work_for_a_while() -> None:
    for _ in range(2000):
        x.clone().copy_(x)


def work_for_ever() -> None:
    while True:
        x.clone().copy_(x)


class Holder:
    def __init__(self) -> None:
        self.tensor, self.cycle = x, self

    def __del__(self) -> None:
        self.tensor.add_(1)


if what == "tensors gone first":
    del x, stream, event
elif what == "work on a stream":
    with torch.npu.stream(stream):
        x.add_(1)
        event.record()
elif what == "captured graph, replayed":
    graph.replay()
elif what == "captured graph, gone after its tensors":
    del x, y
    del graph
elif what == "captured graph of ordinary operators":
    z = torch.npu.NPUGraph()
    with torch.npu.graph(z):
        y.add_(x.sum())
    z.replay()
    atexit.register(z.replay)
elif what == "capture left open":
    graph = torch.npu.NPUGraph()
    with torch.npu.stream(stream):
        graph.capture_begin()
elif what == "compiled graph, gone before":
    del compiled
    torch._dynamo.reset()
elif what == "sys.exit":
    sys.exit(3)
elif what == "os._exit":
    os._exit(4)
elif what == "exception":
    raise ValueError("on purpose")
elif what == "KeyboardInterrupt":
    raise KeyboardInterrupt
elif what == "KeyboardInterrupt while a thread works":
    threading.Thread(target=work_for_a_while).start()
    os.kill(os.getpid(), 2)
    time.sleep(9)
elif what == "sys.exit and exceptions in threads":
    for last in (sys.exit, lambda: x.view(7)):

        def work() -> None:
            with torch.npu.stream(torch.npu.Stream()):
                x.add_(1)
                last()  # noqa: B023 - the thread ends before the next round

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
elif what == "use at exit":
    atexit.register(lambda: print(x.sum().item()))
elif what == "use at exit, made there":
    atexit.register(lambda: torch.ones(2, device="npu").cpu())
elif what == "daemon thread at work":
    threading.Thread(target=work_for_ever, daemon=True).start()
    time.sleep(0.3)
elif what == "finalizer":
    holder = Holder()
elif what == "empty cache":
    del x
    torch.npu.empty_cache()
elif what == "emptied twice":
    atexit.register(torch.npu.synchronize)
    torch.npu.empty_cache()
else:
    assert what in ("live tensors", "captured graph", "compiled graph"), what
