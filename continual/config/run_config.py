"""Read the config.yaml of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from continual.config.renamed import rename_in_config
from continual.errors import DataError, brief, gathered
from continual.io.untrusted import load_yaml_mapping


def read_config(path: Path) -> DictConfig:
    """Load the config.yaml of a run folder, with current names; raises DataError if damaged.

    Interpolations (`${...}`) are refused: a run folder may come from anyone, and resolving one
    could read the environment.
    """
    values = rename_in_config(load_yaml_mapping(path))
    interpolated = [key for key, value in flatten_keys(values).items() if "${" in f"{key}{value}"]
    if interpolated:
        problems = [
            f"{path}: found ${{...}} in {brief(key)}, expected plain values: interpolations of a "
            "run folder are not resolved; write the value itself"
            for key in interpolated
        ]
        raise DataError(gathered(problems))
    try:
        return OmegaConf.create(values)
    except (OmegaConfBaseException, ValueError) as e:
        raise DataError(
            f"{path} cannot be read: {str(e).splitlines()[0]}; restore it, or give another folder"
        ) from e


def flatten_keys(value: Any, name: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        k: v
        for key, part in value.items()
        for k, v in flatten_keys(part, f"{name}.{key}" if name else str(key)).items()
    }
