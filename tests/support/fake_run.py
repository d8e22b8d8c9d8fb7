"""Run folders with invented numbers, for tests of the report only: the shapes of real ones, in
milliseconds.
"""

from __future__ import annotations

import json
import math
import random

from continual.io.atomic import task_file_name
from continual.results.matrix import Matrix

SKILLS = ("reverse", "third_word", "first_and_third", "swap_ends", "maximum", "count_vowels")
FORGETTING = {
    "naive": 0.75,
    "ewc": 0.4,
    "replay": 0.12,
    "multitask": 0.1,
    "maml": 0.16,
}  # of what is above chance, a stage
TEST_SIZE = 20  # of each task's test


def make_fake_matrix(
    strategy="naive", seed=0, tasks=SKILLS, finished=True, joint=False, order="default"
):
    rng = random.Random(f"{strategy}{seed}{joint}")
    matrix = Matrix(
        stream="skills",
        order=order,
        strategy=strategy,
        seed=seed,
        tasks=tuple(tasks),
        stages=(),
        scores=(),
        metrics=dict.fromkeys(tasks, "exact_match"),
        counts=(TEST_SIZE,) * len(tasks),
    )
    scores = {task: rng.uniform(0, 0.1) for task in tasks}
    matrix = matrix.with_row("base", list(map(_round_to_examples, scores.values())))
    for stage in ["joint"] if joint else tasks[: len(tasks) if finished else 3]:
        for task in tasks:
            kept = 1 - FORGETTING.get(strategy, 0.3) * rng.uniform(0.6, 1.2)
            learned = task == stage or joint
            scores[task] = (
                rng.uniform(0.93, 1) if learned else 0.04 + max(0, scores[task] - 0.04) * kept
            )
        matrix = matrix.with_row(stage, list(map(_round_to_examples, scores.values())))
    steps = 95 * (len(matrix.stages) - 1)
    return Matrix(
        **{
            **matrix.__dict__,
            "cost": {
                "seconds": 0.24 * steps,
                "train_seconds": 0.2 * steps,
                "score_seconds": 0.04 * steps,
                "tokens": 512 * steps,
                "peak_bytes": 612_000_000,
                "memory_bytes": 48_000,
            },
        }
    )


def _round_to_examples(score):
    """The nearest score that so many examples can have."""
    return round(TEST_SIZE * score) / TEST_SIZE


def write_fake_run(
    folder, strategy="naive", seed=0, settings=None, notes=False, wrong_text="last first", **more
):
    """Write a run folder; `says` is part of every wrong answer and prompt, to see what a report
    does with it.
    """
    matrix = make_fake_matrix(strategy, seed, **more)
    folder.mkdir(parents=True)
    matrix.save(folder / "matrix.json")
    config = {
        "seed": seed,
        "out": str(folder),
        "strategy": {"_target_": f"strategies.{strategy}", **(settings or {})},
        "stream": {"name": "skills", "order": matrix.order, "seed": seed},
        "train": {"lr": 0.001, "epochs": 5},
    }
    (folder / "config.yaml").write_text(json.dumps(config, indent=1))  # JSON is YAML
    (folder / "events.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in _fake_events(matrix, notes))
    )
    for number, stage in enumerate(matrix.stages):
        _write_predictions(
            folder / "predictions" / f"stage-{number:02d}", matrix, stage, wrong_text
        )
    return folder


def _fake_events(matrix, notes):
    rng = random.Random(matrix.seed)
    yield {"event": "data", "time": 0, "task": matrix.tasks[0], "skipped": 2, "shortened": 7}
    yield {"event": "score", "time": 0, "stage": 0, "seconds": 3.2, "scores": {}}
    for i, stage in enumerate(matrix.stages[1:], 1):
        for step in range(5, 96, 5):
            shares = {
                f"weight/{t}": round(1 / (1 + i) + rng.uniform(-0.02, 0.02), 3)
                for t in matrix.tasks[:i]
            }
            yield {
                "event": "step",
                "time": step,
                "stage": i,
                "task": stage,
                "step": step,
                "steps": 95,
                "lr": 0.001,
                "loss": 0.05 + 2.2 * math.exp(-step / 22) * rng.uniform(0.85, 1.15),
                "tokens": 512 * step,
                "seconds": 0.2 * step,
                "notes": shares if notes else {},
            }
        yield {
            "event": "stage",
            "time": 95,
            "stage": i,
            "task": stage,
            "seconds": 19.0,
            "steps": 95,
            "tokens": 512 * 95,
        }
        yield {
            "event": "checkpoint",
            "time": 97,
            "stage": i,
            "bytes": 9_000_000,
            "memory_bytes": 8000 * i,
        }
        yield {"event": "score", "time": 99, "stage": i, "seconds": 3.4, "scores": {}}


def _write_predictions(folder, matrix, stage, says):
    folder.mkdir(parents=True)
    for j, task in enumerate(matrix.tasks):
        right = round(TEST_SIZE * matrix.scores[matrix.stages.index(stage)][j])
        rows = [
            {
                "id": f"{task}/test/{i}",
                "prompt": f"Give the words in another order ({task}). {says}\nred {i} blue",
                "answer": f"blue {i} red" if i < right else f"red {says}",
                "references": [f"blue {i} red"],
                "score": float(i < right),
            }
            for i in range(TEST_SIZE)
        ]
        (folder / f"{task_file_name(task)}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


def write_fake_adaptation(folder, start="base", rate=0.02):
    """Write an adapt folder whose score rises with steps and shots."""
    folder.mkdir(parents=True)
    points = [
        {
            "shots": shots,
            "step": step,
            "score": round(1 - math.exp(-rate * step * math.log10(shots) / 2), 4),
        }
        for shots in (16, 64, 256)
        for step in (0, 5, 10, 20, 40, 80)
    ]
    curve = {
        "schema": 1,
        "task": "rotate",
        "metric": "exact_match",
        "start": start,
        "points": points,
    }
    (folder / "curve.json").write_text(json.dumps(curve))
    (folder / "config.yaml").write_text("task: rotate\nadapt:\n  steps: 80\n")
    return folder
