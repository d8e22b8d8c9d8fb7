"""Strategies of other packages: whatever is installed and names one in the entry point group
`continual.strategies`.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any

from continual.errors import ConfigError, gathered

GROUP = "continual.strategies"


def plugins() -> dict[str, str]:
    """The dotted path of each one's class, by name; nothing of theirs is imported.

    Raises ConfigError where two packages give different classes one name.
    """
    found: dict[str, set[str]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, set()).add(point.value.replace(":", "."))
    if twice := [
        f"{' and '.join(sorted(paths))} are both called {name!r}, and a strategy's name is its "
        "own; uninstall one of the packages"
        for name, paths in sorted(found.items())
        if len(paths) > 1
    ]:
        raise ConfigError(gathered(twice))
    return {name: paths.pop() for name, paths in sorted(found.items())}


def register(name: str) -> bool:
    """Make strategy=NAME known to Hydra, its keys being its class's with their defaults.

    False where no other package has it, or it is known already. Raises ConfigError where it cannot
    be imported or is no strategy.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.utils import get_class

    path = plugins().get(name)
    store = ConfigStore.instance()
    if path is None or f"{name}.yaml" in store.repo.get("strategy", {}):
        return False
    try:
        keys = default_settings(get_class(path))
    except Exception as error:  # of code that is not ours
        raise ConfigError(
            f"strategy={name} is {path} by an installed package's entry point, and cannot be had "
            f"from there ({error}); fix or uninstall that package"
        ) from error
    store.store(group="strategy", name=name, node={name: {"_target_": path, **keys}}, provider=path)
    return True


def default_settings(kind: type[Any]) -> dict[str, Any]:
    """A strategy's configuration: its hyper-parameters' defaults, ??? where there is none, and the
    run's seed.
    """
    if not is_dataclass(kind) or not hasattr(kind, "load_state_dict"):
        raise ConfigError(
            f"found {kind.__name__}, expected a dataclass that inherits from "
            "continual.strategy.interface.Strategy"
        )
    told: dict[str, Any] = {}
    for f in (f for f in fields(kind) if f.init):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        told[f.name] = "${seed}" if f.name == "seed" else "???" if default is MISSING else default
    return told
