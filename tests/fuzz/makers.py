"""Gives `calls` the makers of all families."""

from __future__ import annotations

import attention_calls
import cache_calls
import calls
import fused_calls

for family in (attention_calls, cache_calls, fused_calls):
    calls.MAKERS.update(family.MAKERS)
