"""La-MAML: learn by looking ahead, each weight at a rate that is learned beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from continual.data.types import Encoded
from continual.models import sharding
from continual.models.model import Model
from continual.models.weights import Weights, unflatten_weights, weights
from continual.packing.batch import Batch
from strategies.maml import MAML


@dataclass(kw_only=True)
class LaMAML(MAML):
    """Look-ahead MAML (Gupta, Yadav & Paull 2020, arXiv 2007.13904, algorithm 1).

    From the weights w, `inner_steps` of SGD at the rates a, each on a part of the step's new
    examples, lead to fast weights, whose loss L on new and remembered examples together is what
    counts. First the rates learn from it, a <- a - rates_lr dL/da, and then the weights, at the new
    rates: w <- w - max(0, a) dL/dw. In the first order dL/dw is the gradient at the fast weights,
    and dL/da is minus its product, weight by weight, with the sum of the inner gradients: a weight
    on which new and old examples agree learns faster, one on which they do not slower, or not at
    all. Inner steps go at a itself, so that a rate below 0 can rise again. Every gradient is first
    scaled down to the norm `clip`; the authors' code does so but for inner ones, whose numbers it
    cuts off at +-`clip`. It also takes L after every inner step, and the mean.

    The weights' step is one of plain SGD: it takes train.optimizer=sgd, and is the paper's at a
    train.lr of 1, which the schedule varies. AdamW, which scales each weight's step by itself,
    would undo the rates. What is tested is w, and it comes behind the fast weights: the farther the
    inner steps lead, the less it answers by itself.

    The authors' code begins with rates of 0.1, rates_lr 0.25, 5 inner steps and a clip of 1 on
    CIFAR, and has 0.15, 0.3, one step an example and 2 on MNIST; conf/strategy/la_maml.yaml says
    why ours differ. Half of what judges is remembered, as there, in a reservoir; ours takes a task
    in at its end, as their use_old_task_memory draws.
    """

    stores: ClassVar[str] = "E examples, 4 P"
    costs: ClassVar[str] = "1 + 1 / (1 - share)"
    requires_sgd = True
    inner_lr: float = 0.03
    inner_steps: int = 2
    rates_lr: float = 0.25
    clip: float | None = 4.0
    share: float = 0.5
    buffer_kind: str = "reservoir"
    inner_optimizer: str = field(init=False, default="meta_sgd")
    inner_scope: str = field(init=False, default="all")
    num_new: int = field(
        init=False, repr=False, default=0
    )  # so many of the step's examples, the first ones

    def draw_replay_examples(self, n: int) -> Sequence[Encoded]:
        """Of all that is remembered: Sample(R)."""
        return self.buffer.draw(n)

    def episodes(self, batch: Batch) -> list[Batch]:
        """The step is one."""
        self.num_new = len(batch.examples)
        return [self.add_replay_examples(batch)]

    def split_episode(self, episode: Batch) -> tuple[list[list[Batch]], Batch]:
        """The new examples, dealt to the inner steps, and all, to judge."""
        k = min(self.inner_steps, self.num_new)
        return [
            episode.select(range(i, self.num_new, k)).micro_batches() for i in range(k)
        ], episode

    def gradient_scale(self, gradient: Weights) -> float | Tensor:
        """No inner gradient is of a larger norm than `clip`."""
        norm = get_total_norm([t.detach() for t in gradient.values()])
        return 1.0 if self.clip is None else (self.clip / (norm + 1e-6)).clamp(max=1)

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Move the rates, algorithm 1 (a), and leave in every `.grad` what they make of the
        weights' step (b).
        """
        loss = super().backward(model, batch)
        live, rates, limit = weights(model), self.rates.detach(), self.clip or math.inf
        if (g := self.rates.grad) is not None:
            norm = sharding.clip_gradients([self.rates], limit) + sharding.clip_gradients(
                [*live.values()], limit
            )  # in place
            # The stage passes over a step that is not finite, and so do the rates.
            rates.copy_(torch.where(norm.isfinite(), rates - self.rates_lr * g, rates))
            self.rates.grad = (
                None  # the optimizer has the rates, for what processes share, and leaves them alone
            )
            for n, rate in unflatten_weights(rates.clamp(min=0), live).items():
                live[n].grad = None if (g := live[n].grad) is None else rate * g
        return loss
