"""A set of trained weights of its own for every task, which testing has to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, unknown
from continual.models.model import Model
from continual.models.weights import Weights, restore, snapshot
from continual.strategy.interface import Strategy, memory

ADAPTER_INITS = ("base", "last")


@dataclass(kw_only=True)
class TaskAdapters(Strategy):
    """Each stage's weights are kept, all that trains: a LoRA or other adapter, or the whole
    network.

    With `adapter_init="base"` each is learned from the weights before the first stage, as if alone; with
    "last" from the previous one, and learning is that of plain fine-tuning. Which of them answers a
    prompt, a subclass says. A checkpoint's own weights are the adapter of the stage that it ends:
    `adapt.init_from` names the one to go on from.
    """

    stores: ClassVar[str] = "4 P (T + 1)"
    adapter_init: str = "base"
    base: Weights = memory(dict)  # before the first stage
    adapters: dict[str, Weights] = memory(dict)  # by stage
    home: dict[str, str] = memory(dict)  # of each task the last stage that had examples of it

    def __post_init__(self) -> None:
        """Refuse an unknown start."""
        super().__post_init__()
        if self.adapter_init not in ADAPTER_INITS:
            raise ConfigError(unknown("start of an adapter", self.adapter_init, ADAPTER_INITS))

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """A new adapter."""
        self.base = self.base or snapshot(model)
        restore(model, self.initial_adapter())
        return super().begin(model, task)

    def initial_adapter(self) -> Weights:
        """What a new adapter starts from, which is also the best there is for a task that has none."""
        return (
            self.base
            if self.adapter_init == "base" or not self.adapters
            else [*self.adapters.values()][-1]
        )

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Keep it."""
        super().end(model, task)
        self.adapters[task.name] = snapshot(model)
        self.home |= {task.task_names[t]: task.name for t in {e.task_index for e in task.train}}


@dataclass(kw_only=True)
class PerTask(TaskAdapters):
    """One adapter a task, chosen by the task's name: the ceiling that methods without it are held
    against.

    So LoRA is meant to be used (Hu et al. 2022, section 4.1: tasks are switched by exchanging BA);
    in continual learning it is the baseline PerTaskFT of Wang et al. (2023), and forgets nothing. A
    task that no stage has learned is answered by what its adapter would start from.
    """

    def route(self, model: Model, task: str) -> None:
        """Give the model the task's adapter."""
        if self.adapters:
            restore(
                model,
                self.adapters[self.home[task]] if task in self.home else self.initial_adapter(),
            )
