"""Folders of float models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.hf_models import model_of


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of float models, each made once; nothing writes into them."""
    made: dict[str, Path] = {}

    def folder(name: str = "qwen2", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
        key = f"{name} {dtype} {changes}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("float")
            model = model_of(name, **changes).to(dtype)
            model.save_pretrained(made[key])
        return made[key]

    return folder
