"""Locks and signals of lq_graph, without torch_npu: `locks.py FUNCTION [ARGUMENTS]`."""

import importlib
import os
import signal
import sys
import threading


def fork(module: str, name: str) -> None:
    """Exits with 0 if a lock that another thread holds is free in a forked child."""
    lock = getattr(importlib.import_module(module), name)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    if not (child := os.fork()):
        os._exit(0 if lock.acquire(timeout=5) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.set()
    thread.join()
    sys.exit(code)


def ctrl_c(inside: str) -> None:
    """Ctrl-C where the default action, the end of the process, is its handler."""
    from lq_graph.modules.transaction import uninterrupted

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with uninterrupted() as deliver:
        signal.raise_signal(signal.SIGINT)
        print("waited", flush=True)
        if inside == "True":
            deliver()
            print("not ended", flush=True)
    print("not ended", flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
