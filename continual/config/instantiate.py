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
    """Call a section's `_target_` with its other keys and `more`.

    Raises ConfigError for a target that cannot be imported, and for keys that are unknown, missing
    or of the wrong type.
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
    expected = {k: mistyped(known[k].annotation, v) for k, v in settings.items() if k in known}
    wrong = [f"{name}.{k}={settings[k]}: expected {kind}" for k, kind in expected.items() if kind]
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
    """Return the `_target_`s in each configuration of a group, by configuration name."""
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
    """Return all `_target_`s of a group, such as model: the only ones a run folder may ask for."""
    return {target for targets in targets_by_name(group).values() for target in targets}


def allowed_strategies() -> set[str]:
    """Return the strategies a run folder may ask for: ours and those of installed packages."""
    return allowed_targets("strategy") | set(plugins().values())


def strategies_without_complete_weights(section: Any) -> list[str]:
    """Name the strategies of a config.yaml whose checkpoint weights alone are not the model.

    Part of their model is in the strategy's memory (`weights_are_complete` is False). Targets that
    are neither ours nor of an installed package are not imported.
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
