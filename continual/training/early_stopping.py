"""Early stopping on the dev loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from continual.data.types import Encoded
from continual.distributed.processes import all_reduce_sum
from continual.distributed.work import iter_own_items
from continual.models.loss import nll
from continual.models.model import Model
from continual.models.sharding import synced_passes
from continual.models.weights import Weights, restore, snapshot
from continual.strategy.interface import Strategy


class EarlyStopping:
    """Early stopping: the dev loss once an epoch, the best weights kept, over after so many epochs
    without a gain.

    Kept with them is all of the strategy's memory, generators too: a path, an average, a reservoir
    are of the steps up to the best weights, as if the stage had ended there. It takes as much
    memory again.
    """

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        dev_examples: Sequence[Encoded],
        steps_per_epoch: int,
        patience: int,
    ) -> None:
        """`epoch` is how many steps one takes, `allowed` how many epochs may bring no gain."""
        self.model, self.strategy, self.dev_examples, self.steps_per_epoch, self.patience = (
            model,
            strategy,
            dev_examples,
            steps_per_epoch,
            patience,
        )
        self.best_loss, self.bad_epochs, self.epochs = math.inf, 0, 0
        self.save_best()

    def check_step(self, step: int) -> None:
        """Measure the dev loss if an epoch ends with this step."""
        if step < (self.epochs + 1) * self.steps_per_epoch:
            return
        self.epochs += 1
        now = self._dev_loss()
        if now < self.best_loss:
            self.best_loss, self.bad_epochs = now, 0
            self.save_best()
        else:
            self.bad_epochs += 1

    def save_best(self) -> None:
        """What the stage goes back to is what is now."""
        self.best_weights: Weights = snapshot(self.model)
        self.best_memory: dict[str, Any] = deepcopy(self.strategy.state_dict())

    def restore_best(self) -> None:
        """Go back to the best, if any was seen."""
        if self.epochs:
            restore(self.model, self.best_weights)
            self.strategy.load_state_dict(self.best_memory)

    @property
    def should_stop(self) -> bool:
        """Whether there were so many epochs without a gain."""
        return self.bad_epochs >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """It as values."""
        return {
            "low": self.best_loss if self.epochs else None,
            "since": self.bad_epochs,
            "seen": self.epochs,
            "best": self.best_weights,
            "memory": self.best_memory,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.bad_epochs, self.epochs, self.best_weights, self.best_memory = (
            state[k] for k in ("since", "seen", "best", "memory")
        )
        self.best_loss = math.inf if state["low"] is None else state["low"]

    @torch.no_grad()
    def _dev_loss(self) -> float:
        self.model.net.eval()
        batch = self.model.batch(self.dev_examples)
        parts = batch.micro_batches()
        with synced_passes(self.model):
            total = torch.tensor(
                sum(
                    float(nll(self.model, micro)) * micro.supervised_tokens
                    for micro in iter_own_items(parts, [p.num_tokens for p in parts])
                ),
                dtype=torch.float64,
            )
        all_reduce_sum([total])
        self.model.net.train()
        return float(total) / batch.supervised_tokens
