"""What can be wrong, in the order in which it must be solved: of two problems, the first is the one
that would remain if only the second were solved. `find_problems` looks for each of RULES."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .environment import AUTOLOAD
from .facts import Facts
from .packages import release_of

__all__ = ["LOWEST", "NEWEST", "RULES", "Problem", "find_notes", "find_problems"]

# Releases of torch between which everything was tested.
LOWEST, NEWEST = "2.7.1", "2.14.0"
_STAND_IN = "python -m cann_host your_script.py"
_CPU_BUILDS = "--index-url https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        id: a fixed name, for programs.
        what: one sentence.
        fix: one sentence.
        commands: that solve it, one for each line.
    """

    id: str
    what: str
    fix: str
    commands: tuple[str, ...] = ()


Rule = Callable[[Facts], "Problem | None"]


def find_problems(facts: Facts) -> list[Problem]:
    """The problems, the first to be solved first."""
    return [problem for rule in RULES if (problem := rule(facts)) is not None]


# ---- torch and torch_npu ----


def _shadowed(facts: Facts) -> Problem | None:
    for name, file in facts.shadowed.items():
        return Problem(
            "shadowed",
            f"`import {name}` takes the file {file}, which is not the package {name}.",
            "Rename the file, or run Python from another folder.",
        )
    return None


def _no_torch(facts: Facts) -> Problem | None:
    if facts.torch is not None or "torch" in facts.shadowed:
        return None
    made_for = facts.torch_npu.made_for if facts.torch_npu else ""
    which = f"torch {made_for}, for which torch_npu is made," if made_for else "torch"
    return Problem(
        "no_torch",
        f"torch is not installed for {facts.python['executable']}.",
        f"Install the CPU build of {which} with the command that the install page of pytorch.org "
        "gives for Pip and CPU, or run the Python that has torch.",
    )


def _old_torch(facts: Facts) -> Problem | None:
    if facts.torch is None or not facts.torch.release or facts.torch.release >= release_of(LOWEST):
        return None
    return Problem(
        "old_torch",
        f"torch {facts.torch.version} is older than {LOWEST}, the first that lq_graph works with.",
        f"Install torch {LOWEST} or later, and the torch_npu that is made for it.",
    )


def _broken_torch(facts: Facts) -> Problem | None:
    if not facts.torch or not facts.torch_error or _old_torch(facts):
        return None
    return Problem(
        "broken_torch",
        f"`import torch, lq_graph` fails even without torch_npu: {facts.torch_error}.",
        f"Install torch again (it lies in {facts.torch.folder}); if it is right, report this.",
    )


def _mismatch(facts: Facts) -> Problem | None:
    torch, npu = facts.torch, facts.torch_npu
    if torch is None or npu is None or not (torch.release and npu.made_for):
        return None
    if torch.release == release_of(npu.made_for):
        return None
    return Problem(
        "version_mismatch",
        f"torch_npu {npu.version} is made for torch {npu.made_for}, and this is torch "
        f"{torch.version}.",
        f"Install the CPU build of torch {npu.made_for}, or the torch_npu that is made for your "
        "torch.",
        (
            f'pip install "torch=={npu.made_for}+cpu" {_CPU_BUILDS}',
            f"pip install --no-deps torch_npu=={npu.version}",
        ),
    )


def _no_torch_npu(facts: Facts) -> Problem | None:
    if facts.torch_npu is not None or "torch_npu" in facts.shadowed:
        return None
    if facts.cann.state == "absent" and not facts.device_files:
        return None
    which = "CANN" if facts.cann.state != "absent" else "an NPU"
    release = ".".join(map(str, facts.torch.release)) if facts.torch else ""
    return Problem(
        "no_torch_npu",
        f"This machine has {which}, and torch_npu is not installed.",
        "Install the torch_npu that is made for your torch.",
        (f"pip install --no-deps 'torch_npu=={release}.*' numpy pyyaml packaging protobuf",)
        if release
        else (),
    )


# ---- CANN ----


def _npu_fails(facts: Facts) -> bool:
    """Whether torch_npu is there and cannot be imported on a real CANN, or was not tried."""
    return facts.torch_npu is not None and not facts.stand_in.active and facts.torch_npu_error != ""


def _wrong_path(facts: Facts) -> Problem | None:
    if not _npu_fails(facts) or facts.cann.state != "wrong path":
        return None
    name = facts.cann.wrong[0] if facts.cann.wrong else next(iter(facts.cann.variables))
    return Problem(
        "cann_wrong_path",
        f"{name} is {facts.cann.variables[name]}, where no CANN is.",
        _source(facts) or f"Unset {name}, and source the set_env.sh of your CANN.",
        _source_command(facts),
    )


def _not_sourced(facts: Facts) -> Problem | None:
    used = facts.cann.used
    if not _npu_fails(facts) or facts.cann.state != "not sourced" or used is None:
        return None
    return Problem(
        "cann_not_sourced",
        f"CANN {used.version} lies in {used.folder}, and this shell has not sourced it.",
        _source(facts),
        _source_command(facts),
    )


def _partly_sourced(facts: Facts) -> Problem | None:
    cann = facts.cann
    if facts.torch_npu is None or facts.stand_in.active or cann.state != "partly sourced":
        return None
    if facts.torch_npu_error == "" and "ASCEND_OPP_PATH" in cann.variables:
        return None  # the loader finds CANN elsewhere
    return Problem(
        "cann_partly_sourced",
        f"CANN is only partly sourced: {', '.join(cann.missing)} "
        f"{'do' if len(cann.missing) > 1 else 'does'} not name it.",
        _source(facts) or "Source the set_env.sh of your CANN.",
        _source_command(facts),
    )


def _no_cann(facts: Facts) -> Problem | None:
    if not _npu_fails(facts) or facts.cann.state != "absent" or facts.autoload_off:
        return None
    return Problem(
        "no_cann",
        "torch_npu is installed and no CANN was found on this machine, so `import torch` fails.",
        f"With an NPU, install CANN and source its set_env.sh; without one, use `{_STAND_IN}`, or "
        f"for plain CPU use set {AUTOLOAD}=0.",
    )


def _source(facts: Facts) -> str:
    return "Source it in every shell that runs a program." if _source_command(facts) else ""


def _source_command(facts: Facts) -> tuple[str, ...]:
    for installed in facts.cann.installed:
        if installed.set_env:
            return (f"source {shlex.quote(installed.set_env)}",)
    return ()


# ---- importing torch_npu ----


def _both_register(facts: Facts) -> bool:
    torch, npu = facts.torch, facts.torch_npu
    return bool(torch and npu and torch.registers_allocator_keys and npu.registers_allocator_keys)


_TWO_ACCELERATORS = re.compile("Duplicated key|Two accelerators cannot be used")


def _cuda_build(facts: Facts) -> Problem | None:
    """From the libraries: both register the same settings; or from how the import ended."""
    said = _TWO_ACCELERATORS.search(facts.torch_npu_error or "")
    if facts.torch is None or not _npu_fails(facts) or not (said or _both_register(facts)):
        return None
    if facts.autoload_off and facts.cann.state == "absent":
        return None
    release = ".".join(map(str, facts.torch.release))
    return Problem(
        "cuda_build",
        f"torch {facts.torch.version} is a build for {facts.torch.build}: beside CANN, `import "
        "torch_npu` ends the process, because both register the same allocator settings.",
        f"Install the CPU build of torch {release}.",
        (f'pip install "torch=={release}+cpu" {_CPU_BUILDS}',),
    )


# What the error of `import torch_npu` means on a CANN that is sourced: the first match counts.
_CAUSES = (
    (
        r"lib(ascend_hal|drvdsmi_host|dcmi)[\w.]*: cannot open shared object",
        "npu_driver",
        "the NPU's driver is not installed, or its folder is not in LD_LIBRARY_PATH",
        "Install the driver, or add /usr/local/Ascend/driver/lib64 and the folders driver and "
        "common in it to LD_LIBRARY_PATH.",
    ),
    (
        r"cannot open shared object|file too short|invalid ELF header|_PATH : \S+ does not exist",
        "cann_incomplete",
        "a part of CANN is missing or damaged",
        "Install CANN's toolkit and the package of kernels (ops) for your chip again, in one "
        "version.",
    ),
    (
        r"undefined symbol: (acl|Hccl|hccl|_ZN2ge|_ZNK2ge|ge)",
        "old_cann",
        "this CANN lacks a function that torch_npu needs",
        "Install the CANN that the release notes of your torch_npu name.",
    ),
    (
        r"undefined symbol",
        "broken_torch_npu",
        "torch_npu's library does not fit this torch",
        "Install torch and torch_npu again, in versions that belong together.",
    ),
    (
        r"No module named '(?!torch_npu)",
        "missing_package",
        "a Python package that torch_npu needs is not installed",
        "Install the package that the error names (yaml is called pyyaml).",
    ),
    (
        r"GLIBC",
        "old_system",
        "this system's C or C++ library is older than the wheel needs",
        "Use a newer system, or a container with one.",
    ),
)


def _import_fails(facts: Facts) -> Problem | None:
    """Import of torch_npu, if nothing above explains why it fails."""
    error = facts.torch_npu_error
    explained = (_broken_torch, _mismatch, _wrong_path, _not_sourced, _no_cann, _cuda_build)
    if not error or not _npu_fails(facts) or any(rule(facts) for rule in explained):
        return None
    if facts.autoload_off and facts.cann.state == "absent":
        return None
    for pattern, name, what, fix in _CAUSES:
        if re.search(pattern, error):
            return Problem(name, f"`import torch_npu` fails, because {what}: {error}.", fix)
    return Problem(
        "broken_torch_npu",
        f"`import torch_npu` fails: {error}.",
        f"Install torch_npu again; for plain CPU use, set {AUTOLOAD}=0.",
    )


# What a module that torchair imports belongs to; newer setuptools have no pkg_resources.
_PACKAGE_OF = {"google": "protobuf", "pkg_resources": "'setuptools<81'", "yaml": "pyyaml"}


def _torchair_fails(facts: Facts) -> Problem | None:
    if not facts.torchair_error:
        return None
    missing = re.search(r"No module named '(\w+)", facts.torchair_error)
    package = _PACKAGE_OF.get(missing[1], missing[1]) if missing else ""
    return Problem(
        "broken_torchair",
        f"`import torchair` fails: {facts.torchair_error}.",
        "Install what torchair imports and the wheel of torch_npu does not ask for."
        if package
        else "Install torch_npu again, of which torchair is a part.",
        (f"pip install {package}",) if package else (),
    )


# ---- the device ----


def _no_device(facts: Facts) -> Problem | None:
    if not facts.device_error:
        return None
    return Problem(
        "no_device",
        f"torch_npu finds CANN and no device it can use: {facts.device_error}.",
        "Look whether `npu-smi info` lists the device, whether ASCEND_RT_VISIBLE_DEVICES hides it, "
        "and whether your user (or container) may open /dev/davinci*.",
    )


def _computes_nothing(facts: Facts) -> Problem | None:
    if not facts.compute_error:
        return None
    return Problem(
        "no_kernels",
        f"The first computation on the device fails: {facts.compute_error}.",
        "Install CANN's package of kernels (ops) for this chip, in the version of the toolkit, and "
        "source CANN again.",
    )


def _no_product(facts: Facts) -> Problem | None:
    if "LQ_GRAPH_CANN" in facts.product_error:
        return Problem(
            "wrong_cann_version",
            facts.product_error.partition(": ")[2].partition(" What to do")[0].rstrip(".") + ".",
            "Unset LQ_GRAPH_CANN, or set it to the version of your CANN.",
        )
    if facts.product_error:
        return Problem(
            "wrong_product",
            facts.product_error.partition(": ")[2].rstrip(".") + ".",
            "Unset LQ_GRAPH_PRODUCT, or set it to 310P, A2, A3 or 950.",
        )
    if facts.product and not facts.product["known"] and facts.device:
        return Problem(
            "unknown_product",
            f"lq_graph has no support table for {facts.device['name']}, and uses that of "
            f"{facts.product['name']}.",
            "Set LQ_GRAPH_PRODUCT to the product whose table applies: 310P, A2, A3 or 950.",
        )
    return None


# ---- compiled code ----

_BUILD = ("pip install -e .",)
_KERNEL = {
    "stale": (
        "stale_kernel",
        "The compiled CPU kernel was built from other sources than the Python beside it, so it is "
        "not used; torch computes the same, slower.",
        "Build it again, in the checkout.",
        _BUILD,
    ),
    "absent": (
        "no_kernel",
        "The compiled CPU kernel is not built: lq_graph is not installed, or was installed without "
        "a C++ compiler; torch computes the same, slower.",
        "Install g++ if it is missing (apt-get install g++), then lq_graph, in a checkout.",
        _BUILD,
    ),
    "openmp": (
        "no_openmp",
        "The compiled CPU kernel cannot be loaded: this torch has no OpenMP runtime with GOMP's "
        "names; torch computes the same, slower.",
        "Install a wheel of torch from its own index; another build of torch may lack this.",
        (),
    ),
    "variable": (
        "wrong_native",
        "LQ_GRAPH_NATIVE is neither 0 nor 1, and names no instruction set that this processor and "
        "the compiled CPU kernel have, so the kernel is not used.",
        "Unset it: then the best instruction set of the processor is taken.",
        (),
    ),
}


def _stand_in(facts: Facts) -> Problem | None:
    if not facts.stand_in.why_not or facts.cann.state not in ("absent", "not sourced"):
        return None
    what, _, todo = facts.stand_in.why_not.partition(" What to do: ")
    if not todo:
        what, _, todo = what.partition(": run ")
        todo = todo and f"run {todo}"
    return Problem(
        "stand_in",
        f"cann_host cannot be used: {what.rstrip('.')}.",
        f"{todo[:1].upper()}{todo[1:].rstrip('.')}." if todo else "Install lq_graph again.",
    )


_WITH_KERNEL = ("x86_64", "aarch64")


def _kernel(facts: Facts) -> Problem | None:
    found = _KERNEL.get(facts.kernel["why_not"]) if facts.kernel else None
    if found is None or (found[0] == "no_kernel" and facts.python["machine"] not in _WITH_KERNEL):
        return None
    return Problem(*found)


# ---- the self-test ----


def _self_test(facts: Facts) -> Problem | None:
    failed = {
        f"{result['group'].partition(':')[0]} ({test['mode']})"
        for test in facts.self_test
        for result in test["results"]
        if not result["left_out"] and not result["passed"]
    }
    if not failed and not facts.self_test_errors:
        return None
    what = [f"wrong in {', '.join(sorted(failed))}"] if failed else []
    what += [f"it ended early: {error}" for error in facts.self_test_errors]
    return Problem(
        "self_test",
        f"The self-test failed: {'; '.join(what)}.",
        "Report it with this output: it is a fault of lq_graph, torch_npu or CANN.",
    )


RULES: tuple[Rule, ...] = (
    _shadowed,
    _no_torch,
    _old_torch,
    _broken_torch,
    _mismatch,  # neither CANN nor cann_host helps before this is solved
    _no_torch_npu,
    _wrong_path,
    _not_sourced,
    _partly_sourced,
    _no_cann,
    _cuda_build,  # only a real CANN meets it
    _import_fails,
    _torchair_fails,
    _no_device,
    _computes_nothing,
    _no_product,
    _stand_in,
    _kernel,
    _self_test,
)


# ---- notes ----


def find_notes(facts: Facts) -> list[str]:
    """What is worth knowing and is no problem, a sentence each."""
    notes = []
    torch, npu = facts.torch, facts.torch_npu
    if torch and torch.release > release_of(NEWEST):
        notes.append(f"torch {torch.version} is newer than {NEWEST}, the newest tested.")
    if npu is None and torch and not _no_torch_npu(facts):
        notes.append("torch_npu is not installed: operators on the CPU, export and Inductor work.")
    if npu and torch and torch.build != "CPU" and not _cuda_build(facts):
        if _both_register(facts):
            notes.append(
                f"torch {torch.version} is a build for {torch.build}: on cann_host it works; "
                "beside a real CANN `import torch_npu` would end the process."
            )
        else:
            notes.append(f"Nothing here uses the {torch.build} half of torch; a CPU build will do.")
    if npu and facts.autoload_off:
        notes.append(f"{AUTOLOAD}=0: `import torch` does not import torch_npu.")
    if facts.kernel and facts.kernel["why_not"] == "off":
        notes.append("LQ_GRAPH_NATIVE turns the compiled CPU kernel off.")
    if facts.kernel and facts.kernel["why_not"] == "processor":
        notes.append(
            "The compiled CPU kernel has no instruction set of this processor: torch computes."
        )
    if facts.allow_internal_format is False:
        notes.append(
            "allow_internal_format is off (torch_npu's default): weights stay ND until a program "
            "sets torch.npu.config.allow_internal_format = True."
        )
    if facts.stand_in.active:
        notes.append("cann_host computes on the CPU: the self-test says nothing about a chip.")
    left_out: dict[str, Counter[str]] = {}  # reason: how many calls of each mode
    for test in facts.self_test:
        for result in test["results"]:
            if result["left_out"]:
                left_out.setdefault(result["left_out"], Counter())[test["mode"]] += 1
    for why, modes in left_out.items():
        counts = ", ".join(f"{count} in {mode}" for mode, count in modes.items())
        notes.append(f"The self-test left calls out ({counts}): {why}.")
    return notes
