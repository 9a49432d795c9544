"""Every private name of torch that the backends use, and what differs between its versions.

Known to work with torch 2.7.1 to 2.14. If versions differ, test here which name exists; never test
the version number. `kernels` imports nothing else of lq_graph, so it has its own such module,
kernels/symbolic.py. torchair's private names are in converters/_torchair.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import FuncTorchInterpreter, coerce_cinterpreter
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.autograd import forward_ad  # its `_current_level` is private
from torch.utils import _pytree as pytree

from ..errors import LinearQuantError

__all__ = [
    "FuncTorchInterpreter",
    "OpOverload",
    "TraceContext",
    "add_inductor_kernel",
    "add_inductor_pass",
    "backend_of",
    "coerce_cinterpreter",
    "detect_fake_mode",
    "error_of_trace",
    "excluded",
    "fakes_of",
    "forward_ad",
    "functorch",
    "is_followed",
    "is_profiled",
    "is_transformed",
    "modules_of",
    "patterns_of_call",
    "pytree",
    "run_as_it_is",
]

E = TypeVar("E", bound=LinearQuantError)
TraceContext = Any  # torch._dynamo.comptime.ComptimeContext; importing it takes a second


def excluded(key: str) -> AbstractContextManager[None]:
    """A block in which the dispatcher skips the kernels of a dispatch key."""
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    )
    return guard


_modes = torch._C._len_torch_dispatch_stack
_transforms = functorch.peek_interpreter_stack
_tracer = torch._C._get_tracing_state


def is_followed() -> bool:
    """Whether a mode, a transform of torch.func or torch.jit.trace follows this thread's calls of
    operators."""
    return bool(_modes()) or _transforms() is not None or _tracer() is not None


def is_transformed() -> bool:
    """Whether a transform of torch.func is active in this thread."""
    return _transforms() is not None


is_profiled = torch._C._autograd._profiler_enabled


def patterns_of_call(op: OpOverload, name: str) -> list[Any]:
    """Patterns of torch's matcher: any call of an operator, its first argument named. A pattern
    matches calls with one number of positional arguments."""
    from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, Ignored, KeywordArg

    positional = [arg for arg in op._schema.arguments if not arg.kwarg_only]
    least = sum(not arg.has_default_value() for arg in positional)
    return [
        CallFunction(op, KeywordArg(name), *(Ignored() for _ in range(1, count)), _users=MULTIPLE)
        for count in range(least, len(positional) + 1)
    ]


def add_inductor_pass(stage: str, name: str, patterns: list[Any], run: Callable[..., None]) -> None:
    """Add a pass over the graphs that Inductor compiles; nothing if this Inductor has no list of
    passes.

    Args:
        stage: "joint_graph", before forward and backward are parted, or "post_grad".
        name: of the pass.
        patterns: what it looks for.
        run: called with each match, and the pattern's named parts. It may change the graph.
    """
    from torch._inductor import pattern_matcher

    passes = getattr(import_module(f"torch._inductor.fx_passes.{stage}"), "pass_patterns", None)
    if not isinstance(passes, list):
        return
    added = pattern_matcher.PatternMatcherPass(pass_name=name)
    for pattern in patterns:
        pattern_matcher.register_graph_pattern(pattern, pass_dict=added)(run)
    passes.append(added)


def add_inductor_kernel(op: OpOverload, kernel: str) -> None:
    """Let Inductor's programs call a function in place of an operator of matrices (m, k) and (n, k)
    that returns (m, n): the dispatcher takes as long as a small layer. A program imports the
    function by itself, because torch keeps programs for other processes.

    Args:
        op: the operator; its first two arguments are the matrices, and output_dtype one of the
            others.
        kernel: "module:function". The function takes the tensors that are given, then for each
            positional argument whether it is given, then the output's dtype; and the output as
            `out`.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    module, _, function = kernel.partition(":")
    name = f"{op.namespace}_{op._opname}"

    class Call(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            wrapper.add_import_once(f"from {module} import {function} as {name}")
            super().codegen(wrapper)

    by_op = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(*args: Any, output_dtype: torch.dtype | None = None) -> Any:
        if V.graph.cpp_wrapper:  # the program is in C++
            return by_op(*args, output_dtype=output_dtype)
        given = [ir.ExternKernel.realize_input(arg) for arg in args if arg is not None]
        size = [args[0].get_size()[0], args[1].get_size()[0]]
        dtype = torch.int8 if output_dtype is None else output_dtype
        call = Call(
            layout=ir.FixedLayout(args[0].get_device(), dtype, size),
            inputs=given,
            constant_args=(tuple(arg is not None for arg in args), dtype),
            python_kernel_name=name,
        )
        return ir.TensorBox.create(call)

    lowering.register_lowering(op, type_promotion_kind=None)(lower)


def run_as_it_is(function: Callable[..., Any]) -> None:
    """Tell Dynamo not to compile a function that runs between graphs.

    torch.compiler.disable would import Dynamo, which takes a second, and would stop a trace.
    """
    frames = torch._C._dynamo.eval_frame
    both = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    frames.set_code_exec_strategy(function.__code__, both)


def fakes_of(arguments: Any) -> tuple[Any, ...] | None:
    """The values of a tuple that Dynamo traces, fake tensors among them; None if one of its tensors
    is something else, as a distributed tensor.

    Args:
        arguments: a variable, as a TraceContext gives it.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    def value(proxy: Any) -> Any:
        return proxy.node.meta["example_value"] if isinstance(proxy, torch.fx.Proxy) else proxy

    found = pytree.tree_map(value, tuple(arguments.as_proxy()))
    tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    known: tuple[Any, ...] = found
    return known if all(isinstance(one, FakeTensor) for one in tensors) else None


def modules_of(trace: TraceContext) -> list[tuple[str, type]]:
    """The modules that Dynamo is in, below the compiled one, the outermost first: how Dynamo writes
    each, and its class. Empty if this Dynamo does not say."""
    try:
        tracer = trace._i_will_not_complain_if_bc_breaks_InstructionTranslator()
        return [(str(path), kind) for path, kind in tracer.nn_module_stack.values()]
    except Exception:
        return []


def backend_of(trace: TraceContext) -> Any:
    """The backend that Dynamo traces for; None if this Dynamo does not say."""
    try:
        tracer = trace._i_will_not_complain_if_bc_breaks_InstructionTranslator()
        return tracer.output.compiler_fn
    except Exception:
        return None


def error_of_trace(error: E) -> E:
    """The error as one that Dynamo lets through, without its own frames, when it is raised beside
    the graph."""
    from torch._dynamo import exc

    passes = getattr(exc, "ShortenTraceback", None)
    if passes is None:
        return error
    kind: Any = type(error)
    found: E = _traced_class(kind, passes)(str(error))
    found.refusal, found.layer = error.refusal, error.layer
    return found


def _without_frames(error: BaseException) -> BaseException:
    """The error without the frames of Dynamo, unless TORCHDYNAMO_VERBOSE asks for them."""
    return error if torch._dynamo.config.verbose else error.with_traceback(None)


@cache
def _traced_class(kind: type[LinearQuantError], passes: type[Exception]) -> Any:
    """A class of errors that is both."""

    start_of_passes: Any = passes.__init__

    def start(self: Any, *args: Any) -> None:
        start_of_passes(self, *args, first_useful_frame=None)  # what Dynamo reads of its errors

    names = {
        "__init__": start,
        "__reduce__": lambda self: (
            kind,
            self.args,
            {"refusal": self.refusal, "layer": self.layer},
        ),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "remove_dynamo_frames": _without_frames,
    }
    return type(kind.__name__, (kind, passes), names)
