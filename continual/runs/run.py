"""A run: for each task of the stream, learn it, score all tasks, write the row of the matrix."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from continual.distributed.processes import broadcast, is_main_process, main_process_first
from continual.errors import DataError, listed
from continual.evaluation.probes.base import Ask
from continual.evaluation.probes.record import record
from continual.evaluation.scoring import Test, score
from continual.io.atomic import task_file_name, write_atomically
from continual.reports import write
from continual.results.matrix import BASE, Matrix
from continual.runs import stop_if
from continual.runs.audit_step import base_scored, noted, shown
from continual.runs.forgetting_monitor import Early, marks, said
from continual.runs.lock import alone, claim
from continual.runs.session import Bench, early_of, predictions, set_up, show_unfit
from continual.runs.signals import Signals
from continual.tracking.events import EventLog
from continual.tracking.trackers import start_tracker
from continual.training import checkpoint
from continual.training.precision import settle
from continual.training.stage import learn


def run(config: DictConfig, console: Console) -> Matrix:
    """Run or resume in `config.out`, and return the matrix.

    Nothing finished is lost: a run that was killed goes on after its last checkpoint and ends in
    the same matrix. Raises Stopped where a signal asked for an end, Gated where stop_if did.
    """
    out = Path(config.out)
    if (done := finished(out)) is not None:
        claim(out, config)
        console.print(f"{out} is finished; show it with: continual report {out}", highlight=False)
        return done
    with alone(out):
        claim(out, config)
        stop_if.passed(out, config.stop_if.forgetting)
        bench = set_up(config, out)
        audit = (
            shown(
                out,
                config,
                bench.stream,
                bench.encoder,
                bench.model.context,
                bench.tests,
                bench.tokens.count_tokens,
                console,
            )
            if is_main_process()
            else None
        )
        bench.load()
        track = start_tracker(config, out)
        with EventLog(out / "events.jsonl", console, track) as events, Signals() as signals:
            with main_process_first():
                settle(
                    config.train.precision,
                    out / "precision.json",
                    bench.model,
                    bench.tokens.sample_rows,
                    events.print_line,
                )
            matrix = stages(out, bench, events, signals, audit)
            events({"event": "end", "summary": matrix.summary()})
        if is_main_process():
            checkpoint.prune(
                out, config.checkpoint.keep
            )  # again: a process that was killed may not have come to it
            write.write(out)
            (out / "finished").touch()
        return matrix


def stages(
    out: Path, bench: Bench, events: EventLog, signals: Signals, audit: dict[str, Any] | None = None
) -> Matrix:
    """Learn each stage that is not learned yet, score each that is not scored; stage 0 is before
    any training.
    """
    found = checkpoint.find(out)
    matrix = resume(out, bench, found, events)
    if audit:
        noted(out, audit, events)
    begun, early = events.stage, early_of(out, bench)
    for number in range(begun, len(bench.stream.stages) + 1):
        events.stage = number
        if number > begun:
            within = found.within if number == begun + 1 else None
            matrix = train(
                out, bench, Keeper(out, bench, matrix, number, events, signals, early), within
            )
        matrix = add_row(out, bench, matrix, events, signals)
    return matrix


def stage_seed(seed: int, number: int) -> int:
    """Each stage's randomness starts anew from the run's seed, so that a resumed stage is the same
    stage.
    """
    return random.Random(f"{seed}/{number}").getrandbits(31)


def finished(out: Path) -> Matrix | None:
    """The matrix of a run that came to its end."""
    return Matrix.load(out / "matrix.json") if (out / "finished").exists() else None


def resume(out: Path, bench: Bench, found: checkpoint.Found, events: EventLog) -> Matrix:
    """The matrix so far, with model and strategy as they were after the last trained stage; empty
    at the start.
    """
    for told in found.damaged:
        events.print_line(f"a damaged checkpoint is passed over, and an older one used: {told}")
    matrix = empty(bench)
    if found.trained:
        matrix = checkpoint.load(found.trained, bench.model, bench.strategy, found=True)
        events.stage = checkpoint.number(found.trained)
    if newest := found.within or found.trained:
        refuse_other_data(out, Matrix.load(newest / "matrix.json"), bench)
        events.print_line(f"resuming {out} from {newest.name}")
    events({"event": "start", "stages": [stage.name for stage in bench.stream.stages]})
    return matrix


def refuse_other_data(out: Path, before: Matrix, bench: Bench) -> None:
    """Raise DataError where the stream's tasks are no longer those whose scores the matrix has: its
    columns and rows would not be what their names say.
    """
    now, stages = empty(bench), (BASE, *(stage.name for stage in bench.stream.stages))
    pairs = {
        "tasks": (before.tasks, now.tasks),
        "stages": (before.stages, stages[: len(before.stages)]),
        "metrics": tuple([str(m.metrics.get(task)) for task in now.tasks] for m in (before, now)),
        "test examples": tuple([*map(str, m.counts)] for m in (before, now)),
    }
    differ = [
        f"{what}: {listed(was)} there, {listed(has)} now"
        for what, (was, has) in pairs.items()
        if was != has
    ]
    if differ:
        raise DataError(
            f"{out} was begun with other data; restore them to go on, or give "
            "another out=\n  " + "\n  ".join(differ)
        )


def empty(bench: Bench) -> Matrix:
    """The matrix before its first row."""
    stream, tests = bench.stream, bench.tests
    names = "+".join(map(str, bench.config.strategy))
    return Matrix(
        stream.name,
        stream.order,
        names,
        bench.config.seed,
        tuple(t.task for t in tests),
        {t.task: t.metric for t in tests},
        (),
        (),
        tuple(len(t.examples) for t in tests),
    )


@dataclass
class Keeper:
    """Keeps the stage under way, as often as the configuration asks and where a signal came."""

    out: Path
    bench: Bench
    matrix: Matrix
    number: int
    events: EventLog
    signals: Signals
    early: Early
    last: float = field(default_factory=time.monotonic)

    def __call__(self, step: int, progress: Callable[[], dict[str, Any]]) -> float:
        """What `learn` calls after each step; returns the seconds that were no training."""
        told = self.early.look(self.number, step)
        over = self.tell(told)
        every = self.bench.config.checkpoint
        due = every.every_steps is not None and step % every.every_steps == 0
        due |= (
            every.every_seconds is not None and time.monotonic() - self.last >= every.every_seconds
        )
        caught, due = self.signals.any(due)
        if due or caught or over:
            self.save(f"-step-{step:08d}", self.matrix, progress())
        if over:
            stop_if.stop(self.out, over)
        self.signals.leave(f"after step {step} of stage {self.number}", self.out, caught)
        return float(told["seconds"]) if told else 0.0

    def tell(self, told: dict[str, Any] | None) -> dict[str, Any] | None:
        """Write down and show a point within the stage, if there is one; what stops the run there,
        if stop_if does.
        """
        if told is None:
            return None
        self.events(told)
        self.events.print_line(f"stage {self.number} {said(told)}")
        self.matrix = replace(
            self.matrix, cost=add_costs(self.matrix.cost, {"score_seconds": told["seconds"]})
        )
        over = stop_if.over(
            told,
            self.bench.stream.stages[self.number - 1].name,
            self.bench.config.stop_if.forgetting,
        )
        if over:
            self.events(over)
        return over

    def save(self, name: str, matrix: Matrix, progress: dict[str, Any] | None = None) -> None:
        """Write a checkpoint, and remove what it makes superfluous."""
        if is_main_process() or self.bench.model.sharded:
            folder = checkpoint.save(
                self.out / "checkpoints" / f"stage-{self.number:02d}{name}",
                self.bench.model,
                self.bench.strategy,
                matrix,
                progress,
            )
        if is_main_process():
            checkpoint.prune(self.out, self.bench.config.checkpoint.keep, folder)
            self.events(
                {
                    "event": "checkpoint",
                    "bytes": checkpoint.size(folder),
                    "memory_bytes": checkpoint.size(folder, "memory.*"),
                }
            )
        self.last = time.monotonic()


def train(out: Path, bench: Bench, keeper: Keeper, within: Path | None) -> Matrix:
    """Learn one stage, from its beginning or from a checkpoint within it, and keep it; the matrix
    has its costs.
    """

    def go_on() -> dict[str, Any]:
        assert within
        found = checkpoint.load(within, bench.model, bench.strategy, found=True)
        keeper.matrix = replace(keeper.matrix, cost=found.cost)
        return checkpoint.progress(within, bench.model)

    number, stage = keeper.number, bench.stream.stages[keeper.number - 1]
    told = keeper.early.begin(number)
    if not within and (over := keeper.tell(told)):
        stop_if.stop(out, over)
    if is_main_process():
        shutil.rmtree(
            predictions(out, number), ignore_errors=True
        )  # of other weights, if there are any
    task = bench.tokens.encode_stage(stage)
    show_unfit(bench.encoder, keeper.events)
    spent = learn(
        bench.model,
        task,
        bench.strategy,
        bench.recipe,
        seed=stage_seed(bench.config.seed, number),
        log=keeper.events,
        after=keeper,
        progress=go_on if within else None,
    )
    matrix = replace(keeper.matrix, cost=add_costs(keeper.matrix.cost, spent))
    keeper.save("", matrix)
    return matrix


def add_row(out: Path, bench: Bench, matrix: Matrix, events: EventLog, signals: Signals) -> Matrix:
    """Score all tasks, and keep the row and the predictions."""
    number, began = events.stage, time.perf_counter()
    stage = bench.stream.stages[number - 1].name if number else BASE
    row = score_all(predictions(out, number), bench, events, signals)
    spent = {"score_seconds": time.perf_counter() - began}
    matrix = replace(matrix.with_row(stage, row), cost=add_costs(matrix.cost, spent))
    events(
        {
            "event": "score",
            "seconds": spent["score_seconds"],
            "scores": dict(zip(matrix.tasks, row, strict=True)),
        }
    )
    if is_main_process():
        matrix.save(out / "matrix.json")
    events.print_line(
        f"stage {number}/{len(bench.stream.stages)} {stage}: average "
        f"{sum(row) / len(row):.3f}"
        + "".join(f", {name} {value:.3f}" for name, value in zip(matrix.tasks, row, strict=True))
    )
    if not number and is_main_process():
        base_scored(out, dict(zip(matrix.tasks, row, strict=True)), events)
    if bench.probes:
        record(
            out,
            [predictions(out, n) for n in range(number + 1)],
            bench.probes,
            asker(out, bench, events, signals),
            matrix,
            events,
        )
    return matrix


def asker(out: Path, bench: Bench, events: EventLog, signals: Signals) -> Ask:
    """What probes ask by: the answers to a test's prompts, each with its mark."""

    def ask(test: Test) -> list[dict[str, Any]]:
        answers = answered(bench, test)[1]
        signals.leave(f"while probing after stage {events.stage}", out)
        return answers

    return ask


def score_all(folder: Path, bench: Bench, events: EventLog, signals: Signals) -> list[float]:
    """Every task's score; every answer is written with its mark, and a task that has its answers is
    not asked again.
    """
    row = []
    for done, test in enumerate(bench.tests):
        events.update_bar("scoring", len(bench.tests), done, test.task)
        path = folder / f"{task_file_name(test.task)}.jsonl"
        value = broadcast(marked(path, test))
        if value is None:
            value, answers = answered(bench, test)
            if is_main_process():
                write_atomically(
                    path, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in answers)
                )
        row.append(value)
        signals.leave(f"while scoring after stage {events.stage}", folder.parents[1])
    events.clear_bar()
    return row


def answered(bench: Bench, test: Test) -> tuple[float, list[dict[str, Any]]]:
    """The score, and every answer with its mark, of the model as the strategy readies it for the
    task.
    """
    bench.strategy.route(bench.model, test.task)
    turns = bench.strategy.dispatch(bench.model, test.prompts)
    return score(bench.model, test, bench.config.score.batch_size, turns)


def marked(path: Path, test: Test) -> float | None:
    """The task's score by the answers that were written before; None where they are not whole."""
    found = marks(path, test)
    return sum(found) / len(found) if found else None


COSTS = ("train_seconds", "score_seconds", "steps", "tokens", "skipped_steps")


def add_costs(before: Mapping[str, float], spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds, steps and tokens add up over stages; the peak of memory is the process's so far."""
    total = {k: before.get(k, 0.0) + spent.get(k, 0.0) for k in COSTS}
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    )
    return {
        **total,
        "seconds": total["train_seconds"] + total["score_seconds"],
        "peak_bytes": max(before.get("peak_bytes", 0.0), float(peak)),
    }
