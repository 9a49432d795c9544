"""The patterns of names that users write: of modules in quantize, of tensors in load_checkpoint."""

from __future__ import annotations

import re
from fnmatch import translate

__all__ = ["name_pattern"]


def name_pattern(text: str) -> re.Pattern[str]:
    """A pattern whose `match` says whether it matches a name.

    A pattern is a glob over the whole name, in which `*` spans dots too, as in fnmatch; after `re:`
    it is a regular expression that matches from the beginning of the name.

    Raises:
        re.error: it is no regular expression.

    Source: fnmatch; vllm-project/compressed-tensors for `re:`.
    """
    return re.compile(text.removeprefix("re:") if text.startswith("re:") else translate(text))
