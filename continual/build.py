"""From a configuration to the things it names: stream, model, strategy, encoder, recipe.

Configurations name their constructors by `_target_`; the engine itself knows no strategy and no stream.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from continual.data import Example, Stream, Task
from continual.errors import ConfigError, DataError, brief, gathered, mistyped, unknown
from continual.files import file_name
from continual.judge import Judge
from continual.model import Model, pick_device
from continual.outside import outside
from continual.parallel import world
from continual.probes.base import Probe
from continual.score import Test, prepare
from continual.sharding import shard
from continual.stage import Recipe
from continual.strategy import Strategy, compose
from continual.template import Encoder
from continual.track import refuse_missing


def construct(section: DictConfig, name: str, **more: Any) -> Any:
    """Call the section's `_target_` with its other keys; raises ConfigError for keys that it does not take."""
    settings: dict[str, Any] = {**OmegaConf.to_container(section, resolve=True), **more}  # type: ignore[dict-item]
    path = settings.pop("_target_")
    try:
        target = get_object(path)
    except Exception as e:
        raise ConfigError(f"{name}._target_={path} cannot be imported: {e}") from e
    known = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for key in settings:
            if key not in known:
                raise ConfigError(unknown(f"key {name}", key, known))
    wrong = [f"{name}.{k}={v}: expected {expected}" for k, v in settings.items()
             if k in known and (expected := mistyped(known[k].annotation, v))]
    if wrong:
        raise ConfigError(gathered(wrong))
    missing = [k for k, p in known.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY and k not in settings]
    if missing:
        raise ConfigError(f"{name} needs {', '.join(f'{name}.{k}' for k in missing)}; give it on the command line")
    return target(**settings)


def targets(group: str) -> dict[str, list[str]]:
    """The constructors that each configuration of a group names, by the configuration's name."""
    texts = {p.name.removesuffix(".yaml"): p.read_text("utf-8") for p in files("conf").joinpath(group).iterdir()
             if p.name.endswith(".yaml")}
    return {name: re.findall(r"^\s*_target_: ([\w.]+)$", text, re.MULTILINE) for name, text in sorted(texts.items())}


def registry(group: str) -> set[str]:
    """The constructors that the configurations of a group name, such as model: all that a run folder may ask for."""
    return {found for named in targets(group).values() for found in named}


LONGEST_NAME = 200
RULES = ("train", "inner")  # of adapt
WHOLE = {"seed": 0, "data.max_length": 1, "train.tokens_per_microbatch": 1, "score.batch_size": 1, "score.limit": 1,
         "score.max_new_tokens": 1, "score.judge.max_length": 1, "score.judge.batch_size": 1, "score.during": 1,
         "score.during_examples": 1, "adapt.steps": 1, "adapt.draws": 1, "checkpoint.every_steps": 1,
         "checkpoint.keep": 1}


def check(config: DictConfig) -> None:
    """Refuse what no constructor will see: what is no whole number, or below the least one that can work."""
    given = {key: OmegaConf.select(config, key) for key in WHOLE}
    wrong = [f"{key}={value}: expected a whole number of at least {WHOLE[key]}" for key, value in given.items()
             if value is not None and (mistyped("int", value) or value < WHOLE[key])]
    if not wrong and (config.seed or 0) >= 2**63:
        wrong.append(f"seed={config.seed}: expected a whole number below 2^63")
    for key, least in (("adapt.at", 0), ("adapt.shots", 1)):
        value = OmegaConf.select(config, key, default=ListConfig([]))
        if not isinstance(value, ListConfig) or any(
                mistyped("int | None", v) or (v is not None and v < least) for v in value):
            wrong.append(f"{key}={value}: expected a list of whole numbers of at least {least}, such as [16,64]")
    if (rule := OmegaConf.select(config, "adapt.rule", default="train")) not in RULES:
        wrong.append(unknown("adapt.rule", str(rule), RULES))
    adapter, kinds = (OmegaConf.select(config, key) for key in ("model.adapter", "model.adapters"))
    if adapter not in (None, "none", *(kinds or ())):
        wrong.append(unknown("model.adapter", str(adapter), ["none", *(kinds or ())]))
    seconds = OmegaConf.select(config, "checkpoint.every_seconds")
    if seconds is not None and (mistyped("float", seconds) or not seconds >= 0):
        wrong.append(f"checkpoint.every_seconds={seconds}: expected a number of seconds of at least 0, or null")
    wrong += [*_early(config), *_loss(config)]
    if wrong:
        raise ConfigError(gathered(wrong))
    pick_device(config.device)
    refuse_missing(config.track)


def _early(config: DictConfig) -> Iterator[str]:
    """What is wrong with how forgetting is looked at within stages."""
    during, limit = (OmegaConf.select(config, key) for key in ("score.during", "stop_if.forgetting"))
    if limit is not None and (mistyped("float", limit) or not 0 <= limit < 1):
        yield f"stop_if.forgetting={limit}: expected a share of at least 0 and below 1, such as 0.2, or null"
    elif limit is not None and during is None:
        yield (f"stop_if.forgetting={limit}: forgetting within a stage is not measured; set score.during=N, the steps "
               "between two looks at it")
    if during is not None and "adapt" in config:
        yield f"score.during={during}: adapt has one task and scores it at adapt.at; leave it out"


def _loss(config: DictConfig) -> Iterator[str]:
    """What is wrong with how a step computes its loss."""
    weight, precision = (OmegaConf.select(config, key) for key in ("loss.instruction_weight", "train.precision"))
    if mistyped("float", weight) or not 0 <= weight <= 1:
        yield f"loss.instruction_weight={weight}: expected a number from 0 (masked) to 1 (as a response)"
    if precision not in (known := ["fp32", "bf16", "auto"]):
        yield unknown("train.precision", precision, known)


def stream(config: DictConfig) -> Stream:
    """The configured task stream; raises DataError for a task after whose name no file can be named."""
    made: Stream = construct(config.stream, "stream")
    if not made.stages:
        raise ConfigError("stream.arrangement=none learns nothing, and is for probes; choose another")
    if long := [t.name for t in made.tasks if len(os.fsencode(file_name(t.name))) > LONGEST_NAME]:
        raise DataError(gathered([f"found the task name {brief(name)}, expected at most {LONGEST_NAME} bytes: files "
                                  "are named after it; shorten it" for name in long]))
    return made


def strategy(config: DictConfig) -> Strategy:
    """The configured strategy, composed where several are listed."""
    parts = {f"strategy.{name}": construct(part, f"strategy.{name}") for name, part in config.strategy.items()}
    return compose(*parts.values(), names=list(parts))


def probes(config: DictConfig) -> dict[str, Probe]:
    """The configured probes, by name, not ready yet; raises ConfigError for a command that measures none."""
    sections = config.get("probe") or {}
    if sections and "adapt" in config:
        raise ConfigError(f"probe=[{','.join(map(str, sections))}]: adapt measures no probe; leave it out, or give it "
                          "to run")
    return {str(name): construct(part, f"probe.{name}") for name, part in sections.items()}


def choosing(config: DictConfig) -> list[str]:
    """The configured strategies that choose weights by a task's name or by each prompt when they are tested."""
    kinds = {name: get_object(part["_target_"]) for name, part in config.strategy.items()}
    return [name for name, kind in kinds.items() if any(getattr(kind, moment) is not getattr(Strategy, moment)
                                                        for moment in ("route", "dispatch"))]


def strategies() -> set[str]:
    """The constructors of strategies that a run folder may ask for: continual's and those of installed packages."""
    return registry("strategy") | set(outside().values())


def lacking(section: Any) -> list[str]:
    """Of a run's strategies, as its config.yaml has them, those without whose memory its weights are no model of its.

    Only constructors that are continual's or an installed package's are looked at.
    """
    known = strategies()
    parts = section.items() if isinstance(section, DictConfig) else ()
    return [str(name) for name, part in parts if isinstance(part, DictConfig) and str(part.get("_target_")) in known
            and not get_object(part["_target_"]).whole]


def refuse_shards(config: DictConfig, learner: Strategy) -> None:
    """Raise ConfigError where train.shard=true cannot be had with what else is configured."""
    if mistyped("bool", config.train.shard):
        raise ConfigError(f"train.shard={config.train.shard}: expected true or false")
    if not config.train.shard:
        return
    if not learner.shardable:
        can = [name for name, (kind, *_) in targets("strategy").items() if get_object(kind).shardable]
        raise ConfigError(f"strategy={'+'.join(map(str, config.strategy))} works on whole weights as it is configured, "
                          "and with train.shard=true no process has them; set train.shard=false, or choose of "
                          f"{', '.join(can)}")
    if config.train.precision == "auto":
        raise ConfigError("train.precision=auto is measured in one process, which a model in shards cannot be; set "
                          "train.precision=fp32 or bf16, or train.shard=false")
    if config.model.get("quantize", "none") != "none":
        raise ConfigError(f"model.quantize={config.model.quantize} and train.shard=true cannot be had together; choose "
                          "one of them")


def refuse_optimizer(config: DictConfig, learner: Strategy) -> None:
    """Raise ConfigError where the strategy takes plain SGD and the configuration has something else."""
    if learner.sgd_only and config.train.optimizer != "sgd":
        raise ConfigError(f"strategy={'+'.join(map(str, config.strategy))} has a learning rate of its own for each "
                          f"weight, which train.optimizer={config.train.optimizer} would undo; set "
                          "train.optimizer=sgd, and train.lr to 1 or what the strategy's configuration says")


def model(config: DictConfig, tasks: Stream | None) -> Model:
    """The configured model on its device, or in shards on all, with the configured batch layout and precision."""
    weight = config.loss.instruction_weight
    shards = config.train.shard and world() > 1
    made = _model(config, tasks, **({"device": "cpu"} if shards else {}))
    if made.layout.seq2seq and weight:
        raise ConfigError("loss.instruction_weight is for causal models: an encoder's prompt has no loss; set it to 0")
    made.layout = replace(made.layout, tokens=config.train.tokens_per_microbatch, instruction_weight=weight)
    made.bf16 = config.train.precision == "bf16"  # with auto: once it is measured
    if shards:
        shard(made, pick_device(config.device))
    elif config.train.shard:
        print("train.shard=true: one process alone holds the whole model", file=sys.stderr)
    return made


def reader(config: DictConfig, tasks: Stream) -> Model:
    """The configured model without its network: its tokenizer and context."""
    return _model(config, tasks, network=False)


def _model(config: DictConfig, tasks: Stream | None, **more: Any) -> Model:
    origin = construct(config.model.stream, "model.stream") if config.model.get("stream") else tasks
    made: Model = construct(config.model, "model", stream=origin, seed=config.model.get("seed", config.seed),
                            **{"device": config.device, **more})
    return made


def encoder(config: DictConfig, made: Model) -> Encoder:
    """The configured template, for this model's tokenizer and context."""
    limit = min(config.data.max_length, made.context or config.data.max_length)
    return Encoder(made.tokenizer, config.data.template, limit, made.layout.seq2seq, config.data.on_unfit)


def test(config: DictConfig, task: Task[Example], encoder: Encoder, index: int) -> Test:
    """The task, column `index` of the matrix, ready to be scored as configured; raises as `score.prepare` does."""
    s = config.score
    return prepare(task, encoder, s.split, index, metric=s.metric, max_new_tokens=s.max_new_tokens, limit=s.limit,
                   how=s.how, judge=judge(config))


def judge(config: DictConfig) -> Judge | None:
    """The configured judge, not loaded yet and the same for all tasks; None where none is named."""
    j = config.score.judge
    return None if j.name is None else _judge(
        str(j.name), str(j.template), str(j.how), str(j.dtype), j.max_length, j.batch_size, config.device)


_judge = cache(Judge)


def recipe(config: DictConfig) -> Recipe:
    """The configured way to train a stage."""
    train: Any = OmegaConf.to_container(config.train, resolve=True)
    keys = {k: v for k, v in train.items() if k not in ("tokens_per_microbatch", "precision", "shard")}
    known = [f.name for f in fields(Recipe)]
    if strange := [unknown("key train", k, known) for k in keys if k not in known]:
        raise ConfigError(gathered(strange))
    return Recipe(**keys, mask_instruction_tokens=config.loss.mask_instruction_tokens, mask_how=config.loss.mask_how)
