"""cann_host as a runtime: devices, memory, streams, captured graphs, workers, the profiler, the end
of the process. Each script runs in a process of its own, on the real torch_npu."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cann_host
from cann_host import _native
from support.compiler import COMPILER, needs_compiler
from support.processes import run, start

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


# ---- options ----

BAD_OPTIONS = [
    (("--soc", "chip"), "soc is 'chip'; a chip is Ascend910B1 to B4"),
    (("--soc", "Ascend910B9"), "soc is 'Ascend910B9'; a chip is"),  # torch_npu has no such chip
    (("--soc", "Ascend910A"), "soc is 'Ascend910A'; a chip is"),  # no rules for it here
    (("--cann-version", "new"), "cann_version is 'new'; a CANN version is like 9.1.0 or 8.2.RC1"),
    (("--devices", "0"), "devices is '0'; it must be a number from 1 to 64"),
    (("--devices", "65"), "devices is '65'; it must be a number from 1 to 64"),
    (("--memory", "much"), "memory is 'much'; a size is like 8GiB, 512MiB or 1073741824"),
    (("--memory", "0"), "memory is '0'; a size is like"),
    (("--streams", "fast"), "streams is 'fast'; it must be now or late"),
    (("--overruns", "stop"), "overruns is 'stop'; it must be warn or refuse"),
    (("--fail", "aclrtMalloc"), "fail has 'aclrtMalloc'; a fault is SYMBOL:CODE or SYMBOL:CODE@N"),
    (("--fail", "aclrtMalloc:0"), "fail has 'aclrtMalloc:0'; a fault is"),
    (("--fail", "aclrtMalloc:1@0"), "fail has 'aclrtMalloc:1@0'; a fault is"),
    (("--fail", "aclrtMalloc:EZ9999"), "aclrtMalloc returns a number, such as 161002"),
]


@pytest.mark.parametrize(("options", "text"), BAD_OPTIONS, ids=lambda v: " ".join(v)[:30])
def test_a_wrong_option_is_one_sentence(options: tuple[str, ...], text: str, tmp_path) -> None:
    done = start(tmp_path, "print('ran')", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cann_host: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wrong_variable_is_called_by_its_name(tmp_path) -> None:
    done = start(tmp_path, "", CANN_HOST_DEVICES="two")
    assert "CANN_HOST_DEVICES is 'two'; it must be a number from 1 to 64" in done.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("8GiB", 8 << 30), ("512MiB", 512 << 20), ("1.5G", 3 << 29), ("64 kb", 64 << 10), ("77", 77)],
)
def test_sizes(given: str, wanted: int) -> None:
    from cann_host.options import Options

    assert Options.of(memory=given).memory == wanted


@pytest.mark.parametrize("version", ["8.1.RC1", "8.2.RC1", "8.5.0", "9.0.0.alpha1", "9.1.0"])
def test_cann_version(version: str, tmp_path) -> None:
    script = """
        import torch_npu, cann_host
        from torch_npu.npu.utils import get_cann_version, _is_gte_cann_version
        print(get_cann_version(), cann_host.info()["cann_version"], _is_gte_cann_version("8.3.RC1"))
    """
    newer = version >= "8.5"
    assert run(tmp_path, script, "--cann-version", version) == f"{version} {version} {newer}\n"


SOCS = (
    "Ascend910B1",
    "Ascend910B4-1",
    "Ascend910_9363",
    "Ascend910_9391",
    "Ascend310P3",
    "Ascend310P7",
    "Ascend950PR_9579",
)


@pytest.mark.parametrize("soc", SOCS)
def test_socs(soc: str, tmp_path) -> None:
    script = """
        import torch
        # ND to FRACTAL_NZ and back: through aclnn, and through aclop on 310P
        import torch_npu
        torch.npu.config.allow_internal_format = True
        x = torch.arange(64 * 48).to(torch.int8).view(64, 48).npu()
        cast = torch_npu.npu_format_cast(x, 29)
        same = torch.equal(cast.cpu(), x.cpu())
        print(torch.npu.get_device_name(), torch_npu.get_npu_format(cast).name, same)
    """
    assert run(tmp_path, script, "--soc", soc) == f"{soc} FRACTAL_NZ True\n"


# ---- devices and memory ----


def test_several_devices(tmp_path) -> None:
    script = """
        import torch
        print(torch.npu.device_count())
        a = torch.full((3,), 2.0, device="npu:1")
        b = a.to("npu:0")
        print(a.device, (a * a).device, b.device, torch.equal(a.cpu(), b.cpu()))
        with torch.npu.device(1):
            print(torch.ones(1, device="npu").device, torch.ones(1).npu().device)
        torch.npu.set_device(2)
        print(torch.zeros(1, device="npu").device, torch.npu.current_stream().device)
        print([torch.npu.memory_allocated(i) > 0 for i in range(3)])
        try:
            torch.ones(1, device="npu:3")
        except RuntimeError as error:
            print("no npu:3")
    """
    assert run(tmp_path, script, "--devices", "3").splitlines() == [
        "3",
        "npu:1 npu:1 npu:0 True",
        "npu:1 npu:1",
        "npu:2 npu:2",
        "[True, True, False]",
        "no npu:3",
    ]


def test_a_memory_limit_is_a_real_out_of_memory(tmp_path) -> None:
    script = """
        import torch
        GiB = 1 << 30
        def allocate(size, device="npu:0"):
            return torch.empty(size, dtype=torch.int8, device=device)
        print(torch.npu.get_device_properties(0).total_memory == 4 * GiB)
        held = allocate(3 * GiB)
        free, total = torch.npu.mem_get_info()
        print(total == 4 * GiB, free <= GiB, torch.npu.memory_allocated() >= 3 * GiB)
        try:
            allocate(2 * GiB)
        except torch.OutOfMemoryError as error:
            print("Tried to allocate 2.00 GiB" in str(error), "4.00 GiB total" in str(error))
        other = allocate(3 * GiB, "npu:1")  # each device has its own
        del held
        print(allocate(3 * GiB).numel() == 3 * GiB)  # what was freed can be had again
        print(torch.npu.max_memory_allocated() < 4 * GiB)
    """
    output = run(tmp_path, script, "--memory", "4GiB", "--devices", "2")
    assert output.splitlines() == ["True", "True True True", "True True", "True", "True"]


def test_pinned_memory(tmp_path) -> None:
    script = """
        import torch
        x = torch.arange(8.0).pin_memory()
        y = x.to("npu", non_blocking=True)
        torch.npu.synchronize()
        print(x.is_pinned(), torch.ones(1).is_pinned(), torch.equal(y.cpu(), x))
    """
    assert run(tmp_path, script) == "True False True\n"


def test_a_seed_decides_what_is_drawn(tmp_path) -> None:
    script = """
        import torch
        def draw():
            d = "npu"
            one = torch.ones(8, device=d)
            return [t.tolist() for t in (
                torch.randn(2, device=d), torch.rand(2, device=d), torch.randperm(5, device=d),
                torch.randint(9, (2,), device=d), torch.bernoulli(one / 2), one.clone().normal_(),
                torch.nn.functional.dropout(one), torch.multinomial(one, 3))]
        torch.npu.manual_seed(3); first = draw(); second = draw()
        torch.npu.manual_seed(3); again = draw()
        before = torch.random.get_rng_state(); draw(); after = torch.random.get_rng_state()
        print(first == again, first != second, torch.equal(before, after))
    """
    assert run(tmp_path, script) == "True True True\n"


# ---- streams, events, captured graphs ----

FORGOTTEN_WAIT = """
    import torch
    source = torch.ones(1 << 16).pin_memory()
    result = torch.zeros(1 << 16).pin_memory()
    x = torch.zeros(1 << 16, device="npu")
    torch.npu.synchronize()
    side, main = torch.npu.Stream(), torch.npu.current_stream()
    with torch.npu.stream(side):
        x.copy_(source, non_blocking=True)
    if WAITS:
        main.wait_stream(side)
    result.copy_(x, non_blocking=True)
    before = int(result.sum())
    main.synchronize()
    print(before, int(result.sum()))
"""
WAITS = [
    # streams, whether the program waits, what it reads before and after it synchronizes
    ("now", False, "65536 65536"),
    ("now", True, "65536 65536"),
    ("late", False, "0 0"),  # the mistake shows
    ("late", True, "0 65536"),
]


@pytest.mark.parametrize(("streams", "waits", "reads"), WAITS)
def test_late_streams_show_a_wait_that_was_forgotten(streams, waits, reads, tmp_path) -> None:
    script = FORGOTTEN_WAIT.replace("WAITS", str(waits))
    assert run(tmp_path, script, "--streams", streams) == reads + "\n"


@pytest.mark.parametrize("streams", ["now", "late"])
def test_events(streams: str, tmp_path) -> None:
    script = """
        import time, torch
        first, last = (torch.npu.Event(enable_timing=True) for _ in range(2))
        stream = torch.npu.Stream()
        print(first.query())  # never recorded
        with torch.npu.stream(stream):
            first.record()
            x = torch.ones(256, 256, device="npu")
            y = (x @ x).sum()
            last.record()
        stream.wait_event(last)
        last.synchronize()
        stream.synchronize()
        print(last.query(), stream.query(), y.item(), first.elapsed_time(last) > 0)
        for _ in range(100):
            last.record(stream)
        while not last.query():  # asking gets there
            pass
        print("done")
    """
    assert run(tmp_path, script, "--streams", streams).splitlines() == [
        "True",
        f"True True {256.0**3} True",
        "done",
    ]


def test_a_failure_of_late_work_is_told_to_the_one_who_waits(tmp_path) -> None:
    script = """
        import torch, cann_host
        x, y = torch.ones(4, device="npu"), torch.zeros(4, device="npu")
        stream = torch.npu.Stream()
        torch.npu.synchronize()
        from dataclasses import replace
        from cann_host import aclnn
        copy = aclnn.OPERATORS["aclnnInplaceCopy"]
        def broken(*_):
            raise aclnn.RefusedError("broken on purpose")
        aclnn.OPERATORS["aclnnInplaceCopy"] = replace(copy, compute=broken)
        with torch.npu.stream(stream):
            y.copy_(x)
        print("launched")
        try:
            stream.synchronize()
        except RuntimeError as error:
            print("told")
        aclnn.OPERATORS["aclnnInplaceCopy"] = copy
        with torch.npu.stream(stream):
            y.copy_(x)
        stream.synchronize()
        print(y.tolist())
    """
    output = run(tmp_path, script, "--streams", "late")
    assert output.splitlines() == ["launched", "told", "[1.0, 1.0, 1.0, 1.0]"]


@pytest.mark.parametrize("streams", ["now", "late"])
def test_captured_graph_over_two_streams(streams: str, tmp_path) -> None:
    script = """
        import torch
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
        except RuntimeError as error:
            print("refused")
        print(int(a.sum()))
    """
    output = run(tmp_path, script, "--streams", streams)
    assert output.splitlines() == ["1.0 2.0", "5.0 5.0", "6.0 6.0", "refused", "24"]


@pytest.mark.parametrize("streams", ["now", "late"])
def test_ordinary_operators_are_captured(streams: str, tmp_path) -> None:
    script = """
        import torch
        torch.manual_seed(0)
        def compute(x, w, seen, out):
            h = torch.relu(x.t() @ w + 1.5) * 2
            peak, at = h.max(dim=1)
            seen.add_(h.sum(0))  # in place
            torch.add(h, 1, out=out)
            more = torch._foreach_mul([h, peak], 3.0)
            like = torch.arange(3, device=x.device) + torch.ones(3, device=x.device)
            return [h, peak, at, h.softmax(-1), *more, like, h.view(-1)[2:] - 1, h.half()]
        def tensors(device):
            shapes = (8, 4), (8, 3), (3,), (4, 3)
            return [torch.linspace(-1, 1, a * b[0] if b else a).view(a, *b).to(device)
                    for a, *b in shapes]
        on_npu, on_cpu = tensors("npu"), tensors("cpu")
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            got = compute(*on_npu)
        for scale in (1.0, -3.0, 0.5):
            on_npu[0].fill_(scale), on_cpu[0].fill_(scale)
            graph.replay()
            torch.npu.synchronize()
            want = compute(*on_cpu)
            for a, b in zip(got + on_npu, want + on_cpu, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a.cpu(), b)
        from cann_host import runtime
        captures = runtime.current().captures
        held = len(captures.works)
        del graph
        with torch.npu.graph(torch.npu.NPUGraph()):
            on_npu[0].abs()
        print(held > 10, len(captures.works) <= 1)
    """
    assert run(tmp_path, script, "--streams", streams) == "True True\n"


NOT_CAPTURED = {
    "torch.nonzero(x)": "aten.nonzero.default is not captured: the shape of its result depends on",
    "torch.randn_like(x)": "draws random numbers, which is not captured",
    "torch.add(x, 1, out=small)": "would resize out in a captured graph",
    "blocks.abs()": "of an internal format is not captured here",
    "one.item()": "the stream is being captured; nothing can wait for it",
}


def test_what_is_not_captured_says_why(tmp_path) -> None:
    script = """
        import torch, torch_npu
        torch.npu.config.allow_internal_format = True
        x, small, one = (torch.ones(n, device="npu") for n in (4, 2, 1))
        blocks = torch_npu.npu_format_cast(torch.ones(32, 32, device="npu").half(), 29)
        for what in WHATS:
            try:
                with torch.npu.graph(torch.npu.NPUGraph()):
                    eval(what)
            except RuntimeError as error:
                print(str(error).replace("\\n", " "))
            assert x.sum().item() == 4  # nothing is left of the capture
    """
    output = run(tmp_path, script.replace("WHATS", repr(list(NOT_CAPTURED)))).splitlines()
    for line, text in zip(output, NOT_CAPTURED.values(), strict=True):
        assert text in line


GONE = {
    # what the graph does with memory that is given back before its replay: what is told
    "y.copy_(big)": "aclnnInplaceCopy: 67108864 bytes at",
    "y.add_(big)": "aten.add_.Tensor: a tensor that the graph uses is no longer allocated",
    "big.zero_()": "no longer allocated",
}


@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize("streams", ["now", "late"])
def test_a_replay_on_memory_that_is_gone_is_an_error(what: str, streams: str, tmp_path) -> None:
    script = """
        import gc, torch
        big, y = (torch.ones(1 << 24, device="npu") for _ in range(2))
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            WHAT
        graph.replay()
        torch.npu.synchronize()
        print("replayed")
        del big
        gc.collect()
        torch.npu.empty_cache()
        try:
            graph.replay()
            torch.npu.synchronize()
        except RuntimeError as error:
            print(str(error).replace("\\n", " "))
        print(y[0].item() >= 1)
    """
    output = run(tmp_path, script.replace("WHAT", what), "--streams", streams).splitlines()
    assert (output[0], output[-1]) == ("replayed", "True")
    assert GONE[what] in output[1]


def test_threads(tmp_path) -> None:
    script = """
        import threading, torch
        results = [None] * 8
        def work(i):
            stream = torch.npu.Stream()
            with torch.npu.stream(stream):
                x = torch.full((32, 32), float(i), device="npu")
                for _ in range(20):
                    y = x.clone() + x
            stream.synchronize()
            results[i] = y.sum().item()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(results == [2.0 * i * 1024 for i in range(8)])
    """
    for streams in ("now", "late"):
        assert run(tmp_path, script, "--streams", streams) == "True\n"


def test_memory_stays_flat(tmp_path) -> None:
    """benchmarks/soak.py, shorter, and that it would tell."""
    soak = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    command = [sys.executable, "-m", "cann_host", str(soak), "--calls", "4000", "--runs", "400"]
    for bound, status, word in (("1", 0, "flat"), ("-1000", 1, "NOT FLAT")):
        done = subprocess.run([*command, "--bound", bound], capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1].startswith(word)
        command[-3:] = ["10", "--runs", "10"]


# ---- training, workers, profiler ----


def test_a_training_step_on_fallback_operators(tmp_path) -> None:
    script = """
        import torch
        from torch import nn
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Flatten(), nn.Linear(196, 5))
        x, target = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
        def step(model, x, target):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            return [p.detach().cpu() for p in model.parameters()]
        import copy
        twin = copy.deepcopy(model)
        for a, b in zip(step(model.npu(), x.npu(), target.npu()), step(twin, x, target)):
            torch.testing.assert_close(a, b)
        print("equal")
    """
    assert run(tmp_path, script) == "equal\n"


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_data_loader_workers(context: str, tmp_path) -> None:
    script = f"""
        import torch
        from torch.utils.data import DataLoader, Dataset
        class Numbers(Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, i):
                return torch.full((2,), float(i))
        if __name__ == "__main__":
            torch.ones(1, device="npu")  # the parent has used the device
            loader = DataLoader(Numbers(), 2, num_workers=2, pin_memory=True,
                                multiprocessing_context="{context}")
            print([int(x.to("npu", non_blocking=True).sum()) for x in loader])
    """
    assert run(tmp_path, script) == "[2, 10, 18, 26]\n"


def test_a_spawned_process_has_the_same_options(tmp_path) -> None:
    script = """
        import multiprocessing
        def work(queue):
            import cann_host, torch
            there = torch.ones(2).npu().tolist()
            queue.put((cann_host.info()["soc"], torch.npu.device_count(), there))
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=work, args=(queue,))
            process.start()
            print(queue.get())
            process.join()
            print(process.exitcode)
    """
    output = run(tmp_path, script, "--soc", "Ascend910B4", "--devices", "2")
    assert output.splitlines() == ["('Ascend910B4', 2, [1.0, 1.0])", "0"]


def test_torch_profiler(tmp_path) -> None:
    script = """
        import torch
        with torch.profiler.profile() as profile:
            torch.ones(4, device="npu") + torch.ones(4, device="npu")
        print("aten::add" in {event.key for event in profile.key_averages()})
    """
    assert "True\n" in run(tmp_path, script)


# ---- signals and exceptions in Python that the library calls ----

# where Python is called from C++: what the program does
CALLED = {
    "operator": "y.copy_(x)",
    "graph": "compiled(x)",
    "replay": "graph.replay(); torch.npu.synchronize()",
}
INTERRUPTED = [
    # what happens in there: what the program sees
    ("os.kill(os.getpid(), signal.SIGINT)", "KeyboardInterrupt"),
    ("os.kill(os.getpid(), signal.SIGTERM)", "SystemExit 3"),
    ("os.kill(os.getpid(), signal.SIGALRM)", "TimeoutError now"),
]


def test_an_interrupt_is_the_programs_and_the_work_is_done(tmp_path) -> None:
    script = f"""
        import os, signal, torch, torchair
        from dataclasses import replace
        from cann_host import aclnn, runtime
        from cann_host.graph import engine
        captures = runtime.current().captures
        def ends(*_):
            raise SystemExit(3)
        def late(*_):
            raise TimeoutError("now")
        # torchair's own handlers ignore a Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, ends)
        signal.signal(signal.SIGALRM, late)
        x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
        compiled = torch.compile(lambda t: y.copy_(t + 1), backend=torchair.get_npu_backend(),
                                 dynamic=False)
        compiled(x)
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            y.add_(x)
        happens = ""
        def hook(function):
            def hooked(*arguments):
                global happens
                what, happens = happens, ""
                exec(what)
                return function(*arguments)
            return hooked
        copy = aclnn.OPERATORS["aclnnInplaceCopy"]
        aclnn.OPERATORS["aclnnInplaceCopy"] = replace(copy, compute=hook(copy.compute))
        engine._read = hook(engine._read)
        captures.works.update((n, hook(work)) for n, work in list(captures.works.items()))
        for name, call in {CALLED!r}.items():
            for what, _ in {INTERRUPTED!r}:
                for repeat in range(3):
                    y.zero_()
                    happens = what
                    try:
                        exec(call)
                        print("nothing")
                    except BaseException as error:
                        said = f"{{type(error).__name__}} {{error}}".split("\\n")[0].strip()
                        print(name, said, y.sum().item())
    """
    sums = {"operator": 8.0, "graph": 16.0, "replay": 8.0}
    assert run(tmp_path, script).splitlines() == [
        f"{name} {error} {sums[name]}"
        for name in CALLED
        for _, error in INTERRUPTED
        for _ in range(3)
    ]


def test_an_exception_that_is_none_of_errors_comes_out_as_it_is(tmp_path) -> None:
    """Raised in there, not by a signal: the call fails, and the exception follows at once."""
    script = """
        import os, signal, torch
        from dataclasses import replace
        from cann_host import aclnn
        x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
        copy = aclnn.OPERATORS["aclnnInplaceCopy"]
        def forever(*_):
            while True:  # the first Ctrl-C waits for this to end, the second does not
                os.kill(os.getpid(), signal.SIGINT)
        def raises(error):
            def function(*_):
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
    """
    lines = [line for line in run(tmp_path, script).splitlines() if line != "True"]
    assert lines == [
        "SystemExit(4) RuntimeError",
        "GeneratorExit('x') RuntimeError",
        "KeyboardInterrupt() RuntimeError",
        "8.0",
    ]


def test_no_interrupt_is_lost_wherever_it_comes(tmp_path) -> None:
    script = """
        import random, signal, time, torch
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
    """
    assert run(tmp_path, script).strip() == "400"


# ---- forks ----

# Threads that are in the library all the time, without the interpreter lock.
TURNS = """
    #include <cstddef>
    #include <thread>
    extern "C" void begin(int (*make)(void**, size_t, int), int (*end)(void*), volatile int* stop) {
      std::thread([=] {
        while (!*stop) {
          void* made = nullptr;
          make(&made, 64, 0);
          end(made);
          end(nullptr);  // keeps an error's text
        }
      }).detach();
    }
"""
BUSY = """
    import ctypes, os, select, sys, torch, cann_host
    lib = cann_host.runtime.current().library
    turns = ctypes.CDLL(os.environ["TURNS"])
    x = torch.ones(64, 64, device="npu")
    if QUEUE:
        x.clone()  # starts the queue
    pairs = [(lib.aclrtMalloc, lib.aclrtFree), (lib.aclrtCreateStream, lib.aclrtDestroyStream),
             (lib.aclrtCreateEventWithFlag, lib.aclrtDestroyEvent)]
    stop = ctypes.c_int()
    for make, end in pairs:
        turns.begin(make, end, ctypes.byref(stop))
    outcomes = []
    for _ in range(12):
        mine, its = os.pipe()
        child = os.fork()
        if not child:
            try:
                for make, end in pairs:
                    made = ctypes.c_void_p()
                    make(ctypes.byref(made), ctypes.c_size_t(64), 0)
                    end(made)
                text = str(((x.clone() + 1) @ x).sum().item())
            except RuntimeError as error:
                text = str(error)
            os.write(its, text.encode())
            os._exit(0)
        os.close(its)
        if not select.select([mine], [], [], 30)[0]:
            os.kill(child, 9)
            outcomes.append("hangs")
        else:
            outcomes.append(os.read(mine, 999).decode())
        os.waitpid(child, 0)
        os.close(mine)
    stop.value = 1
    print(set(outcomes), flush=True)
    os._exit(0)
"""


@needs_compiler
@pytest.mark.parametrize(
    ("queue", "streams"), [("0", "now"), ("0", "late"), ("1", "now"), ("2", "now")]
)
def test_a_child_forked_while_threads_are_in_the_library_goes_on(queue, streams, tmp_path) -> None:
    source, built = tmp_path / "turns.cpp", tmp_path / "turns.so"
    source.write_text(textwrap.dedent(TURNS))
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", "-pthread", str(source)]
    subprocess.run([*command, "-o", str(built)], check=True)
    script = BUSY.replace("QUEUE", queue)
    variables = {"TASK_QUEUE_ENABLE": queue, "TURNS": str(built)}
    output = run(tmp_path, script, "--streams", streams, **variables)
    assert output == "{'524288.0'}\n"


def test_a_child_forked_while_work_is_done_is_told_what_it_lacks(tmp_path) -> None:
    """Another thread does a stream's late work; in the child it stays undone."""
    script = """
        import os, threading, torch
        from dataclasses import replace
        from cann_host import aclnn
        x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
        torch.npu.synchronize()
        begun, forked = threading.Event(), threading.Event()
        copy = aclnn.OPERATORS["aclnnInplaceCopy"]
        def slow(*arguments):
            begun.set()
            forked.wait()
            copy.compute(*arguments)
        aclnn.OPERATORS["aclnnInplaceCopy"] = replace(copy, compute=slow)
        y.copy_(x)
        worker = threading.Thread(target=torch.npu.synchronize)
        worker.start()
        begun.wait()
        if not os.fork():
            for _ in range(2):
                try:
                    print("right" if y.sum().item() == 8 else "wrong")
                except RuntimeError as error:
                    print("told", flush=True)
            print(torch.ones(8, device="npu").sum().item(), flush=True)
            os._exit(0)
        os.wait()
        forked.set()
        worker.join()
        print(y.sum().item())
    """
    found = run(tmp_path, script, "--streams", "late").splitlines()
    assert "told" in found[0]
    assert found[-1] == "8.0"


# ---- torch_npu's task queue ----


@pytest.mark.parametrize("queue", ["1", "2"])
def test_launches_in_the_task_queue_need_no_interpreter_lock(queue: str, tmp_path) -> None:
    """torch_npu waits for its queue with the lock held, in torch.load onto the device say."""
    script = """
        import io, torch
        x = torch.randn(64, 64).npu()
        saved = io.BytesIO()
        torch.save({i: torch.full((32, 32), float(i)) for i in range(9)}, saved)
        right = []
        for _ in range(3):
            for _ in range(200):
                y = x.clone()  # waits in the queue
            saved.seek(0)
            loaded = torch.load(saved, map_location="npu")
            right += [loaded[i].sum().item() == 1024 * i for i in range(9)]
            for _ in range(200):
                y.copy_(x)
            storage = torch.UntypedStorage(64, device="npu")
            storage.copy_(torch.UntypedStorage(64))
            right.append(torch.equal(y.cpu(), x.cpu()))
        late = torch.empty(64, 64).pin_memory()
        late.copy_(x.clone(), non_blocking=True)
        torch.npu.synchronize()
        print(all(right), torch.equal(late, x.cpu()), torch.equal((x @ x).cpu(), x.cpu() @ x.cpu()))
    """
    assert run(tmp_path, script, TASK_QUEUE_ENABLE=queue) == "True True True\n"


QUEUE_FAILS = {
    # what fails: what the program is told at first
    "aclnnInplaceCopy:507015@3": "operator name is aclnnInplaceCopy",
    "aclnnInplaceCopyGetWorkspaceSize:161002@3": "",  # 1: at the call, 2: later
}


@pytest.mark.parametrize("fault", QUEUE_FAILS)
@pytest.mark.parametrize("queue", ["1", "2"])
def test_a_failure_in_the_task_queue_is_told_and_nothing_is_read_after_it(
    queue: str, fault: str, tmp_path
) -> None:
    """torch_npu drops what is launched after the failure it told."""
    script = f"""
        import torch, cann_host
        x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
        torch.npu.synchronize()
        told, read = [], []
        with cann_host.faults("{fault}"):
            for i in range(30):
                try:
                    y.copy_(x * (i + 1))
                    read.append(y.cpu()[0].item() == i + 1)
                except RuntimeError as error:
                    told.append(str(error))
        print(all(read), len(told) > 0, len(read) + len(told), told[0].replace("\\n", " "))
        print("to be trusted" in told[-1])
    """
    output = run(tmp_path, script, TASK_QUEUE_ENABLE=queue).splitlines()
    assert output[0].startswith("True True 30 ")
    if text := QUEUE_FAILS[fault]:
        assert text in output[0]
    at_the_call = queue == "1" and "GetWorkspaceSize" in fault
    assert output[1] == str(not at_the_call)


def test_what_an_operator_refuses_in_the_task_queue_is_told_to_who_waits(tmp_path) -> None:
    script = """
        import torch
        from dataclasses import replace
        from cann_host import aclnn
        x, y = torch.ones(8, device="npu"), torch.zeros(8, device="npu")
        copy = aclnn.OPERATORS["aclnnInplaceCopy"]
        def broken(*_):
            raise aclnn.RefusedError("broken on purpose")
        for broken_one in (replace(copy, check=broken), replace(copy, compute=broken)):
            torch.npu.synchronize()
            aclnn.OPERATORS["aclnnInplaceCopy"] = broken_one
            try:
                y.copy_(x)
                torch.npu.synchronize()
            except RuntimeError as error:
                print("broken on purpose (CANN error 161002, invalid parameter)" in str(error))
            aclnn.OPERATORS["aclnnInplaceCopy"] = copy
            y.zero_().copy_(x)
            print(y.sum().item())
    """
    for queue in ("1", "2"):
        assert run(tmp_path, script, TASK_QUEUE_ENABLE=queue) == "True\n8.0\n" * 2


# ---- the end of the process ----

SETUP = """
    import atexit, os, sys, threading, time
    import torch, torch_npu
    x = torch.ones(64, 64, device="npu")
    stream, event = torch.npu.Stream(), torch.npu.Event(enable_timing=True)
"""
GRAPH = """
    graph = torch.npu.NPUGraph()
    y = torch.empty_like(x)
    with torch.npu.graph(graph):
        y.copy_(x)
"""
COMPILED = """
    import torchair
    compiled = torch.compile(lambda t: t + 1, backend=torchair.get_npu_backend(), dynamic=False)
    compiled(x)
"""
ENDS: dict[str, tuple[str, int | None]] = {
    # what the script does last: its exit code
    "live tensors": ("", 0),
    "tensors gone first": ("del x, stream, event", 0),
    "work on a stream": ("with torch.npu.stream(stream): x.add_(1); event.record()", 0),
    "captured graph": (GRAPH, 0),
    "captured graph, replayed": (GRAPH + "    graph.replay()", 0),
    "captured graph, gone after its tensors": (GRAPH + "    del x, y; del graph", 0),
    "capture left open": (
        "graph = torch.npu.NPUGraph()\nwith torch.npu.stream(stream): graph.capture_begin()",
        0,
    ),
    "compiled graph": (COMPILED, 0),
    "compiled graph, gone before": (COMPILED + "    del compiled; torch._dynamo.reset()", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "os._exit": ("os._exit(4)", 4),
    "exception": ("raise ValueError('on purpose')", 1),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", -2),
    "KeyboardInterrupt while a thread works": (
        """
    def work():
        for _ in range(2000):
            x.clone().copy_(x)
    threading.Thread(target=work).start()
    os.kill(os.getpid(), 2)
    time.sleep(9)
""",
        -2,
    ),
    "sys.exit and exceptions in threads": (
        """
    for last in (sys.exit, lambda: x.view(7)):
        def work():
            with torch.npu.stream(torch.npu.Stream()):
                x.add_(1)
                last()
        thread = threading.Thread(target=work); thread.start(); thread.join()
""",
        0,
    ),
    "captured graph of ordinary operators": (
        GRAPH
        + """
    z = torch.npu.NPUGraph()
    with torch.npu.graph(z):
        y.add_(x.sum())
    z.replay(); atexit.register(z.replay)
""",
        0,
    ),
    "use at exit": ("atexit.register(lambda: print(x.sum().item()))", 0),
    "use at exit, made there": ("atexit.register(lambda: torch.ones(2, device='npu').cpu())", 0),
    "daemon thread at work": (
        """
    def work():
        while True:
            x.clone().copy_(x)
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.3)
""",
        None,  # PyTorch itself ends the process then, on a CPU too: it must only end
    ),
    "finalizer": (
        """
    class Holder:
        def __del__(self):
            self.tensor.add_(1)
    holder = Holder(); holder.tensor = x
    holder.cycle = holder
""",
        0,
    ),
    "empty cache": ("del x; torch.npu.empty_cache()", 0),
    "emptied twice": ("atexit.register(torch.npu.synchronize); torch.npu.empty_cache()", 0),
}


WITH_WORK_LEFT = (
    "work on a stream",
    "captured graph, replayed",
    "captured graph of ordinary operators",
    "compiled graph",
    "use at exit",
    "daemon thread at work",
)


@pytest.mark.parametrize(
    ("what", "streams"),
    [(what, "now") for what in ENDS] + [(what, "late") for what in WITH_WORK_LEFT],
)
def test_a_clean_end(what: str, streams: str, tmp_path) -> None:
    last, code = ENDS[what]
    done = start(tmp_path, textwrap.dedent(SETUP) + textwrap.dedent(last), "--streams", streams)
    if code is None:
        return
    assert done.returncode == code, done.stderr[-2000:]
    assert not re.search(r"Fatal|terminate called|Segmentation|core dumped", done.stderr)


def test_a_torch_npu_that_does_not_load_is_the_last_word(tmp_path) -> None:
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('broken on purpose')")
    done = start(tmp_path, "", PYTHONPATH=str(tmp_path), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "broken on purpose" in done.stderr.splitlines()[-1]
    assert "atexit" not in done.stderr


# ---- what it leaves alone ----


def test_nothing_is_written_and_nothing_connects(tmp_path) -> None:
    script = """
        import sys
        seen = set()
        sys.addaudithook(lambda event, _: event.startswith("socket.") and seen.add(event))
        import torch, torchair
        double = torch.compile(lambda t: t + t, backend=torchair.get_npu_backend(), dynamic=False)
        print(double(torch.ones(2, device="npu")).tolist(), sorted(seen - {"socket.gethostname"}))
    """
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir(), cwd.mkdir()
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "-m", "cann_host", str(path)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HOME": str(home), "TMPDIR": str(home)},
        check=True,
    )
    assert done.stdout == "[2.0, 2.0] []\n"
    # the one folder is torch's own
    assert {item.name.partition("_")[0] for item in home.iterdir()} <= {"torchinductor"}
    assert not [item for item in tmp_path.rglob("*") if item.is_file() and item != path]


def test_libraries_come_by_absolute_path_and_start_nothing(library) -> None:
    assert Path(library._name).is_absolute()
    assert [Path(library._name)] == _native.loaded_libraries("libcann_host.so")
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    shown = subprocess.run(
        ["nm", "-D", "--undefined-only", library._name], capture_output=True, text=True, check=True
    )
    wanted = {line.split()[-1].partition("@")[0] for line in shown.stdout.splitlines()}
    assert "dlsym" in wanted
    assert not wanted & {"system", "execve", "fork", "getaddrinfo", "gethostbyname"}
    # the sockets are HCCL's, between processes of one machine
    sources = Path(cann_host.__file__).parent.glob("csrc/*.cpp")
    assert [path.name for path in sources if "socket(" in path.read_text()] == ["hccl_group.cpp"]
    assert "AF_INET" not in (Path(cann_host.__file__).parent / "csrc/hccl_group.cpp").read_text()


# ---- hostile calls ----


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    folder = _native.library_directory()
    assert folder is not None
    torch.zeros(1, device="npu")  # a device is chosen
    return _native.load(folder)


def last_error(library: ctypes.CDLL) -> str:
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library.aclGetRecentErrMsg().decode()


FAILING = [symbol for _, symbol, kind in cann_host.entries() if kind == "fails"]


@pytest.mark.parametrize("symbol", FAILING)
def test_what_is_not_implemented_fails_by_its_name(symbol: str, library) -> None:
    function = getattr(library, symbol)
    function.restype = ctypes.c_int64
    code = function() & 0xFFFFFFFF
    assert f"cann_host: {symbol} is not implemented" in last_error(library)
    returns_no_code = symbol.startswith(("acltdtCreate", "acltdtGet")) or "IsEnabled" in symbol
    assert code == 200006 or returns_no_code


def test_every_symbol_is_listed(library) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", library._name], capture_output=True, text=True, check=True
    )
    theirs = re.compile(r"(acl|Hccl|mspti|Msprof|rt[A-Z])\w*")
    exported = {line.split()[-1] for line in shown.stdout.splitlines()}
    symbols = {name for name in exported if theirs.fullmatch(name)}
    listed = {symbol for _, symbol, _ in cann_host.entries() if not symbol.startswith("ge.")}
    assert symbols == {name for name in listed if theirs.fullmatch(name)}


HANDLES = {
    "aclrtSynchronizeStream": "is no stream",
    "aclrtDestroyStream": "is no stream",
    "aclrtSynchronizeEvent": "is no event",
    "aclrtDestroyEvent": "is no event",
    "aclrtFree": "was not allocated here",
    "aclrtFreeHost": "was not allocated here",
    "aclmdlRIDestroy": "is no captured graph",
    "aclDestroyTensor": "was not made here",
    "aclDestroyIntArray": "was not made here",
    "aclDestroyScalar": "was not made here",
    "aclDestroyDataBuffer": "is nothing that was created here",
    "aclrtSetCurrentContext": "unknown context",
}


@pytest.mark.parametrize("symbol", HANDLES)
@pytest.mark.parametrize("handle", [1, 0x5A5A5A5A5A5A])
def test_a_handle_that_was_never_given(symbol: str, handle: int, library) -> None:
    assert getattr(library, symbol)(ctypes.c_void_p(handle)) != 0
    assert HANDLES[symbol] in last_error(library)


def test_null_arguments_end_no_process(tmp_path) -> None:
    script = """
        import ctypes, os, cann_host, torch
        torch.npu.set_device(0)
        symbols = [symbol for _, symbol, _ in cann_host.entries() if "." not in symbol]
        for symbol in symbols:
            pid = os.fork()
            if not pid:
                getattr(cann_host.runtime.current().library, symbol)(*[ctypes.c_void_p(None)] * 14)
                os._exit(0)
            if os.waitpid(pid, 0)[1]:
                print(symbol)
        print(len(symbols) > 150)
    """
    assert run(tmp_path, script) == "True\n"


COPIES = {
    # direction of aclrtMemcpyKind: what overruns
    "to the device": 1,
    "to the host": 2,
    "in the device": 3,
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_stays_inside_what_was_allocated(kind: str, library) -> None:
    block = ctypes.c_void_p()
    assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(64), 0) == 0
    host = ctypes.create_string_buffer(256)
    here = ctypes.c_void_p(ctypes.addressof(host))
    dst = here if kind == "to the host" else block
    src = here if kind == "to the device" else block

    def copy(count: int) -> int:
        size = ctypes.c_size_t(count)
        return library.aclrtMemcpy(dst, size, src, size, COPIES[kind])

    assert copy(64) == 0
    assert copy(65) == 100000
    assert "not all in memory that was allocated here" in last_error(library)
    assert library.aclrtMemset(block, ctypes.c_size_t(65), 0, ctypes.c_size_t(65)) == 100000
    assert library.aclrtFree(block) == 0


DESCRIPTORS = [
    # dims, strides, offset, storage, dtype, format: in 64 bytes
    ("fits", (4, 4), (4, 1), 0, (16,), 0, 2, True),
    ("one row too many", (5, 4), (4, 1), 0, (20,), 0, 2, False),
    ("offset", (4, 4), (4, 1), 1, (16,), 0, 2, False),
    ("negative offset", (1,), (1,), -1, (16,), 0, 2, False),
    ("negative dim", (-4, 4), (4, 1), 0, (16,), 0, 2, False),
    ("negative stride", (4, 4), (-4, 1), 0, (16,), 0, 2, False),
    ("overflowing dim", (1 << 62, 4), (4, 1), 0, (16,), 0, 2, False),
    ("overflowing stride", (3, 4), (1 << 62, 1), 0, (16,), 0, 2, False),
    ("wide dtype", (4, 4), (4, 1), 0, (16,), 9, 2, False),
    ("unknown dtype", (4, 4), (4, 1), 0, (16,), 99, 2, False),
    ("storage of blocks", (4, 4), (4, 1), 0, (1, 1, 16, 8), 0, 29, False),
]


@pytest.mark.parametrize("case", DESCRIPTORS, ids=lambda case: case[0])
def test_a_descriptor_stays_inside_what_was_allocated(case: tuple, library) -> None:
    _, dims, strides, offset, storage, dtype, acl_format, fits = case
    block = ctypes.c_void_p()
    assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(64), 0) == 0
    library.aclCreateTensor.restype = ctypes.c_void_p
    numbers = [(ctypes.c_int64 * len(values))(*values) for values in (dims, strides, storage)]
    tensor = library.aclCreateTensor(
        numbers[0],
        ctypes.c_uint64(len(dims)),
        dtype,
        numbers[1],
        ctypes.c_int64(offset),
        acl_format,
        numbers[2],
        ctypes.c_uint64(len(storage)),
        block,
    )
    size, executor = ctypes.c_uint64(), ctypes.c_void_p()
    code = library.aclnnInplaceZeroGetWorkspaceSize(
        ctypes.c_void_p(tensor), ctypes.byref(size), ctypes.byref(executor)
    )
    assert code == (0 if fits else 161002), last_error(library)
    if fits:
        assert library.aclnnInplaceZero(None, ctypes.c_uint64(0), executor, None) == 0
    library.aclDestroyTensor(ctypes.c_void_p(tensor))
    assert library.aclrtFree(block) == 0


def test_an_executor_is_used_once_and_on_memory_that_is_there(library) -> None:
    library.aclCreateTensor.restype = ctypes.c_void_p
    eight = (ctypes.c_int64 * 1)(8)
    one = (ctypes.c_int64 * 1)(1)

    def prepared() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        block, size, executor = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_void_p()
        assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(64), 0) == 0
        rank, offset = ctypes.c_uint64(1), ctypes.c_int64(0)
        made = library.aclCreateTensor(eight, rank, 9, one, offset, 2, eight, rank, block)
        tensor = ctypes.c_void_p(made)
        code = library.aclnnInplaceZeroGetWorkspaceSize(
            tensor, ctypes.byref(size), ctypes.byref(executor)
        )
        assert code == 0
        assert library.aclDestroyTensor(tensor) == 0
        assert library.aclDestroyTensor(tensor) == 161002  # twice
        return block, executor

    def launch(executor: ctypes.c_void_p) -> int:
        return library.aclnnInplaceZero(None, ctypes.c_uint64(0), executor, None)

    block, executor = prepared()
    assert launch(executor) == 0
    assert launch(executor) == 161001
    assert "without an executor of its own" in last_error(library)
    assert library.aclrtFree(block) == 0
    block, executor = prepared()
    assert library.aclrtFree(block) == 0
    assert launch(executor) == 161002
    assert "no longer allocated" in last_error(library)


def test_an_impossible_descriptor_is_none(library) -> None:
    library.aclCreateTensor.restype = ctypes.c_void_p
    assert (
        library.aclCreateTensor(
            None,
            ctypes.c_uint64(1 << 40),
            0,
            None,
            ctypes.c_int64(0),
            2,
            None,
            ctypes.c_uint64(0),
            None,
        )
        is None
    )
    assert "aclCreateTensor: 1099511627776 dims" in last_error(library)


SIZES = [
    # function, arguments after the first: code, what is said
    ("aclrtMalloc", [0, 0], 100000, "size 0"),
    ("aclrtMalloc", [(1 << 64) - 1, 0], 207001, "do not fit"),
    ("aclrtMalloc", [1 << 63, 0], 207001, "do not fit"),
    ("aclrtMallocAlign32", [(1 << 64) - 512, 0], 207001, "do not fit"),
    ("aclrtMallocHost", [(1 << 64) - 1], 207001, "the host has no 18446744073709551615 bytes left"),
    ("aclrtMallocHost", [(1 << 64) - 512], 207001, "the host has no"),
]


@pytest.mark.parametrize(("name", "more", "code", "text"), SIZES)
def test_a_size_that_cannot_be(name: str, more: list, code: int, text: str, library) -> None:
    place = ctypes.c_void_p()
    values = [ctypes.c_size_t(more[0]), *more[1:]]
    assert getattr(library, name)(ctypes.byref(place), *values) == code
    assert text in last_error(library)
    assert place.value is None


LENGTHS = [
    # bytes of the destination, bytes to copy, kind: whether 64 bytes to 64 bytes can be that
    (64, 64, 1, True),
    (64, 64, 4, True),  # by default the addresses decide
    ((1 << 64) - 1, (1 << 64) - 1, 1, False),
    (1 << 63, 1 << 63, 1, False),
    (64, (1 << 64) - 1, 1, False),
    (65, 65, 4, False),
    (64, 64, -1, False),
    (64, 64, 8, False),
]


@pytest.mark.parametrize(("room", "count", "kind", "fits"), LENGTHS)
@pytest.mark.parametrize("wait", ["", "Async"])
def test_a_length_that_cannot_be(room, count, kind, fits, wait: str, library) -> None:
    block = ctypes.c_void_p()
    assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(64), 0) == 0
    host = ctypes.create_string_buffer(64)
    stream = [None] if wait else []
    copy = getattr(library, f"aclrtMemcpy{wait}")
    given = block, ctypes.c_size_t(room), host, ctypes.c_size_t(count), kind
    assert copy(*given, *stream) == (0 if fits else 100000)
    if kind == 1:
        fill = getattr(library, f"aclrtMemset{wait}")
        code = fill(block, ctypes.c_size_t(room), 0, ctypes.c_size_t(count), *stream)
        assert code == (0 if fits else 100000)
    assert library.aclrtFree(block) == 0


# ---- memory that a captured graph refers to ----


def launch_copy(library, block, stream) -> int:
    size = ctypes.c_size_t(64)
    return library.aclrtMemcpyAsync(block, size, block, size, 3, stream)


def launch_set(library, block, stream) -> int:
    return library.aclrtMemsetAsync(block, ctypes.c_size_t(64), 1, ctypes.c_size_t(64), stream)


def launch_operator(library, block, stream) -> int:
    library.aclCreateTensor.restype = ctypes.c_void_p
    dims, one = (ctypes.c_int64 * 1)(16), (ctypes.c_int64 * 1)(1)
    rank = ctypes.c_uint64(1)
    made = library.aclCreateTensor(dims, rank, 0, one, ctypes.c_int64(0), 2, dims, rank, block)
    tensor, size, executor = ctypes.c_void_p(made), ctypes.c_uint64(), ctypes.c_void_p()
    code = library.aclnnInplaceZeroGetWorkspaceSize(
        tensor, ctypes.byref(size), ctypes.byref(executor)
    )
    library.aclDestroyTensor(tensor)
    return code or library.aclnnInplaceZero(None, ctypes.c_uint64(0), executor, stream)


def launch_collective(library, block, stream) -> int:
    root, comm = ctypes.create_string_buffer(4108), ctypes.c_void_p()
    library.HcclGetRootInfo(root)
    library.HcclCommInitRootInfo(1, root, 0, ctypes.byref(comm))
    return library.HcclAllReduce(block, block, ctypes.c_uint64(16), 4, 0, comm, stream)


LAUNCHES = {
    "aclrtMemcpyAsync": launch_copy,
    "aclrtMemsetAsync": launch_set,
    "aclnnInplaceZero": launch_operator,
    "HcclAllReduce": launch_collective,
}


@pytest.mark.parametrize("symbol", LAUNCHES)
@pytest.mark.parametrize("then", ["gone", "another's"])
def test_a_replay_refuses_memory_that_is_not_what_it_was(symbol: str, then: str, library) -> None:
    block, stream, graph = (ctypes.c_void_p() for _ in range(3))
    size = ctypes.c_size_t(64)
    assert library.aclrtMalloc(ctypes.byref(block), size, 0) == 0
    assert library.aclrtCreateStream(ctypes.byref(stream)) == 0
    assert library.aclmdlRICaptureBegin(stream, 0) == 0
    assert LAUNCHES[symbol](library, block, stream) == 0
    assert library.aclmdlRICaptureEnd(stream, ctypes.byref(graph)) == 0
    assert library.aclmdlRIExecuteAsync(graph, stream) == 0
    assert library.aclrtFree(block) == 0
    again = []
    while then != "gone" and (not again or again[-1].value != block.value) and len(again) < 99:
        again.append(ctypes.c_void_p())
        assert library.aclrtMalloc(ctypes.byref(again[-1]), size, 0) == 0
    assert library.aclmdlRIExecuteAsync(graph, stream) != 0
    assert f"{symbol}: 64 bytes at" in last_error(library)
    assert "no longer allocated" in last_error(library)
    for one in again:
        assert library.aclrtFree(one) == 0
    assert library.aclmdlRIDestroy(graph) == 0
    assert library.aclrtDestroyStream(stream) == 0


# ---- null pointers ----

TYPES = {
    # a parameter's type, without const: what a caller passes
    "aclTensor*": "tensor",
    "aclIntArray*": "array",
    "aclScalar*": "scalar",
    "aclOpExecutor*": "executor",
    "aclTensorDesc*": "desc",
    "aclDataBuffer*": "buffer",
}


def parameters() -> dict[str, list[str]]:
    """The parameters of each of CANN's functions, as the sources declare them."""
    text = "".join(
        re.sub(r"//.*", "", path.read_text())
        for path in sorted((Path(cann_host.__file__).parent / "csrc").glob("*.cpp"))
    )
    found = {}
    listed = {symbol for _, symbol, kind in cann_host.entries() if kind != "fails"}
    for name, inside in re.findall(r"\n[\w :]+[ *]+(\w+)\(([^(){};]*)\) \{", text):
        if name in listed:
            names = [" ".join(one.split()) for one in inside.split(",")]
            found[name] = [one for one in names if one and one != "..."]
    return found


def test_a_null_among_good_arguments_ends_no_process(tmp_path) -> None:
    """Each pointer of each function, null while the others point to something."""
    calls = parameters()
    launches = {s for _, s, _ in cann_host.entries() if f"{s}GetWorkspaceSize" in calls}
    for symbol in launches:  # written by a macro
        calls[symbol] = ["void*", "uint64_t", "aclOpExecutor* executor", "void* stream"]
    known = {symbol for _, symbol, kind in cann_host.entries() if kind != "fails"}
    assert {name for name in known if "." not in name} - set(calls) == set()
    script = f"""
        import ctypes, os, re, cann_host, torch
        P = ctypes.c_void_p
        lib, calls, types = cann_host.runtime.current().library, {calls!r}, {TYPES!r}
        torch.npu.set_device(0)
        x = torch.zeros(64, device="npu")
        root, comm, stream, event = ctypes.create_string_buffer(4108), P(), P(), P()
        lib.HcclGetRootInfo(root)
        lib.HcclCommInitRootInfo(1, root, 0, ctypes.byref(comm))
        lib.aclrtCreateStream(ctypes.byref(stream))
        lib.aclrtCreateEventWithFlag(ctypes.byref(event), 0)
        for make in ("aclCreateTensor", "aclCreateIntArray", "aclCreateScalar",
                     "aclCreateTensorDesc", "aclCreateDataBuffer", "aclopCreateAttr"):
            getattr(lib, make).restype = P
        dims, one = (ctypes.c_int64 * 1)(8), (ctypes.c_int64 * 1)(1)
        n = ctypes.c_uint64(1)
        tensor = P(lib.aclCreateTensor(dims, n, 0, one, ctypes.c_int64(0), 2, dims, n,
                                       P(x.data_ptr())))
        made = dict(tensor=tensor, array=P(lib.aclCreateIntArray(dims, n)),
                    scalar=P(lib.aclCreateScalar(dims, 9)),
                    desc=P(lib.aclCreateTensorDesc(0, 1, dims, 2)),
                    buffer=P(lib.aclCreateDataBuffer(P(x.data_ptr()), ctypes.c_size_t(32))))
        page = ctypes.create_string_buffer(1 << 16)

        def good(parameter):
            text = parameter.replace("const ", "").replace(" const", "")
            name = text.split()[-1].lstrip("*")
            if "double" in text or "float " in text and "*" not in text:
                return ctypes.c_double(1e-6)
            if "*" not in text:
                return ctypes.c_int64(1)
            if name in ("comm", "stream", "event", "on"):
                return dict(comm=comm, stream=stream, event=event, on=stream)[name]
            for type_, thing in types.items():
                if text.startswith(type_ + " ") and thing == "executor":  # each is good once
                    size, executor = ctypes.c_uint64(), P()
                    lib.aclnnInplaceZeroGetWorkspaceSize(
                        tensor, ctypes.byref(size), ctypes.byref(executor))
                    return executor
                if text.startswith(type_ + " "):
                    return made[thing]
            if text.startswith("void* ") and name in ("send", "receive", "buffer", "data", "dst"):
                return P(x.data_ptr())
            return ctypes.cast(page, P)

        for name, parameters in calls.items():
            for null in [i for i, p in enumerate(parameters) if "*" in p]:
                given = [good(p) if i != null else None for i, p in enumerate(parameters)]
                print(name, parameters[null], flush=True)  # the last one ended the process
                getattr(lib, name)(*given)
    """
    done = start(tmp_path, script)
    assert done.returncode == 0, done.stdout.splitlines()[-1:]
    assert done.stdout.count("\n") > 300
