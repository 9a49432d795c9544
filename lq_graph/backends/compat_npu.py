"""What differs between the versions of torch_npu, asked from what is installed.

Two trains of schemas are in use (docs/versions.md). torch_npu 2.7.1, 2.8.0 and 2.9.0, as first
released, have `ScalarType?` where later ones have `int?`: output_dtype of npu_quant_matmul,
dst_type of npu_dynamic_quant, dtype of npu_quantize. Their overloads take torch's numbers for both,
so `npu.py` passes numbers and asks nothing in a call.

What torchair lacks is in converters/_torchair.py.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import torch

from ..errors import LinearQuantError
from ..rules.tables import FRACTAL_NZ
from .compat import OpOverload

__all__ = [
    "ACL_INT32",
    "config_of_patterns",
    "find_operator",
    "import_torchair",
    "installed",
    "lowers_to_ge",
    "why_no_int4_nz",
    "why_no_passes",
]

ACL_INT32 = 3  # aclDataType


def installed() -> str:
    """The installed torch_npu, for a message: "torch_npu 2.13.0"."""
    import torch_npu

    return f"torch_npu {torch_npu.__version__}"


def find_operator(name: str, *arguments: str) -> OpOverload | None:
    """An operator of torch_npu that graphs may call, if it is there and takes these arguments.

    torchair has to convert it, once torchair has loaded its converters of torch_npu's operators. It
    keeps a converter as an attribute of the overload.
    """
    packet = getattr(torch.ops.npu, name, None)
    if packet is None:
        return None
    found: OpOverload = packet.default
    taken = {argument.name for argument in found._schema.arguments}
    loaded = "torchair._ge_concrete_graph.ge_converter.custom" in sys.modules
    converted = not loaded or hasattr(found, "_ge_converter")
    return found if converted and taken.issuperset(arguments) else None


def config_of_patterns() -> Any:
    """torchair's configuration, in the check of a match; None elsewhere.

    The check does not get it. The function that applies the patterns has it:
    `_apply_pattern_passes` of torchair and of npugraph_ex, a caller of this function.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_apply_pattern_passes":
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("config")


def import_torchair() -> Any:
    """torchair. Its import installs a handler for SIGINT that ignores Ctrl-C (core/_backend.py);
    this restores the old handler.

    Raises:
        LinearQuantError: it cannot be imported.
    """
    import torch_npu  # noqa: F401  (makes the name `torchair` importable)

    handler = signal.getsignal(signal.SIGINT)
    outer = sys.exc_info()[1]  # what the caller handles has nothing to do with this import
    try:
        import torchair

        torchair.CompilerConfig  # noqa: B018  (torch_npu imports the module at the first attribute)
    except Exception as error:  # torch_npu raises its own, with the cause as context
        raise _not_importable(error, outer) from error
    if signal.getsignal(signal.SIGINT) is not handler:
        signal.signal(signal.SIGINT, handler)
    return torchair


def _not_importable(error: BaseException, outer: BaseException | None) -> LinearQuantError:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause is not outer:
        causes.append(cause)
    missing = next((c.name for c in causes if isinstance(c, ModuleNotFoundError)), None)
    if missing == "pkg_resources":
        why = "it imports pkg_resources, which setuptools 82 no longer has"
        fix = 'run `pip install "setuptools<81"` in this environment'
    elif missing:
        why, fix = f"it imports {missing}, which is not installed", f"install {missing}"
    else:
        why, fix = str(causes[-1]).strip(), "read the error above, which is torchair's own"
    return LinearQuantError(
        f"torchair of {installed()} cannot be imported: {why}. What to do: {fix}."
    )


def why_no_passes() -> str:
    """Why torchair runs no passes of other libraries in a graph; empty if it does, or if there is
    no torchair that makes graphs."""
    if "torch_npu" not in sys.modules:
        return ""
    try:
        torchair = import_torchair()
    except LinearQuantError:
        return ""
    if hasattr(torchair, "register_replacement"):
        return ""
    return f"torchair of {installed()} runs no passes of other libraries"


def why_no_int4_nz() -> str:
    """Why int4 weights cannot be cast to FRACTAL_NZ here; empty if they can.

    An int4 weight is int32 in torch, and its blocks have rows of 8 words, not 16. torch_npu makes
    such blocks with customize_dtype. Before Ascend 950, 2.8.0.post4, 2.8.0.post5, 2.10.0 and
    2.10.0.post4 refuse it; 2.7.1, 2.8.0 and 2.9.0 take it and ignore it; newer ones ask for CANN
    9.1 (FormatCastKernelNpu.cpp of Ascend/pytorch). So this casts one block.
    """
    import torch_npu

    block = torch.zeros(16, 8, dtype=torch.int32, device="npu")
    size = block.untyped_storage().nbytes()
    try:
        cast = torch_npu.npu_format_cast(block, FRACTAL_NZ, customize_dtype=ACL_INT32)
    except RuntimeError as error:
        if "customize_dtype" not in str(error):
            raise
        return str(error).partition("\n")[0].rstrip(".")
    return "" if cast.untyped_storage().nbytes() == size else "it makes blocks of 16 words, not 8"


def lowers_to_ge(backend: Any) -> bool:
    """Whether a backend of torch.compile is torchair's for GE graphs; False if it does not say.

    Args:
        backend: as Dynamo holds it: torchair's partial function, inside wrappers of torch.
    """
    for _ in range(_WRAPPERS):
        config = getattr(backend, "keywords", {}).get("compiler_config")
        if config is not None:
            return bool(getattr(config.mode, "value", None) == "max-autotune")
        inner = (getattr(backend, name, None) for name in _WRAPPED)
        backend = next((one for one in inner if one is not None), None)
    return False


_WRAPPERS = 8  # more than torch has around each other
_WRAPPED = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn")
