"""The quantizer that transformers' from_pretrained runs for `lq_graph.Config`.

A model that was float is loaded by transformers and then quantized by `lq_graph.quantize`. Of a
folder that save_pretrained wrote, transformers loads every tensor. Of a folder that another tool
wrote, transformers makes the model, and `lq_graph.load_checkpoint` loads it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..checkpoints.load import LoadReport, load_checkpoint
from ..errors import LinearQuantValueError
from ..modules.places import places_of, put
from ..modules.replaceable import carry_over
from ..quantization.choose import choose
from ..quantization.quantize import quantize
from ..quantization.report import QuantizeReport
from ..rules.tables import dtype_name
from .compat import register_quantizer, set_cast
from .config import METHOD, Config
from .hooks import hooks_put_back, put_hook, taken_hook
from .saved import (
    MARK,
    Loading,
    SavedLayer,
    SavedLayers,
    added_biases,
    check_biases,
    name_in,
    put_biases,
    why_not_saved,
)

__all__ = ["DESCRIPTION", "Quantizer", "attach", "register"]

DESCRIPTION = "quant_model_description*.json"  # of msmodelslim; its config.json says nothing
_logger = logging.get_logger(f"transformers.{METHOD}")


class Quantizer(HfQuantizer):
    """What transformers calls; see `Config`.

    Attributes:
        report: what quantize or load_checkpoint returned; None for a model that was loaded from a
            folder of save_pretrained, and before a model is loaded.
    """

    quantization_config: Any

    def __init__(self, quantization_config: Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: QuantizeReport | LoadReport | None = None
        self._folder: str = ""  # of another tool's checkpoint
        self._later: list[tuple[nn.Module, str, nn.Linear]] = []  # what load_checkpoint loads
        self._unexpected: Any = None  # what the model says itself of keys that it has not

    # ---- before the weights ----

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse what is known before the files are read."""
        config = self.quantization_config
        other_tool = bool(self._folder) or (self.pre_quantized and config.layers is None)
        _check_device_map(device_map, other_tool)
        if not self.pre_quantized and config.needs_calibration and config.calibration is None:
            raise LinearQuantValueError(
                "from_pretrained: A8W8Static needs the ranges of the activations. What to do: pass "
                "lq_graph.Config(scheme, calibration=[...]), a few dozen inputs of the model, or "
                "use A8W8Dynamic."
            )

    def update_dtype(self, dtype: Any) -> Any:
        """The dtype of the model: that of the folder, if the caller has no other wish."""
        wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if self.quantization_config.layers is None:
            # transformers 4 makes float32 of None
            return "auto" if dtype is None else dtype
        saved = getattr(torch, self.quantization_config.dtype)
        if isinstance(wanted, torch.dtype) and wanted != saved:
            raise LinearQuantValueError(
                f"from_pretrained: dtype is {dtype_name(wanted)}, and the folder holds a model "
                f"that was quantized in {dtype_name(saved)}. What to do: leave dtype out, or "
                f"quantize the float model with dtype=torch.{dtype_name(wanted)}."
            )
        return saved

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.quantization_config.layers is not None:
            _put_loading(model, self.quantization_config.layers)
            put_biases(model, self.quantization_config.biases)
            return
        if model.dtype not in (torch.float16, torch.bfloat16):
            raise LinearQuantValueError(
                f"from_pretrained: the model's dtype is {dtype_name(model.dtype)}, and its layers "
                "can be quantized in float16 and bfloat16. What to do: pass dtype=torch.bfloat16."
            )
        folder = Path(model.config.name_or_path or "")
        if self.pre_quantized or any(folder.glob(DESCRIPTION)):
            self.quantization_config.check_only_checkpoint()
            self._folder = str(folder)
            self._leave_linear_layers(model, folder)
        else:  # a pattern without layers is refused before the files are read
            config = self.quantization_config
            choose(model, config.scheme, config.ignore, "from_pretrained")

    def _leave_linear_layers(self, model: PreTrainedModel, folder: Path) -> None:
        """Take the nn.Linear layers out: transformers would load int8 values as floats."""
        if not folder.is_dir():
            raise LinearQuantValueError(
                f"from_pretrained: {folder} is no folder. What to do: pass the folder, for "
                "example what huggingface_hub.snapshot_download returns."
            )
        text = model.config.get_text_config(decoder=True)
        tied = model.get_output_embeddings() if getattr(text, "tie_word_embeddings", True) else None
        for module, held in places_of(model).items():
            if isinstance(module, nn.Linear) and module is not tied:
                for parent, name in held:
                    self._later.append((parent, name, module))
                    put(parent, name, nn.Module())
        # their tensors are in the files; load_checkpoint refuses what the model has not
        self._unexpected = model._keys_to_ignore_on_load_unexpected
        kind = list if self._unexpected is None else type(self._unexpected)
        model._keys_to_ignore_on_load_unexpected = kind([""])

    def update_expected_keys(
        self, model: PreTrainedModel, expected_keys: list[str], _: list[str]
    ) -> list[str]:
        """transformers 4 calls this before it loads."""
        if self.quantization_config.layers is not None:
            set_cast(model, None)
        return expected_keys

    # ---- after the weights ----

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        if config.layers is not None:
            _build_loaded(model)
            check_biases(model)
            set_cast(model, model.dtype)
        elif self._folder:
            self._load_rest(model)
        else:
            with hooks_put_back(model):
                self.report = quantize(
                    model, config.scheme, config.calibration, ignore=config.ignore
                )
            _say(self.report)
        self._note(model)
        return model

    def _load_rest(self, model: PreTrainedModel) -> None:
        """Load another tool's checkpoint."""
        device = model.device
        parents = list({id(parent): parent for parent, _, _ in self._later}.values())
        for parent, name, linear in self._later:
            put(parent, name, linear.train(parent.training))
        self._later.clear()  # a layer that something else holds is not replaced
        model._keys_to_ignore_on_load_unexpected = self._unexpected
        given = {"dtype": model.dtype, **self.quantization_config.checkpoint}
        self.report = load_checkpoint(model, self._folder, **given)
        for parent in parents:
            parent.to(device)
        vars(model.config).pop("transformers_weights", None)  # of the door
        if not self.report:
            _logger.warning(f"lq_graph: {self._folder} holds no quantized layer.")

    def _note(self, model: PreTrainedModel) -> None:
        """Let the model's config say what is quantized."""
        config = self.quantization_config.quantized(SavedLayers.of(model), model.dtype)
        config.checkpoint, config.biases = {}, added_biases(model)
        self.quantization_config = model.config.quantization_config = config

    # ---- saving ----

    def get_state_dict_and_metadata(
        self,
        model: PreTrainedModel,
        safe_serialization: bool = True,  # noqa: ARG002 - is_serializable refuses the other
    ) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """What save_pretrained saves. config.json will say what the model is now: it may have been
        changed since it was loaded."""
        if why := why_not_saved(model):
            raise LinearQuantValueError(
                f"save_pretrained: {why}. What to do: save the model before that, quantize it with "
                "A8W8Static(int8_between=False), or unload() the adapters."
            )
        self._note(model)
        seen: dict[tuple[torch.device, int], str] = {}
        state = dict(model.state_dict())
        for name in self.quantization_config.layers:
            state[f"{name}.{MARK}"] = torch.zeros(1)
            for key in (key for key in state if key.startswith(f"{name}.")):
                place = state[key].device, state[key].untyped_storage().data_ptr()
                if seen.setdefault(place, key) != key:  # safetensors holds no tensor twice
                    state[key] = state[key].clone()
        return state, {}

    def is_serializable(self, safe_serialization: bool | None = True) -> bool:
        """Whether save_pretrained can save the model: as safetensors. A layer that cannot be saved
        is refused when it is saved, with the reason."""
        if safe_serialization is False:
            _logger.warning("lq_graph: quantized models are saved with safe_serialization=True.")
        return safe_serialization is not False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on the model can be trained: no gradient passes through a quantized
        layer."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether generate() may compile the model."""
        return True


@cache
def register() -> None:
    """Let transformers know "lq_graph"; once in a process."""
    register_quantizer(METHOD, Config, Quantizer)


def attach(model: PreTrainedModel) -> None:
    """Let `save_pretrained` of a model that `lq_graph.quantize` or `load_checkpoint` changed write
    a folder that from_pretrained loads again, as after from_pretrained with a `Config`.

    Args:
        model: with QuantizedLinear layers.

    Raises:
        LinearQuantValueError: it has none, or another quantizer.
    """
    if not SavedLayers.of(model):
        raise LinearQuantValueError(
            "attach: the model has no QuantizedLinear. What to do: call lq_graph.quantize first."
        )
    if isinstance(known := getattr(model, "hf_quantizer", None), HfQuantizer):
        if isinstance(known, Quantizer):
            return
        raise LinearQuantValueError(
            f"attach: transformers loaded the model with {type(known).__name__}. What to do: save "
            "it with lq_graph.save_checkpoint."
        )
    quantizer = Quantizer(Config(), pre_quantized=True)
    quantizer._note(model)
    # plain attributes, as transformers sets them
    attributes: Any = model
    attributes.hf_quantizer, attributes.is_quantized = quantizer, True
    attributes.quantization_method = METHOD


def _check_device_map(device_map: Any, other_tool: bool) -> None:
    """Refuse places where the layers of a model cannot be.

    Args:
        device_map: as from_pretrained has it; transformers asks again when it has made a map.
        other_tool: whether load_checkpoint loads the model.
    """
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    names = sorted({str(device) for device in devices})
    if "disk" in names or ("cpu" in names and len(names) > 1):
        raise LinearQuantValueError(
            f"from_pretrained: device_map offloads layers, to {', '.join(names)}, and a quantized "
            "layer stays on its device. What to do: pass a device_map without cpu and disk, or "
            "max_memory= that fits."
        )
    if other_tool and len(names) > 1:
        raise LinearQuantValueError(
            f"from_pretrained: device_map has {', '.join(names)}, and another tool's folder is "
            "loaded on one device. What to do: load it with device_map='cpu', save_pretrained it, "
            "and load that folder on several."
        )


def _put_loading(model: PreTrainedModel, layers: dict[str, SavedLayer]) -> None:
    """Put a `Loading` in place of every layer that was quantized."""
    modules, places = dict(model.named_modules()), places_of(model)
    for saved_as, layer in layers.items():
        name = name_in(model, saved_as)
        if name is None:
            continue
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            found = "no module of that name" if module is None else type(module).__name__
            raise LinearQuantValueError(
                f"from_pretrained: config.json says that {saved_as} is quantized, and the model "
                f"has {found} there. What to do: load it with the class and the version of "
                "transformers that saved it."
            )
        for parent, own in places[module]:
            put(parent, own, Loading(layer, module))


def _build_loaded(model: PreTrainedModel) -> None:
    """Replace every `Loading` by its layer."""
    names = {module: name for name, module in model.named_modules()}
    for module, held in places_of(model).items():
        if isinstance(module, Loading):
            hook = taken_hook(module)
            new = module.build(names[module])
            carry_over(module.replaces[0], new)
            new.train(module.training)
            for parent, own in held:
                put(parent, own, new)
            put_hook(new, hook)


def _say(report: QuantizeReport) -> None:
    done = sum(line.changed for line in report)
    _logger.warning(
        f"lq_graph: {done} of {len(report)} nn.Linear layers are quantized; "
        "model.hf_quantizer.report says what each became."
    )
