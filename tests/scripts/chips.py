"""What the options --soc and --cann-version make of a process: `chips.py FUNCTION`."""

import sys

import torch
import torch_npu

import cann_host


def cann_version() -> None:
    from torch_npu.npu.utils import _is_gte_cann_version, get_cann_version

    print(get_cann_version(), cann_host.info()["cann_version"], _is_gte_cann_version("8.3.RC1"))


def format_cast() -> None:
    """ND to FRACTAL_NZ and back: through aclnn, and through aclop on 310P."""
    torch.npu.config.allow_internal_format = True
    x = torch.arange(64 * 48).to(torch.int8).view(64, 48).npu()
    cast = torch_npu.npu_format_cast(x, 29)
    same = torch.equal(cast.cpu(), x.cpu())
    print(torch.npu.get_device_name(), torch_npu.get_npu_format(cast).name, same)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
