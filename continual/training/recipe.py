"""Settings of a stage's training: optimizer, schedule, batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from continual.errors import Problems, mistyped, unknown

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a stage's training; conf/train/default.yaml explains each key."""

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
        """Raise ConfigError for values that cannot work."""
        _find_type_problems(self).raise_if_any()  # ranges can only be checked for numbers
        _find_range_problems(self).raise_if_any()
        _find_choice_problems(self).raise_if_any()

    def total_steps(self, num_examples: int) -> int:
        """Return the number of optimizer steps of a stage with this many examples."""
        steps_per_epoch = math.ceil(num_examples / self.batch_size)
        return self.steps or max(1, round(self.epochs * steps_per_epoch))


def _find_type_problems(recipe: Recipe) -> Problems:
    """Return the values that have another type than their key."""
    problems = Problems()
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        expected = mistyped(f.type, value)
        problems.require(not expected, f"{_config_key(f.name)}={value}: expected {expected}")
    return problems


def _find_range_problems(recipe: Recipe) -> Problems:
    """Return the numbers that are out of range; NaN is out of every range."""
    problems = Problems()
    for name in ("batch_size", "log_every_steps", "steps", "patience"):
        value = getattr(recipe, name)
        if value is not None and not 1 <= value < 2**63:
            limit = " and below 2^63" if value > 1 else ""
            problems.add(f"{_config_key(name)}={value}: expected at least 1{limit}")

    for name in ("warmup_ratio", "prompt_mask_prob"):
        value = getattr(recipe, name)
        problems.require(
            0 <= value <= 1,
            f"{_config_key(name)}={value}: expected a share or probability in [0, 1]",
        )

    betas = recipe.betas
    problems.require(
        len(betas) == 2 and all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas),
        f"train.betas={list(betas)}: expected two numbers in [0, 1), such as [0.9,0.999]",
    )
    for name in ("lr", "weight_decay"):
        value = getattr(recipe, name)
        problems.require(value >= 0, f"train.{name}={value}: expected at least 0")

    norm = recipe.max_grad_norm
    problems.require(
        norm is None or norm > 0,
        f"train.max_grad_norm={norm}: expected more than 0, or null for no clipping",
    )
    if recipe.steps is None and not 0 < recipe.epochs <= 1e9:
        limit = " and at most 1e9" if recipe.epochs > 1 else ""
        problems.add(f"train.epochs={recipe.epochs}: expected more than 0{limit}")
    return problems


def _find_choice_problems(recipe: Recipe) -> Problems:
    """Return the names that are not among the known ones."""
    choices = {
        "schedule": tuple(SCHEDULES),
        "optimizer": OPTIMIZERS,
        "prompt_mask_mode": ("replace", "drop"),
        "on_nonfinite": ("stop", "skip"),
    }
    problems = Problems()
    for name, known in choices.items():
        value = getattr(recipe, name)
        if value not in known:
            problems.add(unknown(_config_key(name), value, known))
    return problems


def _config_key(name: str) -> str:
    """Return the configuration key of a field."""
    return f"loss.{name}" if name.startswith("prompt_mask") else f"train.{name}"
