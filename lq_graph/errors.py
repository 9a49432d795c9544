"""The errors a user of lq_graph meets."""

from __future__ import annotations

import logging

__all__ = ["PARAM_INVALID", "LinearQuantError", "LinearQuantTypeError", "LinearQuantValueError"]

# how a message ends: ACLNN_ERR_PARAM_INVALID
PARAM_INVALID = "(aclnn would report 161002)"


class LinearQuantError(Exception):
    """Anything LinearQuant refuses. The text names the tensor, what was given, what is allowed
    on the product, what to do, and the aclnn error code the caller is spared."""


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
