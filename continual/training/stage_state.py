"""How far a stage has come: its step, optimizer, schedule, early stopping and random states, as
values and back.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from continual.errors import DataError
from continual.io.untrusted import is_number
from continual.models.model import Model
from continual.models.sharding import shard_like
from continual.training.early_stopping import Patience


@dataclass
class Progress:
    """A stage under way: all that its next step depends on beside the weights, the strategy's
    memory and the data.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    patience: Patience | None
    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    suspects: set[str] = field(default_factory=set)  # the ids of the rows of skipped steps

    @property
    def trained(self) -> list[torch.Tensor]:
        """What the optimizer changes."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state(self) -> dict[str, Any]:
        """It as values that a checkpoint can hold."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "suspects": sorted(self.suspects),
            "budget": self.model.layout.tokens_per_microbatch,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "patience": self.patience.state() if self.patience else None,
            "random": random_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there; raises DataError where the state is another stage's."""
        try:
            self._load(state)
        except (
            KeyError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            OverflowError,
            RuntimeError,
        ) as e:
            raise DataError(
                f"the stage's progress does not fit it ({e!r}); remove the newest "
                "stage-NN-step-* of the run's checkpoints to go on from the one before it"
            ) from e

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.skipped, self.suspects = state["skipped"], set(state["suspects"])
        if not all(
            is_number(state[key], 0) for key in ("step", "tokens", "seconds", "skipped", "budget")
        ):
            raise ValueError("its step, tokens, seconds, skipped and budget are no counts")
        self.model.layout = replace(self.model.layout, tokens_per_microbatch=state["budget"])
        self.optimizer.load_state_dict(self._cut(state["optimizer"]))
        self.schedule.load_state_dict(state["schedule"])
        if self.patience:
            self.patience.load(state["patience"])
        set_random_state(state["random"])

    def _cut(self, state: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer keeps of each parameter, in shards where that one is."""
        if not self.model.sharded:
            return state
        kept = {
            i: {
                k: shard_like(t, self.trained[i]) if t.shape == self.trained[i].shape else t
                for k, t in own.items()
            }
            for i, own in state["state"].items()
        }
        return {**state, "state": kept}


def random_state() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and torch, on each device."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": list(random.getstate()),
        "numpy": [name, torch.from_numpy(np.array(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [*torch.cuda.get_rng_state_all()] if _cuda() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Give the global generators what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if _cuda() and state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _cuda() -> bool:
    return torch.cuda.is_available()
