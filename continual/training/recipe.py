"""How a stage trains: optimizer, schedule, batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from continual.errors import ConfigError, gathered, mistyped, unknown

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a stage is trained; conf/train/default.yaml says what each key means."""

    lr: float
    epochs: float = 1
    steps: int | None = None
    batch_size: int = 32
    warmup_ratio: float = 0.0
    schedule: str = "linear"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    patience: int | None = None
    log_every_steps: int = 10
    prompt_mask_prob: float = 0.0
    prompt_mask_mode: str = "replace"
    on_nonfinite: str = "stop"

    def __post_init__(self) -> None:
        """Refuse names and numbers that cannot work."""
        if problems := [*_type_problems(self)] or [*_range_problems(self)]:
            raise ConfigError(gathered(problems))
        if self.schedule not in SCHEDULES:
            raise ConfigError(unknown("train.schedule", self.schedule, SCHEDULES))
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(unknown("train.optimizer", self.optimizer, OPTIMIZERS))
        if self.prompt_mask_mode not in ("replace", "drop"):
            raise ConfigError(
                unknown("loss.prompt_mask_mode", self.prompt_mask_mode, ["replace", "drop"])
            )
        if self.on_nonfinite not in ("stop", "skip"):
            raise ConfigError(unknown("train.on_nonfinite", self.on_nonfinite, ["stop", "skip"]))

    def total_steps(self, num_examples: int) -> int:
        """The optimizer steps of a stage of so many examples."""
        return self.steps or max(1, round(self.epochs * math.ceil(num_examples / self.batch_size)))


def _type_problems(recipe: Recipe) -> Iterator[str]:
    """What is of another kind than the key needs."""
    for f in fields(recipe):
        if expected := mistyped(f.type, value := getattr(recipe, f.name)):
            yield f"{_config_key(f.name)}={value}: expected {expected}"


def _range_problems(recipe: Recipe) -> Iterator[str]:
    """What is a number that cannot work."""
    for name in ("batch_size", "log_every_steps", "steps", "patience"):
        if (value := getattr(recipe, name)) is not None and not 1 <= value < 2**63:
            yield f"{_config_key(name)}={value}: expected at least 1{' and below 2^63' if value > 1 else ''}"
    for name in ("warmup_ratio", "prompt_mask_prob"):
        if not 0 <= (value := getattr(recipe, name)) <= 1:
            yield f"{_config_key(name)}={value}: expected a share or probability in [0, 1]"
    if len(recipe.betas) != 2 or not all(
        isinstance(b, (int, float)) and 0 <= b < 1 for b in recipe.betas
    ):
        yield f"train.betas={list(recipe.betas)}: expected two numbers in [0, 1), such as [0.9,0.999]"
    for name in ("lr", "weight_decay"):
        if not (value := getattr(recipe, name)) >= 0:
            yield f"train.{name}={value}: expected at least 0"
    if recipe.max_grad_norm is not None and not recipe.max_grad_norm > 0:
        yield f"train.max_grad_norm={recipe.max_grad_norm}: expected more than 0, or null for no clipping"
    if recipe.steps is None and not 0 < recipe.epochs <= 1e9:
        yield f"train.epochs={recipe.epochs}: expected more than 0{' and at most 1e9' if recipe.epochs > 1 else ''}"


def _config_key(name: str) -> str:
    """Where a field of the recipe is set."""
    return f"loss.{name}" if name.startswith("prompt_mask") else f"train.{name}"
