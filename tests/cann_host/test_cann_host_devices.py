"""cann_host's options, devices, memory, training and workers. Programs (tests/scripts) run in
processes of their own, on the real torch_npu."""

from __future__ import annotations

import pytest

import cann_host
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


@pytest.mark.slow
@pytest.mark.parametrize(("options", "text"), BAD_OPTIONS, ids=lambda v: " ".join(v)[:30])
def test_a_wrong_option_is_one_sentence(options: tuple[str, ...], text: str) -> None:
    done = start("chips.py cann_version", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cann_host: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_wrong_variable_is_called_by_its_name() -> None:
    done = start("chips.py cann_version", CANN_HOST_DEVICES="two")
    assert "CANN_HOST_DEVICES is 'two'; it must be a number from 1 to 64" in done.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("8GiB", 8 << 30), ("512MiB", 512 << 20), ("1.5G", 3 << 29), ("64 kb", 64 << 10), ("77", 77)],
)
def test_sizes(given: str, wanted: int) -> None:
    from cann_host.options import Options

    assert Options.of(memory=given).memory == wanted


@pytest.mark.slow
@pytest.mark.parametrize("version", ["8.1.RC1", "8.2.RC1", "8.5.0", "9.0.0.alpha1", "9.1.0"])
def test_cann_version(version: str) -> None:
    newer = version >= "8.5"
    said = run("chips.py cann_version", "--cann-version", version)
    assert said == f"{version} {version} {newer}\n"


SOCS = (
    "Ascend910B1",
    "Ascend910B4-1",
    "Ascend910_9363",
    "Ascend910_9391",
    "Ascend310P3",
    "Ascend310P7",
    "Ascend950PR_9579",
)


@pytest.mark.slow
@pytest.mark.parametrize("soc", SOCS)
def test_socs(soc: str) -> None:
    assert run("chips.py format_cast", "--soc", soc) == f"{soc} FRACTAL_NZ True\n"


# ---- devices and memory ----


@pytest.mark.slow
def test_several_devices() -> None:
    assert run("devices.py several", "--devices", "3").splitlines() == [
        "3",
        "npu:1 npu:1 npu:0 True",
        "npu:1 npu:1",
        "npu:2 npu:2",
        "[True, True, False]",
        "no npu:3",
    ]


@pytest.mark.slow
def test_a_memory_limit_is_a_real_out_of_memory() -> None:
    said = run("devices.py memory_limit", "--memory", "4GiB", "--devices", "2")
    assert said.splitlines() == ["True", "True True True", "True True", "True", "True"]


@pytest.mark.slow
def test_pinned_memory() -> None:
    assert run("devices.py pinned_memory") == "True False True\n"


@pytest.mark.slow
def test_equal_seeds_draw_equal_numbers() -> None:
    assert run("devices.py seeds") == "True True True\n"


# ---- training, workers, profiler ----


@pytest.mark.slow
def test_a_training_step_on_fallback_operators() -> None:
    assert run("training.py one_step") == "equal\n"


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_data_loader_workers(context: str) -> None:
    assert run(f"training.py workers {context}") == "[2, 10, 18, 26]\n"


@pytest.mark.slow
def test_a_spawned_process_has_the_same_options() -> None:
    said = run("devices.py spawned", "--soc", "Ascend910B4", "--devices", "2")
    assert said.splitlines() == ["('Ascend910B4', 2, [1.0, 1.0])", "0"]


@pytest.mark.slow
def test_torch_profiler() -> None:
    assert "True\n" in run("training.py profiler")
