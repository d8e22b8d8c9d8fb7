"""A quadratic pull towards earlier weights. L2, EWC, online EWC and MAS differ in the importance of
each weight.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.importance import fisher, sensitivity
from continual.models.model import Model
from continual.models.weights import Weights, combine, safe_ratio, snapshot, to_float32, weights
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory
from continual.strategy.replay_buffer import sample_task_examples


def task_fisher(
    model: Model, task: Task[Encoded], num_examples: int, labels: str, seed: str
) -> Weights:
    """The diagonal Fisher information of some of a task's training examples; a resumed run draws
    the same.
    """
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    return fisher(model, sample_task_examples(task, num_examples, seed), labels, generator)


@dataclass(kw_only=True)
class L2(Strategy):
    """The penalty strength/2 * sum_i importance_i (w_i - anchor_i)^2, with importance 1 and the
    last weights as anchor.

    The baseline "L2" of Kirkpatrick et al. (2017, figure 2).
    """

    stores: ClassVar[str] = "8 P"
    costs: ClassVar[str] = "1 + O(P)"
    strength: float = 1.0
    anchor: Weights = memory(dict)
    importance: Weights = memory(dict)

    def __post_init__(self) -> None:
        """Refuse a push away."""
        super().__post_init__()
        if self.strength < 0:
            raise ConfigError(
                f"found {self.strength} as the strength of the pull to earlier weights, expected "
                "at least 0"
            )

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The task's loss and the pull."""
        loss = super().loss(model, batch)
        return loss + self.penalty(model) if self.anchor and self.strength else loss

    def penalty(self, model: Model) -> Tensor:
        """The pull's value at the model's weights; a scalar.

        Its gradient is at hand when its value is, and is not sought anew: the step reads every
        weight fewer times.
        """
        live, twice = weights(model), []
        for n, a in self.anchor.items():
            apart = live[n] - a
            twice.append(
                ((self.importance[n] * apart.detach()) * apart).sum()
            )  # its gradient: importance * apart
        value = torch.stack(twice).sum()
        return self.strength * (value - value.detach() / 2)

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Measure the importance of each weight and anchor it where it is."""
        super().end(model, task)
        if self.strength:
            self.consolidate(
                to_float32(snapshot(model)), to_float32(self.measure_importance(model, task))
            )

    def measure_importance(self, model: Model, task: Task[Encoded]) -> Weights:
        """How much each weight matters to the task that was just learned."""
        return {n: torch.ones_like(w) for n, w in snapshot(model).items()}

    def consolidate(self, end_weights: Weights, task_importance: Weights) -> None:
        """Only the last anchor counts."""
        self.anchor, self.importance = end_weights, task_importance


@dataclass(kw_only=True)
class EWC(L2):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, eq. 3): one penalty a task, weighted
    by its Fisher.

    The tasks' penalties sum_t F_t (w - w_t)^2 are one quadratic with importance S = sum_t F_t
    around the mean of the anchors weighted by F_t, plus a constant: memory and time do not grow
    with the number of tasks. `num_examples` of each task's training data estimate the Fisher, with
    `labels` "empirical" or "sampled".
    """

    strength: float = 1000.0
    num_examples: int = 100
    labels: str = "empirical"
    seed: int = 0
    constant: float = memory(float)
    stages: int = memory(int)

    def penalty(self, model: Model) -> Tensor:
        """The sum of all tasks' penalties, exactly; a scalar."""
        return super().penalty(model) + self.strength / 2 * self.constant

    def measure_importance(self, model: Model, task: Task[Encoded]) -> Weights:
        """The diagonal Fisher information of the task, at its end."""
        self.stages += 1
        return task_fisher(
            model, task, self.num_examples, self.labels, f"{self.seed}/{self.stages}"
        )

    def consolidate(self, end_weights: Weights, task_importance: Weights) -> None:
        """Complete the square: fold the new penalty into the one that stands for the earlier ones."""
        if not self.anchor:
            self.anchor, self.importance = end_weights, task_importance
            return
        total = combine(torch.add, self.importance, task_importance)
        part = safe_ratio(task_importance, total)
        apart = combine(torch.sub, end_weights, self.anchor)
        left_over = combine(
            lambda s, p, d: (s * p * d.square()).sum(), self.importance, part, apart
        )
        self.constant += float(torch.stack(list(left_over.values())).sum())
        self.anchor = combine(lambda a, p, d: a + p * d, self.anchor, part, apart)
        self.importance = total


@dataclass(kw_only=True)
class OnlineEWC(EWC):
    """Online EWC (Schwarz et al. 2018, section 4): a running Fisher F* = decay F* + F_t around the
    last weights only.

    The penalty weighs that running Fisher by `decay` once more, as in the paper's objective. Before
    it is added the paper normalises each task's Fisher, by what it does not say, so that none
    counts for more by its scale; here a task's scale counts, as in EWC.
    """

    decay: float = 0.9

    def consolidate(self, end_weights: Weights, task_importance: Weights) -> None:
        """Forget a part of the earlier importance; move the anchor here. What is kept is decay F*."""
        kept = self.importance or combine(torch.zeros_like, task_importance)
        self.importance = combine(lambda old, new: self.decay * (old + new), kept, task_importance)
        self.anchor = end_weights


@dataclass(kw_only=True)
class SummedImportance(L2):
    """One pull to the last weights, with the importance of all tasks added up."""

    def consolidate(self, end_weights: Weights, task_importance: Weights) -> None:
        """Add the task's importance, move the anchor here; no weight is pushed away."""
        kept = self.importance or combine(torch.zeros_like, task_importance)
        self.importance = combine(lambda old, new: (old + new).clamp(min=0), kept, task_importance)
        self.anchor = end_weights


@dataclass(kw_only=True)
class MAS(SummedImportance):
    """Memory aware synapses (Aljundi et al. 2018, eq. 3-4): how much each weight changes what the
    model says.

    The importance is the mean absolute gradient of the logits' squared norm over `num_examples` of the
    task. The paper's penalty has no 1/2: its lambda, 1 in all experiments, is half our `strength`.
    """

    strength: float = 2.0
    num_examples: int = 100
    seed: int = 0
    stages: int = memory(int)

    def measure_importance(self, model: Model, task: Task[Encoded]) -> Weights:
        """The logits' sensitivity to each weight, at the task's end."""
        self.stages += 1
        return sensitivity(
            model, sample_task_examples(task, self.num_examples, f"{self.seed}/{self.stages}")
        )
