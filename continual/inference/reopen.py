"""A run's model as it was after any of its stages, from the run's folder; the folder may be
anyone's.

Only what continual itself or an installed package brings along is built from it: see
`adapt.take_over`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from continual.config import instantiate
from continual.config.run_config import read_config
from continual.config.trust import inherit_model_and_data, unknown_strategies
from continual.data.template import Encoder
from continual.errors import ConfigError, DataError, MissingError, brief, gathered, listed, unknown
from continual.io.untrusted import load_json
from continual.models.model import Model
from continual.models.weights import Weights, restore, snapshot
from continual.results.curve import Curve
from continual.results.matrix import BASE_STAGE
from continual.results.run_folder import Run, folder_kind
from continual.runs import build, validate
from continual.strategy.interface import Strategy
from continual.training import checkpoint

ADAPTED_STAGE = "adapted"  # the one stage of an adaptation


@dataclass(frozen=True)
class ModelSource:
    """What a folder tells before any weights are read: its stages, each with where its weights are
    (None: the base).
    """

    path: Path
    result: Run | Curve
    stages: dict[str, Path | None]

    @classmethod
    def load(cls, path: Path) -> ModelSource:
        """Of a run or an adaptation; raises MissingError or DataError for any other folder."""
        what = folder_kind(path)
        if what == "comparison":
            raise MissingError(
                f"{path} holds several runs, and one is expected; name one of "
                f"{listed(sorted(str(p.parent) for p in path.glob('*/matrix.json')), 5)}"
            )
        if what == "adapt":
            return cls(path, Curve.load(path), {ADAPTED_STAGE: path / "model"})
        run = Run.load(path)
        numbers = {name: run.stage_number(name) for name in run.matrix.stages}
        return cls(
            path,
            run,
            {
                name: path / "checkpoints" / f"stage-{n:02d}" if n else None
                for name, n in numbers.items()
            },
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it was scored on."""
        return self.result.matrix.tasks if isinstance(self.result, Run) else (self.result.task,)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to learn."""
        return not isinstance(self.result, Run) or self.result.matrix.is_finished

    @property
    def last_stage(self) -> str:
        """The last stage that was learned and scored."""
        return list(self.stages)[-1]

    def resolve_stage(self, name: str | None) -> str:
        """A stage by its name, its number, or None, the end of a finished run; raises ConfigError,
        or MissingError where its weights were not kept.
        """
        if name is None:
            if not self.is_finished:
                raise ConfigError(
                    f"{self.path} is not finished, and has no last stage yet; finish it, or name "
                    f"a stage that it has: {listed(list(self.stages))}"
                )
            name = self.last_stage
        numbers = (
            {str(number): stage for number, stage in enumerate(self.stages)}
            if isinstance(self.result, Run)
            else {}
        )
        if (stage := name if name in self.stages else numbers.get(name)) is None:
            raise ConfigError(unknown("stage", name, self.stages))
        name = stage
        if (folder := self.stages[name]) and not folder.is_dir():
            raise MissingError(
                f"{folder}: the weights after stage {name!r} are not there (checkpoint.keep=N "
                f"keeps the newest N only); choose of {listed(self.available_stages)}"
            )
        return name

    @property
    def available_stages(self) -> list[str]:
        """The stages whose weights are there."""
        return [name for name, folder in self.stages.items() if folder is None or folder.is_dir()]


@dataclass
class LoadedModel:
    """The model of a `source` as it was after stage `now`; `strategy` chooses its weights by task
    or by prompt.
    """

    source: ModelSource
    config: DictConfig
    model: Model
    encoder: Encoder
    strategy: Strategy
    stage: str = BASE_STAGE
    base_weights: Weights = field(default_factory=dict)

    def load_stage(self, stage: str) -> None:
        """Give the model what it had after this stage; raises DataError where its files are
        damaged.
        """
        if stage == self.stage:
            return
        folder = self.source.stages[stage]
        self.base_weights = self.base_weights or snapshot(self.model)
        self.strategy = _build_routing_strategy(self.config)
        if folder is None:
            restore(self.model, self.base_weights)
        else:
            checkpoint.load(folder, self.model, self.strategy)
        self.stage = stage

    def route(self, task: str | None) -> None:
        """Choose the weights for a task, where the strategy does; raises ConfigError where it needs
        one.
        """
        if task is None and self.routes_by_task:
            raise ConfigError(
                f"the strategy {'+'.join(map(str, self.config.strategy))} has other weights for "
                f"each task, and none is named; choose of {listed(self.source.tasks)}"
            )
        self.strategy.route(self.model, task or "")

    @property
    def routes_by_task(self) -> bool:
        """Whether the weights depend on the task's name."""
        return type(self.strategy).route is not Strategy.route

    @property
    def dispatches_by_prompt(self) -> bool:
        """Whether the weights depend on each prompt."""
        return type(self.strategy).dispatch is not Strategy.dispatch


def load_run_model(source: ModelSource, config: DictConfig) -> LoadedModel:
    """Build the model that the folder's config.yaml names, before its first stage, or adapted.

    `config` is that of `continual run`: the device is its own, and whether a model's own code may
    run. Raises as `adapt.take_over` does, and ConfigError for a strategy or stream that is none of
    continual's or of an installed package's.
    """
    path = source.path / "config.yaml"
    if not path.is_file():
        raise MissingError(
            f"{path}: there is no such file, and it says which model this is; restore it"
        )
    inherit_model_and_data(config, path)
    _inherit_answer_settings(config, path)
    adapted = not isinstance(source.result, Run)
    if adapted and config.model.get("adapter", "none") == "none":
        with open_dict(config):
            config.model = {
                "_target_": "continual.models.loading.load_pretrained",
                "name": str((source.path / "model").absolute()),
                "dtype": config.model.get("dtype", "fp32"),
                "trust_remote_code": config.model.get("trust_remote_code", False),
            }
    model = build.model(config, None)
    model.net.eval()
    model.bf16 = _resolve_precision(config, source.path) == "bf16"
    if adapted and config.model.get("adapter", "none") != "none":
        _load_adapter(model, source.path / "model")
    return LoadedModel(
        source,
        config,
        model,
        build.encoder(config, model),
        _build_routing_strategy(config),
        ADAPTED_STAGE if adapted else BASE_STAGE,
    )


def _inherit_answer_settings(config: DictConfig, path: Path) -> None:
    """Give `config` the keys of the run that its answers depend on, beside model and data."""
    theirs = read_config(path)
    parts = [
        key
        for key in ("strategy", "stream", "train", "score")
        if not isinstance(theirs.get(key), DictConfig)
    ]
    if parts:
        raise DataError(
            f"{path} has no keys of {', '.join(parts)}, and expected are those of a run; give a "
            "folder made by continual run"
        )
    wrong = unknown_strategies(theirs, path)
    if str(theirs.stream.get("_target_")) not in instantiate.allowed_targets("stream"):
        wrong.append(
            f"{path} asks for stream._target_={brief(theirs.stream.get('_target_'))}, which is "
            "not one of continual's; only those are built from a run folder"
        )
    if wrong:
        raise ConfigError(gathered(wrong))
    with open_dict(config):
        config.strategy, config.stream, config.seed = (
            theirs.strategy,
            theirs.stream,
            theirs.get("seed", 0),
        )
        config.score = {**config.score, **theirs.score}
        config.train.precision = theirs.train.get("precision", "fp32")
    validate.check(config)


def _resolve_precision(config: DictConfig, path: Path) -> Any:
    """fp32 or bf16, as configured or, where it was measured, as the run's folder says."""
    if config.train.precision != "auto" or not (path / "precision.json").is_file():
        return config.train.precision
    told = load_json(path / "precision.json")
    return told.get("precision") if isinstance(told, dict) else None


def _build_routing_strategy(config: DictConfig) -> Strategy:
    """The parts of the strategy that choose weights by task or prompt, with nothing learned yet;
    the rest only trains.
    """
    with open_dict(config):
        parts = config.copy()
        parts.strategy = {name: config.strategy[name] for name in build.choosing(config)}
    return build.strategy(parts) if parts.strategy else Strategy()


def _load_adapter(model: Model, folder: Path) -> None:
    """The adapter that `continual adapt` saved; raises DataError where it does not fit the model."""
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    try:
        fits = peft.set_peft_model_state_dict(
            model.net, load_file(file, device=str(model.layout.device))
        )
        if fits is not None and fits.unexpected_keys:
            raise KeyError(fits.unexpected_keys[0])
    except FileNotFoundError as e:
        raise MissingError(f"{file}: there is no such adapter; adapt again, or restore it") from e
    except (SafetensorError, RuntimeError, KeyError, ValueError) as e:
        raise DataError(
            f"{file} is damaged, or of another adapter than config.yaml names ({brief(str(e))}); "
            "adapt again, or restore it"
        ) from e
