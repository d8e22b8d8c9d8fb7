"""Escape text for a terminal."""

from __future__ import annotations

import re

CONTROL_CHARACTERS = re.compile(
    "[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def escape_control(text: str) -> str:
    """Write control characters other than the line feed as Python escapes, such as \\x1b."""
    return CONTROL_CHARACTERS.sub(lambda m: repr(m[0])[1:-1], text)
