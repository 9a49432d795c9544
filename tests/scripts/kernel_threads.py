"""The CPU kernel's threads, forks, and calls from many threads: `kernel_threads.py FUNCTION`."""

import os
import signal
import sys
import threading

import torch

import lq_graph
from lq_graph import kernels
from lq_graph.kernels import library


def counts() -> None:
    """How many threads calls start, alone and beside torch's."""

    def count() -> int:
        return len(os.listdir("/proc/self/task"))

    x = torch.ones(64, 1024, dtype=torch.int8)
    torch.set_num_threads(1)
    before = count()
    lq_graph.linear_quant(x, x, torch.ones(1))
    alone = count()
    torch.set_num_threads(2)
    torch.ones(10**7).add(1)
    torchs = count()
    for _ in range(5):
        lq_graph.linear_quant(x, x, torch.ones(1))
    print(alone - before, count() - torchs)


class Products:
    """Some products, and what they are."""

    def __init__(self) -> None:
        self.made = []
        for m, k, n in ((1, 4096, 512), (64, 512, 700), (300, 2052, 65)):
            x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
            w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
            self.made.append((x, w, (x.double() @ w.double().t()).to(torch.int32).numpy()))

    def check(self) -> None:
        for x, w, want in self.made:
            got = kernels.quant_matmul(x, w, torch.ones(1), output_dtype=torch.int32)
            assert (got.numpy() == want).all()


def exact(threads: str, more: str = "") -> None:
    """Exact with so many threads; and, if asked for more, in a fork and from 12 threads at once."""
    assert library.loaded()
    torch.set_num_threads(int(threads))
    products = Products()
    products.check()
    if more:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            products.check()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        products.check()

        def again() -> None:
            for _ in range(3):
                products.check()
                torch.set_num_threads(torch.get_num_threads() % 5 + 1)

        workers = [threading.Thread(target=again) for _ in range(12)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    print("done")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
