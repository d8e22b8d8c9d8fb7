"""Refuse configurations that no run can have."""

from __future__ import annotations

from collections.abc import Iterator

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from continual.config.instantiate import targets_by_name
from continual.errors import ConfigError, gathered, mistyped, unknown
from continual.models.model import pick_device
from continual.strategy.interface import Strategy
from continual.tracking.trackers import check_tracker_installed

RULES = ("train", "inner")  # of adapt
WHOLE = {
    "seed": 0,
    "data.max_length": 1,
    "train.tokens_per_microbatch": 1,
    "score.batch_size": 1,
    "score.max_examples": 1,
    "score.max_new_tokens": 1,
    "score.judge.max_length": 1,
    "score.judge.batch_size": 1,
    "score.every_steps": 1,
    "score.monitor_examples": 1,
    "adapt.steps": 1,
    "adapt.draws": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
}


def check(config: DictConfig) -> None:
    """Refuse what no constructor will see: what is no whole number, or below the least one that can
    work.
    """
    given = {key: OmegaConf.select(config, key) for key in WHOLE}
    wrong = [
        f"{key}={value}: expected a whole number of at least {WHOLE[key]}"
        for key, value in given.items()
        if value is not None and (mistyped("int", value) or value < WHOLE[key])
    ]
    if not wrong and (config.seed or 0) >= 2**63:
        wrong.append(f"seed={config.seed}: expected a whole number below 2^63")
    for key, least in (("adapt.eval_steps", 0), ("adapt.shots", 1)):
        value = OmegaConf.select(config, key, default=ListConfig([]))
        if not isinstance(value, ListConfig) or any(
            mistyped("int | None", v) or (v is not None and v < least) for v in value
        ):
            wrong.append(
                f"{key}={value}: expected a list of whole numbers of at least {least}, "
                "such as [16,64]"
            )
    if (rule := OmegaConf.select(config, "adapt.update_rule", default="train")) not in RULES:
        wrong.append(unknown("adapt.update_rule", str(rule), RULES))
    adapter, kinds = (OmegaConf.select(config, key) for key in ("model.adapter", "model.adapters"))
    if adapter not in (None, "none", *(kinds or ())):
        wrong.append(unknown("model.adapter", str(adapter), ["none", *(kinds or ())]))
    seconds = OmegaConf.select(config, "checkpoint.every_seconds")
    if seconds is not None and (mistyped("float", seconds) or not seconds >= 0):
        wrong.append(
            f"checkpoint.every_seconds={seconds}: expected a number of seconds of at "
            "least 0, or null"
        )
    wrong += [*_early(config), *_loss(config)]
    if wrong:
        raise ConfigError(gathered(wrong))
    pick_device(config.device)
    check_tracker_installed(config.track)


def _early(config: DictConfig) -> Iterator[str]:
    """What is wrong with how forgetting is looked at within stages."""
    during, limit = (
        OmegaConf.select(config, key) for key in ("score.every_steps", "stop_if.forgetting")
    )
    if limit is not None and (mistyped("float", limit) or not 0 <= limit < 1):
        yield f"stop_if.forgetting={limit}: expected a share of at least 0 and below 1, such as 0.2, or null"
    elif limit is not None and during is None:
        yield (
            f"stop_if.forgetting={limit}: forgetting within a stage is not measured; set "
            "score.every_steps=N, the steps between two looks at it"
        )
    if during is not None and "adapt" in config:
        yield f"score.every_steps={during}: adapt has one task and scores it at adapt.eval_steps; leave it out"


def _loss(config: DictConfig) -> Iterator[str]:
    """What is wrong with how a step computes its loss."""
    weight, precision = (
        OmegaConf.select(config, key) for key in ("loss.instruction_weight", "train.precision")
    )
    if mistyped("float", weight) or not 0 <= weight <= 1:
        yield f"loss.instruction_weight={weight}: expected a number from 0 (masked) to 1 (as a response)"
    if precision not in (known := ["fp32", "bf16", "auto"]):
        yield unknown("train.precision", precision, known)


def refuse_shards(config: DictConfig, learner: Strategy) -> None:
    """Raise ConfigError where train.shard=true cannot be had with what else is configured."""
    if mistyped("bool", config.train.shard):
        raise ConfigError(f"train.shard={config.train.shard}: expected true or false")
    if not config.train.shard:
        return
    if not learner.shardable:
        can = [
            name
            for name, (kind, *_) in targets_by_name("strategy").items()
            if get_object(kind).shardable
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
    """Raise ConfigError where the strategy takes plain SGD and the configuration has something
    else.
    """
    if learner.requires_sgd and config.train.optimizer != "sgd":
        raise ConfigError(
            f"strategy={'+'.join(map(str, config.strategy))} has a learning rate "
            "of its own for each weight, which "
            f"train.optimizer={config.train.optimizer} would undo; set "
            "train.optimizer=sgd, and train.lr to 1 or what the strategy's "
            "configuration says"
        )
