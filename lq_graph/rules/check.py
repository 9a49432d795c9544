"""check(): is this configuration legal, on which products, and if not, why not? Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
from ..kernels import storage_k
from ..reports import styled, table, wrapped
from .advice import nearest_rows
from .cann import CannVersion, parse_cann_version, since_of, target_of
from .plan import Plan, Spec, plan
from .products import get_cann_version, parse_product
from .refusal import refused
from .tables import PRODUCTS, STORAGE_DTYPES, Product, Row, dtype_name, storage_name

__all__ = ["Check", "Verdict", "check"]

_M, _N, _K = 16, 64, 64  # used if the caller gives no shape; any legal sizes would do


# a tensor, a dtype (a shape that fits is assumed), or a dtype with a shape
Argument = Tensor | torch.dtype | tuple[torch.dtype, Sequence[int]]


@dataclass(frozen=True)
class Verdict:
    """The verdict of one product.

    Attributes:
        product: whose table was read.
        plan: what the call would be; None if it is refused.
        error: what `linear_quant` would raise; None if it is legal.
    """

    product: Product
    plan: Plan | None
    error: LinearQuantError | None


@dataclass(frozen=True)
class Check:
    """The answer of `check`; true if at least one checked product takes the call.

    Attributes:
        arguments: dtype and shape of each tensor, given or assumed; None for an absent one.
        output_dtype: of the result.
        verdicts: one for each checked product, in the order of the tables.
        cann: the CANN version; None if it is not known.
    """

    arguments: dict[str, Spec | None]
    output_dtype: torch.dtype
    verdicts: tuple[Verdict, ...]
    cann: CannVersion | None = None

    @property
    def legal_on(self) -> tuple[Product, ...]:
        """The products that take the call."""
        return tuple(verdict.product for verdict in self.verdicts if verdict.plan)

    def __bool__(self) -> bool:
        return bool(self.legal_on)

    def __str__(self) -> str:
        given = [f"{name} {spec}" for name, spec in self.arguments.items() if spec]
        given.append(f"output {dtype_name(self.output_dtype)}")
        cann = f"; CANN {self.cann}" if self.cann else ""
        lines = [*wrapped(", ".join(given) + cann, "  "), ""]
        # products with the same verdict share one line
        answers: dict[str, list[str]] = {}
        for verdict in self.verdicts:
            name = str(verdict.product)
            if verdict.plan:
                answer = (
                    f"yes  {{}}: {dtype_name(self.output_dtype)}{list(verdict.plan.output_shape)}"
                )
                if verdict.plan.cut_scale:
                    answer += "; its kernel keeps the first 19 bits of this scale, others all 32"
            else:
                assert verdict.error is not None and verdict.error.refusal is not None
                answer = f"no   {{}}: {verdict.error.refusal.sentence('the product')}"
            answers.setdefault(answer, []).append(name)
        for answer, names in answers.items():
            text = answer.replace("{}", ", ".join(names), 1)
            first, *more = wrapped(text, " " * 5)
            style = "good" if first.startswith("yes") else "bad"
            lines += [styled(first[:5], style) + first[5:], *more]
        found: dict[Row, dict[Product, str]] = {}
        for verdict in self.verdicts:
            if verdict.plan:
                since = found.setdefault(verdict.plan.row, {})
                since[verdict.product] = verdict.plan.since
        if found:
            lines += ["", "matching row", *_table(found)]
        elif nearest := self.nearest():
            releases = {row: {p: since_of(row, p) for p in row.products} for row in nearest}
            lines += ["", "nearest legal rows, * where they differ"]
            lines += _table(releases, self._given)
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The structure that docs/command_line.md describes."""
        tensors = {
            name: spec and {"dtype": dtype_name(spec.dtype), "shape": list(spec.shape)}
            for name, spec in self.arguments.items()
        }
        return {
            "structure": 1,
            "legal": bool(self),
            "cann": None if self.cann is None else str(self.cann),
            "arguments": tensors,
            "output": dtype_name(self.output_dtype),
            "products": [_as_json(verdict) for verdict in self.verdicts],
        }

    def nearest(self, count: int = 3) -> list[Row]:
        """The rows with the fewest columns to change, over all checked products."""
        x1 = self.arguments["x1"]
        assert x1 is not None
        storages = [x1.dtype] if x1.dtype in STORAGE_DTYPES else list(STORAGE_DTYPES)
        rows = dict.fromkeys(
            row
            for storage in storages
            for verdict in self.verdicts
            for row in nearest_rows(target_of(verdict.product, self.cann), storage, self._given)
        )
        return sorted(rows, key=lambda row: len(row.misses(self._given)))[:count]

    @property
    def _given(self) -> dict[str, torch.dtype | None]:
        tensors = {name: spec and spec.dtype for name, spec in self.arguments.items()}
        return {**tensors, "output_dtype": self.output_dtype}


def check(
    x1: Argument = torch.int8,
    weight: Argument | None = None,
    scale: Argument = torch.float32,
    offset: Argument | None = None,
    pertoken_scale: Argument | None = None,
    bias: Argument | None = None,
    *,
    output_dtype: torch.dtype | None = None,
    product: Product | str | None = None,
    cann: CannVersion | str | None = None,
) -> Check:
    """Check whether `linear_quant` takes a configuration, without running anything.

    Takes the arguments of `linear_quant`. Each may be a tensor (of any device, meta included), a
    dtype, for which a shape that fits is assumed, or a dtype and a shape.

    Args:
        x1, weight, scale, offset, pertoken_scale, bias: see `linear_quant`. weight None: of x1's
            dtype. The others None: absent.
        output_dtype: torch.int8 (also None), float16, bfloat16 or int32.
        product: the product to check, as in `set_product`; None for all products.
        cann: the CANN version, as in `set_cann_version`; None for `get_cann_version()`.

    Returns:
        A Check: true or false, printable, with a verdict for each product.

    Raises:
        LinearQuantValueError: no such product, or not a version of CANN.
        LinearQuantTypeError: an argument that is not a tensor, a dtype, or a dtype and a shape.
    """
    asked = PRODUCTS if product is None else (parse_product(product, "check"),)
    version = get_cann_version() if cann is None else parse_cann_version(cann, "check")
    storage = _dtype("x1", x1)
    given_weight = None if weight is None else _shape(weight)
    given_x1 = _shape(x1)
    words = (given_x1 or given_weight or (storage_k(_K, storage),))[-1:]
    x1_spec = Spec(storage, given_x1 or (_M, *words))
    n = given_weight[-2] if given_weight and len(given_weight) > 1 else _n_of(scale, bias, offset)
    weight_spec = Spec(
        storage if weight is None else _dtype("weight", weight), given_weight or (n, *words)
    )
    arguments: dict[str, Spec | None] = {"x1": x1_spec, "weight": weight_spec}
    m = x1_spec.shape[-2:-1] or (_M,)
    for name, argument, shape in (
        ("scale", scale, (n,)),
        ("offset", offset, (n,)),
        ("pertoken_scale", pertoken_scale, m),
        ("bias", bias, (n,)),
    ):
        arguments[name] = (
            None if argument is None else Spec(_dtype(name, argument), _shape(argument) or shape)
        )
    verdicts = []
    for one in asked:
        try:
            found = plan(**arguments, output_dtype=output_dtype, product=one, cann=version)  # type: ignore[arg-type]
            verdicts.append(Verdict(one, found, None))
        except (LinearQuantTypeError, LinearQuantValueError) as error:
            verdicts.append(Verdict(one, None, error))
    return Check(arguments, output_dtype or torch.int8, tuple(verdicts), version)


def _dtype(name: str, argument: Argument) -> torch.dtype:
    dtype = argument[0] if isinstance(argument, tuple) else argument
    dtype = dtype.dtype if isinstance(dtype, Tensor) else dtype
    if not isinstance(dtype, torch.dtype):
        raise refused(
            LinearQuantTypeError,
            "check",
            name,
            f"{name} is {argument!r}",
            "a tensor, a torch.dtype, or a tuple of a torch.dtype and a shape",
            "pass a dtype, such as torch.int8",
            code=None,
        )
    return dtype


def _shape(argument: Argument) -> tuple[int, ...] | None:
    if isinstance(argument, Tensor):
        return tuple(argument.shape)
    return tuple(argument[1]) if isinstance(argument, tuple) else None


def _n_of(*vectors: Argument | None) -> int:
    """n from a per-channel tensor, if nothing else gives it."""
    for vector in vectors:
        shape = None if vector is None else _shape(vector)
        if shape and shape[-1] > 1:
            return shape[-1]
    return _N


def _as_json(verdict: Verdict) -> dict[str, Any]:
    found: dict[str, Any] = {"product": verdict.product.key, "name": verdict.product.name}
    if verdict.plan:
        return {
            **found,
            "legal": True,
            "output_shape": list(verdict.plan.output_shape),
            "since": verdict.plan.since,
            "source": verdict.plan.row.source,
        }
    return {**found, "legal": False, "why": str(verdict.error)}


def _table(
    rows: Mapping[Row, Mapping[Product, str]], given: dict[str, torch.dtype | None] | None = None
) -> list[str]:
    """Rows of the support table in columns, with the CANN release that brought each to a product;
    with given, a star where a row does not have it."""
    columns = ("scale", "offset", "bias", "pertoken_scale", "output_dtype")
    lines = [["x1, weight", *columns, "since CANN"]]
    for row, releases in rows.items():
        misses = row.misses(given) if given else ()
        cells = [
            ", ".join(map(dtype_name, row.choices(column))) + ("*" if column in misses else "")
            for column in columns
        ]
        storage = storage_name(row.storage)
        if given and given["x1"] != row.storage:
            storage += "*"
        lines.append([storage, *cells, _releases(releases)])
    return table(lines, "  ")


def _releases(releases: Mapping[Product, str]) -> str:
    """ "8.1.RC1 (A2, A3), 9.1.0 (950)"."""
    keys: dict[str, list[str]] = {}
    for product, since in releases.items():
        keys.setdefault(since, []).append(product.key)
    return ", ".join(f"{since} ({', '.join(products)})" for since, products in keys.items())
