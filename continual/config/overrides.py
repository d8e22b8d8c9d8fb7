"""Check and normalize command-line overrides; explain what Hydra refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from continual.config.catalogue import list_choices
from continual.config.plugins import register
from continual.config.quoting import quote_value
from continual.config.renamed import current_key
from continual.distributed.processes import is_main_process
from continual.errors import ConfigError, gathered, unknown

SHORT = {"stream.arrange": "stream.arrangement"}
SHORT_IN = {"adapt": {"checkpoint": "adapt.init_from", "task": "stream.tasks"}}
SECTIONS = ("data", "loss", "checkpoint", "stop_if", "adapt", "plan")  # not from a group
TEXTS = ("out", "device")


def normalize_overrides(verb: str, overrides: Sequence[str]) -> list[str]:
    """Write overrides with full, current keys in Hydra's grammar.

    Expands short keys (stream.arrange; for adapt, checkpoint and task), replaces keys of earlier
    versions, and rewrites `stop_if.NAME>SHARE`. Raises ConfigError for `~key`, and where the shell
    has taken `>SHARE` for a redirection.
    """
    deletions = [word for word in overrides if word.startswith("~")]
    if deletions:
        raise ConfigError(
            f"cannot delete {', '.join(word[1:] for word in deletions)} ('~' is not supported); "
            f"set it to another value, or to null where its comment in continual {verb} --cfg "
            "allows it"
        )

    short = {**SHORT, **SHORT_IN.get(verb, {})}
    normalized = []
    for word in overrides:
        word = _replace_renamed_key(_rewrite_stop_if(word))
        key, sign, value = word.partition("=")
        if sign and key in short:
            if key == "task" and not value.startswith("["):
                value = f"[{value}]"  # adapt's one task is a list of tasks for the stream
            word = f"{short[key]}={value}"
        normalized.append(word)
    return normalized


def _replace_renamed_key(word: str) -> str:
    """Return an override with the current name of its key, printing that name if it has changed.

    Keys of earlier versions work for one release.
    """
    key, sign, value = word.partition("=")
    plus = key[: len(key) - len(key.lstrip("+"))]
    current = current_key(key.removeprefix(plus))
    if current == key.removeprefix(plus):
        return word
    if is_main_process():
        print(f"{key.removeprefix(plus)} is now called {current}", file=sys.stderr)
    return f"{plus}{current}{sign}{value}"


def _rewrite_stop_if(word: str) -> str:
    """Rewrite `stop_if.NAME>SHARE` as `stop_if.NAME=SHARE`."""
    if re.fullmatch(r"stop_if\.\w+", word):
        raise ConfigError(
            f"{word} has no value: without quotes the shell takes > for a file to write to; give "
            f"'{word}>0.2' with the quotes, or {word}=0.2"
        )
    return re.sub(r"^(stop_if\.\w+)>", r"\1=", word)


def compose_config(
    verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]
) -> DictConfig:
    """Compose a command's configuration, looking up unknown strategies in other packages."""
    from hydra.errors import MissingConfigException

    while True:
        try:
            return compose(verb, list(overrides))
        except MissingConfigException as error:
            group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
            if group != "strategy" or not register(choice):
                raise


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for keys that must be given and are not, and for sections of a wrong type.

    Keys of Hydra itself are left to Hydra.
    """
    missing = sorted(k for k in OmegaConf.missing_keys(config) if not k.startswith("hydra."))
    if missing:
        raise ConfigError("\n".join(f"{key} is not set; give {key}=..." for key in missing))
    wrong = [
        f"{key}={config[key]}: expected text; put text that looks like a number or a list in "
        f"quotes: \"{key}='123'\""
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
            "strategy=[] is empty; name at least one strategy, such as naive (plain fine-tuning)"
        )
    if wrong:
        raise ConfigError(gathered(wrong))


def explain_error(
    error: Exception, verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]
) -> ConfigError:
    """Explain an error of Hydra: unknown choices and keys with the closest valid names."""
    group, _, choice = str(getattr(error, "missing_cfg_file", "") or "").rpartition("/")
    if group.startswith("hydra/"):
        kind = group.split("/")[1]
        return ConfigError(
            f"{group}={choice} needs the package hydra-{choice}-{kind}, which is not installed: "
            f"pip install hydra-{choice}-{kind}"
        )
    if group:
        return ConfigError(unknown(group, choice, [c.name for c in list_choices(group)]))
    key = getattr(error.__cause__, "full_key", None)
    if key:
        return ConfigError(unknown("key", str(key), _siblings(str(key), verb, overrides, compose)))
    syntax_errors = [text for text in map(_explain_syntax_error, overrides) if text]
    if syntax_errors:
        return ConfigError(gathered(syntax_errors))
    null_groups = [word for word in overrides if re.fullmatch(r"[\w/]+=null", word)]
    if null_groups and isinstance(error, ValueError):
        return ConfigError(
            f"{', '.join(null_groups)}: expected one of the names in that folder of conf/"
        )
    lines = [line for line in str(error).splitlines() if line and "hydra.cc" not in line]
    return ConfigError(" ".join(lines) + " Keys are given as key=value; lists as key=[a,b].")


def _explain_syntax_error(word: str) -> str:
    """Explain an override that Hydra refuses or that has several values; empty if it is valid."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, sign, value = word.partition("=")
    try:
        if not OverridesParser.create().parse_override(word).is_sweep_override():
            return ""
        problem = "several values, which only continual compare takes"
    except HydraException:
        problem = "no key and value that can be parsed"
    quoting = f'; text with characters such as , = ( é in quotes: "{key}={quote_value(value)}"'
    return (
        f"{word}: found {problem}. Keys are given as key=value; lists as "
        f"key=[a,b]{quoting if sign else ''}"
    )


def _siblings(
    key: str, verb: str, overrides: Sequence[str], compose: Callable[..., DictConfig]
) -> list[str]:
    """Return the keys in the section of `key`, and keys of the same name one section deeper.

    Overrides of single keys are left out: one of them is the wrong one.
    """
    from hydra.errors import HydraException

    choices = [o for o in overrides if "." not in o.split("=")[0] and o.split("=")[0] != key]
    try:
        config = compose(verb, [o for o in choices if not o.startswith(("out=", key))])
    except HydraException:  # several overrides are wrong: use the keys of the default choices
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
