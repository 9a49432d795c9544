"""sitecustomize.py of test_allocator_keys: loads a library when torch.cuda is imported.

It is beside this file, libcuda_keys.so. Runs in every process, workers too. torch.cuda is imported
once torch's C++ is loaded.
"""

import ctypes
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Cuda(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "torch.cuda":
            ctypes.CDLL("libc10.so", mode=os.RTLD_NOLOAD | ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(Path(__file__).with_name("libcuda_keys.so")))


sys.meta_path.insert(0, Cuda())
