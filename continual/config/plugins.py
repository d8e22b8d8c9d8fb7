"""Find strategies of other packages by the entry point group `continual.strategies`."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any

from continual.errors import ConfigError, gathered

GROUP = "continual.strategies"


def plugins() -> dict[str, str]:
    """Return the dotted class path of each plug-in strategy, by name, without importing it.

    Raises ConfigError if two packages give the same name to different classes.
    """
    paths: dict[str, set[str]] = {}
    for point in entry_points(group=GROUP):
        paths.setdefault(point.name, set()).add(point.value.replace(":", "."))
    duplicates = [
        f"{' and '.join(sorted(targets))} are both called {name!r}, but a strategy's name must be "
        "unique; uninstall one of the packages"
        for name, targets in sorted(paths.items())
        if len(targets) > 1
    ]
    if duplicates:
        raise ConfigError(gathered(duplicates))
    return {name: targets.pop() for name, targets in sorted(paths.items())}


def register(name: str) -> bool:
    """Register strategy=NAME with Hydra, with the fields of its class as keys.

    Returns False if no other package has it, or if it is registered already. Raises ConfigError if
    it cannot be imported or is not a strategy.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.utils import get_class

    path = plugins().get(name)
    store = ConfigStore.instance()
    if path is None or f"{name}.yaml" in store.repo.get("strategy", {}):
        return False
    try:
        keys = default_settings(get_class(path))
    except Exception as error:  # whatever the other package raises
        raise ConfigError(
            f"strategy={name} is {path} by an installed package's entry point, but cannot be "
            f"imported from there ({error}); fix or uninstall that package"
        ) from error
    store.store(group="strategy", name=name, node={name: {"_target_": path, **keys}}, provider=path)
    return True


def default_settings(kind: type[Any]) -> dict[str, Any]:
    """Return a strategy's configuration: the defaults of its fields, ??? without one."""
    if not is_dataclass(kind) or not hasattr(kind, "load_state_dict"):
        raise ConfigError(
            f"found {kind.__name__}, expected a dataclass that inherits from "
            "continual.strategy.interface.Strategy"
        )
    settings: dict[str, Any] = {}
    for f in fields(kind):
        if not f.init:
            continue
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        settings[f.name] = "???" if default is MISSING else default
        if f.name == "seed":
            settings[f.name] = "${seed}"
    return settings
