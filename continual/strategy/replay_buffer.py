"""Replay buffers: which examples of earlier tasks are kept, and which are drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, unknown

BUFFER_KINDS = ("balanced", "reservoir", "ranked")
T = TypeVar("T")


def update_reservoir(
    sample: list[T], arrivals: Sequence[T], capacity: int, seen: int, rng: random.Random
) -> None:
    """Offer `arrivals` to a uniform sample, in place: Algorithm R (Vitter 1985).

    Afterwards `sample` is a uniform sample, of at most `capacity`, of all examples ever offered.
    `seen` is how many were offered before.
    """
    for n, example in enumerate(arrivals, seen + 1):
        if len(sample) < capacity:
            sample.append(example)
            continue
        place = rng.randrange(n)
        if place < capacity:
            sample[place] = example


def sample_task_examples(task: Task[Encoded], n: int, seed: str) -> list[Encoded]:
    """Draw `n` of a task's training examples, or all if it has fewer; the seed decides which."""
    return random.Random(seed).sample(list(task.train), min(n, len(task.train)))


@dataclass
class ReplayBuffer:
    """Examples of earlier tasks.

    `capacity` of 1 or more is the number of examples in the whole buffer; below 1 it is the
    fraction of each task's training examples that is kept, at least one. A "balanced" buffer gives
    every task an equal part of the capacity, to within one example; a "reservoir" keeps a uniform
    sample of all examples seen, of whichever task. With a fraction each task has its own
    reservoir, so both kinds are the same. A "ranked" buffer is balanced, but keeps the first
    examples of each task instead of a uniform sample.
    """

    capacity: float
    kind: str = "balanced"
    seed: int = 0
    # By task name; "all" where one reservoir serves every task.
    tasks: dict[str, list[Encoded]] = field(default_factory=dict)
    seen: int = 0
    rng: random.Random = field(default=None)  # type: ignore[assignment]  # seeded if not given

    def __post_init__(self) -> None:
        """Validate kind and capacity; seed the generator, unless a checkpoint gave one."""
        if self.kind not in BUFFER_KINDS:
            raise ConfigError(unknown("replay buffer", self.kind, BUFFER_KINDS))
        if self.capacity < 0 or (self.capacity > 1 and self.capacity % 1):
            raise ConfigError(
                f"a replay buffer of capacity {self.capacity}: give a whole number of examples, "
                "or a fraction of each task between 0 and 1"
            )
        self.rng = self.rng or random.Random(self.seed)

    def __len__(self) -> int:
        """Count the kept examples."""
        return sum(map(len, self.tasks.values()))

    @property
    def examples(self) -> list[Encoded]:
        """All kept examples, task by task."""
        return [e for kept in self.tasks.values() for e in kept]

    def add(self, task: str, examples: Sequence[Encoded]) -> None:
        """Offer a finished task's training examples to the buffer."""
        if self.kind == "reservoir" and self.capacity >= 1:
            sample = self.tasks.setdefault("all", [])
            update_reservoir(sample, examples, int(self.capacity), self.seen, self.rng)
        else:
            self._add_balanced(task, examples)
        self.seen += len(examples)

    def _add_balanced(self, task: str, examples: Sequence[Encoded]) -> None:
        """Keep an equal part of each task.

        Earlier tasks give up examples at random, or in a "ranked" buffer their last ones.
        """
        quota = max(1, round(self.capacity * len(examples))) if self.capacity else 0
        if self.capacity >= 1:
            earlier = [name for name in self.tasks if name != task]
            # The remainder goes to the first tasks, one example each.
            quota, remainder = divmod(int(self.capacity), len(earlier) + 1)
            for i, name in enumerate(earlier):
                self._shrink(name, quota + (i < remainder))

        self.tasks.pop(task, None)
        if self.kind == "ranked":
            self.tasks[task] = [*examples[:quota]]
        else:
            self.tasks[task] = []
            update_reservoir(self.tasks[task], examples, quota, 0, self.rng)

    def _shrink(self, task: str, size: int) -> None:
        """Reduce a task's examples to `size`."""
        kept = self.tasks[task]
        size = min(size, len(kept))
        self.tasks[task] = kept[:size] if self.kind == "ranked" else self.rng.sample(kept, size)

    @property
    def examples_by_task(self) -> dict[int, list[Encoded]]:
        """All kept examples by task index, also where one reservoir serves every task."""
        pools: dict[int, list[Encoded]] = {}
        for example in self.examples:
            pools.setdefault(example.task_index, []).append(example)
        return pools

    def draw(self, n: int, pool: Sequence[Encoded] | None = None) -> list[Encoded]:
        """Draw `n` examples uniformly from `pool`, by default from all.

        No example is drawn twice before every one has been drawn once.
        """
        pool = self.examples if pool is None else pool
        drawn: list[Encoded] = []
        while len(drawn) < n and pool:
            drawn += self.rng.sample(pool, min(n - len(drawn), len(pool)))
        return drawn

    def draw_by_task(self, n: int, task_weights: Mapping[int, float]) -> list[Encoded]:
        """Draw `n` examples: first their tasks, in proportion to these weights, then the examples.

        `task_weights` is by task index; a task without a weight is not drawn.
        """
        pools = self.examples_by_task
        if not pools:
            return []
        odds = [task_weights.get(t, 0.0) for t in pools]
        times = Counter(self.rng.choices(list(pools), odds, k=n))
        return [e for t, k in times.items() for e in self.draw(k, pools[t])]
