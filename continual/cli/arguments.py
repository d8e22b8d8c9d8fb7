"""Parse PATH and key=value arguments of commands without a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from continual.errors import ConfigError, unknown


def parse_export_arguments(values: Mapping[str, str]) -> dict[str, Any]:
    """Convert the values of the command line's keys to arguments of `export`."""
    return {
        "stage": values["stage"] or None,
        "task": values["task"] or None,
        "merge": parse_bool("merged", values["merged"]) if values["merged"] else None,
        "out": Path(values["out"]) if values["out"] else None,
        "license": values["license"] or None,
    }


def parse_arguments(
    words: Sequence[str], keys: Mapping[str, str]
) -> tuple[list[Path], dict[str, str]]:
    """Split a command's words into paths and the values of its keys; `keys` has the defaults.

    A word with "=" is a path if such a file exists: run folders of a comparison have such names.
    Raises ConfigError for a key that is not among `keys`.
    """
    paths = []
    values = dict(keys)
    for word in words:
        key, sign, value = word.partition("=")
        if sign and key in keys:
            values[key] = value
        elif sign and not Path(word).exists():
            raise ConfigError(unknown("key", key, keys))
        else:
            paths.append(Path(word))
    return paths, values


def parse_bool(key: str, value: str) -> bool:
    """Parse true or false; raises ConfigError for anything else."""
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value}: expected true or false")
    return value == "true"


def parse_count(key: str, value: str) -> int:
    """Parse a whole number of at least 1; raises ConfigError for anything else."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}", value, re.ASCII):
        raise ConfigError(f"{key}={value}: expected a whole number of at least 1")
    return int(value)
