"""Sphinx configuration: `sphinx-build -W --keep-going -b html docs docs/_build`.

The pages are built on a plain CPU: lq_graph and torch are imported, torch_npu and CANN are not
needed: autodoc replaces them by empty modules.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # else `import torch` loads torch_npu

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import lq_graph  # noqa: E402 - after the environment is set

project = "lq_graph"
author = "the lq_graph authors"
copyright = "the lq_graph authors"
version = release = lq_graph.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_mock_imports = ["google", "torch_npu", "torchair"]
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
default_role = "py:obj"  # `name` in a docstring links to the object of this name, if there is one
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Shape"]

copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

toc_object_entries_show_parents = "hide"
html_theme = "furo"
html_title = f"lq_graph {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
