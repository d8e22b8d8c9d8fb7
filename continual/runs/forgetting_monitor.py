"""Forgetting seen early: every so many steps of a stage a small sample of each task seen so far is
scored.

A task's sample is of its test examples and the same all the run through. With S[i][j] its score on
task j after stage i, and s[j] its score now, within stage n, forgetting is what the matrix of the
samples would say if the stage ended here: the mean, over the tasks j that earlier stages taught, of
max_{i<n} S[i][j] - s[j], from the first stage i on that taught j (Chaudhry et al. 2018, F_k). The
points within stages are not among the i: the more often one looked, the higher the maximum over
noisy scores would be.

What is scored is the model as it trains: what a strategy does at a stage's end, such as merging, is
still to come. The tasks that the stage itself teaches are answered by the weights at hand; others
as the strategy's `route` and `dispatch` have it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from continual.data.types import Stream
from continual.distributed.processes import broadcast, is_main_process
from continual.errors import DataError
from continual.evaluation.scoring import EvalSet, score_task
from continual.io.atomic import task_file_name
from continual.models.model import Model
from continual.models.weights import restore, snapshot
from continual.results.matrix import mean_or_none
from continual.results.prediction import load_predictions
from continual.strategy.interface import Strategy
from continual.training.stage_state import capture_rng_state, restore_rng_state


@dataclass
class ForgettingMonitor:
    """Scores `examples` test examples a task `every` so many steps, never where that is None.

    `where` names the folder that holds the answers after a stage, by its number from 0, before any
    training.
    """

    model: Model
    strategy: Strategy
    stream: Stream
    tests: Sequence[EvalSet]
    predictions_folder: Callable[[int], Path]
    every_steps: int | None
    num_examples: int
    batch_size: int
    seed: int
    stage_scores: list[dict[str, float]] = field(
        default_factory=list
    )  # S: of stage 0, 1, ...; by task

    def __post_init__(self) -> None:
        """Draw the samples."""
        self.sample_indices = {
            t.task: sorted(
                random.Random(f"{self.seed}/{t.task}").sample(
                    range(len(t.examples)), min(self.num_examples, len(t.examples))
                )
            )
            for t in self.tests
        }
        self.stage_tasks: list[set[str]] = [
            {e.task for e in stage.train} for stage in self.stream.stages
        ]

    def begin_stage(self, stage_number: int) -> dict[str, Any] | None:
        """The event of step 0 of this stage, from 1: the samples' scores as the stage before it
        left them.

        None where nothing is scored within stages. Raises DataError where answers of an earlier
        stage are not there.
        """
        if self.every_steps is None:
            return None
        while len(self.stage_scores) < stage_number:
            self.stage_scores.append(
                broadcast(
                    self._load_stage_scores(len(self.stage_scores)) if is_main_process() else {}
                )
            )
        return self._make_event(
            stage_number,
            0,
            {
                t.task: self.stage_scores[stage_number - 1][t.task]
                for t in self._seen_test_sets(stage_number)
            },
        )

    def score_step(self, stage_number: int, step: int) -> dict[str, Any] | None:
        """The event of this step of stage `number`, which has begun; None where none is due."""
        if self.every_steps is None or step % self.every_steps:
            return None
        began, own = time.perf_counter(), self.stage_tasks[stage_number - 1]
        with preserve_state(self.model, self.strategy):
            tests = sorted(
                self._seen_test_sets(stage_number), key=lambda t: t.task not in own
            )  # first what needs the weights at hand
            found = {t.task: self._score_sample(t, routed=t.task not in own) for t in tests}
        told = self._make_event(
            stage_number, step, {t.task: found[t.task] for t in self._seen_test_sets(stage_number)}
        )
        return {**told, "seconds": time.perf_counter() - began}

    def _seen_test_sets(self, number: int) -> list[EvalSet]:
        """The tasks that the stages up to this one teach, in the matrix's order."""
        seen = set[str]().union(*self.stage_tasks[:number])
        return [t for t in self.tests if t.task in seen]

    def _load_stage_scores(self, number: int) -> dict[str, float]:
        """S[number], of the tasks that are seen in the next stage."""
        found = {}
        for test in self._seen_test_sets(number + 1):
            told = load_example_scores(
                path := self.predictions_folder(number) / f"{task_file_name(test.task)}.jsonl", test
            )
            if told is None:
                raise DataError(
                    f"{path}: found no mark of every test example, expected them for "
                    "score.every_steps to compare with; restore the file, or go on with "
                    "score.every_steps=null"
                )
            drawn = self.sample_indices[test.task]
            found[test.task] = sum(told[i] for i in drawn) / len(drawn)
        return found

    def _score_sample(self, test: EvalSet, *, routed: bool) -> float:
        sample, turns = test.select(self.sample_indices[test.task]), None
        if routed:
            self.strategy.route(self.model, test.task)
            turns = self.strategy.dispatch(self.model, sample.prompt_ids)
        return score_task(self.model, sample, self.batch_size, turns)[0]

    def _make_event(self, number: int, step: int, scores: dict[str, float]) -> dict[str, Any]:
        falls = []
        for test in self._seen_test_sets(number - 1):
            first = next(i for i, names in enumerate(self.stage_tasks, 1) if test.task in names)
            falls.append(
                max(row[test.task] for row in self.stage_scores[first:number]) - scores[test.task]
            )
        return {
            "event": "during",
            "step": step,
            "scores": scores,
            "forgetting": mean_or_none(falls),
            "examples": self.num_examples,
            "seconds": 0.0,
        }


@contextmanager
def preserve_state(model: Model, strategy: Strategy) -> Iterator[None]:
    """Within it the model can be asked, also by `route` and `dispatch`; behind it all is as it was,
    bit for bit.

    That is its mode, its weights, the virtual tokens that it reads behind, and what is drawn next.
    """
    routed = any(
        getattr(type(strategy), name) is not getattr(Strategy, name)
        for name in ("route", "dispatch")
    )
    drawn, layout, virtual = capture_rng_state(), model.layout, getattr(model.net, "virtual", None)
    held, fixed = snapshot(model) if routed else None, virtual.fixed if virtual else None
    try:
        with model.eval_mode(), torch.no_grad():
            yield
    finally:
        if held is not None:
            restore(model, held)
        if virtual:
            virtual.fixed = fixed
        model.layout = layout
        restore_rng_state(drawn)


def format_event(event: Mapping[str, Any]) -> str:
    """The event in a line for the terminal."""
    forgetting = "" if event["forgetting"] is None else f"forgetting {event['forgetting']:.3f}, "
    return f"step {event['step']}: {forgetting}" + ", ".join(
        f"{t} {s:.3f}" for t, s in event["scores"].items()
    )


def load_example_scores(path: Path, test: EvalSet) -> list[float] | None:
    """The mark of each of the test's examples, by the answers that were written; None where they
    are not whole.
    """
    try:
        predictions = load_predictions(path)
    except (OSError, ValueError):
        return None
    scores = [p.score for p in predictions]
    has_all_examples = [p.id for p in predictions] == [e.id for e in test.examples]
    return scores if has_all_examples and all(0 <= s <= 1 for s in scores) else None
