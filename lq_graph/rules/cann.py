"""CANN versions: their order, and the tables as a version of CANN has them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from ..errors import LinearQuantValueError
from .refusal import Fix, refused
from .tables import Choice, Product, QuantRow, Row, Since, quant_rows_of, rows_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "ENV_CANN",
    "CannVersion",
    "Target",
    "check_int4_nz",
    "detect_cann",
    "lacks",
    "parse_cann_version",
    "quant_rows_in",
    "read_cann_version",
    "rows_in",
    "since_of",
    "target_of",
    "upgrade",
]

ENV_CANN = "LQ_GRAPH_CANN"

# 8.0.RC3, 8.5.0, 9.0.0-beta.2, 8.2.RC1.alpha003, 8.0.RC2.2
_FORM = re.compile(
    r"(\d+)\.(\d+)\.(RC)?(\d+)(?:[.-]?(alpha|beta|rc)\.?(\d*)|\.(\d+))?", re.IGNORECASE
)
_STAGES = ("alpha", "beta", "rc", "")


@dataclass(frozen=True, order=True)
class CannVersion:
    """A version of CANN. Versions are ordered: 8.0.RC3 < 8.0.0 < 8.1.RC1 < 8.5.0-beta.1 < 8.5.0.

    Attributes:
        release: major, minor, 0 for a release candidate or else 1, its number.
        stage: 0 alpha, 1 beta, 2 rc, 3 the release itself; and its number, or that of a patch.
        text: as it was written.
    """

    release: tuple[int, int, int, int]
    stage: tuple[int, int]
    text: str = field(compare=False)

    def __str__(self) -> str:
        return self.text

    def has(self, since: str) -> bool:
        """Whether it has what a release brought. A version before a release, such as 9.0.0-beta.1,
        counts as the release, because public material does not tell what it has."""
        found = _release(since)
        return self.release >= found.release


def read_cann_version(text: str) -> CannVersion | None:
    """The version that a text names; None if it has no form that the vendor publishes."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        return None
    major, minor, candidate, number, stage, of_stage, patch = found.groups()
    release = (int(major), int(minor), 0 if candidate else 1, int(number))
    return CannVersion(
        release,
        (_STAGES.index((stage or "").lower()), int(of_stage or patch or 0)),
        text.strip(),
    )


def parse_cann_version(version: CannVersion | str, where: str) -> CannVersion:
    """A version, or the version that a text names.

    Args:
        version: what was given.
        where: the function or variable that names it, for the message.

    Raises:
        LinearQuantValueError: not a version of CANN.
    """
    if isinstance(version, CannVersion):
        return version
    found = read_cann_version(version) if isinstance(version, str) else None
    if found is None:
        raise refused(
            LinearQuantValueError,
            where,
            "CANN version",
            f"{version!r} is not a version of CANN",
            "one such as 8.2.RC1, 9.0.0 or 9.1.0-beta.1",
            "name the version that your CANN installation reports",
            code=None,
        )
    return found


@cache
def _release(since: str) -> CannVersion:
    found = read_cann_version(since)
    assert found is not None, since
    return found


def detect_cann() -> CannVersion | None:
    """The version that torch_npu finds; None if torch_npu is not imported, or does not tell. CANN
    tells it from 8.1.RC1 on (GetCANNInfo.cpp, Ascend/pytorch)."""
    ask = getattr(sys.modules.get("torch_npu.npu.utils"), "get_cann_version", None)
    if ask is None:
        return None
    try:
        return read_cann_version(str(ask()))
    except Exception:  # whatever a vendor's version raises: the version is not known
        return None


@dataclass(frozen=True, eq=False)  # one object each: looked up by identity on every call
class Target:
    """What rules apply to: a product, and the CANN version on it; None if it is not known."""

    product: Product
    cann: CannVersion | None


@cache
def target_of(product: Product, cann: CannVersion | None) -> Target:
    """The one Target of a product and a version."""
    return Target(product, cann)


def lacks(target: Target, since: str | None) -> bool:
    """Whether the target's CANN is known to be older than a release."""
    return since is not None and target.cann is not None and not target.cann.has(since)


def upgrade(since: str) -> Fix:
    """The advice to install a newer CANN."""
    return Fix(f"upgrade CANN to {since} or later")


def check_int4_nz(target: Target) -> None:
    """Refuse an int4 weight in FRACTAL_NZ if a newer CANN brought the kernels for it.

    Raises:
        LinearQuantValueError: with the release.
    """
    since = target.product.int4_nz_since
    if since is not None and lacks(target, since):
        raise refused(
            LinearQuantValueError,
            "linear_quant",
            "weight",
            "weight is int32 (int4) in FRACTAL_NZ",
            f"this from CANN {since} on",
            upgrade(since),
            "leave int4_nz False: the weight stays ND",
            product=target.product,
            why=f"this is CANN {target.cann}",
            since=since,
            code=None,
        )


def since_of(
    row: Row | QuantRow, product: Product, given: Mapping[str, torch.dtype | None] | None = None
) -> str:
    """The CANN release that a row needs on a product.

    Args:
        row: of the table.
        product: one that has the row.
        given: the dtypes of a call, by column; without, what came later than the row does not
            count.
    """
    return max((product.since, *_of_row(row.since, product, given)), key=_release)


def _of_row(
    all_since: Iterable[Since],
    product: Product,
    given: Mapping[str, torch.dtype | None] | None = None,
) -> list[str]:
    return [
        since.cann
        for since in all_since
        if (not since.products or product in since.products)
        and (not since.column or (given is not None and given.get(since.column) in since.dtypes))
    ]


@cache
def rows_in(target: Target, storage: torch.dtype | None = None) -> tuple[Row, ...]:
    """The rows of a product, in table order, with the dtypes that its CANN version has."""
    rows = rows_of(target.product, storage)
    return tuple(
        _narrowed(row, target) for row in rows if not lacks(target, since_of(row, target.product))
    )


def _narrowed(row: Row, target: Target) -> Row:
    """A row without the dtypes that came later than the target's CANN version."""
    for since in row.since:
        if since.column and lacks(target, since.cann):
            kept: Choice = tuple(d for d in row.choices(since.column) if d not in since.dtypes)
            row = replace(row, **{since.column: kept})  # type: ignore[arg-type]
    return row


@cache
def quant_rows_in(target: Target, op: str) -> tuple[QuantRow, ...]:
    """The rows of a quantizing operator that a product has with its CANN version."""
    rows = quant_rows_of(target.product, op)
    return tuple(row for row in rows if not lacks(target, since_of(row, target.product)))
