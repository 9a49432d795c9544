"""launched.py imports it from the same folder."""

ANSWER = 42
