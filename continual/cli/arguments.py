"""Parse PATH and key=value arguments of commands without a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from continual.errors import ConfigError, unknown


def parse_export_arguments(values: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `export` that the keys of the command line give, in `KEYS`."""
    return {
        "stage": values["stage"] or None,
        "task": values["task"] or None,
        "merge": truth("merged", values["merged"]) if values["merged"] else None,
        "out": Path(values["out"]) if values["out"] else None,
        "license": values["license"] or None,
    }


def given(words: Sequence[str], keys: Mapping[str, str]) -> tuple[list[Path], dict[str, str]]:
    """The paths among a command's words, and the values of its keys; `keys` has the default of
    each.

    A word with "=" is a path where there is such a file: a comparison names its folders so. Raises
    ConfigError for a key that is not among `keys`.
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
