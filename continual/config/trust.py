"""Take over model and data keys from a run folder that may be anyone's."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, open_dict

from continual.config import instantiate
from continual.config.run_config import read_config
from continual.errors import ConfigError, DataError, brief, gathered


def unknown_strategies(theirs: DictConfig, path: Path) -> list[str]:
    """What a run's config.yaml has under strategy that is none of continual's or of an installed
    package's; raises DataError where it has no such key.
    """
    if not isinstance(theirs.get("strategy"), DictConfig):
        raise DataError(
            f"{path} has no key of strategy, and expected are those of a run; give a folder made "
            "by continual run"
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
    """Give `config` the model and data keys of a run's config.yaml, which may be anyone's: it names
    no code to run.

    Raises DataError where it lacks them, ConfigError where it asks for what is none of the
    registry's constructors or for a model's own code.
    """
    theirs = read_config(path)
    if lacking := [
        key for key in ("model", "data", "stream") if not isinstance(theirs.get(key), DictConfig)
    ]:
        raise DataError(
            f"{path} has no keys of {', '.join(lacking)}, and expected are those of a run; give "
            "a folder made by continual run"
        )
    model, stream = theirs.model, theirs.model.get("stream") or theirs.stream
    wrong = [
        f"{path} asks for {key}._target_={brief(section.get('_target_'))}, which is not one of "
        f"continual's ({', '.join(sorted(known))}); only those are built from a run folder"
        for key, section, known in (
            (
                "model",
                model,
                instantiate.allowed_targets("model") - instantiate.allowed_targets("stream"),
            ),
            ("stream", stream, instantiate.allowed_targets("stream")),
        )
        if str(section.get("_target_")) not in known
    ]
    within = [
        {k: v for k, v in section.items() if k not in ("_target_", "stream")}
        for section in (model, stream)
    ]
    if "_target_" in str(within):
        wrong.append(
            f"{path} asks for a _target_ within model or stream, where nothing is built; remove it"
        )
    if wrong:
        raise ConfigError(gathered(wrong))
    if model.get("trust_remote_code") and not config.model.get("trust_remote_code"):
        raise ConfigError(
            f"{path} asks to run code that the model {brief(model.get('name'))} brings along; if "
            "you trust its source, give model=hf model.name=NAME model.trust_remote_code=true"
        )
    with open_dict(config):
        config.model, config.data = model, {**config.data, **theirs.data}
        config.model.seed = model.get(
            "seed", theirs.get("seed", 0)
        )  # what was drawn, no checkpoint need have
        if "stream" in model:  # what a model from scratch was built for
            config.model.stream = stream
