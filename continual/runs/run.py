"""A run: for each task of the stream, learn it, score all tasks, write the row of the matrix."""

from __future__ import annotations

import random
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from continual.data.template import Encoding
from continual.distributed.processes import broadcast, is_main_process, main_process_first
from continual.errors import DataError, listed
from continual.evaluation.probes.base import Predict
from continual.evaluation.probes.record import run_probes
from continual.evaluation.scoring import EvalSet, score_task
from continual.io.atomic import task_file_name, write_atomically
from continual.reports import write
from continual.results.matrix import BASE, Matrix
from continual.results.prediction import Prediction, format_predictions
from continual.runs import stop_if
from continual.runs.audit_step import print_audit, record_audit, report_solved_tasks
from continual.runs.forgetting_monitor import ForgettingMonitor, format_event, load_example_scores
from continual.runs.lock import claim, run_folder_lock
from continual.runs.session import (
    RunSession,
    make_forgetting_monitor,
    predictions_folder,
    prepare_session,
    report_unusable,
)
from continual.runs.signals import StopSignal
from continual.tracking.events import EventLog
from continual.tracking.trackers import start_tracker
from continual.training import checkpoint
from continual.training.precision import choose_precision
from continual.training.stage import train_stage


def run(config: DictConfig, console: Console) -> Matrix:
    """Run or resume in `config.out`, and return the matrix.

    Nothing finished is lost: a run that was killed goes on after its last checkpoint and ends in
    the same matrix. Raises Stopped where a signal asked for an end, Gated where stop_if did.
    """
    out = Path(config.out)
    if (done := load_finished_matrix(out)) is not None:
        claim(out, config)
        console.print(f"{out} is finished; show it with: continual report {out}", highlight=False)
        return done
    with run_folder_lock(out):
        claim(out, config)
        stop_if.clear(out, config.stop_if.forgetting)
        bench = prepare_session(config, out)
        audit = (
            print_audit(
                out,
                config,
                bench.stream,
                bench.encoder,
                bench.model.context_length,
                bench.test_sets,
                bench.token_cache.count_tokens,
                console,
            )
            if is_main_process()
            else None
        )
        bench.load_network()
        track = start_tracker(config, out)
        with EventLog(out / "events.jsonl", console, track) as events, StopSignal() as signals:
            with main_process_first():
                choose_precision(
                    config.train.precision,
                    out / "precision.json",
                    bench.model,
                    bench.token_cache.sample_rows,
                    events.print_line,
                )
            matrix = run_stages(out, bench, events, signals, audit)
            events({"event": "end", "summary": matrix.summary()})
        if is_main_process():
            checkpoint.prune(
                out, config.checkpoint.keep
            )  # again: a process that was killed may not have come to it
            write.write(out)
            (out / "finished").touch()
        return matrix


def run_stages(
    out: Path,
    session: RunSession,
    events: EventLog,
    stop_signal: StopSignal,
    audit: dict[str, Any] | None = None,
) -> Matrix:
    """Learn each stage that is not learned yet, score each that is not scored; stage 0 is before
    any training.
    """
    found = checkpoint.find_resume_point(out)
    matrix = restore_run(out, session, found, events)
    if audit:
        record_audit(out, audit, events)
    begun, early = events.stage, make_forgetting_monitor(out, session)
    for number in range(begun, len(session.stream.stages) + 1):
        events.stage = number
        if number > begun:
            is_first = number == begun + 1
            within = found.step_folder if is_first else None
            # The scored rows were encoded once for all stages: report them with the first one.
            unreported = session.test_encodings if is_first else []
            matrix = run_stage(
                out,
                session,
                StageCallback(out, session, matrix, number, events, stop_signal, early),
                within,
                unreported,
            )
        matrix = score_stage(out, session, matrix, events, stop_signal)
    return matrix


def derive_stage_seed(seed: int, stage_number: int) -> int:
    """Each stage's randomness starts anew from the run's seed, so that a resumed stage is the same
    stage.
    """
    return random.Random(f"{seed}/{stage_number}").getrandbits(31)


def load_finished_matrix(out: Path) -> Matrix | None:
    """The matrix of a run that came to its end."""
    return Matrix.load(out / "matrix.json") if (out / "finished").exists() else None


def restore_run(
    out: Path, session: RunSession, resume_point: checkpoint.ResumePoint, events: EventLog
) -> Matrix:
    """The matrix so far, with model and strategy as they were after the last trained stage; empty
    at the start.
    """
    for told in resume_point.damage:
        events.print_line(f"a damaged checkpoint is passed over, and an older one used: {told}")
    matrix = empty_matrix(session)
    if resume_point.stage_folder:
        matrix = checkpoint.load(
            resume_point.stage_folder, session.model, session.strategy, is_verified=True
        )
        events.stage = checkpoint.stage_number(resume_point.stage_folder)
    if newest := resume_point.step_folder or resume_point.stage_folder:
        check_same_data(out, Matrix.load(newest / "matrix.json"), session)
        events.print_line(f"resuming {out} from {newest.name}")
    events({"event": "start", "stages": [stage.name for stage in session.stream.stages]})
    return matrix


def check_same_data(out: Path, previous: Matrix, session: RunSession) -> None:
    """Raise DataError where the stream's tasks are no longer those whose scores the matrix has: its
    columns and rows would not be what their names say.
    """
    now, stages = empty_matrix(session), (BASE, *(stage.name for stage in session.stream.stages))
    pairs = {
        "tasks": (previous.tasks, now.tasks),
        "stages": (previous.stages, stages[: len(previous.stages)]),
        "metrics": tuple([str(m.metrics.get(task)) for task in now.tasks] for m in (previous, now)),
        "test examples": tuple([*map(str, m.counts)] for m in (previous, now)),
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


def empty_matrix(session: RunSession) -> Matrix:
    """The matrix before its first row."""
    stream, tests = session.stream, session.test_sets
    names = "+".join(map(str, session.config.strategy))
    return Matrix(
        stream.name,
        stream.order,
        names,
        session.config.seed,
        tuple(t.task for t in tests),
        {t.task: t.metric for t in tests},
        (),
        (),
        tuple(len(t.examples) for t in tests),
    )


@dataclass
class StageCallback:
    """Keeps the stage under way, as often as the configuration asks and where a signal came."""

    out: Path
    session: RunSession
    matrix: Matrix
    stage_number: int
    events: EventLog
    stop_signal: StopSignal
    monitor: ForgettingMonitor
    last_save_time: float = field(default_factory=time.monotonic)

    def __call__(self, step: int, get_state: Callable[[], dict[str, Any]]) -> float:
        """What `learn` calls after each step; returns the seconds that were no training."""
        told = self.monitor.score_step(self.stage_number, step)
        over = self.record_forgetting(told)
        every = self.session.config.checkpoint
        due = every.every_steps is not None and step % every.every_steps == 0
        due |= (
            every.every_seconds is not None
            and time.monotonic() - self.last_save_time >= every.every_seconds
        )
        caught, due = self.stop_signal.any(due)
        if due or caught or over:
            self.save_checkpoint(f"-step-{step:08d}", self.matrix, get_state())
        if over:
            stop_if.halt(self.out, over)
        self.stop_signal.raise_if_received(
            f"after step {step} of stage {self.stage_number}", self.out, caught
        )
        return float(told["seconds"]) if told else 0.0

    def record_forgetting(self, event: dict[str, Any] | None) -> dict[str, Any] | None:
        """Write down and show a point within the stage, if there is one; what stops the run there,
        if stop_if does.
        """
        if event is None:
            return None
        self.events(event)
        self.events.print_line(f"stage {self.stage_number} {format_event(event)}")
        self.matrix = replace(
            self.matrix, cost=add_costs(self.matrix.cost, {"score_seconds": event["seconds"]})
        )
        over = stop_if.check(
            event,
            self.session.stream.stages[self.stage_number - 1].name,
            self.session.config.stop_if.forgetting,
        )
        if over:
            self.events(over)
        return over

    def save_checkpoint(
        self, name: str, matrix: Matrix, stage_state: dict[str, Any] | None = None
    ) -> None:
        """Write a checkpoint, and remove what it makes superfluous."""
        if is_main_process() or self.session.model.sharded:
            folder = checkpoint.save(
                self.out / "checkpoints" / f"stage-{self.stage_number:02d}{name}",
                self.session.model,
                self.session.strategy,
                matrix,
                stage_state,
            )
        if is_main_process():
            checkpoint.prune(self.out, self.session.config.checkpoint.keep, folder)
            self.events(
                {
                    "event": "checkpoint",
                    "bytes": checkpoint.size_bytes(folder),
                    "memory_bytes": checkpoint.size_bytes(folder, "memory.*"),
                }
            )
        self.last_save_time = time.monotonic()


def run_stage(
    out: Path,
    session: RunSession,
    callback: StageCallback,
    step_folder: Path | None,
    unreported: Sequence[Encoding] = (),
) -> Matrix:
    """Learn one stage, from its beginning or from a checkpoint within it, and keep it; the matrix
    has its costs.
    """

    def go_on() -> dict[str, Any]:
        assert step_folder
        found = checkpoint.load(step_folder, session.model, session.strategy, is_verified=True)
        callback.matrix = replace(callback.matrix, cost=found.cost)
        return checkpoint.load_stage_state(step_folder, session.model)

    number, stage = callback.stage_number, session.stream.stages[callback.stage_number - 1]
    told = callback.monitor.begin_stage(number)
    if not step_folder and (over := callback.record_forgetting(told)):
        stop_if.halt(out, over)
    if is_main_process():
        shutil.rmtree(
            predictions_folder(out, number), ignore_errors=True
        )  # of other weights, if there are any
    task, encodings = session.token_cache.encode_stage(stage)
    report_unusable([*unreported, *encodings], callback.events)
    spent = train_stage(
        session.model,
        task,
        session.strategy,
        session.recipe,
        seed=derive_stage_seed(session.config.seed, number),
        log_event=callback.events,
        on_step=callback,
        restore_state=go_on if step_folder else None,
    )
    matrix = replace(callback.matrix, cost=add_costs(callback.matrix.cost, spent))
    callback.save_checkpoint("", matrix)
    return matrix


def score_stage(
    out: Path, session: RunSession, matrix: Matrix, events: EventLog, stop_signal: StopSignal
) -> Matrix:
    """Score all tasks, and keep the row and the predictions."""
    number, began = events.stage, time.perf_counter()
    stage = session.stream.stages[number - 1].name if number else BASE
    row = score_all_tasks(predictions_folder(out, number), session, events, stop_signal)
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
        f"stage {number}/{len(session.stream.stages)} {stage}: average "
        f"{sum(row) / len(row):.3f}"
        + "".join(f", {name} {value:.3f}" for name, value in zip(matrix.tasks, row, strict=True))
    )
    if not number and is_main_process():
        report_solved_tasks(out, dict(zip(matrix.tasks, row, strict=True)), events)
    if session.probes:
        run_probes(
            out,
            [predictions_folder(out, n) for n in range(number + 1)],
            session.probes,
            make_answer_function(out, session, events, stop_signal),
            matrix,
            events,
        )
    return matrix


def make_answer_function(
    out: Path, session: RunSession, events: EventLog, stop_signal: StopSignal
) -> Predict:
    """What probes ask by: the answers to a test's prompts, each with its mark."""

    def ask(test: EvalSet) -> list[Prediction]:
        answers = route_and_score(session, test)[1]
        stop_signal.raise_if_received(f"while probing after stage {events.stage}", out)
        return answers

    return ask


def score_all_tasks(
    folder: Path, session: RunSession, events: EventLog, stop_signal: StopSignal
) -> list[float]:
    """Every task's score; every answer is written with its mark, and a task that has its answers is
    not asked again.
    """
    row = []
    for done, test in enumerate(session.test_sets):
        events.update_bar("scoring", len(session.test_sets), done, test.task)
        path = folder / f"{task_file_name(test.task)}.jsonl"
        value = broadcast(load_task_score(path, test))
        if value is None:
            value, answers = route_and_score(session, test)
            if is_main_process():
                write_atomically(path, format_predictions(answers))
        row.append(value)
        stop_signal.raise_if_received(
            f"while scoring after stage {events.stage}", folder.parents[1]
        )
    events.clear_bar()
    return row


def route_and_score(session: RunSession, test: EvalSet) -> tuple[float, list[Prediction]]:
    """The score, and every answer with its mark, of the model as the strategy readies it for the
    task.
    """
    session.strategy.route(session.model, test.task)
    turns = session.strategy.dispatch(session.model, test.prompt_ids)
    return score_task(session.model, test, session.config.score.batch_size, turns)


def load_task_score(path: Path, test: EvalSet) -> float | None:
    """The task's score by the answers that were written before; None where they are not whole."""
    found = load_example_scores(path, test)
    return sum(found) / len(found) if found else None


COST_KEYS = ("train_seconds", "score_seconds", "steps", "tokens", "skipped_steps")


def add_costs(before: Mapping[str, float], stage_costs: Mapping[str, float]) -> dict[str, float]:
    """Seconds, steps and tokens add up over stages; the peak of memory is the process's so far."""
    total = {k: before.get(k, 0.0) + stage_costs.get(k, 0.0) for k in COST_KEYS}
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
