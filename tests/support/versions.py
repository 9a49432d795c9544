"""The torch_npu versions that noxfile.py runs, and whose wheels check_wheels.py reads."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["VERSIONS", "Version"]


class Version(NamedTuple):
    torch_npu: str
    torch: str
    python: str


# Each Python from 3.10 to 3.13 is met, and both trains of 2.7.1 to 2.10.0: as first released, and
# the later `.postN`, which have the operators of 2.13.0.
VERSIONS = (
    Version("2.7.1", "2.7.1", "3.10"),
    Version("2.7.1.post11", "2.7.1", "3.10"),
    Version("2.8.0", "2.8.0", "3.10"),
    Version("2.8.0.post4", "2.8.0", "3.10"),
    Version("2.8.0.post5", "2.8.0", "3.10"),
    Version("2.9.0", "2.9.0", "3.11"),
    Version("2.9.0.post9", "2.9.0", "3.11"),
    Version("2.10.0", "2.10.0", "3.11"),
    Version("2.10.0.post4", "2.10.0", "3.11"),
    Version("2.10.0.post7", "2.10.0", "3.11"),
    Version("2.11.0.post3", "2.11.0", "3.10"),
    Version("2.12.0.post3", "2.12.0", "3.12"),
    Version("2.13.0", "2.13.0", "3.12"),
    Version("2.14.0", "2.14.0", "3.13"),
)
