"""Clear words for what Hydra refuses on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf

from continual.catalogue import choices
from continual.errors import ConfigError, unknown
from continual.outside import register

SHORT = {"stream.arrange": "stream.arrangement"}
SHORT_IN = {"adapt": {"checkpoint": "adapt.start", "task": "stream.tasks"}}


def spelled(verb: str, overrides: Sequence[str]) -> list[str]:
    """The overrides with short keys written out: stream.arrange, of adapt checkpoint and task (one name); and gates.

    Raises ConfigError where a shell has taken the `>SHARE` of a gate for a file.
    """
    keys, found = {**SHORT, **SHORT_IN.get(verb, {})}, []
    for word in map(_gate, overrides):
        key, given, value = word.partition("=")
        whole = f"[{value}]" if key == "task" and not value.startswith("[") else value
        found.append(f"{keys[key]}={whole}" if given and key in keys else word)
    return found


def _gate(word: str) -> str:
    """`stop_if.NAME>SHARE` as Hydra writes it."""
    if re.fullmatch(r"stop_if\.\w+", word):
        raise ConfigError(f"{word} has no value: unquoted, > names a file that a shell writes to; give '{word}>0.2', "
                          f"with the quotes, or {word}=0.2")
    return re.sub(r"^(stop_if\.\w+)>", r"\1=", word)


def composed(verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]) -> DictConfig:
    """The verb's configuration; a strategy that it lacks is looked for in other packages."""
    from hydra.errors import MissingConfigException

    while True:
        try:
            return compose(verb, list(overrides))
        except MissingConfigException as error:
            group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
            if group != "strategy" or not register(choice):
                raise


def resolved(config: DictConfig) -> None:
    """Raise ConfigError if a key without an honest default was not given; Hydra fills in its own."""
    if missing := sorted(key for key in OmegaConf.missing_keys(config) if not key.startswith("hydra.")):
        raise ConfigError("\n".join(f"{key} is not set; give {key}=..." for key in missing))


def explained(error: Exception, verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]) -> ConfigError:
    """The error in our words: an unknown choice or key with the nearest valid names, else Hydra's first line."""
    group, _, choice = str(getattr(error, "missing_cfg_file", "") or "").rpartition("/")
    if group.startswith("hydra/"):
        kind = group.split("/")[1]
        return ConfigError(f"{group}={choice} is none of Hydra's own, and needs hydra-{choice}-{kind}, which is not "
                           f"installed: pip install hydra-{choice}-{kind}")
    if group:
        return ConfigError(unknown(group, choice, [c.name for c in choices(group)]))
    key = getattr(error.__cause__, "full_key", None)
    if key:
        return ConfigError(unknown("key", str(key), _siblings(str(key), verb, overrides, compose)))
    lines = [line for line in str(error).splitlines() if line and "hydra.cc" not in line]
    return ConfigError(" ".join(lines) + " Keys are given as key=value; lists as key=[a,b].")


def _siblings(key: str, verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]) -> list[str]:
    """The keys beside `key` in the configuration without the overrides that set single keys."""
    from hydra.errors import HydraException

    choices = [o for o in overrides if "." not in o.split("=")[0] and o.split("=")[0] != key]
    try:
        config = compose(verb, [o for o in choices if not o.startswith(("out=", key))])
    except HydraException:  # several are wrong; those of the default choices are better than none
        config = compose(verb, [])
    parent, _, _ = key.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    return [f"{parent}.{name!s}" if parent else str(name) for name in (section or {})]
