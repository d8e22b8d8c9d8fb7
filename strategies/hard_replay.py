"""Replay of hard examples: those with the highest loss are kept, or those forgotten most are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, unknown
from continual.models.loss import response_logits
from continual.models.model import Model
from continual.strategy.interface import memory, replaces_super
from continual.strategy.replay_buffer import ReplayBuffer
from strategies.replay import Rehearsal

CRITERIA = ("loss", "forgetting")


@dataclass(kw_only=True)
class HardReplay(Rehearsal):
    """Replay that chooses by each example's mean loss, measured at the end of every stage.

    With `criterion="loss"` those of a task are kept that have the highest loss when it has been learned
    (the memory's counterpart of hard example mining, Shrivastava et al. 2016), and drawn uniformly.
    With "forgetting" a uniform sample is kept; by how much each one's loss has risen since its task
    was learned decides which give way when the buffer is full (those that rose least), and which of
    `candidates` times as many, drawn uniformly, a step takes (those that rose most: the criterion and
    the two draws of maximally interfered retrieval, Aljundi et al. 2019, algorithm 1, whose loss
    rises in one virtual step instead of since it was learned).
    """

    shardable = True
    stores: ClassVar[str] = "E examples; by forgetting also 2 numbers each"
    capacity: float = 0.1
    criterion: str = "loss"
    candidates: int = 2
    learned: dict[str, float] = memory(
        dict
    )  # the loss of what is kept when its task had been learned
    risen: dict[str, float] = memory(dict)  # by how much it is higher now

    def __post_init__(self) -> None:
        """Refuse a choice that does not exist; make the buffer."""
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ConfigError(unknown("hard examples by", self.criterion, CRITERIA))
        if self.candidates < 1:
            raise ConfigError(
                f"hard examples among {self.candidates} times as many: expected at least 1"
            )
        self.buffer = ReplayBuffer(self.capacity, "ranked", self.seed)

    @replaces_super
    def draw_replay_examples(self, n: int) -> Sequence[Encoded]:
        """By forgetting, the most forgotten of several times as many as are needed, or of all there
        are.
        """
        if self.criterion == "loss":
            return super().draw_replay_examples(n)
        drawn = self.buffer.draw(max(n, min(self.candidates * n, len(self.buffer))))
        return sorted(drawn, key=lambda e: -self.risen[example_key(e)])[:n]

    def update_buffer(self, model: Model, task: Task[Encoded]) -> None:
        """Rank the new examples, and by forgetting the earlier ones too; keep the first of each
        task.
        """
        if self.criterion == "loss":
            new = mean_example_losses(model, task.train)
            self.buffer.add(task.name, sorted(task.train, key=lambda e: -new[example_key(e)]))
            return
        now = mean_example_losses(model, self.buffer.examples)
        self.buffer.tasks = {
            t: sorted(kept, key=lambda e: self.learned[example_key(e)] - now[example_key(e)])
            for t, kept in self.buffer.tasks.items()
        }
        self.buffer.add(task.name, self.buffer.rng.sample(list(task.train), len(task.train)))
        now |= mean_example_losses(
            model, [e for e in self.buffer.examples if example_key(e) not in now]
        )
        self.learned = {
            k: self.learned.get(k, now[k]) for k in map(example_key, self.buffer.examples)
        }
        self.risen = {k: now[k] - loss for k, loss in self.learned.items()}


def example_key(e: Encoded) -> str:
    """Ids are unique within a task."""
    return f"{e.task_index} {e.id}"


def mean_example_losses(model: Model, examples: Sequence[Encoded]) -> dict[str, float]:
    """Each example's mean negative log-likelihood of a response token, in nats, by name."""
    return {
        example_key(examples[i]): float(F.cross_entropy(z, y))
        for i, y, z in response_logits(model, examples)
    }
