"""Options of the stand-in, for `activate` and the launcher, and their variables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

__all__ = ["VARIABLES", "CannHostError", "Fault", "Options", "parse_faults"]


class CannHostError(RuntimeError):
    """The stand-in cannot do this; the text says why and what to do."""

    __module__ = "cann_host"  # where it is public


# option: (variable, form of its value, help)
VARIABLES = {
    "soc": ("CANN_HOST_SOC", "NAME", "the chip to report, as CANN names it"),
    "cann_version": ("CANN_HOST_CANN_VERSION", "VERSION", "the CANN version to report"),
    "devices": ("CANN_HOST_DEVICES", "COUNT", "how many devices there are"),
    "memory": (
        "CANN_HOST_MEMORY",
        "SIZE",
        "bytes of each device, such as 8GiB; an allocation beyond it is out of memory",
    ),
    "streams": (
        "CANN_HOST_STREAMS",
        "now|late",
        "when work on a stream is done: before the launch returns, or only when the program "
        "waits for it, which shows a forgotten wait",
    ),
    "fail": (
        "CANN_HOST_FAIL",
        "SYMBOL:CODE[@N],...",
        "calls that fail: aclnnQuantMatmulV5:161002@3 is the third call of that symbol",
    ),
    "overruns": (
        "CANN_HOST_OVERRUNS",
        "warn|refuse",
        "if CANN's kernel writes past its result without an error: compute what the device reads "
        "afterwards, with a RuntimeWarning, or refuse",
    ),
    "fill": (
        "CANN_HOST_FILL",
        "nan|zero|BYTE",
        "what each byte of new device memory is: nan (0xFF, a NaN of every floating dtype), zero, "
        "or a number such as 0xAB; torch_npu then keeps no freed memory for the next tensor",
    ),
}

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_FILLS = {"nan": 0xFF, "zero": 0}
MOST_DEVICES = 64
MOST_MEMORY = (1 << 63) - 1  # torch keeps sizes as int64


@dataclass(frozen=True)
class Options:
    """Options of the stand-in.

    Attributes:
        soc: the chip to report, as CANN names it.
        cann_version: the CANN version to report.
        devices: number of devices.
        memory: bytes of each; 0 shares the host's memory among them.
        streams: "now" or "late", see `VARIABLES`.
        fail: calls that fail, see `parse_faults`.
        overruns: "warn" or "refuse", see `VARIABLES`.
        fill: "nan", "zero" or the value of a byte as text; empty leaves new memory as it is.
    """

    soc: str = "Ascend910B2"
    cann_version: str = "9.1.0"
    devices: int = 1
    memory: int = 0
    streams: str = "now"
    fail: str = ""
    overruns: str = "warn"
    fill: str = ""

    @property
    def fill_byte(self) -> int:
        """The byte of `fill`; -1 for none."""
        byte = _FILLS.get(self.fill, _byte(self.fill))
        return -1 if byte is None else byte

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Options from the arguments, else from the variables, else the defaults.

        Raises:
            CannHostError: a value is not allowed.
        """
        values: dict[str, Any] = {}
        for name, (variable, _, _) in VARIABLES.items():
            value, source = given.get(name), name
            if value is None:
                value, source = os.environ.get(variable), variable
            if value not in (None, ""):
                values[name] = _READERS[name](str(value).strip(), source)
        return cls(**values)

    def variables(self) -> dict[str, str]:
        """The variables with which another process gets the same options."""
        default = Options()
        return {
            VARIABLES[field.name][0]: str(asdict(self)[field.name])
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        }


# The chips that torch_npu knows and cann_host has rules for (rules/products.py).
_SOC = re.compile(
    r"Ascend910B([1-4]|2C|4-1)|Ascend910_93(62|63|72|81|82|91|92)|Ascend310P[123457]|"
    r"Ascend950[0-9A-Za-z_]{0,40}"
)


def _soc(text: str, source: str) -> str:
    if not _SOC.fullmatch(text):
        raise CannHostError(
            f"{source} is {text!r}; a chip is Ascend910B1 to B4, B2C or B4-1, Ascend910_9362, "
            "9363, 9372, 9381, 9382, 9391 or 9392, Ascend310P1 to P5 or P7, or Ascend950 with any "
            "ending"
        )
    return text


def _version(text: str, source: str) -> str:
    if not re.fullmatch(r"\d{1,3}\.\d{1,3}\.(RC)?\d{1,3}(\.alpha\d{1,3})?", text):
        raise CannHostError(f"{source} is {text!r}; a CANN version is like 9.1.0 or 8.2.RC1")
    return text


def _devices(text: str, source: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or not 1 <= int(text) <= MOST_DEVICES:
        raise CannHostError(f"{source} is {text!r}; it must be a number from 1 to {MOST_DEVICES}")
    return int(text)


def _memory(text: str, source: str) -> int:
    found = re.fullmatch(r"(\d{1,40}(?:\.\d{1,40})?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    size = int(Fraction(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not 1 <= size <= MOST_MEMORY:
        raise CannHostError(
            f"{source} is {text!r}; a size is like 8GiB, 512MiB or 1073741824, from 1 to "
            f"{MOST_MEMORY} bytes"
        )
    return size


def _streams(text: str, source: str) -> str:
    if text not in ("now", "late"):
        raise CannHostError(f"{source} is {text!r}; it must be now or late")
    return text


def _overruns(text: str, source: str) -> str:
    if text not in ("warn", "refuse"):
        raise CannHostError(f"{source} is {text!r}; it must be warn or refuse")
    return text


def _fill(text: str, source: str) -> str:
    if text not in _FILLS and _byte(text) is None:
        raise CannHostError(
            f"{source} is {text!r}; it must be nan, zero, or a byte, such as 0xAB or 171"
        )
    return text


def _byte(text: str) -> int | None:
    """0xAB, or 171."""
    if not re.fullmatch(r"0[xX][0-9A-Fa-f]{1,2}|\d{1,3}", text):
        return None
    value = int(text, 16 if text[1:2] in ("x", "X") else 10)
    return value if value <= 255 else None


def _fail(text: str, source: str) -> str:
    parse_faults(text, source)
    return text


_READERS: dict[str, Callable[[str, str], Any]] = {
    "soc": _soc,
    "cann_version": _version,
    "devices": _devices,
    "memory": _memory,
    "streams": _streams,
    "fail": _fail,
    "overruns": _overruns,
    "fill": _fill,
}


@dataclass(frozen=True)
class Fault:
    """A call that will fail.

    Attributes:
        symbol: a function of CANN, or ge.load, ge.add, ge.compile, ge.run.
        code: the code that it returns and with which its text begins: a number, or for ge a text
            such as EZ9999.
        call: the number of the call, from 1; 0 for every call.
    """

    symbol: str
    code: str
    call: int

    @property
    def number(self) -> int:
        """The code as a function of CANN returns it; the graph engine has one code for failure."""
        return int(self.code) if self.code.isdecimal() else 1


def parse_faults(text: str, source: str = "fail") -> list[Fault]:
    """Read `symbol:code@n,...`; without @n every call fails.

    Raises:
        CannHostError: the text does not have that form.
    """
    faults = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)?):([A-Z]{0,2}\d{1,6})(?:@(\d{1,9}))?", part)
        if not found or (found[3] and int(found[3]) == 0) or found[2].strip("0") == "":
            raise CannHostError(
                f"{source} has {part!r}; a fault is SYMBOL:CODE or SYMBOL:CODE@N, such as "
                "aclnnQuantMatmulV5:161002@3 for the third call, or ge.compile:EZ9999"
            )
        if not found[2].isdecimal() and not found[1].startswith("ge."):
            raise CannHostError(
                f"{source} has {part!r}; {found[1]} returns a number, such as 161002 or 507015"
            )
        faults.append(Fault(found[1], found[2], int(found[3] or 0)))
    return faults
