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
    """Algorithm R (Vitter 1985): after it, `kept` is a uniform sample of all that was ever seen.

    `seen` is how many examples had passed before `arrivals`.
    """
    for n, example in enumerate(arrivals, seen + 1):
        if len(sample) < capacity:
            sample.append(example)
        elif (place := rng.randrange(n)) < capacity:
            sample[place] = example


def sample_task_examples(task: Task[Encoded], n: int, seed: str) -> list[Encoded]:
    """`n` of a task's training examples, or all where it has fewer; the same ones for the same
    seed.
    """
    return random.Random(seed).sample(list(task.train), min(n, len(task.train)))


@dataclass
class ReplayBuffer:
    """Examples of earlier tasks.

    `capacity` of 1 or more is the number of examples in the whole buffer, below 1 the fraction of
    each task's training examples that is kept, at least one. A "balanced" buffer gives every task
    an equal part of the capacity, to within one example; a "reservoir" keeps a uniform sample of
    all examples seen, whichever task they came from. A fraction is by its nature one reservoir a
    task, so both kinds agree there. A "ranked" buffer is balanced, and keeps of each task not a
    uniform sample but the examples that stand first.
    """

    capacity: float
    kind: str = "balanced"
    seed: int = 0
    tasks: dict[str, list[Encoded]] = field(
        default_factory=dict
    )  # "all" when one reservoir serves every task
    seen: int = 0
    rng: random.Random = field(default=None)  # type: ignore[assignment]  # seeded, unless one is given

    def __post_init__(self) -> None:
        """Refuse a kind or capacity that does not exist; seed a generator where none is given, as a
        checkpoint does.
        """
        if self.kind not in BUFFER_KINDS:
            raise ConfigError(unknown("replay buffer", self.kind, BUFFER_KINDS))
        if self.capacity < 0 or (self.capacity > 1 and self.capacity % 1):
            raise ConfigError(
                f"a replay buffer of capacity {self.capacity}: give a whole number of examples, "
                "or a fraction of each task between 0 and 1"
            )
        self.rng = self.rng or random.Random(self.seed)

    def __len__(self) -> int:
        """How many examples are kept."""
        return sum(map(len, self.tasks.values()))

    @property
    def examples(self) -> list[Encoded]:
        """All that is kept, task by task."""
        return [e for kept in self.tasks.values() for e in kept]

    def add(self, task: str, examples: Sequence[Encoded]) -> None:
        """Offer a finished task's training examples to the buffer."""
        if self.kind == "reservoir" and self.capacity >= 1:
            update_reservoir(
                self.tasks.setdefault("all", []), examples, int(self.capacity), self.seen, self.rng
            )
        else:
            self._add_balanced(task, examples)
        self.seen += len(examples)

    def _add_balanced(self, task: str, examples: Sequence[Encoded]) -> None:
        """An equal part for each task: earlier ones give way at random, or from the last one on."""
        quota = max(1, round(self.capacity * len(examples))) if self.capacity else 0
        if self.capacity >= 1:
            earlier = [name for name in self.tasks if name != task]
            parts, rest = divmod(
                int(self.capacity), len(earlier) + 1
            )  # the rest goes to the first tasks, one each
            for i, name in enumerate(earlier):
                kept = self.tasks[name]
                part = min(parts + (i < rest), len(kept))
                self.tasks[name] = (
                    kept[:part] if self.kind == "ranked" else self.rng.sample(kept, part)
                )
            quota = parts
        self.tasks.pop(task, None)
        self.tasks[task] = [*examples[:quota]] if self.kind == "ranked" else []
        if self.kind != "ranked":
            update_reservoir(self.tasks[task], examples, quota, 0, self.rng)

    @property
    def examples_by_task(self) -> dict[int, list[Encoded]]:
        """All that is kept, by task index, also where one reservoir serves every task."""
        pools: dict[int, list[Encoded]] = {}
        for example in self.examples:
            pools.setdefault(example.task_index, []).append(example)
        return pools

    def draw(self, n: int, pool: Sequence[Encoded] | None = None) -> list[Encoded]:
        """`n` examples, uniformly, of all or of a pool of them; none twice before all have been
        drawn once.
        """
        pool = self.examples if pool is None else pool
        drawn: list[Encoded] = []
        while len(drawn) < n and pool:
            drawn += self.rng.sample(pool, min(n - len(drawn), len(pool)))
        return drawn

    def draw_by_task(self, n: int, task_weights: Mapping[int, float]) -> list[Encoded]:
        """`n` examples: first their tasks are drawn, by these odds of each task index (none: 0),
        then theirs.
        """
        pools = self.examples_by_task
        times = Counter(
            self.rng.choices(list(pools), [task_weights.get(t, 0.0) for t in pools], k=n)
            if pools
            else ()
        )
        return [e for t, k in times.items() for e in self.draw(k, pools[t])]
