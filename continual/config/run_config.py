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
    """The config.yaml of a run folder; raises DataError where it is damaged."""
    told = rename_in_config(load_yaml_mapping(path))
    if asked := [key for key, value in flatten_keys(told).items() if "${" in f"{key}{value}"]:
        raise DataError(
            gathered(
                [
                    f"{path}: found ${{...}} in {brief(key)}, expected values only: nothing that "
                    "a run folder asks for is looked up; write the value itself"
                    for key in asked
                ]
            )
        )
    try:
        return OmegaConf.create(told)
    except (OmegaConfBaseException, ValueError) as e:
        raise DataError(
            f"{path} cannot be read: {str(e).splitlines()[0]}; restore it, or give another folder"
        ) from e


def flatten_keys(value: Any, name: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        k: v
        for key, part in value.items()
        for k, v in flatten_keys(part, f"{name}.{key}" if name else str(key)).items()
    }
