"""Adapt a checkpoint or base model to one new task; measure curves over steps and shots."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from continual.config import instantiate
from continual.config.run_config import read_config
from continual.config.trust import inherit_model_and_data, unknown_strategies
from continual.data.types import Encoded, Task
from continual.distributed.processes import broadcast, is_main_process, main_process_first
from continual.errors import ConfigError, MissingError, Problems
from continual.evaluation.scoring import score_task
from continual.io.atomic import write_atomically
from continual.io.untrusted import check_links_inside
from continual.models.sharding import gather_on_cpu
from continual.models.weights import restore, snapshot
from continual.reports import write
from continual.results.curve import CURVE_FILE, Curve
from continual.runs import build
from continual.runs.lock import claim, run_folder_lock
from continual.runs.session import RunSession, prepare_session, report_unusable
from continual.runs.signals import StopSignal
from continual.strategy.interface import Strategy
from continual.tracking.events import EventLog
from continual.tracking.trackers import start_tracker
from continual.training import checkpoint
from continual.training.precision import choose_precision
from continual.training.recipe import Recipe
from continual.training.stage import train_stage

NAIVE_TARGET = f"{Strategy.__module__}.{Strategy.__name__}"  # the default strategy
UNFINISHED_FILE = "curve.unfinished.json"  # finished curves, while others are not


def adapt(config: DictConfig, console: Console) -> list[dict[str, Any]]:
    """Train on the stream's one task, a curve for each draw of each number of shots.

    Returns the points of all curves. Each curve starts from the same weights. Finished curves are
    kept: a command that was stopped or killed resumes after them, and ends with the same curves.
    Raises ConfigError unless the stream has exactly one task, RunInterrupted after a signal.
    """
    folder = resolve_start(config)
    out = Path(config.out)
    with run_folder_lock(out):
        claim(out, config)
        return _adapt(config, console, out, folder)


def _adapt(
    config: DictConfig, console: Console, out: Path, folder: Path | None
) -> list[dict[str, Any]]:
    if (out / CURVE_FILE).exists():
        console.print(f"{out} is finished; show it with: continual report {out}", highlight=False)
        return _to_points(Curve.load(out))
    session = prepare_session(config, out)
    tasks = session.stream.tasks
    if len(tasks) != 1:
        names = ", ".join(task.name for task in tasks)
        raise ConfigError(
            f"adapt learns one task, and this stream has {len(tasks)}: {names}; pick one, such as "
            f"stream.tasks=[{tasks[0].name}]"
        )
    session.load_network()
    update_rule = config.adapt.update_rule
    if folder:
        strategy = session.strategy if update_rule == "inner" else None
        checkpoint.load(folder, session.model, strategy)
    task, encodings = session.token_cache.encode_stage(session.stream.stages[0])
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
        report_unusable([*session.test_encodings, *encodings], events)
        metric = session.test_sets[0].metric
        empty_curve = Curve(out, task.name, metric, str(folder or "base"), (), update_rule)
        curve = train_curves(session, task, empty_curve, events, stop_signal)

    net = session.model.net
    full_weights = None
    if session.model.sharded:
        full_weights = {name: gather_on_cpu(t) for name, t in net.state_dict().items()}
    if is_main_process():
        net.save_pretrained(out / "model", state_dict=full_weights)
        session.model.tokenizer.save_pretrained(out / "model")
        # Last: a folder with this file is complete.
        write_atomically(out / CURVE_FILE, json.dumps(curve.to_dict(), indent=1))
        (out / UNFINISHED_FILE).unlink(missing_ok=True)
        write.write_report(out)
    return _to_points(curve)


def _to_points(curve: Curve) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = curve.to_dict()["points"]
    return points


def resolve_start(config: DictConfig) -> Path | None:
    """Return the checkpoint to start from, or None for the base model.

    `config` takes over the model and data keys of the checkpoint's run; with
    adapt.update_rule=inner also its strategy, whose inner loop is used.
    """
    inner = config.adapt.update_rule == "inner"
    if inner and any(part.get("_target_") != NAIVE_TARGET for part in config.strategy.values()):
        raise ConfigError(
            f"found strategy={'+'.join(map(str, config.strategy))} and "
            "adapt.update_rule=inner, which uses the strategy of the run in adapt.init_from; leave "
            "one of them out"
        )
    if config.adapt.init_from == "base":
        if inner:
            raise ConfigError(
                "adapt.update_rule=inner uses the inner loop of the run in adapt.init_from, and "
                "the base model has none; name a checkpoint, or set adapt.update_rule=train"
            )
        return None
    path = Path(config.adapt.init_from)
    if path.is_dir():
        check_links_inside(path)
    is_checkpoint = (path / "weights.safetensors").exists()
    folder = path if is_checkpoint else checkpoint.find_resume_point(path).stage_folder
    source = next((p for p in (path, *path.parents) if (p / "config.yaml").exists()), None)
    if folder is None or source is None:
        raise MissingError(
            f"adapt.init_from={path} is neither a run folder with a checkpoint nor "
            "one of its checkpoints; name a folder made by continual run, or "
            "adapt.init_from=base"
        )
    theirs = read_config(source / "config.yaml")
    incomplete = instantiate.strategies_without_complete_weights(theirs.get("strategy"))
    if incomplete:
        raise ConfigError(
            f"adapt.init_from={path}: the strategy {'+'.join(incomplete)} keeps a part of the "
            "model in its memory, so its weights alone are not the model that was scored; start "
            "from a run of another strategy, or from adapt.init_from=base"
        )
    inherit_model_and_data(config, source / "config.yaml")
    if inner:
        Problems(unknown_strategies(theirs, source / "config.yaml")).raise_if_any()
        config.strategy = theirs.strategy
        build.strategy(config).inner_loop()  # raises ConfigError if it has none
    return folder


def train_curves(
    session: RunSession,
    task: Task[Encoded],
    empty_curve: Curve,
    events: EventLog,
    stop_signal: StopSignal,
) -> Curve:
    """Train a curve for each draw of each number of shots (null: all training examples).

    The model ends as that of the last curve. A draw is an order of the training examples: the
    support set with fewer shots is a part of the one with more. Curves that the folder of
    `empty_curve` holds are not trained again.
    """
    settings = session.settings.adapt
    assert settings  # this command has the section
    num_rows = len(task.train)
    start_weights = snapshot(session.model)
    shots = dict.fromkeys(num_rows if n is None else min(n, num_rows) for n in settings.shots)
    curves = [(n, draw) for n in shots for draw in range(settings.draws)]

    path = empty_curve.path / UNFINISHED_FILE
    points = []
    if broadcast(path.exists()):
        points = list(Curve.load(empty_curve.path, UNFINISHED_FILE).points)
    finished = {point[:2] for point in points}
    base_score = _score_task(session)
    for number, (n, draw) in enumerate(curves, 1):
        if (n, draw) in finished:
            continue
        events.stage = number
        restore(session.model, start_weights)
        points += _train_curve(session, task, n, draw, base_score, events, stop_signal)
        # The last curve counts as finished only when its model is saved.
        if is_main_process() and (n, draw) != curves[-1]:
            unfinished = replace(empty_curve, points=tuple(points))
            write_atomically(path, json.dumps(unfinished.to_dict(), indent=1))
    return replace(empty_curve, points=tuple(sorted(points)))


def _train_curve(
    session: RunSession,
    task: Task[Encoded],
    shots: int,
    draw: int,
    base_score: float,
    events: EventLog,
    stop_signal: StopSignal,
) -> list[tuple[int, int, int, float]]:
    """Train one curve; return its points (shots, draw, step, score).

    The task is scored after the steps of `adapt.eval_steps` and after the last one. `base_score` is
    the score before training.
    """
    settings = session.settings.adapt
    assert settings
    points: list[tuple[int, int, int, float]] = []
    rng = random.Random(f"{session.config.seed}/{draw}")
    support = rng.sample(list(task.train), len(task.train))[:shots]

    def measure(step: int, _: Any = None) -> None:
        if step in settings.eval_steps or step == settings.steps:
            value = _score_task(session) if step else base_score
            points.append((shots, draw, step, value))
            events(
                {
                    "event": "score",
                    "shots": shots,
                    "draw": draw,
                    "step": step,
                    "scores": {task.name: value},
                }
            )
            events.print_line(f"{task.name}, {shots} shots, draw {draw}, step {step}: {value:.3f}")
        stop_signal.raise_if_received(
            f"in the curve of {shots} shots and draw {draw}, which begins anew",
            Path(session.config.out),
        )

    measure(0)
    strategy, recipe = _make_learner(session)
    train_stage(
        session.model,
        replace(task, train=support),
        strategy,
        replace(recipe, steps=settings.steps),
        seed=rng.getrandbits(31),
        log_event=events,
        on_step=measure,
    )
    return points


def _make_learner(session: RunSession) -> tuple[Strategy, Recipe]:
    """Return strategy and recipe as configured, or those of the inner loop of the start's run."""
    if session.config.adapt.update_rule == "train":
        return build.strategy(session.config), session.recipe
    # The inner loop scales the gradient by its own learning rates: lr is 1.
    recipe = replace(
        session.recipe,
        optimizer="sgd",
        lr=1.0,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=None,
    )
    return session.strategy.inner_loop(), recipe


def _score_task(session: RunSession) -> float:
    model = session.model
    model.net.eval()
    value, _ = score_task(model, session.test_sets[0], session.settings.score.batch_size)
    model.net.train()
    return value
