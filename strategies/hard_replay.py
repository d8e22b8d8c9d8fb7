"""Replay of hard examples: keep those of highest loss, or draw those that were forgotten most."""

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

    With `criterion="loss"` the buffer keeps the examples of a task that have the highest loss at
    its end (the buffer's counterpart of hard example mining, Shrivastava et al. 2016), and draws
    uniformly.

    With "forgetting" it keeps a uniform sample, and counts by how much each example's loss has
    risen since its task was learned. When the buffer is full, the examples that rose least are
    removed first. A step draws `candidates` times as many examples as it needs, uniformly, and
    takes those that rose most. Criterion and draw are those of maximally interfered retrieval
    (Aljundi et al. 2019, algorithm 1), whose loss rises in one virtual step instead of since the
    task was learned.
    """

    shardable = True
    stores: ClassVar[str] = "E examples; by forgetting also 2 numbers each"
    capacity: float = 0.1
    criterion: str = "loss"
    candidates: int = 2
    # By example: its loss when its task had been learned, and how much higher it is now.
    learned: dict[str, float] = memory(dict)
    risen: dict[str, float] = memory(dict)

    def __post_init__(self) -> None:
        """Validate criterion and candidates; create the buffer."""
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ConfigError(unknown("criterion of hard_replay", self.criterion, CRITERIA))
        if self.candidates < 1:
            raise ConfigError(f"hard_replay with candidates {self.candidates}: expected at least 1")
        self.buffer = ReplayBuffer(self.capacity, "ranked", self.seed)

    @replaces_super
    def draw_replay_examples(self, n: int) -> Sequence[Encoded]:
        """Draw uniformly, or by forgetting the most forgotten of the candidates."""
        if self.criterion == "loss":
            return super().draw_replay_examples(n)
        num_candidates = max(n, min(self.candidates * n, len(self.buffer)))
        drawn = self.buffer.draw(num_candidates)
        return sorted(drawn, key=lambda e: -self.risen[example_key(e)])[:n]

    def update_buffer(self, model: Model, task: Task[Encoded]) -> None:
        """Rank the new examples, and by forgetting the earlier ones too; keep each task's first."""
        if self.criterion == "loss":
            losses = mean_example_losses(model, task.train)
            ranked = sorted(task.train, key=lambda e: -losses[example_key(e)])
            self.buffer.add(task.name, ranked)
            return

        losses = mean_example_losses(model, self.buffer.examples)
        self.buffer.tasks = {
            name: sorted(kept, key=lambda e: self.learned[example_key(e)] - losses[example_key(e)])
            for name, kept in self.buffer.tasks.items()
        }
        shuffled = self.buffer.rng.sample(list(task.train), len(task.train))
        self.buffer.add(task.name, shuffled)

        new = [e for e in self.buffer.examples if example_key(e) not in losses]
        losses |= mean_example_losses(model, new)
        keys = [example_key(e) for e in self.buffer.examples]
        self.learned = {key: self.learned.get(key, losses[key]) for key in keys}
        self.risen = {key: losses[key] - loss for key, loss in self.learned.items()}


def example_key(example: Encoded) -> str:
    """Name an example by its task and its id, which is unique within the task."""
    return f"{example.task_index} {example.id}"


def mean_example_losses(model: Model, examples: Sequence[Encoded]) -> dict[str, float]:
    """Compute each example's mean negative log-likelihood per response token, in nats, by key."""
    return {
        example_key(examples[i]): float(F.cross_entropy(logits, targets))
        for i, targets, logits in response_logits(model, examples)
    }
