"""Whether to compute in bfloat16: measured on the machine at hand, once a run, and kept beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from continual.data.types import Encoded
from continual.errors import DataError
from continual.io.atomic import write_atomically
from continual.io.untrusted import load_json
from continual.models.loss import accumulate, nll
from continual.models.model import Model

MIN_SPEEDUP = 1.1  # how much faster bf16 must be than fp32, for what it rounds away
MAX_ROWS, MAX_ROUNDS = 32, 3
MAX_SECONDS = 0.5  # seconds after which no further round begins
MIN_PASS_SECONDS = (
    0.05  # seconds of a pass that can be told from the clock's and the system's noise
)


def choose_precision(
    precision: str,
    path: Path,
    model: Model,
    sample_rows: Callable[[int], Sequence[Encoded]],
    print_line: Callable[[str], None],
) -> None:
    """With train.precision=auto, let `model` compute in what `path` says, or else in what measures
    faster on `rows`.

    `rows` gives at most so many. Raises DataError where `path` says neither fp32 nor bf16.
    """
    if precision != "auto":
        return
    if path.exists():
        chosen = _load_choice(path)
        print_line(f"train.precision=auto: {chosen}, as this run began")
    else:
        ratio = measure_bf16_speedup(model, sample_rows(MAX_ROWS))
        chosen = "bf16" if ratio >= MIN_SPEEDUP else "fp32"
        write_atomically(path, json.dumps({"precision": chosen, "bf16_speed": round(ratio, 3)}))
        print_line(
            f"train.precision=auto: {chosen}; bf16 is {ratio:.2f} times as fast as fp32 here"
        )
    model.bf16 = chosen == "bf16"


def _load_choice(path: Path) -> str:
    try:
        chosen = load_json(path)["precision"]
        if chosen in ("fp32", "bf16"):
            return str(chosen)
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f'{path} does not say in which precision the run began; write {{"precision": "fp32"}} or '
        '{"precision": "bf16"} into it, or give another out='
    )


def measure_bf16_speedup(model: Model, rows: Sequence[Encoded]) -> float:
    """How many times as fast as in fp32 a step's forward and backward pass is in bf16; `model` is
    left as it was.

    It takes as few rows as can be measured, so that it is over in well under a second unless a
    single one takes longer.
    """
    bf16, n, began = model.bf16, 1, time.perf_counter()
    model.net.train()
    time_training_pass(model, rows[:1], bf16=False)  # a first pass builds what later ones use
    while n < len(rows) and time_training_pass(model, rows[:n], bf16=False) < MIN_PASS_SECONDS:
        n *= 2
    time_training_pass(model, rows[:n], bf16=True)
    spent: list[list[float]] = []
    while not spent or (len(spent) < MAX_ROUNDS and time.perf_counter() - began < MAX_SECONDS):
        spent.append([time_training_pass(model, rows[:n], bf16=how) for how in (False, True)])
    model.bf16 = bf16
    model.net.zero_grad()
    model.net.eval()
    full, half = (min(times) for times in zip(*spent, strict=True))
    return float(full / half)


def time_training_pass(model: Model, rows: Sequence[Encoded], *, bf16: bool) -> float:
    """What one forward and backward pass takes."""
    wait = getattr(torch, model.layout.device.type).synchronize
    model.bf16 = bf16
    wait()
    began = time.perf_counter()
    accumulate(nll, model, model.batch(rows).micro_batches())
    wait()
    return time.perf_counter() - began
