"""Check a configuration for values and combinations that cannot work."""

from __future__ import annotations

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from continual.config.instantiate import targets_by_name
from continual.errors import ConfigError, Problems, mistyped, unknown
from continual.models.model import pick_device
from continual.runs.settings import RunSettings, read_settings
from continual.strategy.interface import Strategy
from continual.tracking.trackers import check_tracker_installed

PRECISIONS = ("fp32", "bf16", "auto")


def check(config: DictConfig) -> RunSettings:
    """Return the typed sections of a configuration.

    Raises ConfigError for values that cannot work and that no constructor checks, and for a device
    or tracker that is not available.
    """
    problems = Problems()
    settings = read_settings(config, problems)
    adapter = OmegaConf.select(config, "model.adapter")
    adapters = OmegaConf.select(config, "model.adapters") or ()
    if adapter not in (None, "none", *adapters):
        problems.add(unknown("model.adapter", str(adapter), ["none", *adapters]))
    weight = OmegaConf.select(config, "loss.instruction_weight")
    problems.require(
        not mistyped("float", weight) and 0 <= weight <= 1,
        f"loss.instruction_weight={weight}: expected a number from 0 (masked) to 1 (as a response)",
    )
    precision = OmegaConf.select(config, "train.precision")
    if precision not in PRECISIONS:
        problems.add(unknown("train.precision", precision, PRECISIONS))
    problems.raise_if_any()
    pick_device(config.device)
    check_tracker_installed(config.track)
    return settings


def refuse_shards(config: DictConfig, learner: Strategy) -> None:
    """Raise ConfigError if train.shard=true does not work with the rest of the configuration."""
    if mistyped("bool", config.train.shard):
        raise ConfigError(f"train.shard={config.train.shard}: expected true or false")
    if not config.train.shard:
        return
    if not learner.is_shardable():
        can = [
            name
            for name, (kind, *_) in targets_by_name("strategy").items()
            if get_object(kind).declares_shardable()
        ]
        raise ConfigError(
            f"strategy={'+'.join(map(str, config.strategy))} works on whole "
            "weights as it is configured, and with train.shard=true no process has "
            f"them; set train.shard=false, or choose of {', '.join(can)}"
        )
    if config.train.precision == "auto":
        raise ConfigError(
            "train.precision=auto is measured in one process, which a model in "
            "shards cannot be; set train.precision=fp32 or bf16, or "
            "train.shard=false"
        )
    if config.model.get("quantize", "none") != "none":
        raise ConfigError(
            f"model.quantize={config.model.quantize} and train.shard=true cannot "
            "be had together; choose one of them"
        )


def refuse_optimizer(config: DictConfig, learner: Strategy) -> None:
    """Raise ConfigError if the strategy needs plain SGD and another optimizer is configured."""
    if learner.requires_sgd and config.train.optimizer != "sgd":
        raise ConfigError(
            f"strategy={'+'.join(map(str, config.strategy))} has a learning rate "
            "of its own for each weight, which "
            f"train.optimizer={config.train.optimizer} would undo; set "
            "train.optimizer=sgd, and train.lr to 1 or what the strategy's "
            "configuration says"
        )
