"""Names from earlier versions, and what they are called now.

Run folders and configurations that an earlier version wrote name constructors and keys by their
old names; these tables let them open.
"""

from __future__ import annotations

from typing import Any

# Module -> module, for the `_target_` of run folders and configurations.
MODULES = {
    "continual.model": "continual.models.loading",
    "continual.scratch": "continual.training.scratch",
    "continual.strategy": "continual.strategy.interface",
    "continual.probes.general": "continual.evaluation.probes.general",
    "continual.probes.shots": "continual.evaluation.probes.shots",
    "continual.probes.transfer": "continual.evaluation.probes.transfer",
    "continual.probes.turns": "continual.evaluation.probes.turns",
    "continual.probes.wordings": "continual.evaluation.probes.wordings",
    "strategies.adapters": "strategies.per_task",
    "strategies.anchor": "strategies.ewc",
    "strategies.hard": "strategies.hard_replay",
    "strategies.incremental": "strategies.incremental_lora",
    "strategies.lamaml": "strategies.la_maml",
    "strategies.path": "strategies.si",
    "streams.skills": "streams.skills.stream",
}


def current_target(target: str) -> str:
    """Return the dotted path under which a constructor lives now, for a path of now or of earlier."""
    module, _, name = target.rpartition(".")
    return f"{MODULES.get(module, module)}.{name}"


def rename_targets(value: Any) -> Any:
    """Return nested plain mappings and lists with every `_target_` by its current path."""
    if isinstance(value, dict):
        return {
            key: current_target(part)
            if key == "_target_" and isinstance(part, str)
            else rename_targets(part)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [rename_targets(part) for part in value]
    return value
