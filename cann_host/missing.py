"""What torch_npu and torchair say if something is missing in the stand-in.

Their texts blame the installation of CANN. Its own sentences are put in their place, or after them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any

__all__ = ["correct", "name_operator", "without_line"]

# torch_npu prints it on stdout when a program ends by an error that is not torch_npu's; after a
# console, an empty line.
_NOT_MINE = re.compile(r"(\[ERROR\] .* ERR99999 UNKNOWN applicaiton exception)?")

_NO_ACLNN = re.compile(r"(aclnn\w+) or \1GetWorkspaceSize not in libopapi\.so")


def correct() -> None:
    """Correct torch_npu, which is imported."""
    _name_atb()
    _name_aclnn()
    _hold_back()


def _name_atb() -> None:
    """Name the library that torch_npu's operators of ATB need. torch_npu keeps the error of its own
    attempt for the first call, without a text."""
    atb: Any = sys.modules.get("torch_npu.op_plugin.atb._atb_ops")
    if getattr(atb, "NNAL_EX", None) is not None:
        atb.NNAL_EX = OSError(
            "cann_host does not have libatb.so, the library of ATB in NNAL: operators such as "
            "torch_npu._npu_reshape_and_cache and _npu_paged_attention are not computed"
        )


def _name_aclnn() -> None:
    """Say after the traceback which operator of libopapi is missing: torch_npu adds that there may
    be no libopapi at all."""
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        hook(kind, error, trace)
        if found := _NO_ACLNN.search(str(error)):
            print(
                f"cann_host: libopapi is here and does not have {found[1]}. With CANN this call is "
                "possible. What to do: another operator for this step, or add this one (README of "
                "cann_host, How to add an aclnn function).",
                file=sys.stderr,
            )

    sys.excepthook = show


def _hold_back() -> None:
    """Hold back the line with which torch_npu marks errors that are not its own."""
    handler: Any = getattr(sys.modules.get("torch_npu.utils._error_code"), "_except_handler", None)
    if handler is None:
        return
    handle: Callable[[], None] = handler.handle_exception

    def handle_exception() -> None:
        with without_line(_NOT_MINE):
            handle()

    handler.handle_exception = handle_exception


def name_operator(converters: ModuleType) -> None:
    """Name the operator of a graph for which torchair has no converter: torchair then asks CANN for
    the operator's definition and, without one, says that CANN may not be installed correctly.

    Args:
        converters: torchair._ge_concrete_graph.fx2ge_converter; changed if it is one that asks.
    """
    asked = "GetRegisteredIrDef, the definitions of CANN's operators, is not in this stand-in"
    validate = getattr(converters, "_validate_ascend_ir", None)
    texts = getattr(converters, "ConverterErrorMsg", None)
    if validate is None or texts is None:
        return
    texts.SO_LOAD_FAILED = f"cann_host: {asked}: torchair.ge.custom_op cannot be used here."

    def _validate_ascend_ir(status: str, name: str) -> None:
        if status == "None":
            raise RuntimeError(
                f"cann_host: the graph has {name}, for which torchair has no converter. {asked}; a "
                f"CANN that has an operator {name} converts it. What to do: {_advice(name)}."
            )
        validate(status, name)

    vars(converters)["_validate_ascend_ir"] = _validate_ascend_ir


def _advice(name: str) -> str:
    if "FusionAttention" in name:  # what scaled_dot_product_attention becomes
        return (
            'attn_implementation="eager" for a model of transformers, or leave the attention out '
            "of the graph"
        )
    return (
        "register a converter (torchair.register_fx_node_ge_converter) to operators that cann_host "
        "has, or leave this call out of the graph"
    )


class _WithoutLine:
    """A text stream that drops a line that matches exactly; the rest goes to the stream behind
    it."""

    def __init__(self, stream: Any, line: re.Pattern[str]) -> None:
        self._stream = stream
        self._line = line
        self._dropped = False

    def write(self, text: str) -> int:
        if self._line.fullmatch(text):
            self._dropped = True
        elif self._dropped and text == "\n":  # print() writes the end of the line separately
            self._dropped = False
        else:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def without_line(line: re.Pattern[str]) -> Iterator[None]:
    """A block that prints lines to stdout, without those that match."""
    stdout = sys.stdout
    sys.stdout = _WithoutLine(stdout, line)
    try:
        yield
    finally:
        sys.stdout = stdout
