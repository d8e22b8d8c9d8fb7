"""Typed sections of a run's configuration, with their checks of types and ranges.

conf/ explains each key; the fields here have the same names. `train` and `loss` are read by
`build.recipe`, sections with a `_target_` by the constructors that they name.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from continual.errors import Problems, mistyped, unknown

Section = TypeVar("Section")

UPDATE_RULES = ("train", "inner")


def _at_least(minimum: int, default: Any) -> Any:
    """Declare a field with a smallest value."""
    return field(default=default, metadata={"minimum": minimum})


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Section `data`."""

    template: str = "plain"
    max_length: int = _at_least(1, default=512)
    on_unusable: str = "error"


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Section `score.judge`."""

    name: str | None = None
    template: str = "plain"
    grade_mode: str = "likelihood"
    dtype: str = "fp32"
    max_length: int = _at_least(1, default=2048)
    batch_size: int = _at_least(1, default=16)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Section `score`, without `score.judge`."""

    split: str = "test"
    metric: str | None = None
    answer_mode: str = "generate"
    max_new_tokens: int | None = _at_least(1, default=None)
    max_examples: int | None = _at_least(1, default=None)
    batch_size: int = _at_least(1, default=128)
    every_steps: int | None = _at_least(1, default=None)
    monitor_examples: int = _at_least(1, default=16)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Section `checkpoint`."""

    every_steps: int | None = _at_least(1, default=None)
    every_seconds: float | None = None
    keep: int | None = _at_least(1, default=None)


@dataclass(frozen=True, kw_only=True)
class StopSettings:
    """Section `stop_if`."""

    forgetting: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """Section `adapt`, which only that command has."""

    init_from: str = "base"
    update_rule: str = "train"
    steps: int = _at_least(1, default=100)
    eval_steps: tuple[int, ...] = ()
    shots: tuple[int | None, ...] = ()
    draws: int = _at_least(1, default=3)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All typed sections of a configuration."""

    data: DataSettings
    score: ScoreSettings
    judge: JudgeSettings
    checkpoint: CheckpointSettings
    stop_if: StopSettings
    adapt: AdaptSettings | None  # None for other commands


def read_section(config: DictConfig, key: str, section: type[Section]) -> Section:
    """Return a section of the configuration as its class, unchecked; missing keys have defaults."""
    given = OmegaConf.select(config, key)
    values = OmegaConf.to_container(given, resolve=True) if isinstance(given, DictConfig) else {}
    assert isinstance(values, dict)
    known = {f.name: values[f.name] for f in _fields(section) if f.name in values}
    return section(**{name: _to_tuple(value) for name, value in known.items()})


def read_settings(config: DictConfig, problems: Problems) -> RunSettings:
    """Return all typed sections of a configuration; add what is wrong with them to `problems`.

    Sections that a command does not have are those of the defaults.
    """
    settings = RunSettings(
        data=read_section(config, "data", DataSettings),
        score=read_section(config, "score", ScoreSettings),
        judge=read_section(config, "score.judge", JudgeSettings),
        checkpoint=read_section(config, "checkpoint", CheckpointSettings),
        stop_if=read_section(config, "stop_if", StopSettings),
        adapt=read_section(config, "adapt", AdaptSettings) if "adapt" in config else None,
    )
    _check_minimum(problems, "seed", config.get("seed"), "int | None", 0)
    _check_minimums(problems, "data", settings.data)
    tokens = OmegaConf.select(config, "train.tokens_per_microbatch")
    _check_minimum(problems, "train.tokens_per_microbatch", tokens, "int | None", 1)
    _check_minimums(problems, "score", settings.score)
    _check_minimums(problems, "score.judge", settings.judge)
    _check_minimums(problems, "checkpoint", settings.checkpoint)
    if settings.adapt:
        _check_minimums(problems, "adapt", settings.adapt)
    if not problems and (config.get("seed") or 0) >= 2**63:
        problems.add(f"seed={config.seed}: expected a whole number below 2^63")

    if settings.adapt:
        _check_adapt(problems, settings.adapt)
    _check_every_seconds(problems, settings.checkpoint.every_seconds)
    _check_monitor(problems, settings)
    return settings


def _check_minimums(problems: Problems, key: str, section: Any) -> None:
    """Check every field of a section that has a smallest value."""
    for f in _fields(type(section)):
        if "minimum" in f.metadata:
            value = getattr(section, f.name)
            _check_minimum(problems, f"{key}.{f.name}", value, f.type, f.metadata["minimum"])


def _check_minimum(
    problems: Problems, key: str, value: Any, annotation: object, minimum: int
) -> None:
    is_valid = not mistyped(annotation, value) and (value is None or value >= minimum)
    problems.require(is_valid, f"{key}={value}: expected a whole number of at least {minimum}")


def _check_adapt(problems: Problems, adapt: AdaptSettings) -> None:
    """Check the lists of numbers and the update rule."""
    lists: dict[str, tuple[Any, int]] = {
        "eval_steps": (adapt.eval_steps, 0),
        "shots": (adapt.shots, 1),
    }
    for name, (values, minimum) in lists.items():
        is_valid = isinstance(values, tuple) and all(
            not mistyped("int | None", v) and (v is None or v >= minimum) for v in values
        )
        shown = list(values) if isinstance(values, tuple) else values
        problems.require(
            is_valid,
            f"adapt.{name}={shown}: expected a list of whole numbers of at least {minimum}, "
            "such as [16,64]",
        )
    if adapt.update_rule not in UPDATE_RULES:
        problems.add(unknown("adapt.update_rule", str(adapt.update_rule), UPDATE_RULES))


def _check_every_seconds(problems: Problems, seconds: Any) -> None:
    problems.require(
        seconds is None or (not mistyped("float", seconds) and seconds >= 0),
        f"checkpoint.every_seconds={seconds}: expected a number of seconds of at least 0, or null",
    )


def _check_monitor(problems: Problems, settings: RunSettings) -> None:
    """Check how forgetting is measured within stages, and its limit."""
    limit: Any = settings.stop_if.forgetting
    every_steps = settings.score.every_steps
    if limit is not None and (mistyped("float", limit) or not 0 <= limit < 1):
        problems.add(
            f"stop_if.forgetting={limit}: expected a share of at least 0 and below 1, such as 0.2, "
            "or null"
        )
    elif limit is not None and every_steps is None:
        problems.add(
            f"stop_if.forgetting={limit}: forgetting within a stage is not measured; set "
            "score.every_steps=N to measure it every N steps"
        )
    if every_steps is not None and settings.adapt:
        problems.add(
            f"score.every_steps={every_steps}: adapt has one task and scores it at "
            "adapt.eval_steps; leave it out"
        )


def _fields(section: type[Any]) -> tuple[Field[Any], ...]:
    return fields(section)


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
