"""Experience replay: examples of earlier tasks take part in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.model import Model
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory
from continual.strategy.replay_buffer import ReplayBuffer


@dataclass(kw_only=True)
class Rehearsal(Strategy):
    """Take steps on new and replayed examples together; a subclass decides what is stored.

    `share` of each optimizer step's examples come from the buffer, added to the step's new ones.
    The fractional part of their number is carried to the next step, so that the stage's share is
    exact to within one example.
    """

    shardable = True
    stores: ClassVar[str] = "E examples"
    costs: ClassVar[str] = "1 / (1 - share)"
    share: float = 0.25
    seed: int = 0
    buffer: ReplayBuffer = memory(lambda: ReplayBuffer(0))
    fractional_carry: float = memory(float)

    def __post_init__(self) -> None:
        """Validate 0 <= share < 1, which leaves room for new examples."""
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise ConfigError(
                f"replay share {self.share}: expected a number from 0 up to but not including 1"
            )
        self.buffer = ReplayBuffer(0, seed=self.seed)

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Start the stage with nothing carried over."""
        self.fractional_carry = 0.0
        return super().begin(model, task)

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Take one step on new and replayed examples together."""
        return super().backward(model, self.add_replay_examples(batch))

    def add_replay_examples(self, batch: Batch) -> Batch:
        """Append this step's replayed examples to its new ones."""
        if not len(self.buffer):
            return batch
        self.fractional_carry += len(batch.examples) * self.share / (1 - self.share)
        n = int(self.fractional_carry + 1e-9)
        self.fractional_carry -= n
        return batch.with_examples([*batch.examples, *self.draw_replay_examples(n)])

    def draw_replay_examples(self, n: int) -> Sequence[Encoded]:
        """Draw the `n` replayed examples of this step."""
        return self.buffer.draw(n)

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Store examples of the finished task."""
        super().end(model, task)
        self.update_buffer(model, task)

    def update_buffer(self, model: Model, task: Task[Encoded]) -> None:
        """Store examples of the finished task in the buffer.

        At most one strategy of a composition may override this.
        """


@dataclass(kw_only=True)
class Replay(Rehearsal):
    """Experience replay (Robins 1995; Chaudhry et al. 2019, "On Tiny Episodic Memories").

    `capacity` and `buffer_kind` are those of `continual.strategy.replay_buffer.ReplayBuffer`.
    """

    shardable = True
    capacity: float = 0.1
    buffer_kind: str = "balanced"

    def __post_init__(self) -> None:
        """Create the buffer."""
        super().__post_init__()
        self.buffer = ReplayBuffer(self.capacity, self.buffer_kind, self.seed)

    def update_buffer(self, model: Model, task: Task[Encoded]) -> None:
        """Offer the task's examples to the buffer."""
        self.buffer.add(task.name, task.train)
