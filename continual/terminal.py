"""What is typed and what is shown: a command's plain words, and text from files that a terminal must not obey."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from continual.errors import ConfigError, unknown

OBEYED = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def safe(text: str) -> str:
    """The text with every character but the line feed that a terminal obeys as it is written in Python."""
    return OBEYED.sub(lambda m: repr(m[0])[1:-1], text)


def given(words: Sequence[str], keys: Mapping[str, str]) -> tuple[list[Path], dict[str, str]]:
    """The paths among a command's words, and the values of its keys; `keys` has the default of each.

    A word with "=" is a path where there is such a file: a comparison names its folders so. Raises ConfigError for a
    key that is not among `keys`.
    """
    paths, told = [], dict(keys)
    for word in words:
        key, sign, value = word.partition("=")
        if sign and key in keys:
            told[key] = value
        elif sign and not Path(word).exists():
            raise ConfigError(unknown("key", key, keys))
        else:
            paths.append(Path(word))
    return paths, told


def quoted(text: str) -> str:
    """A text as a value on the command line: in the quotes of Hydra's grammar where it needs them to be that text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        if OverridesParser.create().parse_override(f"key={text}").value() == text:
            return text
    except HydraException:
        pass
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'") + "'"


def truth(key: str, value: str) -> bool:
    """Whether it is true; raises ConfigError where it is neither true nor false."""
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value}: expected true or false")
    return value == "true"


def count(key: str, value: str) -> int:
    """A whole number of at least 1; raises ConfigError for anything else."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}", value, re.ASCII):
        raise ConfigError(f"{key}={value}: expected a whole number of at least 1")
    return int(value)
