"""What a probe is: it readies its prompts before training, and measures a few figures at each
stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from continual.data.template import Encoder
from continual.data.types import Example, Stream, Task
from continual.errors import ConfigError
from continual.evaluation.judge import Judge
from continual.evaluation.scoring import PERPLEXITY, EvalSet, prepare_eval_set
from continual.results.matrix import Matrix
from continual.results.prediction import Prediction

LabelValues = dict[str, float | None]  # figures by label; None where there is nothing to measure
ProbeResult = dict[str, LabelValues]  # by entry
# Answers the examples of a set as `score_task` does.
Predict = Callable[[EvalSet], list[Prediction]]


@dataclass(frozen=True)
class ProbeEntry:
    """One table of probes.json: what its figures are, where their definition comes from, and which
    are better.
    """

    description: str
    source: str
    better: str = "higher"


@dataclass(frozen=True)
class RunSetup:
    """What a run has before its first stage."""

    config: DictConfig
    stream: Stream
    encoder: Encoder
    judge: Judge | None = None

    def make_eval_set(
        self, task: Task[Example], rows: Sequence[Example], encoder: Encoder | None = None
    ) -> EvalSet:
        """These rows, ready to be scored as the matrix is; raises as `score.prepare` does."""
        s = self.config.score
        scored: dict[str, Any] = {str(s.split): tuple(rows)}
        return prepare_eval_set(
            replace(task, **scored),
            encoder or self.encoder,
            s.split,
            self.stream.tasks.index(task),
            metric=s.metric,
            max_new_tokens=s.max_new_tokens,
            answer_mode=s.answer_mode,
            judge=self.judge,
        )

    def scored_rows(self, task: Task[Example], max_examples: int | None) -> Sequence[Example]:
        """The first rows that are scored, at most `limit`."""
        return task.get_split(self.config.score.split)[:max_examples]

    def metric_name(self, task: Task[Example]) -> str:
        """What marks the task's answers."""
        return str(self.config.score.metric or task.metric)


@dataclass(frozen=True)
class StageContext:
    """What a probe has after a stage: `ask`, the matrix up to this stage, and what it found itself
    before training.
    """

    predict: Predict
    matrix: Matrix
    base_result: ProbeResult | None = None

    def mean_score(self, test: EvalSet) -> float:
        """The mean of the marks."""
        marks = [prediction.score for prediction in self.predict(test)]
        return sum(marks) / len(marks)


class Probe:
    """Something to measure before training and after every stage.

    `ready` comes first and once, and raises ContinualError for what cannot be measured. `measure`
    gives each of `entries` its figures; it is the same in all processes, and depends on the weights
    and the prompts alone.
    """

    def prepare(self, setup: RunSetup) -> None:
        """Make the prompts."""

    @property
    def entries(self) -> Mapping[str, ProbeEntry]:
        """What it measures, by name; once it is ready."""
        raise NotImplementedError

    def measure(self, context: StageContext) -> ProbeResult:
        """The figures after this stage."""
        raise NotImplementedError


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean of what was measured; None of nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def check_minimum(probe: str, minimum: int, **values: int | None) -> None:
    """Raise ConfigError where a key of the probe is below what can work."""
    for key, value in values.items():
        if value is not None and value < minimum:
            raise ConfigError(f"probe.{probe}.{key}={value}: expected at least {minimum}")


def check_generates_answers(probe: str, setting: RunSetup) -> None:
    """Raise ConfigError where tasks are not answered, for a probe that looks at answers."""
    if marked := [t.name for t in setting.stream.tasks if setting.metric_name(t) == PERPLEXITY]:
        raise ConfigError(
            f"probe=[{probe}] looks at answers, and by perplexity {', '.join(marked)} gives none; "
            "set score.metric to another, or leave the probe out"
        )
