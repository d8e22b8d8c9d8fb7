"""Progressive prompts: a task learns virtual tokens of its own, behind which those of the earlier
tasks stand still.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.model import Model
from continual.models.weights import restore, snapshot, weights
from continual.strategy.interface import Strategy, memory


@dataclass(kw_only=True)
class ProgressivePrompts(Strategy):
    """Progressive prompts (Razdaibiedina et al. 2023, section 3): task k is learned behind [P_k,
    ..., P_1].

    P_k alone trains, of a model with `model.adapter=prompt_tuning`: no other weight changes, and
    what an earlier task is answered behind, [P_j, ..., P_1], never does. As in the authors' code a
    new prompt starts as the embeddings of random words. Their reparameterisation by a residual MLP,
    which is thrown away after a task, has no part here.

    At `max_prompts` so many prompts are learned, null: one a stage. After that the newest trains on, and
    its tasks share it. A task that has not been learned is answered behind all prompts there are. A
    checkpoint's own weights are the newest prompt alone, which no task is answered behind from the
    second stage on.
    """

    stores: ClassVar[str] = "4 P T"
    costs: ClassVar[str] = "1 + T virtual prompts to read"
    weights_are_complete = False
    max_prompts: int | None = None
    seed: int = 0
    prompts: list[Tensor] = memory(list)  # P_1, P_2, ...: (n, H) each
    reach: dict[str, int] = memory(dict)  # of each learned task, how many of them it has

    def __post_init__(self) -> None:
        """Refuse a number of prompts that cannot be."""
        super().__post_init__()
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ConfigError(
                f"progressive prompts with max_prompts={self.max_prompts}: expected at least 1, or null"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """The earlier prompts stand still, and a new one starts."""
        still = self.frozen_prompts()
        model.set_prompt_prefix(still[::-1])
        if still and len(still) == len(self.prompts):
            restore(model, self.draw_prompt(model, f"{self.seed}/{len(still)}"))
        self.check_prompts_fit(model, task)
        return super().begin(model, task)  # last: a part of a composition may look at the model

    def frozen_prompts(self) -> list[Tensor]:
        """The prompts that the stage does not change."""
        return self.prompts if self.max_prompts is None else self.prompts[: self.max_prompts - 1]

    @torch.no_grad()
    def draw_prompt(self, model: Model, seed: str) -> dict[str, Tensor]:
        """A prompt (n, H) of random words, each as likely, under its name among the weights."""
        words, rng = model.net.get_input_embeddings(), random.Random(seed)
        return {
            name: words(
                torch.tensor(rng.choices(range(words.num_embeddings), k=len(w)), device=w.device)
            )
            for name, w in weights(model).items()
        }

    def check_prompts_fit(self, model: Model, task: Task[Encoded]) -> None:
        """Raise ConfigError now where the prompts of all tasks to come would leave no room for
        examples like these.
        """
        coming = len(set(task.task_names) - stage_task_names(task) - self.reach.keys())
        count = min(
            len(self.frozen_prompts()) + 1 + coming, self.max_prompts or len(task.task_names)
        )
        n = sum(len(w) for w in weights(model).values())
        model.check_fits_context(max(len(e.ids) for e in task.train) - 1, count * n)

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Keep the prompt."""
        super().end(model, task)
        self.prompts = [*self.frozen_prompts(), *snapshot(model).values()]
        self.reach |= dict.fromkeys(stage_task_names(task), len(self.prompts))

    def route(self, model: Model, task: str) -> None:
        """Behind the task's own prompt and those before it; behind all where it has none."""
        super().route(model, task)
        model.set_prompt_prefix(self.prompts[: self.reach.get(task)][::-1], live=False)


def stage_task_names(task: Task[Encoded]) -> set[str]:
    """The names of the tasks that a stage's examples are of."""
    return {task.task_names[e.task_index] for e in task.train}
