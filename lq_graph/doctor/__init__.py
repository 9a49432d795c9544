"""`python -m lq_graph doctor`: what this machine has, what is wrong, and what to do first.

It must work where `import torch` fails or ends the process. So this process imports neither torch
nor anything that needs it: `packages`, `cann` and `environment` read files and variables, and
`children` imports torch and torch_npu in other processes, which run `inside`. `problems` is the
list of what can be wrong, in the order in which it must be solved; `report` writes the answer.
"""
