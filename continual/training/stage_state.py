"""State of a stage in progress: step, optimizer, scheduler, early stopping, random generators."""

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
from continual.training.early_stopping import EarlyStopping
from continual.training.serialization import MALFORMED_ERRORS


@dataclass
class StageState:
    """Everything that the next step depends on, except weights, strategy memory and data."""

    model: Model
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    early_stopping: EarlyStopping | None
    step: int = 0
    supervised_tokens: float = 0.0
    seconds: float = 0.0
    skipped_steps: int = 0
    suspect_ids: set[str] = field(default_factory=set)  # ids of the rows in skipped steps

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters that the optimizer changes."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as values that a checkpoint can hold."""
        return {
            "step": self.step,
            "tokens": self.supervised_tokens,
            "seconds": self.seconds,
            "skipped": self.skipped_steps,
            "suspects": sorted(self.suspect_ids),
            "budget": self.model.layout.tokens_per_microbatch,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.scheduler.state_dict(),
            "patience": self.early_stopping.state_dict() if self.early_stopping else None,
            "random": capture_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raise DataError if it does not fit this stage."""
        try:
            self._load_state_dict(state)
        except MALFORMED_ERRORS as e:
            raise DataError(
                f"the stage's progress does not fit it ({e!r}); remove the newest "
                "stage-NN-step-* of the run's checkpoints to resume from the one before it"
            ) from e

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        counts = ("step", "tokens", "seconds", "skipped", "budget")
        if not all(is_number(state[key], 0) for key in counts):
            raise ValueError("its step, tokens, seconds, skipped and budget are no counts")
        self.step = state["step"]
        self.supervised_tokens = state["tokens"]
        self.seconds = state["seconds"]
        self.skipped_steps = state["skipped"]
        self.suspect_ids = set(state["suspects"])
        self.model.layout = replace(self.model.layout, tokens_per_microbatch=state["budget"])
        self.optimizer.load_state_dict(self._shard_optimizer_state(state["optimizer"]))
        self.scheduler.load_state_dict(state["schedule"])
        if self.early_stopping:
            self.early_stopping.load_state_dict(state["patience"])
        restore_rng_state(state["random"])

    def _shard_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Shard the optimizer's tensors like the parameters that they belong to."""
        if not self.model.sharded:
            return state
        sharded = {
            i: {
                key: shard_like(t, self.parameters[i]) if t.shape == self.parameters[i].shape else t
                for key, t in tensors.items()
            }
            for i, tensors in state["state"].items()
        }
        return {**state, "state": sharded}


def capture_rng_state() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy, torch and each CUDA device."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": list(random.getstate()),
        "numpy": [name, torch.from_numpy(np.array(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [*torch.cuda.get_rng_state_all()] if _cuda_available() else [],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Restore the states that `capture_rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if _cuda_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _cuda_available() -> bool:
    return torch.cuda.is_available()
