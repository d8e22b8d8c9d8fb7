"""Run a stream: train each stage, then score all tasks and add a row to the matrix."""

from __future__ import annotations

import random
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from continual.results.matrix import BASE_STAGE, Matrix
from continual.results.prediction import Prediction, format_predictions
from continual.runs import stop_if
from continual.runs.audit_step import print_audit, record_audit, report_solved_tasks
from continual.runs.checkpointer import Checkpointer
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
    """Run or resume in the folder `config.out`; return the matrix.

    A run that was killed resumes after its last checkpoint and ends with the same matrix. Raises
    RunInterrupted after a signal, ForgettingLimitExceeded if stop_if.forgetting is exceeded.
    """
    out = Path(config.out)
    finished_matrix = load_finished_matrix(out)
    if finished_matrix is not None:
        claim(out, config)
        console.print(f"{out} is finished; show it with: continual report {out}", highlight=False)
        return finished_matrix
    with run_folder_lock(out):
        claim(out, config)
        stop_if.clear(out, config.stop_if.forgetting)
        session = prepare_session(config, out)
        audit = None
        if is_main_process():
            audit = print_audit(
                out,
                config,
                session.stream,
                session.encoder,
                session.model.context_length,
                session.test_sets,
                session.token_cache.count_tokens,
                console,
            )
        session.load_network()
        track = start_tracker(config, out)
        with EventLog(out / "events.jsonl", console, track) as events, StopSignal() as stop_signal:
            with main_process_first():
                choose_precision(
                    config.train.precision,
                    out / "precision.json",
                    session.model,
                    session.token_cache.sample_rows,
                    events.print_line,
                )
            matrix = run_stages(out, session, events, stop_signal, audit)
            events({"event": "end", "summary": matrix.summary()})
        if is_main_process():
            # Again: a process that was killed after its last checkpoint did not remove old ones.
            checkpoint.prune(out, session.settings.checkpoint.keep)
            write.write_report(out)
            (out / "finished").touch()
        return matrix


def run_stages(
    out: Path,
    session: RunSession,
    events: EventLog,
    stop_signal: StopSignal,
    audit: dict[str, Any] | None = None,
) -> Matrix:
    """Train and score all stages that are not finished; return the matrix.

    Stage 0 is the model before any training, which is only scored.
    """
    resume_point = checkpoint.find_resume_point(out)
    matrix = restore_run(out, session, resume_point, events)
    if audit:
        record_audit(out, audit, events)
    last_trained = events.stage
    monitor = make_forgetting_monitor(out, session)
    for number in range(last_trained, len(session.stream.stages) + 1):
        events.stage = number
        if number > last_trained:
            is_first = number == last_trained + 1
            step_folder = resume_point.step_folder if is_first else None
            # The scored rows were encoded once for all stages: report them with the first one.
            unreported = session.test_encodings if is_first else []
            callback = StageCallback(out, session, matrix, number, events, stop_signal, monitor)
            matrix = run_stage(out, session, callback, step_folder, unreported)
        matrix = score_stage(out, session, matrix, events, stop_signal)
    return matrix


def derive_stage_seed(seed: int, stage_number: int) -> int:
    """Derive a stage's seed from the run's, so that a resumed stage is the same stage."""
    return random.Random(f"{seed}/{stage_number}").getrandbits(31)


def load_finished_matrix(out: Path) -> Matrix | None:
    """Return the matrix of a finished run, or None."""
    return Matrix.load(out / "matrix.json") if (out / "finished").exists() else None


def restore_run(
    out: Path, session: RunSession, resume_point: checkpoint.ResumePoint, events: EventLog
) -> Matrix:
    """Restore model and strategy after the last trained stage; return the matrix so far.

    Sets `events.stage` to the number of that stage. Raises DataError if the data has changed.
    """
    for damage in resume_point.damage:
        events.print_line(f"a damaged checkpoint is passed over, and an older one used: {damage}")
    matrix = empty_matrix(session)
    if resume_point.stage_folder:
        matrix = checkpoint.load(
            resume_point.stage_folder, session.model, session.strategy, is_verified=True
        )
        events.stage = checkpoint.stage_number(resume_point.stage_folder)
    newest = resume_point.step_folder or resume_point.stage_folder
    if newest:
        check_same_data(out, Matrix.load(newest / "matrix.json"), session)
        events.print_line(f"resuming {out} from {newest.name}")
    events({"event": "start", "stages": [stage.name for stage in session.stream.stages]})
    return matrix


def check_same_data(out: Path, previous: Matrix, session: RunSession) -> None:
    """Raise DataError if tasks, stages, metrics or test rows differ from those of the matrix.

    Its rows and columns would then not be what their names say.
    """
    now = empty_matrix(session)
    stages = (BASE_STAGE, *(stage.name for stage in session.stream.stages))
    pairs = {
        "tasks": (previous.tasks, now.tasks),
        "stages": (previous.stages, stages[: len(previous.stages)]),
        "metrics": tuple([str(m.metrics.get(task)) for task in now.tasks] for m in (previous, now)),
        "test examples": tuple([str(n) for n in m.counts] for m in (previous, now)),
    }
    differences = [
        f"{name}: {listed(before)} there, {listed(after)} now"
        for name, (before, after) in pairs.items()
        if before != after
    ]
    if differences:
        raise DataError(
            f"{out} was begun with other data; restore them to go on, or give "
            "another out=\n  " + "\n  ".join(differences)
        )


def empty_matrix(session: RunSession) -> Matrix:
    """Return the matrix before its first row."""
    stream = session.stream
    tests = session.test_sets
    names = "+".join(str(name) for name in session.config.strategy)
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
    """After each step of a stage: measure forgetting, save checkpoints, stop the run if needed."""

    out: Path
    session: RunSession
    matrix: Matrix
    stage_number: int
    events: EventLog
    stop_signal: StopSignal
    monitor: ForgettingMonitor

    def __post_init__(self) -> None:
        """Start the time between checkpoints."""
        self.checkpointer = Checkpointer(self.out, self.session, self.stage_number, self.events)

    def __call__(self, step: int, get_state: Callable[[], dict[str, Any]]) -> float:
        """Do what is due after this step; return the seconds that were not spent on training."""
        forgetting = self.monitor.score_step(self.stage_number, step)
        limit_exceeded = self.record_forgetting(forgetting)
        signal_number, is_due = self.stop_signal.any(self.checkpointer.is_due(step))

        if is_due or signal_number or limit_exceeded:
            self.checkpointer.save_step(step, self.matrix, get_state())
        if limit_exceeded:
            stop_if.halt(self.out, limit_exceeded)
        position = f"after step {step} of stage {self.stage_number}"
        self.stop_signal.raise_if_received(position, self.out, signal_number)
        return float(forgetting["seconds"]) if forgetting else 0.0

    def record_forgetting(self, event: dict[str, Any] | None) -> dict[str, Any] | None:
        """Log and print an event of the monitor, and add its seconds to the matrix's costs.

        Returns the event that stops the run if forgetting exceeds stop_if.forgetting, else None.
        """
        if event is None:
            return None
        self.events(event)
        self.events.print_line(f"stage {self.stage_number} {format_event(event)}")
        costs = add_costs(self.matrix.cost, {"score_seconds": event["seconds"]})
        self.matrix = replace(self.matrix, cost=costs)

        stage_name = self.session.stream.stages[self.stage_number - 1].name
        limit_exceeded = stop_if.check(event, stage_name, self.session.settings.stop_if.forgetting)
        if limit_exceeded:
            self.events(limit_exceeded)
        return limit_exceeded


def run_stage(
    out: Path,
    session: RunSession,
    callback: StageCallback,
    step_folder: Path | None,
    unreported: Sequence[Encoding] = (),
) -> Matrix:
    """Train one stage and save its checkpoint; return the matrix with the stage's costs.

    The stage starts at its beginning, or from `step_folder`, a checkpoint within it. `unreported`
    are encodings to report with those of the stage.
    """
    number = callback.stage_number
    stage = session.stream.stages[number - 1]
    restore_state = None
    if step_folder:
        restore_state = partial(
            checkpoint.load_within_stage, step_folder, session.model, session.strategy
        )
        costs = Matrix.load(step_folder / "matrix.json").cost
        callback.monitor.begin_stage(number)
        callback.matrix = replace(callback.matrix, cost=costs)
    else:
        limit_exceeded = callback.record_forgetting(callback.monitor.begin_stage(number))
        if limit_exceeded:
            stop_if.halt(out, limit_exceeded)

    if is_main_process():  # answers of an earlier attempt come from other weights
        shutil.rmtree(predictions_folder(out, number), ignore_errors=True)
    task, encodings = session.token_cache.encode_stage(stage)
    report_unusable([*unreported, *encodings], callback.events)
    stage_costs = train_stage(
        session.model,
        task,
        session.strategy,
        session.recipe,
        seed=derive_stage_seed(session.config.seed, number),
        log_event=callback.events,
        on_step=callback,
        restore_state=restore_state,
    )
    matrix = replace(callback.matrix, cost=add_costs(callback.matrix.cost, stage_costs))
    callback.checkpointer.save_stage(matrix)
    return matrix


def score_stage(
    out: Path, session: RunSession, matrix: Matrix, events: EventLog, stop_signal: StopSignal
) -> Matrix:
    """Score all tasks after a stage, and run the probes; return the matrix with the new row."""
    number = events.stage
    started = time.perf_counter()
    stage = session.stream.stages[number - 1].name if number else BASE_STAGE
    row = score_all_tasks(predictions_folder(out, number), session, events, stop_signal)
    seconds = time.perf_counter() - started
    costs = add_costs(matrix.cost, {"score_seconds": seconds})
    matrix = replace(matrix.with_row(stage, row), cost=costs)
    scores = dict(zip(matrix.tasks, row, strict=True))
    events({"event": "score", "seconds": seconds, "scores": scores})
    if is_main_process():
        matrix.save(out / "matrix.json")
    events.print_line(
        f"stage {number}/{len(session.stream.stages)} {stage}: average "
        f"{sum(row) / len(row):.3f}"
        + "".join(f", {name} {value:.3f}" for name, value in scores.items())
    )
    if not number and is_main_process():
        report_solved_tasks(out, scores, events)
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
    """Return the function by which probes get the scored predictions for a test set."""

    def ask(test: EvalSet) -> list[Prediction]:
        answers = route_and_score(session, test)[1]
        stop_signal.raise_if_received(f"while probing after stage {events.stage}", out)
        return answers

    return ask


def score_all_tasks(
    folder: Path, session: RunSession, events: EventLog, stop_signal: StopSignal
) -> list[float]:
    """Return the score of every task, and write the predictions to `folder`.

    A task whose predictions are complete there is not answered again.
    """
    row = []
    for index, test in enumerate(session.test_sets):
        events.update_bar("scoring", len(session.test_sets), index, test.task)
        path = folder / f"{task_file_name(test.task)}.jsonl"
        value = broadcast(load_task_score(path, test))
        if value is None:
            value, predictions = route_and_score(session, test)
            if is_main_process():
                write_atomically(path, format_predictions(predictions))
        row.append(value)
        stop_signal.raise_if_received(
            f"while scoring after stage {events.stage}", folder.parents[1]
        )
    events.clear_bar()
    return row


def route_and_score(session: RunSession, test: EvalSet) -> tuple[float, list[Prediction]]:
    """Let the strategy route to the task; return its score and the scored predictions."""
    session.strategy.route(session.model, test.task)
    turns = session.strategy.dispatch(session.model, test.prompt_ids)
    return score_task(session.model, test, session.settings.score.batch_size, turns)


def load_task_score(path: Path, test: EvalSet) -> float | None:
    """Return the task's score from written predictions; None if they are not complete."""
    scores = load_example_scores(path, test)
    return sum(scores) / len(scores) if scores else None


COST_KEYS = ("train_seconds", "score_seconds", "steps", "tokens", "skipped_steps")


def add_costs(before: Mapping[str, float], stage_costs: Mapping[str, float]) -> dict[str, float]:
    """Add a stage's costs to those before; `peak_bytes` is the peak of this process or earlier."""
    total = {key: before.get(key, 0.0) + stage_costs.get(key, 0.0) for key in COST_KEYS}
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # it counts in KiB
    return {
        **total,
        "seconds": total["train_seconds"] + total["score_seconds"],
        "peak_bytes": max(before.get("peak_bytes", 0.0), float(peak)),
    }
