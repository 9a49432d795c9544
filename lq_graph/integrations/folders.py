"""Folders of quantized models that any of the tools wrote, loaded by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from ..checkpoints.files import expanded
from ..errors import LinearQuantValueError
from .config import METHOD, Config
from .quantizer import DESCRIPTION

__all__ = ["from_pretrained"]

_FOR_CONFIG = ("trust_remote_code", "code_revision")


def from_pretrained(
    folder: str | Path,
    auto_class: Any = AutoModelForCausalLM,
    *,
    checkpoint: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The model in a folder, with the quantized layers of lq_graph: as transformers'
    from_pretrained, for folders of compressed-tensors and msmodelslim too.

    transformers gives a folder whose config.json names compressed-tensors to its own integration,
    whatever quantization_config says. So this reads the config first. transformers makes the model,
    its buffers and its generation config, and `lq_graph.load_checkpoint` loads the tensors: only
    what the model needs is in memory. All of it is on one device.

    Args:
        folder: on this machine; huggingface_hub.snapshot_download returns one. A folder that
            save_pretrained wrote loads as with transformers' from_pretrained, and a float one is
            quantized if there is a quantization_config.
        auto_class: of transformers, with a method from_pretrained.
        checkpoint: keyword arguments of `load_checkpoint`, for example mmap=True.
        kwargs: of auto_class.from_pretrained: dtype, device_map, attn_implementation, ...; dtype
            is the one in config.json by default.

    Returns:
        The model; `model.hf_quantizer.report` is what load_checkpoint returned.

    Raises:
        CheckpointError: what load_checkpoint refuses.
        LinearQuantValueError: what `Config` refuses; no folder; one without quantized layers.
    """
    place = expanded(folder)
    if not place.is_dir():
        raise LinearQuantValueError(
            f"from_pretrained: there is no folder {place}. What to do: check the path; for a model "
            "of a hub, pass the folder that huggingface_hub.snapshot_download returns."
        )
    config = kwargs.pop("config", None)
    if config is None:
        given = {name: kwargs[name] for name in _FOR_CONFIG if name in kwargs}
        config = AutoConfig.from_pretrained(str(place), **given)
    if "torch_dtype" not in kwargs:
        kwargs.setdefault("dtype", "auto")
    wanted = kwargs.pop("quantization_config", None)
    own = _method_of(config) == METHOD
    other_tool = not own and _is_quantized(config, place)
    if checkpoint and not other_tool:
        raise LinearQuantValueError(
            f"from_pretrained: checkpoint is for load_checkpoint, and {place} holds no other "
            "tool's quantized model. What to do: leave it out."
        )
    if not own and not other_tool and wanted is None:
        raise LinearQuantValueError(
            f"from_pretrained: {place} holds no quantized model. What to do: pass "
            "quantization_config=lq_graph.Config(...), which quantizes it."
        )
    if other_tool and (wanted is None or isinstance(wanted, Config)):
        if wanted is not None:
            wanted.check_only_checkpoint()
        for part in (config, config.get_text_config(decoder=True)):
            vars(part).pop("quantization_config", None)
        given = {**(wanted.checkpoint if wanted else {}), **(checkpoint or {})}
        config.quantization_config = Config(checkpoint=given).to_dict()
        wanted = None
        if (file := _file_of(place)) is not None:
            config.transformers_weights = file
    if wanted is not None:
        kwargs["quantization_config"] = wanted
    return auto_class.from_pretrained(str(place), config=config, **kwargs)


def _is_quantized(config: Any, folder: Path) -> bool:
    parts = (config, config.get_text_config(decoder=True))
    named = any(getattr(part, "quantization_config", None) for part in parts)
    return named or any(folder.glob(DESCRIPTION))


def _file_of(folder: Path) -> str | None:
    """The file of weights, or its index, if it has another name than transformers looks for."""
    names = sorted(path.name for path in folder.glob("*.safetensors*"))
    indices = [name for name in names if name.endswith(".index.json")]
    found = indices or [name for name in names if name.endswith(".safetensors")]
    return found[0] if len(found) == 1 and not found[0].startswith("model.") else None


def _method_of(config: Any) -> object:
    """quant_method of a model's config."""
    found = getattr(config, "quantization_config", None)
    return found.get("quant_method") if isinstance(found, dict) else None
