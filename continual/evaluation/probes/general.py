"""General ability: scores on a stream that no stage trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from continual.config.instantiate import construct
from continual.data.types import Example, Stream, Task
from continual.errors import ContinualError
from continual.evaluation.probes.base import (
    Probe,
    ProbeEntry,
    ProbeResult,
    RunSetup,
    StageContext,
    check_minimum,
    mean_or_none,
)
from continual.evaluation.scoring import EvalSet, prepare_eval_set

SOURCE = "Wang et al. 2023 (TRACE): R^G_t, and the general ability delta mean_i (R^G_t,i - R^G_0,i)"


@dataclass(kw_only=True)
class GeneralAbility(Probe):
    """Scores on a stream that is never trained on, and their change since before training.

    With R^G_t,i the score on task i of this stream after stage t, `general` holds each score and
    their mean, and `general drift` the differences to R^G_0,i, whose mean is the general ability
    delta of TRACE (Wang et al. 2023). A task is scored on `split`, by default the run's split, or
    else on test or dev, whichever it has; on the first `max_examples` rows.
    """

    stream: Mapping[str, Any]
    split: str | None = None
    metric: str | None = None
    max_examples: int | None = 100
    max_new_tokens: int | None = None
    eval_sets: list[EvalSet] = field(init=False, repr=False, default_factory=list)
    row_summaries: list[str] = field(init=False, repr=False, default_factory=list)

    def prepare(self, setup: RunSetup) -> None:
        """Build the stream and encode its prompts; raise errors that name the probe's keys."""
        check_minimum(
            "general", 1, max_examples=self.max_examples, max_new_tokens=self.max_new_tokens
        )
        score = setup.config.score
        try:
            made: Stream = construct(OmegaConf.create(dict(self.stream)), "probe.general.stream")
            for task in made.tasks:
                split = self.split or _choose_split(task, score.split)
                self.eval_sets.append(
                    prepare_eval_set(
                        task,
                        setup.encoder,
                        split,
                        0,
                        metric=self.metric,
                        max_examples=self.max_examples,
                        max_new_tokens=self.max_new_tokens,
                        answer_mode=score.answer_mode if task.labels else "generate",
                        judge=setup.judge,
                    )
                )
                self.row_summaries.append(_summarize_rows(self.eval_sets[-1], split))
        except ContinualError as error:
            message = str(error).replace("score.max_new_tokens", "probe.general.max_new_tokens")
            raise type(error)(f"probe.general.stream: {message}") from error

    @property
    def entries(self) -> Mapping[str, ProbeEntry]:
        """Describe the scores and their drift."""
        return {
            "general": ProbeEntry(
                f"score on tasks that are never trained on ({'; '.join(self.row_summaries)})",
                SOURCE,
            ),
            "general drift": ProbeEntry(
                "the same less the score before training; below 0: ability was lost", SOURCE
            ),
        }

    def measure(self, context: StageContext) -> ProbeResult:
        """Score each task."""
        scores: dict[str, float | None] = {
            test.task: context.mean_score(test) for test in self.eval_sets
        }
        scores = {"mean": mean_or_none(scores.values()), **scores}
        base = context.base_result["general"] if context.base_result else scores
        drift = {
            label: None if value is None or (before := base.get(label)) is None else value - before
            for label, value in scores.items()
        }
        return {"general": scores, "general drift": drift}


def _summarize_rows(test: EvalSet, split: str) -> str:
    """Describe the number of scored rows, their split and metric, and rows that do not fit."""
    shortened = sum(x.shortened for x in test.encodings)
    skipped = sum(x.encoded is None for x in test.encodings)
    counts = [f"{n} {what}" for n, what in ((shortened, "shortened"), (skipped, "left out")) if n]
    return (
        f"{test.task}: {', '.join([f'{len(test.examples)} {split} rows', *counts])}, {test.metric}"
    )


def _choose_split(task: Task[Example], first: str) -> str:
    """Return the first of the given split, test and dev that the task has."""
    return next((split for split in (first, "test", "dev") if getattr(task, split, ())), first)
