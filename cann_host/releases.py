"""Which release of CANN brought which function. With an older one reported, the function is absent,
and torch_npu takes the way that it has without it, or says that it did not find it.

A function that no public source dates is always here.
"""

from __future__ import annotations

import ctypes
import re

from cann_host.options import CannHostError

__all__ = ["BROUGHT", "hidden", "hide"]

# release: its functions
BROUGHT = {
    # Ascend/pytorch, csrc/core/npu/GetCANNInfo.cpp: not supported before
    "8.1.RC1": ("aclsysGetCANNVersion",),
    # csrc/core/npu/interface/AclInterface.cpp, AclrtPointerGetAttributesExist;
    # csrc/core/npu/NPUGraph.cpp, apply_cache_op_info
    "8.5.0": ("aclrtPointerGetAttributes", "aclrtSetStreamAttribute"),
    # hicann/ops-transformer: posembedding/rope_with_sin_cos_cache has its V2 in 9.0.0, not 8.5.0
    "9.0.0": ("aclnnRopeWithSinCosCacheV2", "aclnnRopeWithSinCosCacheV2GetWorkspaceSize"),
    # hicann/ops-nn: quant/dynamic_quant has aclnn_dynamic_quant_v4.h in 9.1.0 and not in 9.0.0;
    # hicann/ops-transformer: posembedding/kv_rms_norm_rope_cache has aclnnKvRmsNormRopeCacheV2.md
    "9.1.0": (
        "aclnnDynamicQuantV4",
        "aclnnDynamicQuantV4GetWorkspaceSize",
        "aclnnKvRmsNormRopeCacheV2",
        "aclnnKvRmsNormRopeCacheV2GetWorkspaceSize",
    ),
}

_hidden: set[str] = set()  # in this process


def _key(version: str) -> tuple[int, ...]:
    """8.2.RC1 is before 8.2.0, and an alpha before what it becomes."""
    found = re.fullmatch(r"(\d+)\.(\d+)\.(RC)?(\d+)(?:\.alpha(\d+))?", version)
    assert found is not None, version  # options.py has checked it
    major, minor, candidate, number, alpha = found.groups()
    return (
        int(major),
        int(minor),
        int(candidate is None),
        int(number),
        int(alpha is None),
        int(alpha or 0),
    )


def absent(version: str) -> set[str]:
    """The functions that a version of CANN does not have."""
    return {
        symbol
        for release, symbols in BROUGHT.items()
        if _key(version) < _key(release)
        for symbol in symbols
    }


def hide(library: ctypes.CDLL, version: str) -> None:
    """Hide the functions that a version of CANN does not have from the dynamic linker, before
    torch_npu looks for them.

    Raises:
        CannHostError: a symbol cannot be hidden.
    """
    for symbol in absent(version) - _hidden:
        if library.cann_host_hide(ctypes.cast(library[symbol], ctypes.c_void_p), symbol.encode()):
            raise CannHostError(f"{symbol}, which CANN {version} does not have, cannot be hidden")
        _hidden.add(symbol)


def hidden() -> frozenset[str]:
    """The functions that are hidden in this process."""
    return frozenset(_hidden)
