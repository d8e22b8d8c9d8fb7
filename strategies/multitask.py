"""Multi-task learning on the current and the remembered tasks, each with a weight in the loss."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, unknown
from continual.models.loss import gradient_of
from continual.models.model import Model
from continual.models.weights import flatten_weights, gradient, set_gradient, unflatten_weights
from continual.packing.batch import Batch
from continual.strategy.interface import memory, to_param_groups
from strategies.replay import Replay

WEIGHTINGS = ("fixed", "size", "temperature", "uncertainty")
CONFLICTS = ("keep", "project")


@dataclass(kw_only=True)
class MultiTask(Replay):
    """The loss of a step is sum_t weight_t * (mean loss over the tokens of task t in it), the
    weights summing to 1.

    `weighting` says whence the weights come. "fixed": `weights` by task name, 1 where none is
    given, 0 to leave a task out. "size": the task's number of training examples. "temperature":
    equal weights for tokens, while the remembered tasks are drawn in proportion to size^(1 /
    `temperature`) (Raffel et al. 2020, section 3.5.2). "uncertainty": equal weights times
    exp(-s_t), plus s_t / 2, with a log variance s_t a task that is learned along at
    `uncertainty_lr` (Kendall et al. 2018, eq. 10, with the classification likelihood).

    `conflicts` says what becomes of tasks whose gradients oppose each other. "keep": they are added
    up. "project": each gives way before it is, PCGrad (Yu et al. 2020, algorithm 1), which costs a
    second pass over the step.
    """

    shardable = True
    weighting: str = "fixed"
    weights: Mapping[str, float] | None = None
    temperature: float = 2.0
    uncertainty_lr: float = 0.01
    conflicts: str = "keep"
    sizes: dict[int, int] = memory(dict)
    columns: list[str] = memory(list)
    log_variance: Tensor = memory(lambda: torch.zeros(0))
    task_batches: list[Batch] = field(
        init=False, repr=False, default_factory=list
    )  # its examples, a batch for each task

    def __post_init__(self) -> None:
        """Refuse what cannot be a weighting."""
        super().__post_init__()
        if self.weighting not in WEIGHTINGS:
            raise ConfigError(unknown("weighting", self.weighting, WEIGHTINGS))
        if self.conflicts not in CONFLICTS:
            raise ConfigError(unknown("conflicts", self.conflicts, CONFLICTS))
        if not self.temperature > 0 or any(w < 0 for w in (self.weights or {}).values()):
            raise ConfigError("a multitask temperature must be above 0, and no weight below it")

    def is_shardable(self) -> bool:
        """Return True unless conflicts are projected, which takes whole gradients."""
        return super().is_shardable() and self.conflicts == "keep"

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Count the tasks' sizes; hand the log variances to the optimizer where they are learned."""
        self.columns = list(task.task_names)
        if strange := set(self.weights or {}) - set(self.columns):
            raise ConfigError(
                unknown("task in strategy.multitask.weights", min(strange), self.columns)
            )
        for e in task.train:
            self.sizes[e.task_index] = 0
        for e in task.train:
            self.sizes[e.task_index] += 1
        trained = super().begin(model, task)
        if self.weighting != "uncertainty":
            return trained
        start = (
            self.log_variance.detach() if len(self.log_variance) else torch.zeros(len(self.columns))
        )
        self.log_variance = torch.nn.Parameter(start.to(model.layout.device))
        return [
            *to_param_groups(trained),
            {"params": [self.log_variance], "lr": self.uncertainty_lr, "weight_decay": 0},
        ]

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """The weighted step; where conflicts are projected, what that changes of the tasks'
        gradients is added.
        """
        loss = super().backward(model, batch)
        if (
            self.conflicts == "project"
            and len(parts := [part for part in self.task_batches if part.supervised_tokens]) > 1
        ):
            own = gradient(model)
            tokens = sum(part.supervised_tokens for part in parts)
            each = torch.stack(
                [
                    part.supervised_tokens
                    / tokens
                    * flatten_weights(gradient_of(self.loss, model, part))
                    for part in parts
                ]
            )
            set_gradient(
                model,
                unflatten_weights(
                    flatten_weights(own) + (project_conflicts(each, self.buffer.rng) - each).sum(0),
                    own,
                ),
            )
        return loss

    def add_replay_examples(self, batch: Batch) -> Batch:
        """New and remembered examples, each scaled so that the tasks' token means get their
        weights.
        """
        batch = super().add_replay_examples(batch)
        tokens = {t: part.supervised_tokens for t, part in batch.split_by_task().items()}
        if self.weighting == "temperature":
            share = {t: n / batch.supervised_tokens for t, n in tokens.items()}
        else:
            raw = {t: self._unnormalized_weight(t) for t in tokens}
            share = {t: w / (sum(raw.values()) or 1) for t, w in raw.items()}
        self._log_task_weights(share)
        scale = {t: share[t] * batch.supervised_tokens / n for t, n in tokens.items()}
        batch = batch.with_examples(batch.examples, [scale[e.task_index] for e in batch.examples])
        self.task_batches = list(batch.split_by_task().values())
        return batch

    def _unnormalized_weight(self, task: int) -> float:
        if self.weighting == "fixed":
            return (self.weights or {}).get(self.columns[task], 1.0)
        return float(self.sizes[task]) if self.weighting == "size" else 1.0

    def _log_task_weights(self, share: Mapping[int, float]) -> None:
        factor = torch.exp(-self.log_variance.detach()).tolist() if len(self.log_variance) else None
        self.notes = {
            f"weight/{self.columns[t]}": w * (factor[t] if factor else 1) for t, w in share.items()
        }

    def draw_replay_examples(self, n: int) -> Sequence[Encoded]:
        """With a temperature, the remembered tasks are drawn first, then an example of each."""
        if self.weighting != "temperature":
            return super().draw_replay_examples(n)
        return self.buffer.draw_by_task(
            n, {t: size ** (1 / self.temperature) for t, size in self.sizes.items()}
        )

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The weighted loss, and the log variances' own term where they are learned."""
        if self.weighting != "uncertainty":
            return super().loss(model, batch)
        s = self.log_variance
        own = (batch.token_weights * s[batch.task_index]).sum() / batch.supervised_tokens / 2
        return super().loss(model, batch.with_task_factors(torch.exp(-s))) + own


def project_conflicts(gradients: Tensor, rng: random.Random) -> Tensor:
    """Each row of (T, P), less what of it goes against any other row, taken in a random order."""
    freed = gradients.clone()
    for i, g in enumerate(freed):
        for j in rng.sample(range(len(freed)), len(freed)):
            other = gradients[j]
            if j != i and (along := g @ other) < 0:
                g -= along / (other @ other) * other
    return freed
