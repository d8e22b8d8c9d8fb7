"""Zero-shot and k-shot in context: the score with answered train rows in front of the prompt."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from continual.data.types import Example, Task
from continual.errors import ConfigError
from continual.evaluation.probes.base import (
    Entry,
    Found,
    Look,
    Probe,
    Setting,
    answered,
    at_least,
    known_mean,
)
from continual.evaluation.scoring import Test

SOURCE = "Brown et al. 2020, section 2: zero-, one- and few-shot, without gradient updates"


@dataclass(kw_only=True)
class Shots(Probe):
    """Each task's score with k demonstrations in context (Brown et al. 2020), for each k.

    Demonstrations are train rows of the task, by the run's template, and the same for all of its
    prompts: those of k are the first k of one seeded draw, and what a scored prompt asks is not
    among them. The score is the mean over `draws`. A prompt that has no room for k holds as many as
    fit, which is counted; where none of a task's prompts holds k, that is not measured.
    """

    k: Sequence[int] = (0, 1, 2, 3, 4, 5)
    draws: int = 1
    limit: int | None = 50
    seed: int = 0
    tests: dict[tuple[str, int], list[Test]] = field(init=False, repr=False, default_factory=dict)
    asked: Counter[int] = field(init=False, repr=False, default_factory=Counter)  # prompts, by k
    fewer: Counter[int] = field(
        init=False, repr=False, default_factory=Counter
    )  # those of them that hold fewer

    def ready(self, setting: Setting) -> None:
        """Draw the demonstrations; raises ConfigError where a task has too few rows to show."""
        at_least("shots", 1, draws=self.draws, limit=self.limit)
        if wrong := [k for k in self.k if isinstance(k, bool) or not isinstance(k, int) or k < 0]:
            raise ConfigError(
                f"probe.shots.k={[*self.k]}: found {wrong}, expected whole numbers of at least 0"
            )
        answered("shots", setting)
        for task in setting.stream.tasks:
            rows = setting.rows(task, self.limit)
            asked = {_asked(e) for e in rows}
            fit = [e for e in task.train if _asked(e) not in asked and e.outputs[0].strip()]
            if len(fit) < max(self.k, default=0):
                raise ConfigError(
                    f"probe.shots.k={[*self.k]}: task {task.name!r} has {len(fit)} train rows "
                    "that could be shown; lower k, or add rows"
                )
            for draw in range(self.draws):
                drawn = random.Random(f"{self.seed}/{task.name}/{draw}").sample(
                    fit, max(self.k, default=0)
                )
                for k in self.k if not draw else [k for k in self.k if k]:
                    self._add(setting, task, rows, drawn[:k])

    def _add(
        self,
        setting: Setting,
        task: Task[Example],
        rows: Sequence[Example],
        shown: Sequence[Example],
    ) -> None:
        """The task's prompts behind these demonstrations, if one of them has room for all."""
        encoder, k = setting.apart(shown=tuple(shown)), len(shown)
        test = setting.test(task, rows, encoder)
        fewer = len(set(encoder.fewer) - set(encoder.skipped))
        self.asked[k] += len(test.examples)
        self.fewer[k] += fewer
        self.tests.setdefault((task.name, k), [])
        if fewer < len(test.examples):
            self.tests[task.name, k].append(test)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Means over the tasks, then each task's."""
        lack = ", ".join(f"{n} of {self.asked[k]} at k={k}" for k, n in self.fewer.items() if n)
        told = f"{self.draws} draw{'s' if self.draws > 1 else ''} of them, at most {self.limit} prompts a task"
        return {
            "shots": Entry(
                "score with k answered train rows before the prompt, mean over tasks, and of each "
                f"({told}{f'; prompts without room for all: {lack}' if lack else ''})",
                SOURCE,
            )
        }

    def measure(self, look: Look) -> Found:
        """Score each task behind each number of demonstrations."""
        each = {
            at: known_mean([look.score(test) for test in tests]) for at, tests in self.tests.items()
        }
        means: dict[str, float | None] = {}
        for k in self.k:
            told = [value for (_, n), value in each.items() if n == k]
            means[f"k={k}"] = None if None in told else known_mean(told)
        return {"shots": {**means, **{f"{task} k={k}": value for (task, k), value in each.items()}}}


def _asked(e: Example) -> tuple[object, ...]:
    """What the example asks, without the answer."""
    return (e.instruction, e.input, e.messages[:-1])
