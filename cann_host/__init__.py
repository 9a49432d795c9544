"""A stand-in for CANN: the real torch_npu and torchair on any Linux machine, computed on the CPU.

    python -m cann_host script.py [args]        run a script
    python -m cann_host -m module [args]        run a module, pytest for example
    python -m cann_host -c code [args]          run code; - reads it from stdin, -i is a console

or, before anything imports torch:

    import cann_host
    cann_host.activate()

It shows that the wheels' Python and C++ accept a program and that its graphs compute what CANN's
documents say. It does not show what a chip does.

    launcher        `python -m cann_host`; as_python runs the program as Python does
    runtime         activation, and the one object with the state of this process
    bindings        the native library's functions, declared for ctypes
    graph           GE graphs: compiled, run, and their operators (graph/ops)
    aclnn           the operators of eager calls
    aten            ordinary PyTorch operators on npu tensors
    rules           what CANN refuses
    csrc            the native library, a file for each part of CANN

Importing this package imports no torch.
"""

from cann_host.options import CannHostError
from cann_host.runtime import activate, entries, faults, info, is_active

__all__ = ["CannHostError", "activate", "entries", "faults", "info", "is_active"]
