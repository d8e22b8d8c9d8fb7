"""Sparse fine-tuning: a stage trains only the few weights that matter most to its task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.model import Model
from continual.models.weights import Weights, combine, snapshot, top_mask, weights
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory
from strategies.ewc import task_fisher


@dataclass(kw_only=True)
class Sparse(Strategy):
    """Fisher-masked sparse fine-tuning (FISH mask, Sung et al. 2021, section 3), with a mask for
    each task.

    Before a stage the Fisher information of `num_examples` of the task, its instructions with their
    responses, is taken at the weights as they are, and only the `fraction` of all trainable weights
    with the largest is trained. All others stay bit for bit: they get no gradient, so AdamW has no
    moments for them, and what its weight decay takes from them is given back. 0.5% and 1024
    examples are those of the paper's table 1.

    Weights that are among the `protected_fraction` (a fraction) with the largest Fisher information for the
    earlier tasks, summed over these as measured at each one's end, are left out first. The paper
    has one task, and none of this.
    """

    stores: ClassVar[str] = "a count; 4 P with avoid; 5 P more within a stage"
    costs: ClassVar[str] = "1 + O(P); a Fisher a stage"
    fraction: float = 0.005
    protected_fraction: float = 0.0
    num_examples: int = 1024
    labels: str = "empirical"
    seed: int = 0
    past: int = memory(int)  # stages
    needed: Weights = memory(
        dict
    )  # the Fisher information of the earlier tasks, where it is to be avoided
    mask: Weights = memory(dict)  # of this stage: True where it trains
    held: Weights = memory(dict)  # where this stage began

    def __post_init__(self) -> None:
        """Refuse fractions that leave nothing to train."""
        super().__post_init__()
        if not (
            0 < self.fraction <= 1
            and self.protected_fraction >= 0
            and (self.protected_fraction == 0 or self.fraction + self.protected_fraction <= 1)
        ):
            raise ConfigError(
                f"sparse fine-tuning of a fraction {self.fraction} that avoids {self.protected_fraction}: "
                "expected a fraction above 0 and both together at most 1"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Choose the weights that this stage trains, without dropout."""
        trained = super().begin(model, task)
        if self.fraction < 1:
            with model.eval_mode():
                self.held, self.mask = (
                    snapshot(model),
                    self.select_mask(self.measure_importance(model, task)),
                )
        return trained

    def measure_importance(self, model: Model, task: Task[Encoded]) -> Weights:
        """How much each weight matters to the task."""
        return task_fisher(model, task, self.num_examples, self.labels, f"{self.seed}/{self.past}")

    def select_mask(self, importance: Weights) -> Weights:
        """True for the weights that matter most, but for those to be avoided."""
        if self.needed:
            importance = combine(
                lambda f, old: f.masked_fill(old, -1),
                importance,
                top_mask(self.needed, self.protected_fraction),
            )
        return top_mask(importance, self.fraction)

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave the gradient of the chosen weights."""
        self.restore_frozen(model)
        loss = super().backward(model, batch)
        for n, w in weights(model).items() if self.mask else ():
            if w.grad is not None:
                w.grad = w.grad * self.mask[n]
        return loss

    @torch.no_grad()
    def restore_frozen(self, model: Model) -> None:
        """Give the other weights back what weight decay took from them."""
        for n, w in weights(model).items() if self.mask else ():
            w.copy_(torch.where(self.mask[n], w, self.held[n]))

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """The mask was this stage's; what matters to its task is kept where later ones are to avoid
        it.
        """
        self.restore_frozen(model)
        super().end(model, task)
        self.mask, self.held = {}, {}
        self.past += 1
        if self.protected_fraction:
            found = self.measure_importance(model, task)
            self.needed = combine(torch.add, self.needed, found) if self.needed else found
