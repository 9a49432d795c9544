"""check_model(): every quantizing call of a model, and the rows of the tables that take it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
from ..fusion.editor import layer_of
from ..modules.linear_quant import LinearQuant
from ..modules.runs import arguments_of, running
from ..reports import counted, folded, table, wrapped
from ..rules.cann import CannVersion, parse_cann_version
from ..rules.plan import Spec
from ..rules.products import get_cann_version, parse_product
from ..rules.tables import PRODUCTS, Product, QuantRow, Row, dtype_name, storage_name
from .dry_run import DryRun, copied, with_values
from .vendor_calls import Asked, is_quantizing, read_call

__all__ = ["CallCheck", "CallVerdict", "ModelCheck", "check_model"]


@dataclass(frozen=True)
class CallVerdict:
    """What one product says to a call.

    Attributes:
        product: whose table was read.
        row: the row that takes the call; None if the call is refused, or of an operator without a
            table (trans_quant_param).
        error: what lq_graph would raise; None if the product takes the call.
    """

    product: Product
    row: Row | QuantRow | None
    error: LinearQuantError | None


@dataclass(frozen=True)
class CallCheck:
    """One call of a quantizing operator.

    Attributes:
        layer: qualified name of the module that makes the call; empty for the model itself.
        operator: with its namespace: "npu.npu_quant_matmul".
        node: name of the call in the FX graph; empty if a module was checked.
        tensors: dtype and shape of the arguments, None for an absent one. They have the names of
            lq_graph's operators: the x2 of npu_quant_matmul is `weight`, (..., n, k).
        output_dtype: of the result; int32 for packed int4.
        verdicts: one for each checked product; empty if the call is not covered.
        why_not: why no rules of lq_graph are about the call; empty if some are.
        note: what a graph does with the call that eager torch_npu does not; empty if they agree.
    """

    layer: str
    operator: str
    node: str
    tensors: dict[str, Spec | None]
    output_dtype: torch.dtype
    verdicts: tuple[CallVerdict, ...]
    why_not: str
    note: str = ""

    @property
    def legal_on(self) -> tuple[Product, ...]:
        """The products that take the call."""
        return tuple(verdict.product for verdict in self.verdicts if verdict.error is None)

    @property
    def row(self) -> str:
        """The row of the first product that takes the call, in words; "-" if none does."""
        rows = [verdict.row for verdict in self.verdicts if verdict.row is not None]
        if not rows:
            return "any" if self.legal_on else "-"
        row = rows[0]
        if isinstance(row, Row):
            return f"{storage_name(row.storage)} to {dtype_name(row.output)}"
        return f"{dtype_name(self._first.dtype)} to {storage_name(row.output_dtype)}"

    @property
    def _first(self) -> Spec:
        spec = next(iter(self.tensors.values()))
        assert spec is not None
        return spec

    def as_json(self) -> dict[str, Any]:
        """The call as JSON holds it."""
        return {
            "layer": self.layer,
            "operator": self.operator,
            "node": self.node,
            "tensors": {name: str(spec) for name, spec in self.tensors.items() if spec},
            "output_dtype": dtype_name(self.output_dtype),
            "legal_on": [product.key for product in self.legal_on],
            "refused": {
                verdict.product.key: str(verdict.error)
                for verdict in self.verdicts
                if verdict.error is not None
            },
            "row": self.row,
            "not_covered": self.why_not,
            "note": self.note,
        }


@dataclass(frozen=True)
class ModelCheck:
    """The answer of `check_model`; true if at least one checked product takes every call that rules
    are about, and the run came to its end. Prints as a table; `as_json()` gives all of it.

    Attributes:
        calls: in the order of the run.
        products: that were checked.
        cann: the CANN version; None if it is not known.
        stopped: why the run did not come to its end, with the module; empty if it did. Calls after
            that are not here.
        assumed: the sizes that a graph leaves open, and what they were taken as.
        not_called: LinearQuant layers that the run did not reach.
    """

    calls: tuple[CallCheck, ...]
    products: tuple[Product, ...]
    cann: CannVersion | None
    stopped: str
    assumed: dict[str, int]
    not_called: tuple[str, ...]

    @property
    def legal_on(self) -> tuple[Product, ...]:
        """The products that take every call that rules are about; none if there is no such call."""
        covered = self._covered
        if not covered:
            return ()
        return tuple(p for p in self.products if all(p in call.legal_on for call in covered))

    @property
    def _covered(self) -> list[CallCheck]:
        return [call for call in self.calls if not call.why_not]

    def __bool__(self) -> bool:
        return bool(self.legal_on) and not self.stopped

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        return {
            "legal": bool(self),
            "legal_on": [product.key for product in self.legal_on],
            "products": [product.key for product in self.products],
            "cann": None if self.cann is None else str(self.cann),
            "calls": [call.as_json() for call in self.calls],
            "stopped": self.stopped,
            "assumed": self.assumed,
            "not_called": list(self.not_called),
        }

    def __str__(self) -> str:
        where = ", ".join(map(str, self.legal_on))
        one = self.products[0] if len(self.products) == 1 else "any product"
        answer = f"all legal on {where}" if where else f"not all legal on {one}"
        cann = f"; CANN {self.cann}" if self.cann else ""
        count, covered = len(self.calls), len(self._covered)
        found = f"{count:,} calls; " if count else "no quantizing call"
        if count:
            found += answer if covered else "no rules are about any of them"
            if 0 < covered < count:
                found += f", of the {covered:,} that rules are about"
        lines = wrapped(found + cann)
        if self.calls:
            lines += ["", *table(self._rows()), *self._details()]
        if self.assumed:
            sizes = ", ".join(f"{name} as {size}" for name, size in self.assumed.items())
            lines += ["", *wrapped(f"sizes that the graph leaves open were taken: {sizes}")]
        if self.not_called:
            names = ", ".join(counted(group) for group in folded(self.not_called, str))
            lines += ["", *wrapped(f"not called, and so not checked: {names}", "  ")]
        if self.stopped:
            lines += ["", *wrapped(f"the run stopped, calls after it are missing: {self.stopped}")]
        return "\n".join(lines)

    def _groups(self) -> list[list[CallCheck]]:
        return folded(
            self.calls,
            lambda call: call.layer,
            lambda call: (call.operator, str(call.tensors), call.output_dtype, call.why_not),
        )

    def _rows(self) -> list[list[object]]:
        rows: list[list[object]] = [["layer", "call", "row", *(p.key for p in self.products)]]
        for group in self._groups():
            call = group[0]
            row = "not covered" if call.why_not else call.row
            verdicts = {v.product: "yes" if v.error is None else "no" for v in call.verdicts}
            rows.append(
                [
                    counted([one.layer for one in group]) or "(model)",
                    call.operator.partition(".")[2] or call.operator,
                    row,
                    *(verdicts.get(product, "?") for product in self.products),
                ]
            )
        return rows

    def _details(self) -> Iterator[str]:
        """The sentences about each call; equal ones once."""
        for group in self._groups():
            call = group[0]
            said: dict[str, list[str]] = {}
            if call.why_not:
                said[f"not covered: {call.why_not}"] = []
            for verdict in call.verdicts:
                if verdict.error is not None and verdict.error.refusal is not None:
                    sentence = verdict.error.refusal.sentence("the product")
                    said.setdefault(sentence, []).append(str(verdict.product))
            if call.note:
                said[f"note {call.note}"] = []
            if not said:
                continue
            given = [f"{name} {spec}" for name, spec in call.tensors.items() if spec]
            if call.verdicts:
                given.append(f"output {dtype_name(call.output_dtype)}")
            name = counted([one.layer for one in group]) or "(model)"
            where = f" ({call.node})" if call.node and len(group) == 1 else ""
            yield ""
            yield f"{name}: {call.operator}{where}"
            yield from wrapped(f"  {', '.join(given)}", "  ")
            for sentence, products in said.items():
                names = f"no   {', '.join(products)}: " if products else ""
                yield from wrapped(f"  {names}{sentence}", " " * 7)


def check_model(
    model: nn.Module,
    inputs: Any = None,
    *,
    product: Product | str | None = None,
    cann: CannVersion | str | None = None,
) -> ModelCheck:
    """Check every quantizing call of a model: which row of the support tables takes it, or why it
    is refused, before a device refuses it with 161002.

    The calls are those of lq_graph's operators and of torch_npu's npu_quant_matmul,
    npu_dynamic_quant, npu_quantize and npu_trans_quant_param, whoever makes them: a layer of
    lq_graph, a module of torch_npu, code of your own. Other calls of torch_npu with "quant" in
    their name are listed as not covered.

    A copy of the model is run once without its weights: calls on large tensors are not computed,
    and neither is a quantizing call, so that a refused one does not end the run. The model may be
    on CPU, meta or NPU; no device is used. A branch that depends on values, such as the choice of
    experts, goes one way. A model that was compiled runs uncompiled, so a graph break hides
    nothing. That all tensors are on one device is not checked.

    Args:
        model: any module; or a GraphModule, such as torch.export's `program.module()`.
        inputs: what to call it with: a tensor as the only argument, a tuple or list by position, a
            mapping by keyword. Tensors on meta, and `lq_graph.rules.plan.Spec`, become zeros. May
            be absent for a GraphModule whose placeholders have their values (`node.meta["val"]`);
            sizes that are symbols there are taken as in its trace.
        product: the product to check, as in `set_product`; None for all products.
        cann: the CANN version, as in `set_cann_version`; None for `get_cann_version()`.

    Returns:
        A ModelCheck: true or false, printable, with one CallCheck for each call.

    Raises:
        LinearQuantTypeError: model is no module, or inputs are something else.
        LinearQuantValueError: no such product, not a version of CANN, no inputs, or the run made no
            quantizing call.
    """
    if not isinstance(model, nn.Module):
        raise LinearQuantTypeError(
            f"check_model: model is a {type(model).__name__}; allowed is a module. What to do: "
            "lq_graph.check takes the tensors of one call."
        )
    products = PRODUCTS if product is None else (parse_product(product, "check_model"),)
    version = get_cann_version() if cann is None else parse_cann_version(cann, "check_model")
    assumed: dict[str, int] = {}
    args: Sequence[Any]
    kwargs: dict[str, Any]
    if inputs is None:
        args, kwargs = _placeholders(model, assumed), {}
    else:
        given = [inputs] if isinstance(inputs, Spec) else inputs
        args, kwargs = arguments_of(given, "check_model: inputs are")
    watch = _Watch()
    stopped = _run(copied(model), args, kwargs, watch)
    if not watch.calls and not stopped:
        raise LinearQuantValueError(
            "check_model: no quantizing call was made. What to do: quantize the model first, or "
            "pass inputs that reach its quantized layers."
        )
    called = {layer for layer, *_ in watch.calls}
    layers = [name for name, module in model.named_modules() if isinstance(module, LinearQuant)]
    return ModelCheck(
        tuple(_checked(*call, products, version) for call in watch.calls),
        tuple(products),
        version,
        stopped,
        assumed,
        tuple(name for name in layers if name not in called),
    )


def _checked(
    layer: str,
    operator: str,
    node: str,
    asked: Asked,
    products: Sequence[Product],
    cann: CannVersion | None,
) -> CallCheck:
    verdicts = []
    for product in () if asked.why_not else products:
        try:
            verdicts.append(CallVerdict(product, asked.decide(product, cann), None))
        except LinearQuantError as error:
            if error.refusal is not None:
                own = replace(error.refusal, operator=operator.partition(".")[2])
                error = own.error(type(error)).in_layer("check_model", layer)
            verdicts.append(CallVerdict(product, None, error))
    return CallCheck(
        layer,
        operator,
        node,
        asked.tensors,
        asked.output_dtype,
        tuple(verdicts),
        asked.why_not,
        _note(operator, asked, verdicts),
    )


def _note(operator: str, asked: Asked, verdicts: list[CallVerdict]) -> str:
    """torch_npu itself packs a float32 scale in an eager call; torchair's converter does not."""
    scale = asked.tensors.get("scale")
    rows = [verdict.row for verdict in verdicts if isinstance(verdict.row, Row)]
    if (
        operator == "npu.npu_quant_matmul"
        and scale is not None
        and scale.dtype == torch.float32
        and any(row.folds_scale for row in rows)
    ):
        return (
            "in a GE graph CANN refuses the float32 scale (561002). What to do: pack it first, "
            "with npu_trans_quant_param or use_internal_format_weight, or convert the layer with "
            "lq_graph.convert."
        )
    return ""


# ---- the run ----


class _Watch(DryRun):
    """Notes the quantizing calls, and computes none of them.

    Attributes:
        calls: layer, operator, node of the graph, and the call as the rules read it.
        layers: names of the modules that are running.
        node: of the graph that is running.
        failed: the last exception that left a module, and the innermost module that it left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, str, Asked]] = []
        self.layers: list[str] = []
        self.node: fx.Node | None = None
        self.failed: tuple[BaseException | None, str] = None, ""

    @property
    def layer(self) -> str:
        """The module that is running."""
        inner = self.layers[-1] if self.layers else ""
        return inner or (layer_of(self.node) if self.node is not None else "")

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        namespace, name = func.namespace, func._opname
        if is_quantizing(namespace, name):
            arguments = (argument.name for argument in func._schema.arguments)
            asked = read_call(
                namespace, name, {**dict(zip(arguments, args, strict=False)), **kwargs}
            )
            node = "" if self.node is None else self.node.name
            self.calls.append((self.layer, f"{namespace}.{name}", node, asked))
            if asked.results:
                made = [self.made(*spec) for spec in asked.results]
                return made[0] if len(func._schema.returns) == 1 else tuple(made)
        if namespace == "npu":  # no CPU has a kernel of it
            return self.not_computed(func, args, kwargs)
        return super().call(func, args, kwargs)


def _run(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], watch: _Watch) -> str:
    """Run a model; returns why it stopped."""
    args = [with_values(one, "cpu") for one in args]
    kwargs = {name: with_values(one, "cpu") for name, one in kwargs.items()}
    try:
        with running(model), _named(model, watch), watch:
            if isinstance(model, fx.GraphModule) and not kwargs:
                _Interpreter(model, watch).run(*args)
            else:
                model(*args, **kwargs)
    except Exception as error:  # a model may do anything
        text = next(iter(str(error).splitlines()), "")
        where = watch.failed[1] if watch.failed[0] is error else watch.layer
        if isinstance(error, ImportError) and "torch_npu" not in sys.modules:
            text += ". What to do: if torch_npu lacks CANN here, run it under `python -m cann_host`"
        return f"{where or 'the model'}: {type(error).__name__}: {text}"
    return ""


@contextmanager
def _named(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """A block in which the watch knows which module is running."""

    def enter(name: str) -> Any:
        return lambda *_: watch.layers.append(name)

    def leave(*_: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and error is not watch.failed[0]:
            watch.failed = error, watch.layer
        watch.layers.pop()

    with ExitStack() as undo:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            undo.callback(module.register_forward_pre_hook(enter(name)).remove)
            undo.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


class _Interpreter(fx.Interpreter):
    """Tells the watch which node runs."""

    def __init__(self, module: fx.GraphModule, watch: _Watch) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        self._watch.node = n
        return super().run_node(n)


def _placeholders(model: nn.Module, assumed: dict[str, int]) -> list[Any]:
    """Inputs of a graph, from the values that its trace noted. `assumed` gets the symbols."""
    if not isinstance(model, fx.GraphModule):
        raise LinearQuantValueError(
            "check_model: inputs are absent; a module needs them. What to do: pass what to call "
            "the model with, on any device."
        )

    def number(size: Any) -> int:
        if isinstance(size, int):
            return size
        hint = getattr(size.node, "hint", None)
        if hint is None:
            raise LinearQuantValueError(
                f"check_model: the graph does not say what size {size} is. What to do: pass inputs."
            )
        assumed[str(size)] = int(hint)
        return int(hint)

    found: list[Any] = []
    for node in model.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, Tensor):
            found.append(Spec(value.dtype, tuple(number(size) for size in value.shape)))
        elif isinstance(value, torch.SymInt):
            found.append(number(value))
        elif value is None and "val" not in node.meta:
            raise LinearQuantValueError(
                f"check_model: inputs are absent, and placeholder {node.name} of the graph has no "
                "value. What to do: pass inputs."
            )
        else:
            found.append(value)
    return found
