"""Look-ahead meta-learning: old and new examples judge where steps on the new lead, and set the rate of each weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.data import Encoded, Task
from continual.model import Model
from continual.packing import Batch
from continual.weights import combine, gradient, set_gradient, unflat, weights
from strategies.maml import MAML

# With these AdamW's step is lr g / (|g| + eps) = g / (1 + |g| / 1e4): plain gradient descent.
PLAIN = {"lr": 1e4, "betas": (0.0, 0.0), "eps": 1e4, "weight_decay": 0}


@dataclass(kw_only=True)
class LaMAML(MAML):
    """La-MAML (Gupta et al. 2020, algorithm 1): a learned rate alpha_i of each weight, small where tasks interfere.

    The step's new examples are dealt to `inner_steps` steps, w <- w - alpha * g. The loss of new and remembered
    examples together at the weights after them has a gradient with respect to alpha and to the weights before. First
    alpha moves against its own, by `rates_lr` times it (a); then the weights move by max(0, alpha) times theirs (b),
    so a weight whose alpha has fallen below 0 rests. `train.lr` has no part in that, but its schedule has. The paper
    takes (b)'s gradient to be that at the last weights, as `second_order=False` does.

    The paper steps on one example at a time and fills its memory as they come; here it is filled at a task's end. Its
    authors' code starts alpha at 0.1 with a rate of 0.25 on CIFAR-100, takes 5 inner steps there, and clips either
    gradient to norm 1: the `clip`, before alpha scales the weights' one.
    """

    stores: ClassVar[str] = "E examples and 4 P"
    costs: ClassVar[str] = "(2 + inner_steps) / 2 / (1 - share)"
    inner_lr: float = 0.1
    inner_steps: int = 5
    rates_lr: float = 0.25
    clip: float | None = 1.0
    inner: str = field(init=False, default="meta_sgd")
    adapts: str = field(init=False, default="all")
    new: int = field(init=False, repr=False, default=0)  # of the step's examples, which come first

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Have the optimizer take the step as it is; the rates come first, for the log shows the first group's."""
        trained = super().begin(model, task)
        if not self.inner_steps:
            return trained
        return [g if "lr" in g else g | PLAIN for g in sorted(trained, key=lambda g: "lr" not in g)]

    def recall(self, n: int) -> Sequence[Encoded]:
        """Of all remembered tasks."""
        return self.buffer.draw(n)

    def episodes(self, batch: Batch) -> list[Batch]:
        """One, of all examples."""
        self.new = len(batch.examples)
        return [self.joined(batch)]

    def split(self, episode: Batch) -> tuple[list[list[Batch]], Batch]:
        """The new examples lead, all of them judge."""
        k = min(self.inner_steps, self.new)
        return [episode.pick(range(i, self.new, k)).micro_batches() for i in range(k)], episode

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Move the rates, then leave the step that they give."""
        loss = super().backward(model, batch)
        if self.inner_steps and (g := self.rates.grad) is not None:
            for clipped in ([self.rates], [*weights(model).values()]):
                torch.nn.utils.clip_grad_norm_(clipped, self.clip or math.inf)
            with torch.no_grad():
                self.rates -= self.rates_lr * torch.where(g.isfinite(), g, 0)  # the step is skipped where it is not
            self.rates.grad = None  # the optimizer has no part in it
            rate = unflat(self.rates.detach(), weights(model))
            set_gradient(model, combine(lambda r, g: r.clamp(min=0) * g, rate, gradient(model)))
        return loss
