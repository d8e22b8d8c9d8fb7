"""Learn one new instruction type from a checkpoint or a base model, and draw its curves over steps
and shots.
"""

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
from continual.errors import ConfigError, MissingError, gathered
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

NAIVE_TARGET = f"{Strategy.__module__}.{Strategy.__name__}"  # plain fine-tuning: where no other strategy is asked for
UNFINISHED_FILE = "curve.unfinished.json"  # the curves that are finished, while others are not


def adapt(config: DictConfig, console: Console) -> list[dict[str, Any]]:
    """Fine-tune on the stream's one task for `adapt.steps`, in each draw of each of `adapt.shots`;
    the curves' points.

    Each curve starts from the same weights. Curves that are finished are kept: what was stopped or
    killed goes on behind them, and ends in the same curves. Raises ConfigError where the stream has
    not exactly one task, Stopped where a signal asked for an end.
    """
    folder = resolve_start(config)
    with run_folder_lock(out := Path(config.out)):
        claim(out, config)
        return _adapt(config, console, out, folder)


def _adapt(
    config: DictConfig, console: Console, out: Path, folder: Path | None
) -> list[dict[str, Any]]:
    if (out / CURVE_FILE).exists():
        console.print(f"{out} is finished; show it with: continual report {out}", highlight=False)
        return _to_points(Curve.load(out))
    bench = prepare_session(config, out)
    if len(bench.stream.tasks) != 1:
        names = ", ".join(t.name for t in bench.stream.tasks)
        raise ConfigError(
            "adapt learns one task, and this stream has "
            f"{len(bench.stream.tasks)}: {names}; pick one, such as "
            f"stream.tasks=[{bench.stream.tasks[0].name}]"
        )
    bench.load_network()
    if folder:
        checkpoint.load(
            folder, bench.model, bench.strategy if config.adapt.update_rule == "inner" else None
        )
    task, encodings = bench.token_cache.encode_stage(bench.stream.stages[0])
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
        report_unusable([*bench.test_encodings, *encodings], events)
        empty = Curve(
            out,
            task.name,
            bench.test_sets[0].metric,
            str(folder or "base"),
            (),
            config.adapt.update_rule,
        )
        found = train_curves(bench, task, empty, events, signals)
    state = (
        {n: gather_on_cpu(t) for n, t in bench.model.net.state_dict().items()}
        if bench.model.sharded
        else None
    )
    if is_main_process():
        bench.model.net.save_pretrained(out / "model", state_dict=state)
        bench.model.tokenizer.save_pretrained(out / "model")
        write_atomically(
            out / CURVE_FILE, json.dumps(found.to_dict(), indent=1)
        )  # last: where it is, the rest is whole
        (out / UNFINISHED_FILE).unlink(missing_ok=True)
        write.write_report(out)
    return _to_points(found)


def _to_points(found: Curve) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = found.to_dict()["points"]
    return points


def resolve_start(config: DictConfig) -> Path | None:
    """The checkpoint to start from, None for the base; `config` takes over the model and data keys
    of its run.

    With adapt.update_rule=inner also its strategy, whose inner loop it is.
    """
    inner = config.adapt.update_rule == "inner"
    if inner and any(part.get("_target_") != NAIVE_TARGET for part in config.strategy.values()):
        raise ConfigError(
            f"found strategy={'+'.join(map(str, config.strategy))} beside "
            "adapt.update_rule=inner, which takes that of the start's run; leave one of "
            "them out"
        )
    if config.adapt.init_from == "base":
        if inner:
            raise ConfigError(
                "adapt.update_rule=inner takes the inner loop of the run that prepared "
                "the start, and the base has none; name a checkpoint, or set "
                "adapt.update_rule=train"
            )
        return None
    path = Path(config.adapt.init_from)
    if path.is_dir():
        check_links_inside(path)
    folder = (
        path
        if (path / "weights.safetensors").exists()
        else checkpoint.find_resume_point(path).stage_folder
    )
    source = next((p for p in (path, *path.parents) if (p / "config.yaml").exists()), None)
    if folder is None or source is None:
        raise MissingError(
            f"adapt.init_from={path} is neither a run folder with a checkpoint nor "
            "one of its checkpoints; name a folder made by continual run, or "
            "adapt.init_from=base"
        )
    theirs = read_config(source / "config.yaml")
    if names := instantiate.strategies_without_complete_weights(theirs.get("strategy")):
        raise ConfigError(
            f"adapt.init_from={path}: the strategy {'+'.join(names)} has a part of the "
            "model in its memory, and the weights alone never answered; start from "
            "a run of another strategy, or from adapt.init_from=base"
        )
    inherit_model_and_data(config, source / "config.yaml")
    if inner:
        if wrong := unknown_strategies(theirs, source / "config.yaml"):
            raise ConfigError(gathered(wrong))
        config.strategy = theirs.strategy
        build.strategy(config).inner_loop()  # refused before anything that takes long
    return folder


def train_curves(
    session: RunSession,
    task: Task[Encoded],
    empty_curve: Curve,
    events: EventLog,
    stop_signal: StopSignal,
) -> Curve:
    """A curve for each draw of each number of shots (null: all training examples); the model is
    that of the last one.

    A draw is an order of the training examples: the support set of fewer shots is a part of that of
    more. Curves that the folder of the `empty` one holds are not learned anew.
    """
    settings, every, start = session.config.adapt, len(task.train), snapshot(session.model)
    shots = dict.fromkeys(every if n is None else min(n, every) for n in settings.shots)
    wanted = [(n, draw) for n in shots for draw in range(settings.draws)]
    kept = broadcast((empty_curve.path / UNFINISHED_FILE).exists())
    points = list(Curve.load(empty_curve.path, UNFINISHED_FILE).points) if kept else []
    before, done = _score_task(session), {point[:2] for point in points}
    for number, (n, draw) in enumerate(wanted, 1):
        if (n, draw) not in done:
            events.stage = number
            restore(session.model, start)
            points += _train_curve(session, task, n, draw, before, events, stop_signal)
            if is_main_process() and (n, draw) != wanted[-1]:  # whose model is kept with it
                write_atomically(
                    empty_curve.path / UNFINISHED_FILE,
                    json.dumps(replace(empty_curve, points=tuple(points)).to_dict(), indent=1),
                )
    return replace(empty_curve, points=tuple(sorted(points)))


def _train_curve(
    bench: RunSession,
    task: Task[Encoded],
    shots: int,
    draw: int,
    base_score: float,
    events: EventLog,
    signals: StopSignal,
) -> list[tuple[int, int, int, float]]:
    """Its points, scored `before` training and after the steps of `adapt.eval_steps` and the last."""
    settings, points = bench.config.adapt, []
    rng = random.Random(f"{bench.config.seed}/{draw}")
    support = rng.sample(list(task.train), len(task.train))[:shots]

    def measure(step: int, _: Any = None) -> None:
        if step in settings.eval_steps or step == settings.steps:
            value = _score_task(bench) if step else base_score
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
        signals.raise_if_received(
            f"in the curve of {shots} shots and draw {draw}, which begins anew",
            Path(bench.config.out),
        )

    measure(0)
    strategy, recipe = _make_learner(bench)
    train_stage(
        bench.model,
        replace(task, train=support),
        strategy,
        replace(recipe, steps=settings.steps),
        seed=rng.getrandbits(31),
        log_event=events,
        on_step=measure,
    )
    return points


def _make_learner(bench: RunSession) -> tuple[Strategy, Recipe]:
    """What takes the steps: the configured strategy and optimizer, or the start's own inner loop."""
    if bench.config.adapt.update_rule == "train":
        return build.strategy(bench.config), bench.recipe
    return bench.strategy.inner_loop(), replace(
        bench.recipe,
        optimizer="sgd",
        lr=1.0,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=None,
    )


def _score_task(bench: RunSession) -> float:
    bench.model.net.eval()
    value, _ = score_task(bench.model, bench.test_sets[0], bench.config.score.batch_size)
    bench.model.net.train()
    return value
