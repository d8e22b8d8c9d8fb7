"""A run: for each task of the stream, learn it, score all tasks, write the row of the matrix."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from continual import build, checkpoint, precision, report
from continual.data import Stream
from continual.errors import ConfigError, DataError
from continual.events import Events
from continual.files import file_name, write_whole
from continual.matrix import Matrix
from continual.model import Model
from continual.score import Test, prepare, score
from continual.stage import Recipe, learn
from continual.strategy import Strategy
from continual.template import Encoder
from continual.tokens import Tokens, tokenise


@dataclass
class Bench:
    """All that a run works with."""

    config: DictConfig
    stream: Stream
    model: Model
    strategy: Strategy
    recipe: Recipe
    encoder: Encoder
    tests: list[Test]


def set_up(config: DictConfig) -> Bench:
    """Build what the configuration names; raises ContinualError for whatever is wrong with it."""
    build.check(config)
    strategy, recipe = build.strategy(config), build.recipe(config)  # before anything that takes long
    stream = build.stream(config)
    model = build.model(config, stream)
    encoder = build.encoder(config, model)
    s = config.score
    tests = [prepare(t, encoder, s.split, i, metric=s.metric, max_new_tokens=s.max_new_tokens, limit=s.limit,
                     how=s.how) for i, t in enumerate(stream.tasks)]
    return Bench(config, stream, model, strategy, recipe, encoder, tests)


def run(config: DictConfig, console: Console) -> Matrix:
    """Run or resume in `config.out`, and return the matrix.

    Every finished stage is kept: a run that was killed continues after its last one and ends in the same matrix.
    """
    out = Path(config.out)
    claim(out, config)
    if (done := finished(out)) is not None:
        console.print(f"{out} is finished; show it with: continual report {out}", highlight=False)
        return done
    bench = set_up(config)
    tokens = tokenised(out, bench)
    with Events(out / "events.jsonl", console) as events:
        precision.settle(config.train.precision, out / "precision.json", bench.model, tokens.some, events.say)
        matrix = resume(out, bench, events)
        if not matrix.stages:
            matrix = add_row(out, bench, matrix, "base", {}, events)
        for number, stage in enumerate(bench.stream.stages, 1):
            if number >= len(matrix.stages):
                events.stage = number
                task = tokens.task(stage)
                show_unfit(bench.encoder, events)
                seed = stage_seed(config.seed, number)
                spent = learn(bench.model, task, bench.strategy, bench.recipe, seed=seed, log=events)
                matrix = add_row(out, bench, matrix, stage.name, spent, events)
    report.write(out)
    (out / "finished").touch()
    return matrix


def tokenised(out: Path, bench: Bench) -> Tokens:
    """What all stages learn; raises DataError for rows that cannot be learned, before hours of other stages."""
    return tokenise(out / "tokens.safetensors", bench.encoder, bench.stream, dev=bench.recipe.patience is not None)


def show_unfit(encoder: Encoder, events: Events) -> None:
    """Count and show what was shortened, or left out by data.on_unfit=skip, since the last time."""
    counts = {"skipped": len(encoder.skipped), "shortened": len(encoder.shortened)}
    if any(counts.values()):
        events({"event": "data", **counts})
        events.say(f"inputs shortened to fit: {counts['shortened']}; examples skipped: {counts['skipped']}"
                   + (f" ({', '.join(encoder.skipped[:5])} ...)" if encoder.skipped else ""))
        encoder.skipped.clear()
        encoder.shortened.clear()


def stage_seed(seed: int, number: int) -> int:
    """Each stage's randomness starts anew from the run's seed, so that a resumed stage is the same stage."""
    return random.Random(f"{seed}/{number}").getrandbits(31)


def claim(out: Path, config: DictConfig) -> None:
    """Write the configuration, or check that the folder's run has the same one; raises ConfigError naming the keys."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder, new or of an unfinished run")
    path = out / "config.yaml"
    text = OmegaConf.to_yaml(config, resolve=True)
    begun = any((out / name).exists() for name in ("events.jsonl", "matrix.json"))
    if not path.exists() or not begun:  # a run that was refused may be given again, put right
        write_whole(path, text)
        return
    before, now = (flat(OmegaConf.to_container(c)) for c in (read_config(path), OmegaConf.create(text)))
    differ = [f"{k}: {before.get(k, 'absent')} there, {now.get(k, 'absent')} now"
              for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k != "out"]
    if differ:
        raise ConfigError(f"{out} holds a run with another configuration; give it the same keys to resume, or another "
                          "out=\n  " + "\n  ".join(differ))


def read_config(path: Path) -> DictConfig:
    """The config.yaml of a run folder; raises DataError where it is damaged."""
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise ValueError("it holds no mapping of keys")
        return config
    except (YAMLError, OmegaConfBaseException, ValueError) as e:
        raise DataError(f"{path} cannot be read: {str(e).splitlines()[0]}; restore it, or give another folder") from e


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else str(key)).items()}


def finished(out: Path) -> Matrix | None:
    """The matrix of a run that came to its end."""
    return Matrix.load(out / "matrix.json") if (out / "finished").exists() else None


def resume(out: Path, bench: Bench, events: Events) -> Matrix:
    """The matrix so far, with model and strategy as they were after its last row; an empty one at the start."""
    newest = checkpoint.latest(out)
    if newest is not None:
        matrix = checkpoint.load(newest, bench.model, bench.strategy)
        matrix.save(out / "matrix.json")  # of which the last row was not yet written if the end came in between
        events.say(f"resuming {out} after stage {len(matrix.stages) - 1}, {matrix.stages[-1]}")
    elif (out / "matrix.json").exists():
        matrix = Matrix.load(out / "matrix.json")
    else:
        matrix = empty(bench)
    events.stage = len(matrix.stages)
    events({"event": "start"})
    return matrix


def empty(bench: Bench) -> Matrix:
    """The matrix before its first row."""
    stream, tests = bench.stream, bench.tests
    names = "+".join(map(str, bench.config.strategy))
    return Matrix(stream.name, stream.order, names, bench.config.seed, tuple(t.task for t in tests),
                  {t.task: t.metric for t in tests}, (), (), tuple(len(t.examples) for t in tests))


def add_row(out: Path, bench: Bench, matrix: Matrix, stage: str, spent: Mapping[str, float], events: Events) -> Matrix:
    """Score all tasks, and keep the row, the predictions and, after training, the checkpoint."""
    number, began = len(matrix.stages), time.perf_counter()
    row = score_all(out / "predictions" / f"stage-{number:02d}", bench, events)
    spent = {**spent, "score_seconds": time.perf_counter() - began}
    matrix = replace(matrix.with_row(stage, row), cost=add_costs(matrix.cost, spent))
    events({"event": "score", "seconds": spent["score_seconds"], "scores": dict(zip(matrix.tasks, row, strict=True))})
    if number:
        folder = checkpoint.save(out / "checkpoints" / f"stage-{number:02d}", bench.model, bench.strategy, matrix)
        events({"event": "checkpoint", "bytes": checkpoint.size(folder),
                "memory_bytes": checkpoint.size(folder, "memory.*")})
    matrix.save(out / "matrix.json")
    events.say(f"stage {number}/{len(bench.stream.stages)} {stage}: average {sum(row) / len(row):.3f}"
               + "".join(f", {name} {value:.3f}" for name, value in zip(matrix.tasks, row, strict=True)))
    return matrix


def score_all(folder: Path, bench: Bench, events: Events) -> list[float]:
    """Every task's score; every answer is written with its mark."""
    row = []
    for done, test in enumerate(bench.tests):
        events.bar("scoring", len(bench.tests), done, test.task)
        bench.strategy.route(bench.model, test.task)
        value, predictions = score(bench.model, test, bench.config.score.batch_size)
        lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)
        write_whole(folder / f"{file_name(test.task)}.jsonl", lines)
        row.append(value)
    events.clear()
    return row


def add_costs(before: Mapping[str, float], spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds, steps and tokens add up over stages; the peak of memory is the process's so far."""
    total = {k: before.get(k, 0.0) + spent.get(k, 0.0) for k in ("train_seconds", "score_seconds", "steps", "tokens")}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {**total, "seconds": total["train_seconds"] + total["score_seconds"],
            "peak_bytes": max(before.get("peak_bytes", 0.0), float(peak))}
