"""Limits of cores: a stream's, else its device's, else all."""

from __future__ import annotations

import ctypes

import pytest
import torch

import cann_host

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
ALL = {"cube_core_num": 24, "vector_core_num": 48}  # of an Ascend910B

if not hasattr(torch.npu, "set_stream_limit"):
    pytest.skip("this torch_npu has no limits of streams", allow_module_level=True)


def test_limits_are_kept_and_reported(library: ctypes.CDLL) -> None:
    torch.ones(1, device="npu")
    device, stream = torch.npu.current_device(), torch.npu.Stream()
    try:
        assert torch.npu.get_device_limit(device) == ALL
        assert torch.npu.get_stream_limit(stream) == ALL
        for kind, cores in enumerate((12, 20)):  # torch_npu sets a device's limit once only
            assert library.aclrtSetDeviceResLimit(device, kind, cores) == 0
        assert torch.npu.get_stream_limit(stream) == {"cube_core_num": 12, "vector_core_num": 20}
        torch.npu.set_stream_limit(stream, 3, 4)
        limits = {"cube_core_num": 3, "vector_core_num": 4}
        assert torch.npu.get_stream_limit(stream) == limits
        assert torch.npu.get_device_limit(device)["cube_core_num"] == 12
        with torch.npu.stream(stream):  # torch_npu now tells each launch's thread
            assert (torch.ones(3, device="npu") * 2).tolist() == [2.0, 2.0, 2.0]
        torch.npu.reset_stream_limit(stream)
        assert torch.npu.get_stream_limit(stream)["cube_core_num"] == 12
    finally:
        assert library.aclrtResetDeviceResLimit(device) == 0
    assert torch.npu.get_stream_limit(stream) == ALL


@pytest.mark.parametrize(("cube", "vector"), [(25, 48), (24, 49), (0, 1)])
def test_more_cores_than_the_device_has_are_refused(cube: int, vector: int) -> None:
    torch.ones(1, device="npu")
    stream = torch.npu.Stream()
    before = torch.npu.get_stream_limit(stream)
    with pytest.raises(RuntimeError):
        torch.npu.set_stream_limit(stream, cube, vector)
    torch.npu.reset_stream_limit(stream)
    assert torch.npu.get_stream_limit(stream) == before
