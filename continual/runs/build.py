"""Build what a configuration names: stream, model, strategy, encoder, test sets, recipe.

Configurations name their constructors by `_target_`; the engine knows no strategy and no stream.
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
from continual.errors import ConfigError, DataError, Problems, brief, unknown
from continual.evaluation.judge import Judge
from continual.evaluation.probes.base import Probe
from continual.evaluation.scoring import EvalSet, prepare_eval_set
from continual.io.atomic import task_file_name
from continual.models.model import Model, pick_device
from continual.models.sharding import shard_model
from continual.runs.settings import DataSettings, JudgeSettings, ScoreSettings, read_section
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe

MAX_NAME_BYTES = 200  # of a file that is named after a task


def stream(config: DictConfig) -> Stream:
    """Return the configured stream; raise DataError for task names that are no file names."""
    result: Stream = construct(config.stream, "stream")
    if not result.stages:
        raise ConfigError(
            "stream.arrangement=none learns nothing, and is for probes; choose another"
        )
    problems = Problems()
    for task in result.tasks:
        problems.require(
            len(os.fsencode(task_file_name(task.name))) <= MAX_NAME_BYTES,
            f"found the task name {brief(task.name)}, expected at most {MAX_NAME_BYTES} bytes: "
            "files are named after it; shorten it",
        )
    problems.raise_if_any(DataError)
    return result


def strategy(config: DictConfig) -> Strategy:
    """Return the configured strategy; several are composed."""
    parts = {
        f"strategy.{name}": construct(part, f"strategy.{name}")
        for name, part in config.strategy.items()
    }
    return compose(*parts.values(), names=list(parts))


def probes(config: DictConfig) -> dict[str, Probe]:
    """Return the configured probes by name, before `prepare`.

    Raises ConfigError for probes of a command that measures none.
    """
    sections = config.get("probe") or {}
    if sections and "adapt" in config:
        raise ConfigError(
            f"probe=[{','.join(map(str, sections))}]: adapt measures no probe; "
            "leave it out, or give it to run"
        )
    return {str(name): construct(part, f"probe.{name}") for name, part in sections.items()}


def choosing(config: DictConfig) -> list[str]:
    """Return the names of configured strategies that override `route` or `dispatch`."""
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
    """Return the configured model with its batch layout and precision.

    It is on the configured device or, with train.shard and several processes, sharded over all.
    """
    weight = config.loss.instruction_weight
    is_sharded = config.train.shard and world_size() > 1
    result = _model(config, tasks, **({"device": "cpu"} if is_sharded else {}))
    if result.layout.seq2seq and weight:
        raise ConfigError(
            "loss.instruction_weight is for causal models: an encoder's prompt has "
            "no loss; set it to 0"
        )
    result.layout = replace(
        result.layout,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        instruction_weight=weight,
    )
    result.bf16 = config.train.precision == "bf16"  # auto is measured later
    if is_sharded:
        shard_model(result, pick_device(config.device))
    elif config.train.shard:
        print("train.shard=true: one process alone holds the whole model", file=sys.stderr)
    return result


def reader(config: DictConfig, tasks: Stream) -> Model:
    """Return the configured model without its network: only tokenizer and context length."""
    return _model(config, tasks, load_network=False)


def _model(config: DictConfig, tasks: Stream | None, **more: Any) -> Model:
    source = tasks
    if config.model.get("stream"):
        source = construct(config.model.stream, "model.stream")
    result: Model = construct(
        config.model,
        "model",
        stream=source,
        seed=config.model.get("seed", config.seed),
        **{"device": config.device, **more},
    )
    return result


def encoder(config: DictConfig, made: Model) -> Encoder:
    """Return the encoder of the configured template, for this model's tokenizer and context."""
    data = read_section(config, "data", DataSettings)
    max_tokens = min(data.max_length, made.context_length or data.max_length)
    return Encoder(made.tokenizer, data.template, max_tokens, made.layout.seq2seq, data.on_unusable)


def test(config: DictConfig, task: Task[Example], encoder: Encoder, index: int) -> EvalSet:
    """Prepare a task for scoring as configured; it is column `index` of the matrix.

    Raises the errors of `prepare_eval_set`.
    """
    score = read_section(config, "score", ScoreSettings)
    return prepare_eval_set(
        task,
        encoder,
        score.split,
        index,
        metric=score.metric,
        max_new_tokens=score.max_new_tokens,
        max_examples=score.max_examples,
        answer_mode=score.answer_mode,
        judge=judge(config),
    )


def judge(config: DictConfig) -> Judge | None:
    """Return the configured judge, the same one for all tasks, not loaded yet; or None."""
    settings = read_section(config, "score.judge", JudgeSettings)
    if settings.name is None:
        return None
    return _judge(
        str(settings.name),
        str(settings.template),
        str(settings.grade_mode),
        str(settings.dtype),
        settings.max_length,
        settings.batch_size,
        config.device,
    )


_judge = cache(Judge)


def recipe(config: DictConfig) -> Recipe:
    """Return the configured recipe, from the sections train and loss."""
    train: Any = OmegaConf.to_container(config.train, resolve=True)
    keys = {
        k: v for k, v in train.items() if k not in ("tokens_per_microbatch", "precision", "shard")
    }
    known = [f.name for f in fields(Recipe)]
    Problems(unknown("key train", k, known) for k in keys if k not in known).raise_if_any()
    return Recipe(
        **keys,
        prompt_mask_prob=config.loss.prompt_mask_prob,
        prompt_mask_mode=config.loss.prompt_mask_mode,
    )
