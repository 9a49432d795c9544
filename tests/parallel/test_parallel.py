"""Tensor parallelism: 2 and 4 processes compute what one does.

The ranks are processes of their own (parallel_ranks.py), on the CPU with gloo, and on cann_host's
npu with its HCCL, eagerly and in torchair's graphs.
"""

from __future__ import annotations

import pytest

import cann_host
from support import has
from support.ranks import assert_right, launch

pytestmark = pytest.mark.distributed

needs_cann_host = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
DEVICES = ["cpu", pytest.param("npu", marks=needs_cann_host)]


@pytest.mark.parametrize(
    ("ranks", "device"),
    [
        (2, "cpu"),
        pytest.param(2, "npu", marks=[needs_cann_host, pytest.mark.slow]),
        pytest.param(4, "cpu", marks=pytest.mark.slow),
        pytest.param(4, "npu", marks=[needs_cann_host, pytest.mark.slow]),
    ],
)
def test_every_row_that_can_be_split_equals_one_device(
    ranks: int, device: str, tmp_path, tally
) -> None:
    found = launch("parallel_ranks.py", "values", ranks, tmp_path, device)
    assert_right(found, 400)
    name = f"splits of rows, plans and checkpoints over {ranks} processes on {device}"
    tally(name, len(found[0]))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device: str, tmp_path) -> None:
    assert_right(launch("parallel_ranks.py", "compiled", 2, tmp_path, device), 10)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.skipif(not has.HAS_PASSES, reason="torchair has no register_replacement")
def test_merged(device: str, tmp_path) -> None:
    assert_right(launch("parallel_ranks.py", "merged", 2, tmp_path, device), 15)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_killed_rank_is_an_error_on_the_others(ranks: int, device: str, tmp_path) -> None:
    found = launch("parallel_ranks.py", "killed", ranks, tmp_path, device)
    assert found == [{"killed: error": ""}] * (ranks - 1) + [{}]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_mismatched_shape_is_an_error_on_every_rank(device: str, tmp_path) -> None:
    variables = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"} if device == "cpu" else {}
    found = launch("parallel_ranks.py", "mismatched", 2, tmp_path, device, **variables)
    assert found == [{"mismatched: error": ""}] * 2
