"""The interface of probes: prepare prompts before training, and measure values at each stage."""

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

LabelValues = dict[str, float | None]  # by label; None if there is nothing to measure
ProbeResult = dict[str, LabelValues]  # by entry
# Answers the examples of a set as `score_task` does.
Predict = Callable[[EvalSet], list[Prediction]]


@dataclass(frozen=True)
class ProbeEntry:
    """One table of probes.json: its description, the source, and which values are better.

    `better` is "higher" or "lower".
    """

    description: str
    source: str
    better: str = "higher"


@dataclass(frozen=True)
class RunSetup:
    """The parts of a run that exist before its first stage."""

    config: DictConfig
    stream: Stream
    encoder: Encoder
    judge: Judge | None = None

    def make_eval_set(
        self, task: Task[Example], rows: Sequence[Example], encoder: Encoder | None = None
    ) -> EvalSet:
        """Encode rows to be scored as the matrix is; raise as `prepare_eval_set` does."""
        score = self.config.score
        split_rows: dict[str, Any] = {str(score.split): tuple(rows)}
        return prepare_eval_set(
            replace(task, **split_rows),
            encoder or self.encoder,
            score.split,
            self.stream.tasks.index(task),
            metric=score.metric,
            max_new_tokens=score.max_new_tokens,
            answer_mode=score.answer_mode,
            judge=self.judge,
        )

    def scored_rows(self, task: Task[Example], max_examples: int | None) -> Sequence[Example]:
        """Return the first rows of the scored split, at most `max_examples`."""
        return task.get_split(self.config.score.split)[:max_examples]

    def metric_name(self, task: Task[Example]) -> str:
        """Return the name of the metric that scores the task."""
        return str(self.config.score.metric or task.metric)


@dataclass(frozen=True)
class StageContext:
    """The input of a probe after a stage.

    `predict` answers prompts, `matrix` goes up to this stage, and `base_result` is the probe's own
    result before training.
    """

    predict: Predict
    matrix: Matrix
    base_result: ProbeResult | None = None

    def mean_score(self, eval_set: EvalSet) -> float:
        """Return the mean score over a set."""
        scores = [prediction.score for prediction in self.predict(eval_set)]
        return sum(scores) / len(scores)


class Probe:
    """Measure something before training and after every stage.

    `prepare` is called once, first, and raises ContinualError for what cannot be measured.
    `measure` returns the values of each of `entries`; they are the same in all processes and depend
    only on the weights and the prompts.
    """

    def prepare(self, setup: RunSetup) -> None:
        """Encode the prompts."""

    @property
    def entries(self) -> Mapping[str, ProbeEntry]:
        """Describe the measured tables by name; call it after `prepare`."""
        raise NotImplementedError

    def measure(self, context: StageContext) -> ProbeResult:
        """Return the values after this stage."""
        raise NotImplementedError


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def check_minimum(probe: str, minimum: int, **values: int | None) -> None:
    """Raise ConfigError if a key of the probe is below the minimum."""
    for key, value in values.items():
        if value is not None and value < minimum:
            raise ConfigError(f"probe.{probe}.{key}={value}: expected at least {minimum}")


def check_generates_answers(probe: str, setup: RunSetup) -> None:
    """Raise ConfigError if a task is scored by perplexity, which generates no answers."""
    tasks = [t.name for t in setup.stream.tasks if setup.metric_name(t) == PERPLEXITY]
    if tasks:
        raise ConfigError(
            f"probe=[{probe}] needs answers, and perplexity of {', '.join(tasks)} gives none; "
            "set score.metric to another, or leave the probe out"
        )
