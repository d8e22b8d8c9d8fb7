"""In-context learning: the score with answered train rows before the prompt."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from continual.data.types import Example, Task
from continual.errors import ConfigError
from continual.evaluation.probes.base import (
    Probe,
    ProbeEntry,
    ProbeResult,
    RunSetup,
    StageContext,
    check_generates_answers,
    check_minimum,
    mean_or_none,
)
from continual.evaluation.scoring import EvalSet

SOURCE = "Brown et al. 2020, section 2: zero-, one- and few-shot, without gradient updates"


@dataclass(kw_only=True)
class Shots(Probe):
    """Each task's score with k demonstrations in context (Brown et al. 2020), for each k.

    Demonstrations are train rows of the task in the run's template, the same for all of its
    prompts: the first k of one seeded draw, without rows that ask what a scored prompt asks. The
    score is the mean over `draws`. A prompt without room for k holds as many as fit, and such
    prompts are counted. If none of a task's prompts holds k, the score is None.
    """

    k: Sequence[int] = (0, 1, 2, 3, 4, 5)
    draws: int = 1
    max_examples: int | None = 50
    seed: int = 0
    eval_sets: dict[tuple[str, int], list[EvalSet]] = field(
        init=False, repr=False, default_factory=dict
    )
    prompt_counts: Counter[int] = field(
        init=False, repr=False, default_factory=Counter
    )  # prompts, by k
    reduced_counts: Counter[int] = field(
        init=False, repr=False, default_factory=Counter
    )  # those of them that hold fewer

    def prepare(self, setup: RunSetup) -> None:
        """Draw the demonstrations; raise ConfigError if a task has too few train rows."""
        check_minimum("shots", 1, draws=self.draws, max_examples=self.max_examples)
        if wrong := [k for k in self.k if isinstance(k, bool) or not isinstance(k, int) or k < 0]:
            raise ConfigError(
                f"probe.shots.k={[*self.k]}: found {wrong}, expected whole numbers of at least 0"
            )
        check_generates_answers("shots", setup)
        for task in setup.stream.tasks:
            rows = setup.scored_rows(task, self.max_examples)
            asked = {e.prompt_messages for e in rows}
            fit = [e for e in task.train if e.prompt_messages not in asked and e.outputs[0].strip()]
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
                    self._add_eval_set(setup, task, rows, drawn[:k])

    def _add_eval_set(
        self,
        setting: RunSetup,
        task: Task[Example],
        rows: Sequence[Example],
        demonstrations: Sequence[Example],
    ) -> None:
        """Encode a task's prompts after demonstrations; keep them if any has room for all."""
        encoder = replace(setting.encoder, demonstrations=tuple(demonstrations))
        k = len(demonstrations)
        test = setting.make_eval_set(task, rows, encoder)
        fewer = sum(bool(x.encoded and x.dropped_demonstrations) for x in test.encodings)
        self.prompt_counts[k] += len(test.examples)
        self.reduced_counts[k] += fewer
        self.eval_sets.setdefault((task.name, k), [])
        if fewer < len(test.examples):
            self.eval_sets[task.name, k].append(test)

    @property
    def entries(self) -> Mapping[str, ProbeEntry]:
        """Describe the means over tasks and each task's scores."""
        lack = ", ".join(
            f"{n} of {self.prompt_counts[k]} at k={k}" for k, n in self.reduced_counts.items() if n
        )
        draws = f"{self.draws} draw{'s' if self.draws > 1 else ''} of them"
        told = f"{draws}, at most {self.max_examples} prompts a task"
        return {
            "shots": ProbeEntry(
                "score with k answered train rows before the prompt, mean over tasks, and of each "
                f"({told}{f'; prompts without room for all: {lack}' if lack else ''})",
                SOURCE,
            )
        }

    def measure(self, context: StageContext) -> ProbeResult:
        """Score each task after each number of demonstrations."""
        each = {
            at: mean_or_none([context.mean_score(test) for test in tests])
            for at, tests in self.eval_sets.items()
        }
        means: dict[str, float | None] = {}
        for k in self.k:
            told = [value for (_, n), value in each.items() if n == k]
            means[f"k={k}"] = None if None in told else mean_or_none(told)
        return {"shots": {**means, **{f"{task} k={k}": value for (task, k), value in each.items()}}}
