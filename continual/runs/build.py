"""From a configuration to the things it names: stream, model, strategy, encoder, recipe.

Configurations name their constructors by `_target_`; the engine itself knows no strategy and no
stream.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from functools import cache
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from continual.config.instantiate import construct
from continual.data.template import Encoder
from continual.data.types import Example, Stream, Task
from continual.distributed.processes import world_size
from continual.errors import ConfigError, DataError, brief, gathered, unknown
from continual.evaluation.judge import Judge
from continual.evaluation.probes.base import Probe
from continual.evaluation.scoring import EvalSet, prepare_eval_set
from continual.io.atomic import task_file_name
from continual.models.model import Model, pick_device
from continual.models.sharding import shard_model
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe

LONGEST_NAME = 200


def stream(config: DictConfig) -> Stream:
    """The configured task stream; raises DataError for a task after whose name no file can be
    named.
    """
    made: Stream = construct(config.stream, "stream")
    if not made.stages:
        raise ConfigError(
            "stream.arrangement=none learns nothing, and is for probes; choose another"
        )
    if long := [
        t.name for t in made.tasks if len(os.fsencode(task_file_name(t.name))) > LONGEST_NAME
    ]:
        raise DataError(
            gathered(
                [
                    f"found the task name {brief(name)}, expected at most "
                    f"{LONGEST_NAME} bytes: files are named after it; shorten it"
                    for name in long
                ]
            )
        )
    return made


def strategy(config: DictConfig) -> Strategy:
    """The configured strategy, composed where several are listed."""
    parts = {
        f"strategy.{name}": construct(part, f"strategy.{name}")
        for name, part in config.strategy.items()
    }
    return compose(*parts.values(), names=list(parts))


def probes(config: DictConfig) -> dict[str, Probe]:
    """The configured probes, by name, not ready yet; raises ConfigError for a command that measures
    none.
    """
    sections = config.get("probe") or {}
    if sections and "adapt" in config:
        raise ConfigError(
            f"probe=[{','.join(map(str, sections))}]: adapt measures no probe; "
            "leave it out, or give it to run"
        )
    return {str(name): construct(part, f"probe.{name}") for name, part in sections.items()}


def choosing(config: DictConfig) -> list[str]:
    """The configured strategies that choose weights by a task's name or by each prompt when they
    are tested.
    """
    kinds = {name: get_object(part["_target_"]) for name, part in config.strategy.items()}
    return [
        name
        for name, kind in kinds.items()
        if any(
            getattr(kind, moment) is not getattr(Strategy, moment)
            for moment in ("route", "dispatch")
        )
    ]


def model(config: DictConfig, tasks: Stream | None) -> Model:
    """The configured model on its device, or in shards on all, with the configured batch layout and
    precision.
    """
    weight = config.loss.instruction_weight
    shards = config.train.shard and world_size() > 1
    made = _model(config, tasks, **({"device": "cpu"} if shards else {}))
    if made.layout.seq2seq and weight:
        raise ConfigError(
            "loss.instruction_weight is for causal models: an encoder's prompt has "
            "no loss; set it to 0"
        )
    made.layout = replace(
        made.layout,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        instruction_weight=weight,
    )
    made.bf16 = config.train.precision == "bf16"  # with auto: once it is measured
    if shards:
        shard_model(made, pick_device(config.device))
    elif config.train.shard:
        print("train.shard=true: one process alone holds the whole model", file=sys.stderr)
    return made


def reader(config: DictConfig, tasks: Stream) -> Model:
    """The configured model without its network: its tokenizer and context."""
    return _model(config, tasks, load_network=False)


def _model(config: DictConfig, tasks: Stream | None, **more: Any) -> Model:
    origin = construct(config.model.stream, "model.stream") if config.model.get("stream") else tasks
    made: Model = construct(
        config.model,
        "model",
        stream=origin,
        seed=config.model.get("seed", config.seed),
        **{"device": config.device, **more},
    )
    return made


def encoder(config: DictConfig, made: Model) -> Encoder:
    """The configured template, for this model's tokenizer and context."""
    limit = min(config.data.max_length, made.context_length or config.data.max_length)
    return Encoder(
        made.tokenizer, config.data.template, limit, made.layout.seq2seq, config.data.on_unusable
    )


def test(config: DictConfig, task: Task[Example], encoder: Encoder, index: int) -> EvalSet:
    """The task, column `index` of the matrix, ready to be scored as configured; raises as
    `score.prepare` does.
    """
    s = config.score
    return prepare_eval_set(
        task,
        encoder,
        s.split,
        index,
        metric=s.metric,
        max_new_tokens=s.max_new_tokens,
        max_examples=s.max_examples,
        answer_mode=s.answer_mode,
        judge=judge(config),
    )


def judge(config: DictConfig) -> Judge | None:
    """The configured judge, not loaded yet and the same for all tasks; None where none is named."""
    j = config.score.judge
    return (
        None
        if j.name is None
        else _judge(
            str(j.name),
            str(j.template),
            str(j.grade_mode),
            str(j.dtype),
            j.max_length,
            j.batch_size,
            config.device,
        )
    )


_judge = cache(Judge)


def recipe(config: DictConfig) -> Recipe:
    """The configured way to train a stage."""
    train: Any = OmegaConf.to_container(config.train, resolve=True)
    keys = {
        k: v for k, v in train.items() if k not in ("tokens_per_microbatch", "precision", "shard")
    }
    known = [f.name for f in fields(Recipe)]
    if strange := [unknown("key train", k, known) for k in keys if k not in known]:
        raise ConfigError(gathered(strange))
    return Recipe(
        **keys,
        prompt_mask_prob=config.loss.prompt_mask_prob,
        prompt_mask_mode=config.loss.prompt_mask_mode,
    )
