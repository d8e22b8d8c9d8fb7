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


class Patience:
    """Early stopping: the dev loss once an epoch, the best weights kept, over after so many epochs
    without a gain.

    Kept with them is all of the strategy's memory, generators too: a path, an average, a reservoir
    are of the steps up to the best weights, as if the stage had ended there. It takes as much
    memory again.
    """

    def __init__(
        self, model: Model, strategy: Strategy, dev: Sequence[Encoded], epoch: int, allowed: int
    ) -> None:
        """`epoch` is how many steps one takes, `allowed` how many epochs may bring no gain."""
        self.model, self.strategy, self.dev, self.epoch, self.allowed = (
            model,
            strategy,
            dev,
            epoch,
            allowed,
        )
        self.low, self.since, self.seen = math.inf, 0, 0
        self.keep()

    def look(self, step: int) -> None:
        """Measure the dev loss if an epoch ends with this step."""
        if step < (self.seen + 1) * self.epoch:
            return
        self.seen += 1
        now = self._loss()
        if now < self.low:
            self.low, self.since = now, 0
            self.keep()
        else:
            self.since += 1

    def keep(self) -> None:
        """What the stage goes back to is what is now."""
        self.best: Weights = snapshot(self.model)
        self.memory: dict[str, Any] = deepcopy(self.strategy.state_dict())

    def settle(self) -> None:
        """Go back to the best, if any was seen."""
        if self.seen:
            restore(self.model, self.best)
            self.strategy.load_state_dict(self.memory)

    @property
    def spent(self) -> bool:
        """Whether there were so many epochs without a gain."""
        return self.since >= self.allowed

    def state(self) -> dict[str, Any]:
        """It as values."""
        return {
            "low": self.low if self.seen else None,
            "since": self.since,
            "seen": self.seen,
            "best": self.best,
            "memory": self.memory,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.since, self.seen, self.best, self.memory = (
            state[k] for k in ("since", "seen", "best", "memory")
        )
        self.low = math.inf if state["low"] is None else state["low"]

    @torch.no_grad()
    def _loss(self) -> float:
        self.model.net.eval()
        batch = self.model.batch(self.dev)
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
