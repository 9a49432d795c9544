"""The errors a user of lq_graph meets."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

    from .rules.refusal import Refusal

__all__ = ["LinearQuantError", "LinearQuantTypeError", "LinearQuantValueError"]


class LinearQuantError(Exception):
    """Anything lq_graph refuses. The text names the argument, what was given, what is allowed on
    the product, what to do, and the aclnn error code the caller is spared.

    Attributes:
        refusal: the record behind the text; None for an error that is only a text.
    """

    # no __init__: where torch.compile traces a raise, it would fail on that instead
    refusal: Refusal | None = None

    def in_layer(self, caller: str, layer: str) -> Self:
        """The same error, whose text begins with where in a model it was met.

        Args:
            caller: the function that was called: "quantize".
            layer: the qualified name of the layer.
        """
        if self.refusal is None:
            return type(self)(f"{caller}: {layer}: {self}")
        return replace(self.refusal, caller=caller, layer=layer).error(type(self))


class LinearQuantTypeError(LinearQuantError, TypeError):
    """A dtype, or a combination of dtypes, that no row of the support table has."""


class LinearQuantValueError(LinearQuantError, ValueError):
    """A shape or a value outside the specification."""


class _OurTypeErrors(logging.Filter):
    """torch logs a whole traceback for every TypeError under fake tensors, then raises it anyway.
    Ours are sentences for the user: raised once is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], LinearQuantError))


logging.getLogger("torch._subclasses.fake_tensor").addFilter(_OurTypeErrors())
