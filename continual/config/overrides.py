"""Clear words for what Hydra refuses on the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from continual.config.catalogue import list_choices
from continual.config.plugins import register
from continual.config.quoting import quote_value
from continual.config.renamed import KEYS
from continual.distributed.processes import is_main_process
from continual.errors import ConfigError, gathered, unknown

SHORT = {"stream.arrange": "stream.arrangement"}
SHORT_IN = {"adapt": {"checkpoint": "adapt.init_from", "task": "stream.tasks"}}
SECTIONS = ("data", "loss", "checkpoint", "stop_if", "adapt", "plan")  # that no group provides
TEXTS = ("out", "device")


def normalize_overrides(verb: str, overrides: Sequence[str]) -> list[str]:
    """The overrides with short keys written out: stream.arrange, of adapt checkpoint and task (one
    name); and gates.

    Raises ConfigError where a shell has taken the `>SHARE` of a gate for a file, or a key is to be
    taken away.
    """
    if gone := [word for word in overrides if word.startswith("~")]:
        raise ConfigError(
            f"{', '.join(gone)}: a key is not taken away; give it another value, null where its "
            f"comment in continual {verb} --cfg has a meaning for that"
        )
    keys, found = {**SHORT, **SHORT_IN.get(verb, {})}, []
    for word in map(_replace_renamed_key, map(_rewrite_stop_if, overrides)):
        key, given, value = word.partition("=")
        whole = f"[{value}]" if key == "task" and not value.startswith("[") else value
        found.append(f"{keys[key]}={whole}" if given and key in keys else word)
    return found


def _replace_renamed_key(word: str) -> str:
    """Return an override with its key's current name, and print that name if it was another.

    Keys of earlier versions work for one release.
    """
    key, sign, value = word.partition("=")
    plus = key[: len(key) - len(key.lstrip("+"))]
    current = KEYS.get(key.removeprefix(plus))
    if current is None:
        return word
    if is_main_process():
        print(f"{key.removeprefix(plus)} is now called {current}", file=sys.stderr)
    return f"{plus}{current}{sign}{value}"


def _rewrite_stop_if(word: str) -> str:
    """`stop_if.NAME>SHARE` as Hydra writes it."""
    if re.fullmatch(r"stop_if\.\w+", word):
        raise ConfigError(
            f"{word} has no value: unquoted, > names a file that a shell writes to; give "
            f"'{word}>0.2', with the quotes, or {word}=0.2"
        )
    return re.sub(r"^(stop_if\.\w+)>", r"\1=", word)


def compose_config(
    verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]
) -> DictConfig:
    """The verb's configuration; a strategy that it lacks is looked for in other packages."""
    from hydra.errors import MissingConfigException

    while True:
        try:
            return compose(verb, list(overrides))
        except MissingConfigException as error:
            group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
            if group != "strategy" or not register(choice):
                raise


def check_values(config: DictConfig) -> None:
    """Raise ConfigError if a key without an honest default was not given, or one that everything
    builds on is of another kind; Hydra fills in its own.
    """
    if missing := sorted(
        key for key in OmegaConf.missing_keys(config) if not key.startswith("hydra.")
    ):
        raise ConfigError("\n".join(f"{key} is not set; give {key}=..." for key in missing))
    wrong = [
        f"{key}={config[key]}: expected a text; one that is a number or a list stands in quotes: \"{key}='123'\""
        for key in TEXTS
        if key in config and not isinstance(config[key], str)
    ]
    wrong += [
        f"{key}={config[key]}: expected its keys, as in {key}.KEY=VALUE; continual VERB --cfg "
        "shows them"
        for key in SECTIONS
        if key in config and not isinstance(config[key], DictConfig)
    ]
    if "strategy" not in config:
        wrong.append(
            "strategy=[] names none; choose at least one, such as strategy=naive, plain fine-tuning"
        )
    if wrong:
        raise ConfigError(gathered(wrong))


def explain_error(
    error: Exception, verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]
) -> ConfigError:
    """The error in our words: an unknown choice or key with the nearest valid names, else Hydra's
    first line.
    """
    group, _, choice = str(getattr(error, "missing_cfg_file", "") or "").rpartition("/")
    if group.startswith("hydra/"):
        kind = group.split("/")[1]
        return ConfigError(
            f"{group}={choice} is none of Hydra's own, and needs hydra-{choice}-{kind}, which is "
            f"not installed: pip install hydra-{choice}-{kind}"
        )
    if group:
        return ConfigError(unknown(group, choice, [c.name for c in list_choices(group)]))
    key = getattr(error.__cause__, "full_key", None)
    if key:
        return ConfigError(unknown("key", str(key), _siblings(str(key), verb, overrides, compose)))
    if unread := [told for word in overrides if (told := _explain_syntax_error(word))]:
        return ConfigError(gathered(unread))
    if nothing := [
        w for w in overrides if re.fullmatch(r"[\w/]+=null", w) and isinstance(error, ValueError)
    ]:
        return ConfigError(
            f"{', '.join(nothing)}: expected a name of those in that folder of conf/"
        )
    lines = [line for line in str(error).splitlines() if line and "hydra.cc" not in line]
    return ConfigError(" ".join(lines) + " Keys are given as key=value; lists as key=[a,b].")


def _explain_syntax_error(word: str) -> str:
    """What is wrong with an override that is not in Hydra's grammar, or has several values; empty
    where it is sound.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, given, value = word.partition("=")
    fix = f'; a text with signs such as , = ( é in quotes: "{key}={quote_value(value)}"'
    try:
        parsed = OverridesParser.create().parse_override(word)
        found = (
            "several values, which only continual compare takes"
            if parsed.is_sweep_override()
            else ""
        )
    except HydraException:
        found = "no key and value that can be read"
    return (
        found
        and f"{word}: found {found}. Keys are given as key=value; lists as "
        f"key=[a,b]{fix if given else ''}"
    )


def _siblings(
    key: str, verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]
) -> list[str]:
    """The keys beside `key`, and those of its name a part deeper, without the overrides that set
    single keys.
    """
    from hydra.errors import HydraException

    choices = [o for o in overrides if "." not in o.split("=")[0] and o.split("=")[0] != key]
    try:
        config = compose(verb, [o for o in choices if not o.startswith(("out=", key))])
    except HydraException:  # several are wrong; those of the default choices are better than none
        config = compose(verb, [])
    parent, dot, last = key.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    parts = (
        cast(dict[str, Any], OmegaConf.to_container(section))
        if isinstance(section, DictConfig)
        else {}
    )
    deeper = [
        f"{name}.{last}" for name, part in parts.items() if isinstance(part, dict) and last in part
    ]
    return [f"{parent}{dot}{name}" for name in [*parts, *deeper]]
