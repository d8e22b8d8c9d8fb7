"""General ability: the scores of a stream that no stage learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from continual.config.instantiate import construct
from continual.data.template import Encoder
from continual.data.types import Example, Stream, Task
from continual.errors import ContinualError
from continual.evaluation.probes.base import (
    Entry,
    Found,
    Look,
    Probe,
    Setting,
    at_least,
    known_mean,
)
from continual.evaluation.scoring import Test, prepare

SOURCE = "Wang et al. 2023 (TRACE): R^G_t, and the general ability delta mean_i (R^G_t,i - R^G_0,i)"


@dataclass(kw_only=True)
class General(Probe):
    """How well a stream's tasks are answered that are never learned, and how far that is from
    before training.

    With R^G_t,i the score on its task i after stage t, `general` holds each and their mean, and
    `general drift` the differences to R^G_0,i, whose mean is the general ability delta of TRACE
    (Wang et al. 2023). A task is scored on `split`, or else on the run's, or on that of test and
    dev which it has; the first `limit` rows.
    """

    stream: Mapping[str, Any]
    split: str | None = None
    metric: str | None = None
    limit: int | None = 100
    max_new_tokens: int | None = None
    tests: list[Test] = field(init=False, repr=False, default_factory=list)
    rows: list[str] = field(init=False, repr=False, default_factory=list)

    def ready(self, setting: Setting) -> None:
        """Build the stream and encode its prompts; raises what is wrong with either."""
        at_least("general", 1, limit=self.limit, max_new_tokens=self.max_new_tokens)
        score = setting.config.score
        try:
            made: Stream = construct(OmegaConf.create(dict(self.stream)), "probe.general.stream")
            for task in made.tasks:
                split, encoder = self.split or _split(task, score.split), setting.apart()
                self.tests.append(
                    prepare(
                        task,
                        encoder,
                        split,
                        0,
                        metric=self.metric,
                        limit=self.limit,
                        max_new_tokens=self.max_new_tokens,
                        how=score.how if task.labels else "generate",
                        judge=setting.judge,
                    )
                )
                self.rows.append(_told(self.tests[-1], split, encoder))
        except ContinualError as error:
            said = str(error).replace("score.max_new_tokens", "probe.general.max_new_tokens")
            raise type(error)(f"probe.general.stream: {said}") from error

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The scores, and their drift."""
        return {
            "general": Entry(
                f"score on tasks that are never learned ({'; '.join(self.rows)})", SOURCE
            ),
            "general drift": Entry(
                "the same less the score before training; below 0: ability lost", SOURCE
            ),
        }

    def measure(self, look: Look) -> Found:
        """Score each task."""
        scores: dict[str, float | None] = {test.task: look.score(test) for test in self.tests}
        scores = {"mean": known_mean(scores.values()), **scores}
        base = look.base["general"] if look.base else scores
        drift = {
            label: None if value is None or (before := base.get(label)) is None else value - before
            for label, value in scores.items()
        }
        return {"general": scores, "general drift": drift}


def _told(test: Test, split: str, encoder: Encoder) -> str:
    """How many rows of which split are scored by what, and what became of others."""
    counts = [
        f"{len(rows)} {what}"
        for what, rows in (("shortened", encoder.shortened), ("left out", encoder.skipped))
        if rows
    ]
    return (
        f"{test.task}: {', '.join([f'{len(test.examples)} {split} rows', *counts])}, {test.metric}"
    )


def _split(task: Task[Example], first: str) -> str:
    """The first of these splits that the task has."""
    return next((split for split in (first, "test", "dev") if getattr(task, split, ())), first)
