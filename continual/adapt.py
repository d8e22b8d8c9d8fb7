"""Learn one new instruction type from a checkpoint or a base model, and draw its curve over steps and shots."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict
from rich.console import Console

from continual import build, checkpoint, report
from continual.data import Encoded, Task
from continual.errors import ConfigError, MissingError
from continual.events import Events
from continual.files import write_whole
from continual.interrupt import alone
from continual.parallel import first, leads
from continual.precision import settle
from continual.run import Bench, claim, read_config, set_up, show_unfit, stage_seed
from continual.score import score
from continual.stage import learn
from continual.weights import restore, snapshot


def adapt(config: DictConfig, console: Console) -> list[dict[str, Any]]:
    """Fine-tune on the stream's one task for `adapt.steps`, once for each of `adapt.shots`; returns the curve's points.

    Each curve starts from the same weights. Raises ConfigError where the stream has not exactly one task.
    """
    folder = start_of(config)
    with alone(out := Path(config.out)):
        claim(out, config)
        return _adapt(config, console, out, folder)


def _adapt(config: DictConfig, console: Console, out: Path, folder: Path | None) -> list[dict[str, Any]]:
    if (out / "curve.json").exists():
        console.print(f"{out} is finished; show it with: continual report {out}", highlight=False)
        return list(json.loads((out / "curve.json").read_text("utf-8"))["points"])
    bench = set_up(config, out)
    if len(bench.stream.tasks) != 1:
        names = ", ".join(t.name for t in bench.stream.tasks)
        raise ConfigError(f"adapt learns one task, and this stream has {len(bench.stream.tasks)}: {names}; pick one, "
                          f"such as stream.tasks=[{bench.stream.tasks[0].name}]")
    if folder:
        checkpoint.load(folder, bench.model)
    task = bench.tokens.task(bench.stream.stages[0])
    with Events(out / "events.jsonl", console) as events:
        with first():
            settle(config.train.precision, out / "precision.json", bench.model, bench.tokens.some, events.say)
        show_unfit(bench.encoder, events)
        points = curves(bench, task, events)
    curve = {"schema": 1, "task": task.name, "metric": bench.tests[0].metric, "start": str(folder or "base"),
             "points": points}
    if leads():
        bench.model.net.save_pretrained(out / "model")
        bench.model.tokenizer.save_pretrained(out / "model")
        write_whole(out / "curve.json", json.dumps(curve, indent=1))  # last: where it is, the rest is whole
        report.write(out)
    return points


def start_of(config: DictConfig) -> Path | None:
    """The checkpoint to start from, None for the base; `config` takes over the model and data keys of its run."""
    if config.adapt.start == "base":
        return None
    path = Path(config.adapt.start)
    folder = path if (path / "weights.safetensors").exists() else checkpoint.find(path).trained
    source = next((p for p in (path, *path.parents) if (p / "config.yaml").exists()), None)
    if folder is None or source is None:
        raise MissingError(f"adapt.start={path} is neither a run folder with a checkpoint nor one of its checkpoints; "
                           "name a folder made by continual run, or adapt.start=base")
    theirs = read_config(source / "config.yaml")
    with open_dict(config):
        config.model, config.data = theirs.model, theirs.data
        if "stream" in theirs.model:  # what a model from scratch was built for
            config.model.stream = theirs.model.stream or theirs.stream
    for key, section in (("model", config.model), ("stream", config.model.get("stream") or {})):
        if section and not str(section.get("_target_")).startswith(("continual.", "streams.")):
            raise ConfigError(f"{source}/config.yaml asks for {key}._target_={section.get('_target_')}, which is not "
                              "one of continual's; only those are built from a run folder")
    return folder


def curves(bench: Bench, task: Task[Encoded], events: Events) -> list[dict[str, Any]]:
    """Score after each of `adapt.at` steps, for each number of shots (null: all training examples)."""
    settings, start = bench.config.adapt, snapshot(bench.model)
    test, points = bench.tests[0], []
    recipe = replace(bench.recipe, steps=settings.steps)
    for shots in settings.shots:
        n = len(task.train) if shots is None else min(shots, len(task.train))
        chosen = random.Random(bench.config.seed).sample(list(task.train), n)
        restore(bench.model, start)

        def measure(step: int, _: Any = None, n: int = n) -> None:
            if step in settings.at or step == settings.steps:
                bench.model.net.eval()
                value, _ = score(bench.model, test, bench.config.score.batch_size)
                bench.model.net.train()
                points.append({"shots": n, "step": step, "score": value})
                events({"event": "score", "shots": n, "step": step, "scores": {task.name: value}})
                events.say(f"{task.name}, {n} shots, step {step}: {value:.3f}")

        measure(0)
        learn(bench.model, replace(task, train=chosen), build.strategy(bench.config), recipe,
              seed=stage_seed(bench.config.seed, n), log=events, after=measure)
    return points
