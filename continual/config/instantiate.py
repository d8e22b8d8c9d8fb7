"""Construct what a configuration names by _target_."""

from __future__ import annotations

import inspect
import re
from importlib.resources import files
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from continual.config.plugins import plugins
from continual.config.renamed import KEYS, current_target
from continual.errors import ConfigError, gathered, mistyped, unknown


def construct(section: DictConfig, name: str, **more: Any) -> Any:
    """Call the section's `_target_` with its other keys; raises ConfigError for keys that it does
    not take.
    """
    settings: dict[str, Any] = {**OmegaConf.to_container(section, resolve=True), **more}  # type: ignore[dict-item]
    path = current_target(str(settings.pop("_target_")))
    for key in [k for k in settings if f"{name}.{k}" in KEYS]:
        settings[KEYS[f"{name}.{key}"].rpartition(".")[2]] = settings.pop(key)
    try:
        target = get_object(path)
    except Exception as e:
        raise ConfigError(f"{name}._target_={path} cannot be imported: {e}") from e
    known = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for key in settings:
            if key not in known:
                raise ConfigError(unknown(f"key {name}", key, known))
    wrong = [
        f"{name}.{k}={v}: expected {expected}"
        for k, v in settings.items()
        if k in known and (expected := mistyped(known[k].annotation, v))
    ]
    if wrong:
        raise ConfigError(gathered(wrong))
    missing = [
        k
        for k, p in known.items()
        if p.default is p.empty and p.kind is p.KEYWORD_ONLY and k not in settings
    ]
    if missing:
        raise ConfigError(
            f"{name} needs {', '.join(f'{name}.{k}' for k in missing)}; give it on the command line"
        )
    return target(**settings)


def targets_by_name(group: str) -> dict[str, list[str]]:
    """The constructors that each configuration of a group names, by the configuration's name."""
    texts = {
        p.name.removesuffix(".yaml"): p.read_text("utf-8")
        for p in files("conf").joinpath(group).iterdir()
        if p.name.endswith(".yaml")
    }
    return {
        name: re.findall(r"^\s*_target_: ([\w.]+)$", text, re.MULTILINE)
        for name, text in sorted(texts.items())
    }


def allowed_targets(group: str) -> set[str]:
    """The constructors that the configurations of a group name, such as model: all that a run
    folder may ask for.
    """
    return {found for named in targets_by_name(group).values() for found in named}


def allowed_strategies() -> set[str]:
    """The constructors of strategies that a run folder may ask for: continual's and those of
    installed packages.
    """
    return allowed_targets("strategy") | set(plugins().values())


def strategies_without_complete_weights(section: Any) -> list[str]:
    """Of a run's strategies, as its config.yaml has them, those without whose memory its weights
    are no model of its.

    Only constructors that are continual's or an installed package's are looked at.
    """
    known = allowed_strategies()
    parts = section.items() if isinstance(section, DictConfig) else ()
    return [
        str(name)
        for name, part in parts
        if isinstance(part, DictConfig)
        and str(part.get("_target_")) in known
        and not get_object(part["_target_"]).weights_are_complete
    ]
