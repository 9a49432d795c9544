"""launched.py imports it, for it lies beside it."""

ANSWER = 42
