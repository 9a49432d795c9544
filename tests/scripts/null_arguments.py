"""Null pointers in calls of CANN's functions: `null_arguments.py FUNCTION [ARGUMENTS]`."""

import ctypes
import json
import os
import sys
from typing import Any

import torch

import cann_host

P = ctypes.c_void_p

# a parameter's type, without const: what a caller passes
TYPES = {
    "aclTensor*": "tensor",
    "aclTensorList*": "tensors",
    "aclIntArray*": "array",
    "aclBoolArray*": "flags",
    "aclScalar*": "scalar",
    "aclOpExecutor*": "executor",
    "aclTensorDesc*": "desc",
    "aclDataBuffer*": "buffer",
}


def all_null() -> None:
    """Prints the functions that end the process when all arguments are null."""
    torch.npu.set_device(0)
    symbols = [symbol for _, symbol, _ in cann_host.entries() if "." not in symbol]
    for symbol in symbols:
        pid = os.fork()
        if not pid:
            getattr(cann_host.runtime.current().library, symbol)(*[P(None)] * 80)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            print(symbol)
    print(len(symbols) > 150)


class Arguments:
    """Good values for any parameter."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.x = torch.zeros(64, device="npu")
        self.page = ctypes.create_string_buffer(1 << 16)
        root, comm, stream, event = ctypes.create_string_buffer(4108), P(), P(), P()
        lib.HcclGetRootInfo(root)
        lib.HcclCommInitRootInfo(1, root, 0, ctypes.byref(comm))
        lib.aclrtCreateStream(ctypes.byref(stream))
        lib.aclrtCreateEventWithFlag(ctypes.byref(event), 0)
        self.handles = {"comm": comm, "stream": stream, "event": event, "on": stream}
        for make in (
            "aclCreateTensor",
            "aclCreateTensorList",
            "aclCreateIntArray",
            "aclCreateBoolArray",
            "aclCreateScalar",
            "aclCreateTensorDesc",
            "aclCreateDataBuffer",
            "aclopCreateAttr",
        ):
            getattr(lib, make).restype = P
        dims, one = (ctypes.c_int64 * 1)(8), (ctypes.c_int64 * 1)(1)
        n, data = ctypes.c_uint64(1), P(self.x.data_ptr())
        tensor, another = (
            lib.aclCreateTensor(dims, n, 0, one, ctypes.c_int64(0), 2, dims, n, data)
            for _ in range(2)
        )
        self.made = {
            "tensor": P(tensor),
            "tensors": P(lib.aclCreateTensorList((P * 1)(another), n)),
            "array": P(lib.aclCreateIntArray(dims, n)),
            "flags": P(lib.aclCreateBoolArray(ctypes.create_string_buffer(8), n)),
            "scalar": P(lib.aclCreateScalar(dims, 9)),
            "desc": P(lib.aclCreateTensorDesc(0, 1, dims, 2)),
            "buffer": P(lib.aclCreateDataBuffer(data, ctypes.c_size_t(32))),
        }

    def executor(self) -> ctypes.c_void_p:
        """A new executor: each can be used once."""
        size, executor = ctypes.c_uint64(), P()
        self.lib.aclnnInplaceZeroGetWorkspaceSize(
            self.made["tensor"], ctypes.byref(size), ctypes.byref(executor)
        )
        return executor

    def good(self, parameter: str) -> Any:
        """A value for a parameter as the sources declare it."""
        text = parameter.replace("const ", "").replace(" const", "")
        name = text.split()[-1].lstrip("*")
        if "double" in text or ("float " in text and "*" not in text):
            return ctypes.c_double(1e-6)
        if "*" not in text:
            return ctypes.c_int64(1)
        if text.startswith("char* "):
            return ctypes.c_char_p(b"BSND")
        if name in self.handles:
            return self.handles[name]
        for type_, thing in TYPES.items():
            if text.startswith(type_ + " "):
                return self.executor() if thing == "executor" else self.made[thing]
        if text.startswith("void* ") and name in ("send", "receive", "buffer", "data", "dst"):
            return P(self.x.data_ptr())
        return ctypes.cast(self.page, P)


def one_null(calls: str) -> None:
    """Each pointer of each function, null while the others point to something.

    Args:
        calls: JSON, the parameters of each function.
    """
    torch.npu.set_device(0)
    arguments = Arguments(cann_host.runtime.current().library)
    for name, parameters in json.loads(calls).items():
        for null in [i for i, p in enumerate(parameters) if "*" in p]:
            given = [arguments.good(p) if i != null else None for i, p in enumerate(parameters)]
            print(name, parameters[null], flush=True)  # the last one ended the process
            getattr(arguments.lib, name)(*given)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
