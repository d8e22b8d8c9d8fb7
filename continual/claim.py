"""A run folder belongs to one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from continual.errors import ConfigError, DataError, brief, gathered
from continual.files import write_whole
from continual.parallel import leads
from continual.reading import yaml_mapping

# What changes nothing of what is learned and scored.
FREE = ("out.", "track.", "checkpoint.", "stop_if.", "score.during")


def claim(out: Path, config: DictConfig) -> None:
    """Write the configuration, or check that the folder's run has the same one; raises ConfigError naming the keys."""
    if not leads():
        return
    path = out / "config.yaml"
    text = OmegaConf.to_yaml(config, resolve=True)
    begun = any((out / name).exists() for name in ("events.jsonl", "matrix.json", "checkpoints", "predictions"))
    if not begun:  # a run that was refused may be given again, put right
        write_whole(path, text)
        return
    if not path.exists():
        raise ConfigError(f"{out} holds a run without its config.yaml, which tells whether these are its keys; restore "
                          "that file, or give another out=")
    before, now = (flat(OmegaConf.to_container(c)) for c in (read_config(path), OmegaConf.create(text)))
    differ = [f"{k}: {before.get(k, 'absent')} there, {now.get(k, 'absent')} now"
              for k in sorted(before.keys() | now.keys())
              if before.get(k) != now.get(k) and not f"{k}.".startswith(FREE)]
    if differ:
        raise ConfigError(f"{out} holds a run with another configuration; give it the same keys to resume, or another "
                          "out=\n  " + "\n  ".join(differ))


def read_config(path: Path) -> DictConfig:
    """The config.yaml of a run folder; raises DataError where it is damaged."""
    told = yaml_mapping(path)
    if asked := [key for key, value in flat(told).items() if "${" in f"{key}{value}"]:
        raise DataError(gathered([f"{path}: found ${{...}} in {brief(key)}, expected values only: nothing that a run "
                                  "folder asks for is looked up; write the value itself" for key in asked]))
    try:
        return OmegaConf.create(told)
    except (OmegaConfBaseException, ValueError) as e:
        raise DataError(f"{path} cannot be read: {str(e).splitlines()[0]}; restore it, or give another folder") from e


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else str(key)).items()}
