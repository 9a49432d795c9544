"""`lq_graph.Config`: the quantization_config of transformers' from_pretrained."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch

from ..errors import LinearQuantValueError
from ..quantization.choose import Schemes, check_patterns, schemes_in
from ..quantization.schemes import SCHEMES, A8W8Dynamic, A8W8Static, Scheme
from ..rules.tables import dtype_name
from .saved import SavedLayers

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin as _Base

    _WHY_NOT = ""
else:
    try:
        from transformers.utils.quantization_config import QuantizationConfigMixin as _Base

        _WHY_NOT = ""
    except ImportError as error:  # `from lq_graph import *` imports Config all the same
        _Base, _WHY_NOT = object, str(error)

__all__ = ["METHOD", "Config"]

METHOD = "lq_graph"  # quant_method in a config.json
_VERSION = 1  # of what to_dict writes


class Config(_Base):
    """How from_pretrained of transformers quantizes a model, and how a saved model was quantized.

        config = lq_graph.Config(lq_graph.A8W8Dynamic())
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=config
        )

    The model is loaded in its float dtype, and `lq_graph.quantize` quantizes it: bit for bit what a
    call of quantize gives. `model.hf_quantizer.report` is what quantize returned. A folder that
    `model.save_pretrained` wrote holds this in its config.json, and loads as it was saved.

    The first call registers "lq_graph" with transformers, as does an import of
    `lq_graph.integrations.transformers`.

    Args:
        scheme: as in `quantize`: A8W8Dynamic(), A8W8Static() or A4W4Dynamic(), or a mapping of
            patterns of names to these or to None, for layers that stay float.
        ignore: patterns of layers that stay float, as in `quantize`.
        calibration: for A8W8Static, as in `quantize`: an iterable of inputs of the model. It is not
            saved.
        checkpoint: keyword arguments of `load_checkpoint`, for a folder that another tool wrote;
            see `lq_graph.integrations.transformers.from_pretrained`.

    Attributes:
        layers: what was quantized; None before it is.
        dtype: the dtype of the model that was quantized, by name; None before it is.
        biases: of norms and float layers that msmodelslim's smoothing gave one.

    Raises:
        ImportError: transformers is not installed.
        LinearQuantTypeError: scheme or ignore of another type.
        LinearQuantValueError: an invalid regular expression.
    """

    def __init__(
        self,
        scheme: Schemes = A8W8Dynamic(),  # noqa: B008 - frozen
        *,
        ignore: Iterable[str] = (),
        calibration: Iterable[Any] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        if _WHY_NOT:
            raise ImportError(
                f"lq_graph.Config needs transformers: {_WHY_NOT}. What to do: pip install "
                "transformers."
            )
        from .quantizer import register

        register()
        # what the patterns match is quantize's to check
        ignore = (
            ignore if isinstance(ignore, str) or not isinstance(ignore, Iterable) else [*ignore]
        )
        check_patterns(scheme, ignore, "Config")
        self.quant_method = cast(Any, METHOD)
        self.scheme = dict(scheme) if isinstance(scheme, Mapping) else scheme
        self.ignore = list(ignore)
        self.calibration = calibration
        self.checkpoint = dict(checkpoint or {})
        self.layers: SavedLayers | None = None
        self.dtype: str | None = None
        self.biases: list[str] = []

    @property
    def needs_calibration(self) -> bool:
        """Whether a scheme is static."""
        return any(isinstance(scheme, A8W8Static) for scheme in schemes_in(self.scheme))

    def check_only_checkpoint(self) -> None:
        """Refuse what says how to quantize, for a folder that another tool quantized."""
        if self.ignore or self.calibration is not None or self.scheme != A8W8Dynamic():
            raise LinearQuantValueError(
                "from_pretrained: the folder is quantized already, and scheme, ignore and "
                "calibration of Config are for a float model. What to do: leave them out; "
                "checkpoint={...} has arguments of load_checkpoint."
            )

    def quantized(self, layers: SavedLayers, dtype: torch.dtype) -> Config:
        """The same, for the config of a model that is quantized: it holds no inputs.

        Args:
            layers: of the model.
            dtype: of the model.
        """
        new = copy.copy(self)
        new.calibration, new.layers, new.dtype = None, layers, dtype_name(dtype)
        return new

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds. Lists and not objects where the order counts: transformers sorts
        the keys of objects."""
        found: dict[str, Any] = {
            "quant_method": METHOD,
            "version": _VERSION,
            "scheme": [[name, _to_json(scheme)] for name, scheme in self.scheme.items()]
            if isinstance(self.scheme, dict)
            else _to_json(self.scheme),
            "ignore": list(self.ignore),
        }
        if self.checkpoint:
            found["checkpoint"] = dict(self.checkpoint)
        if self.layers is not None:
            found["dtype"] = self.dtype
            found["layers"] = self.layers.to_json()
            if self.biases:
                found["biases"] = list(self.biases)
        return found

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The Config of what `to_dict` wrote.

        Args:
            config_dict: of a config.json.
            return_unused_kwargs: whether to return the kwargs that are not used, too.
            kwargs: none is used.

        Raises:
            LinearQuantValueError: it is of another version, or damaged.
        """
        if (version := config_dict.get("version", _VERSION)) != _VERSION:
            raise _damaged(
                f"version is {version!r}, and this lq_graph reads {_VERSION}",
                "install the lq_graph that saved the folder, or a newer one",
            )
        try:
            given = config_dict.get("scheme")
            new = cls(
                {name: None if one is None else _from_json(one) for name, one in given}
                if isinstance(given, list)
                else A8W8Dynamic()
                if given is None
                else _from_json(given),
                ignore=config_dict.get("ignore", ()),
                checkpoint=config_dict.get("checkpoint"),
            )
            if "layers" in config_dict:
                new.layers = SavedLayers.from_json(config_dict["layers"])
                new.dtype = config_dict["dtype"]
                new.biases = [str(name) for name in config_dict.get("biases", ())]
                if new.dtype not in ("float16", "bfloat16"):
                    raise ValueError(f"dtype is {new.dtype!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(str(error), "save the model again") from error
        return (new, kwargs) if return_unused_kwargs else new

    def to_json_string(self, use_diff: bool = True) -> str:  # noqa: ARG002 - as in transformers
        """The JSON of `to_dict`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        """transformers copies the config of a model: the inputs of calibration, which may be
        readable only once, are not copied."""
        new = copy.copy(self)
        if isinstance(new.scheme, dict):
            new.scheme = dict(new.scheme)
        new.ignore, new.checkpoint = list(new.ignore), dict(new.checkpoint)
        memo[id(self)] = new
        return new


def _to_json(scheme: Scheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    found = {field.name: getattr(scheme, field.name) for field in fields(scheme)}
    dtype = found["output_dtype"]
    found["output_dtype"] = None if dtype is None else dtype_name(dtype)
    return {"name": type(scheme).__name__, **found}


def _from_json(found: dict[str, Any]) -> Scheme:
    kinds: dict[str, Any] = {kind.__name__: kind for kind in SCHEMES}
    given = dict(found)
    dtype = given.get("output_dtype")
    if dtype not in (None, "float16", "bfloat16"):
        raise ValueError(f"output_dtype is {dtype!r}")
    given["output_dtype"] = None if dtype is None else getattr(torch, dtype)
    scheme: Scheme = kinds[given.pop("name")](**given)
    return scheme


def _damaged(why: str, todo: str) -> LinearQuantValueError:
    return LinearQuantValueError(
        f"lq_graph: quantization_config in config.json: {why}. What to do: {todo}."
    )
