"""Measure forgetting within a stage, on a small sample of each task seen so far.

A task's sample consists of test examples and is the same during the whole run. With S[i][j] the
sample's score of task j after stage i, and s[j] its score now, within stage n, forgetting is what
the matrix of the samples would say if the stage ended here: the mean, over the tasks j of earlier
stages, of max_{i<n} S[i][j] - s[j], from the first stage i with task j on (Chaudhry et al. 2018,
F_k). Scores within stages are not in the maximum: over noisy scores it rises with their number.

The model is scored as it trains, before what a strategy does at a stage's end, such as merging. The
stage's own tasks are answered with the current weights, others with the strategy's `route` and
`dispatch`.
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
    """Score `num_examples` test examples per task every `every_steps` steps (None: never).

    `predictions_folder(n)` is the folder of the predictions after stage n, 0 for the base.
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
    # S: for stage 0, 1, ... the score of each task.
    stage_scores: list[dict[str, float]] = field(default_factory=list)

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
        """Return the event of step 0 of a stage (from 1): the scores after the stage before it.

        None if nothing is scored within stages. Raises DataError if predictions of an earlier stage
        are missing.
        """
        if self.every_steps is None:
            return None
        while len(self.stage_scores) < stage_number:
            number = len(self.stage_scores)
            scores = self._load_stage_scores(number) if is_main_process() else {}
            self.stage_scores.append(broadcast(scores))
        before = self.stage_scores[stage_number - 1]
        scores = {t.task: before[t.task] for t in self._seen_test_sets(stage_number)}
        return self._make_event(stage_number, 0, scores)

    def score_step(self, stage_number: int, step: int) -> dict[str, Any] | None:
        """Return the event of this step of a stage that has begun; None if none is due."""
        if self.every_steps is None or step % self.every_steps:
            return None
        started = time.perf_counter()
        own_tasks = self.stage_tasks[stage_number - 1]
        test_sets = self._seen_test_sets(stage_number)
        scores = {}
        with preserve_state(self.model, self.strategy):
            # The stage's own tasks first: they need the current weights, and routing changes them.
            for test in sorted(test_sets, key=lambda t: t.task not in own_tasks):
                scores[test.task] = self._score_sample(test, routed=test.task not in own_tasks)
        in_order = {test.task: scores[test.task] for test in test_sets}
        event = self._make_event(stage_number, step, in_order)
        return {**event, "seconds": time.perf_counter() - started}

    def _seen_test_sets(self, number: int) -> list[EvalSet]:
        """Return the test sets of the tasks of all stages up to this one, in the matrix's order."""
        seen = set[str]().union(*self.stage_tasks[:number])
        return [t for t in self.tests if t.task in seen]

    def _load_stage_scores(self, number: int) -> dict[str, float]:
        """Return S[number], for the tasks of stages up to the next one."""
        scores = {}
        for test in self._seen_test_sets(number + 1):
            path = self.predictions_folder(number) / f"{task_file_name(test.task)}.jsonl"
            example_scores = load_example_scores(path, test)
            if example_scores is None:
                raise DataError(
                    f"{path}: expected a score for every test example, since score.every_steps "
                    "compares with them; restore the file, or continue with score.every_steps=null"
                )
            indices = self.sample_indices[test.task]
            scores[test.task] = sum(example_scores[i] for i in indices) / len(indices)
        return scores

    def _score_sample(self, test: EvalSet, *, routed: bool) -> float:
        """Return the score of a task's sample, with `route` and `dispatch` if `routed`."""
        sample = test.select(self.sample_indices[test.task])
        turns = None
        if routed:
            self.strategy.route(self.model, test.task)
            turns = self.strategy.dispatch(self.model, sample.prompt_ids)
        return score_task(self.model, sample, self.batch_size, turns)[0]

    def _make_event(self, number: int, step: int, scores: dict[str, float]) -> dict[str, Any]:
        """Return the event with the scores and the forgetting at this step."""
        drops = []
        for test in self._seen_test_sets(number - 1):
            first = next(i for i, names in enumerate(self.stage_tasks, 1) if test.task in names)
            best = max(row[test.task] for row in self.stage_scores[first:number])
            drops.append(best - scores[test.task])
        return {
            "event": "during",
            "step": step,
            "scores": scores,
            "forgetting": mean_or_none(drops),
            "examples": self.num_examples,
            "seconds": 0.0,
        }


@contextmanager
def preserve_state(model: Model, strategy: Strategy) -> Iterator[None]:
    """Undo the changes of generation, `route` and `dispatch` in the block, bit for bit.

    Restores train mode, weights, batch layout, the choice of virtual tokens, and all random
    generators.
    """
    routed = any(
        getattr(type(strategy), name) is not getattr(Strategy, name)
        for name in ("route", "dispatch")
    )
    rng_state = capture_rng_state()
    layout = model.layout
    virtual = getattr(model.net, "virtual", None)
    fixed = virtual.fixed if virtual else None
    weights_before = snapshot(model) if routed else None
    try:
        with model.eval_mode(), torch.no_grad():
            yield
    finally:
        if weights_before is not None:
            restore(model, weights_before)
        if virtual:
            virtual.fixed = fixed
        model.layout = layout
        restore_rng_state(rng_state)


def format_event(event: Mapping[str, Any]) -> str:
    """Format the event as a line for the terminal."""
    forgetting = "" if event["forgetting"] is None else f"forgetting {event['forgetting']:.3f}, "
    return f"step {event['step']}: {forgetting}" + ", ".join(
        f"{t} {s:.3f}" for t, s in event["scores"].items()
    )


def load_example_scores(path: Path, test: EvalSet) -> list[float] | None:
    """Return the score of each test example from written predictions; None if any is missing."""
    try:
        predictions = load_predictions(path)
    except (OSError, ValueError):
        return None
    scores = [p.score for p in predictions]
    has_all_examples = [p.id for p in predictions] == [e.id for e in test.examples]
    return scores if has_all_examples and all(0 <= s <= 1 for s in scores) else None
