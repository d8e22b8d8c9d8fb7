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
    """Measure the dev loss once an epoch, keep the best weights, and say when to stop.

    With the best weights it keeps all of the strategy's memory, generators included, so that a
    path, an average or a reservoir holds the steps up to the best weights only, as if the stage had
    ended there. This needs the memory for weights and strategy once more.
    """

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        dev_examples: Sequence[Encoded],
        steps_per_epoch: int,
        patience: int,
    ) -> None:
        """Keep the current weights; `patience` is the number of epochs without a lower loss."""
        self.model = model
        self.strategy = strategy
        self.dev_examples = dev_examples
        self.steps_per_epoch = steps_per_epoch
        self.patience = patience
        self.best_loss = math.inf
        self.bad_epochs = 0
        self.epochs = 0
        self.save_best()

    def check_step(self, step: int) -> None:
        """Measure the dev loss if an epoch ends with this step."""
        if step < (self.epochs + 1) * self.steps_per_epoch:
            return
        self.epochs += 1
        loss = self._dev_loss()
        if loss < self.best_loss:
            self.best_loss = loss
            self.bad_epochs = 0
            self.save_best()
        else:
            self.bad_epochs += 1

    def save_best(self) -> None:
        """Keep the current weights and strategy memory as the best."""
        self.best_weights: Weights = snapshot(self.model)
        self.best_memory: dict[str, Any] = deepcopy(self.strategy.state_dict())

    def restore_best(self) -> None:
        """Restore the best weights and strategy memory, if a dev loss was measured."""
        if self.epochs:
            restore(self.model, self.best_weights)
            self.strategy.load_state_dict(self.best_memory)

    @property
    def should_stop(self) -> bool:
        """True after `patience` epochs without a lower dev loss."""
        return self.bad_epochs >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "low": self.best_loss if self.epochs else None,
            "since": self.bad_epochs,
            "seen": self.epochs,
            "best": self.best_weights,
            "memory": self.best_memory,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.bad_epochs = state["since"]
        self.epochs = state["seen"]
        self.best_weights = state["best"]
        self.best_memory = state["memory"]
        self.best_loss = math.inf if state["low"] is None else state["low"]

    @torch.no_grad()
    def _dev_loss(self) -> float:
        """Return the mean loss per supervised token of the dev rows, over all processes."""
        self.model.net.eval()
        batch = self.model.batch(self.dev_examples)
        parts = batch.micro_batches()
        with synced_passes(self.model):
            own_sum = sum(
                float(nll(self.model, part)) * part.supervised_tokens
                for part in iter_own_items(parts, [p.num_tokens for p in parts])
            )
        total = torch.tensor(own_sum, dtype=torch.float64)
        all_reduce_sum([total])
        self.model.net.train()
        return float(total) / batch.supervised_tokens
