"""Inherit settings from a run folder that may come from anyone, without running its code."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, open_dict

from continual.config import instantiate
from continual.config.run_config import read_config
from continual.errors import ConfigError, DataError, brief, gathered


def unknown_strategies(theirs: DictConfig, path: Path) -> list[str]:
    """Return a message for each strategy that is neither ours nor of an installed package.

    `theirs` is the configuration at `path`; raises DataError if it has no strategy section.
    """
    if not isinstance(theirs.get("strategy"), DictConfig):
        raise DataError(
            f"{path} has no section strategy, expected the configuration of a run; give a folder "
            "made by continual run"
        )
    known = instantiate.allowed_strategies()
    targets = {
        name: str(part.get("_target_")) if isinstance(part, DictConfig) else ""
        for name, part in theirs.strategy.items()
    }
    return [
        f"{path} asks for strategy.{name}._target_={brief(target)}, which is neither one of "
        "continual's nor of an installed package's; only those are built from a run folder"
        for name, target in targets.items()
        if target not in known
    ]


def inherit_model_and_data(config: DictConfig, path: Path) -> None:
    """Set the model and data keys of `config` to those of a run's config.yaml.

    Raises DataError if the file lacks them, and ConfigError if it asks for a constructor that our
    configurations do not name, or to run code that a model brings along.
    """
    theirs = read_config(path)
    sections = ("model", "data", "stream")
    missing = [key for key in sections if not isinstance(theirs.get(key), DictConfig)]
    if missing:
        raise DataError(
            f"{path} has no section {', '.join(missing)}, expected the configuration of a run; "
            "give a folder made by continual run"
        )

    model = theirs.model
    stream = theirs.model.get("stream") or theirs.stream
    streams = instantiate.allowed_targets("stream")
    models = instantiate.allowed_targets("model") - streams
    problems = []
    for key, section, allowed in (("model", model, models), ("stream", stream, streams)):
        target = section.get("_target_")
        if str(target) not in allowed:
            problems.append(
                f"{path} asks for {key}._target_={brief(target)}, which is not one of continual's "
                f"({', '.join(sorted(allowed))}); only those are built from a run folder"
            )
        rest = {k: v for k, v in section.items() if k not in ("_target_", "stream")}
        if "_target_" in str(rest):
            problems.append(
                f"{path} asks for a _target_ within {key}, where nothing is constructed; remove it"
            )
    if problems:
        raise ConfigError(gathered(problems))
    if model.get("trust_remote_code") and not config.model.get("trust_remote_code"):
        raise ConfigError(
            f"{path} asks to run code that the model {brief(model.get('name'))} brings along; if "
            "you trust its source, give model=hf model.name=NAME model.trust_remote_code=true"
        )
    with open_dict(config):
        config.model = model
        config.data = {**config.data, **theirs.data}
        # Weights that the seed drew and training left alone need not be in a checkpoint.
        config.model.seed = model.get("seed", theirs.get("seed", 0))
        if "stream" in model:  # the stream that a model from scratch was built for
            config.model.stream = stream
