"""The errors a user of lq_graph meets."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .rules.refusal import Refusal
else:
    Refusal = object  # for typing.get_type_hints; this module imports nothing of lq_graph

__all__ = ["LinearQuantError", "LinearQuantTypeError", "LinearQuantValueError"]

E = TypeVar("E", bound="LinearQuantError")


class LinearQuantError(Exception):
    """Anything that lq_graph refuses. The text names the argument, what was given, what is allowed
    on the product, what to do, and the error code that aclnn would report.

    Attributes:
        refusal: the record behind the text; None for an error that is only a text.
        layer: the qualified name of the layer, "layers.3.mlp.down_proj"; empty if it is not known.
    """

    # No __init__: when torch.compile traces a raise, it would fail on the __init__ instead.
    refusal: Refusal | None = None
    layer: str = ""

    def in_layer(self: E, caller: str, layer: str) -> E:
        """The same error; its text begins with the place in the model.

        Args:
            caller: the function that was called: "quantize"; empty for a call of the model.
            layer: the qualified name of the layer.
        """
        if self.refusal is None:
            error = type(self)(": ".join([*filter(None, (caller, layer)), str(self)]))
        else:
            error = replace(self.refusal, caller=caller, layer=layer).error(type(self))
        error.layer = layer
        return error


class LinearQuantTypeError(LinearQuantError, TypeError):
    """A dtype, or a combination of dtypes, that no row of the support table has."""


class LinearQuantValueError(LinearQuantError, ValueError):
    """A shape or a value outside the specification."""


class _OurTypeErrors(logging.Filter):
    """Drops our errors from torch's log. Under fake tensors torch logs a whole traceback for every
    TypeError and then raises it anyway; our errors are sentences for the user, who needs them once.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], LinearQuantError))


logging.getLogger("torch._subclasses.fake_tensor").addFilter(_OurTypeErrors())
