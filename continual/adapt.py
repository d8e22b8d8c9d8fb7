"""Learn one new instruction type from a checkpoint or a base model, and draw its curves over steps and shots."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict
from rich.console import Console

from continual import build, checkpoint, report
from continual.bench import Bench, set_up, show_unfit
from continual.claim import claim, read_config
from continual.data import Encoded, Task
from continual.errors import ConfigError, DataError, MissingError, brief, gathered
from continual.events import Events
from continual.files import write_whole
from continual.interrupt import Signals, alone
from continual.parallel import agreed, first, leads
from continual.precision import settle
from continual.reading import refuse_links_out
from continual.reports.curves import FILE, Curve
from continual.score import score
from continual.sharding import collected
from continual.stage import Recipe, learn
from continual.strategy import Strategy
from continual.track import tracker
from continual.weights import restore, snapshot

PLAIN = f"{Strategy.__module__}.{Strategy.__name__}"  # plain fine-tuning: where no other strategy is asked for
HALF = "curve.unfinished.json"  # the curves that are finished, while others are not


def adapt(config: DictConfig, console: Console) -> list[dict[str, Any]]:
    """Fine-tune on the stream's one task for `adapt.steps`, in each draw of each of `adapt.shots`; the curves' points.

    Each curve starts from the same weights. Curves that are finished are kept: what was stopped or killed goes on
    behind them, and ends in the same curves. Raises ConfigError where the stream has not exactly one task, Stopped
    where a signal asked for an end.
    """
    folder = start_of(config)
    with alone(out := Path(config.out)):
        claim(out, config)
        return _adapt(config, console, out, folder)


def _adapt(config: DictConfig, console: Console, out: Path, folder: Path | None) -> list[dict[str, Any]]:
    if (out / FILE).exists():
        console.print(f"{out} is finished; show it with: continual report {out}", highlight=False)
        return _points(Curve.read(out))
    bench = set_up(config, out)
    if len(bench.stream.tasks) != 1:
        names = ", ".join(t.name for t in bench.stream.tasks)
        raise ConfigError(f"adapt learns one task, and this stream has {len(bench.stream.tasks)}: {names}; pick one, "
                          f"such as stream.tasks=[{bench.stream.tasks[0].name}]")
    bench.load()
    if folder:
        checkpoint.load(folder, bench.model, bench.strategy if config.adapt.rule == "inner" else None)
    task = bench.tokens.task(bench.stream.stages[0])
    track = tracker(config, out)
    with Events(out / "events.jsonl", console, track) as events, Signals() as signals:
        with first():
            settle(config.train.precision, out / "precision.json", bench.model, bench.tokens.some, events.say)
        show_unfit(bench.encoder, events)
        empty = Curve(out, task.name, bench.tests[0].metric, str(folder or "base"), (), config.adapt.rule)
        found = curves(bench, task, empty, events, signals)
    state = {n: collected(t) for n, t in bench.model.net.state_dict().items()} if bench.model.sharded else None
    if leads():
        bench.model.net.save_pretrained(out / "model", state_dict=state)
        bench.model.tokenizer.save_pretrained(out / "model")
        write_whole(out / FILE, json.dumps(found.to_json(), indent=1))  # last: where it is, the rest is whole
        (out / HALF).unlink(missing_ok=True)
        report.write(out)
    return _points(found)


def _points(found: Curve) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = found.to_json()["points"]
    return points


def start_of(config: DictConfig) -> Path | None:
    """The checkpoint to start from, None for the base; `config` takes over the model and data keys of its run.

    With adapt.rule=inner also its strategy, whose inner loop it is.
    """
    inner = config.adapt.rule == "inner"
    if inner and any(part.get("_target_") != PLAIN for part in config.strategy.values()):
        raise ConfigError(f"found strategy={'+'.join(map(str, config.strategy))} beside adapt.rule=inner, which takes "
                          "that of the start's run; leave one of them out")
    if config.adapt.start == "base":
        if inner:
            raise ConfigError("adapt.rule=inner takes the inner loop of the run that prepared the start, and the base "
                              "has none; name a checkpoint, or set adapt.rule=train")
        return None
    path = Path(config.adapt.start)
    if path.is_dir():
        refuse_links_out(path)
    folder = path if (path / "weights.safetensors").exists() else checkpoint.find(path).trained
    source = next((p for p in (path, *path.parents) if (p / "config.yaml").exists()), None)
    if folder is None or source is None:
        raise MissingError(f"adapt.start={path} is neither a run folder with a checkpoint nor one of its checkpoints; "
                           "name a folder made by continual run, or adapt.start=base")
    theirs = read_config(source / "config.yaml")
    if names := build.lacking(theirs.get("strategy")):
        raise ConfigError(f"adapt.start={path}: the strategy {'+'.join(names)} has a part of the model in its memory, "
                          "and the weights alone never answered; start from a run of another strategy, or from "
                          "adapt.start=base")
    take_over(config, source / "config.yaml")
    if inner:
        if wrong := foreign(theirs, source / "config.yaml"):
            raise ConfigError(gathered(wrong))
        config.strategy = theirs.strategy
        build.strategy(config).rule()  # refused before anything that takes long
    return folder


def foreign(theirs: DictConfig, path: Path) -> list[str]:
    """What a run's config.yaml has under strategy that is none of continual's or of an installed package's; raises
    DataError where it has no such key.
    """
    if not isinstance(theirs.get("strategy"), DictConfig):
        raise DataError(f"{path} has no key of strategy, and expected are those of a run; give a folder made by "
                        "continual run")
    known = build.strategies()
    targets = {name: str(part.get("_target_")) if isinstance(part, DictConfig) else "" for name, part
               in theirs.strategy.items()}
    return [f"{path} asks for strategy.{name}._target_={brief(target)}, which is neither one of continual's nor of an "
            "installed package's; only those are built from a run folder" for name, target in targets.items()
            if target not in known]


def take_over(config: DictConfig, path: Path) -> None:
    """Give `config` the model and data keys of a run's config.yaml, which may be anyone's: it names no code to run.

    Raises DataError where it lacks them, ConfigError where it asks for what is none of the registry's constructors or
    for a model's own code.
    """
    theirs = read_config(path)
    if lacking := [key for key in ("model", "data", "stream") if not isinstance(theirs.get(key), DictConfig)]:
        raise DataError(f"{path} has no keys of {', '.join(lacking)}, and expected are those of a run; give a folder "
                        "made by continual run")
    model, stream = theirs.model, theirs.model.get("stream") or theirs.stream
    wrong = [f"{path} asks for {key}._target_={brief(section.get('_target_'))}, which is not one of continual's "
             f"({', '.join(sorted(known))}); only those are built from a run folder"
             for key, section, known in (("model", model, build.registry("model") - build.registry("stream")),
                                         ("stream", stream, build.registry("stream")))
             if str(section.get("_target_")) not in known]
    within = [{k: v for k, v in section.items() if k not in ("_target_", "stream")} for section in (model, stream)]
    if "_target_" in str(within):
        wrong.append(f"{path} asks for a _target_ within model or stream, where nothing is built; remove it")
    if wrong:
        raise ConfigError(gathered(wrong))
    if model.get("trust_remote_code") and not config.model.get("trust_remote_code"):
        raise ConfigError(f"{path} asks to run code that the model {brief(model.get('name'))} brings along; if you "
                          "trust its source, give model=hf model.name=NAME model.trust_remote_code=true")
    with open_dict(config):
        config.model, config.data = model, {**config.data, **theirs.data}
        config.model.seed = model.get("seed", theirs.get("seed", 0))  # what was drawn, no checkpoint need have
        if "stream" in model:  # what a model from scratch was built for
            config.model.stream = stream


def curves(bench: Bench, task: Task[Encoded], empty: Curve, events: Events, signals: Signals) -> Curve:
    """A curve for each draw of each number of shots (null: all training examples); the model is that of the last one.

    A draw is an order of the training examples: the support set of fewer shots is a part of that of more. Curves that
    the folder of the `empty` one holds are not learned anew.
    """
    settings, every, start = bench.config.adapt, len(task.train), snapshot(bench.model)
    shots = dict.fromkeys(every if n is None else min(n, every) for n in settings.shots)
    wanted = [(n, draw) for n in shots for draw in range(settings.draws)]
    kept = agreed((empty.path / HALF).exists())
    points = list(Curve.read(empty.path, HALF).points) if kept else []
    before, done = _scored(bench), {point[:2] for point in points}
    for number, (n, draw) in enumerate(wanted, 1):
        if (n, draw) not in done:
            events.stage = number
            restore(bench.model, start)
            points += _curve(bench, task, n, draw, before, events, signals)
            if leads() and (n, draw) != wanted[-1]:  # whose model is kept with it
                write_whole(empty.path / HALF, json.dumps(replace(empty, points=tuple(points)).to_json(), indent=1))
    return replace(empty, points=tuple(sorted(points)))


def _curve(bench: Bench, task: Task[Encoded], shots: int, draw: int, before: float, events: Events, signals: Signals
           ) -> list[tuple[int, int, int, float]]:
    """Its points, scored `before` training and after the steps of `adapt.at` and the last."""
    settings, points = bench.config.adapt, []
    rng = random.Random(f"{bench.config.seed}/{draw}")
    support = rng.sample(list(task.train), len(task.train))[:shots]

    def measure(step: int, _: Any = None) -> None:
        if step in settings.at or step == settings.steps:
            value = _scored(bench) if step else before
            points.append((shots, draw, step, value))
            events({"event": "score", "shots": shots, "draw": draw, "step": step, "scores": {task.name: value}})
            events.say(f"{task.name}, {shots} shots, draw {draw}, step {step}: {value:.3f}")
        signals.leave(f"in the curve of {shots} shots and draw {draw}, which begins anew", Path(bench.config.out))

    measure(0)
    strategy, recipe = _learner(bench)
    learn(bench.model, replace(task, train=support), strategy, replace(recipe, steps=settings.steps),
          seed=rng.getrandbits(31), log=events, after=measure)
    return points


def _learner(bench: Bench) -> tuple[Strategy, Recipe]:
    """What takes the steps: the configured strategy and optimizer, or the start's own inner loop."""
    if bench.config.adapt.rule == "train":
        return build.strategy(bench.config), bench.recipe
    return bench.strategy.rule(), replace(bench.recipe, optimizer="sgd", lr=1.0, schedule="constant", warmup=0.0,
                                          weight_decay=0.0, clip=None)


def _scored(bench: Bench) -> float:
    bench.model.net.eval()
    value, _ = score(bench.model, bench.tests[0], bench.config.score.batch_size)
    bench.model.net.train()
    return value
