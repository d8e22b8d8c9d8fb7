"""Choose between fp32 and bf16 by measuring both on this machine, once per run."""

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

MIN_SPEEDUP = 1.1  # how much faster than fp32 bf16 must be to be worth its rounding errors
MAX_ROWS = 32
MAX_ROUNDS = 3
MAX_SECONDS = 0.5  # no further round begins after this time
MIN_PASS_SECONDS = 0.05  # a shorter pass cannot be told from the noise of clock and system


def choose_precision(
    precision: str,
    path: Path,
    model: Model,
    sample_rows: Callable[[int], Sequence[Encoded]],
    print_line: Callable[[str], None],
) -> None:
    """With train.precision=auto, set the model to the faster of fp32 and bf16.

    The choice is stored in the file `path`, and used again if it is there. `sample_rows(n)` gives
    at most n rows to measure on. Raises DataError if `path` holds neither fp32 nor bf16.
    """
    if precision != "auto":
        return
    if path.exists():
        choice = _load_choice(path)
        print_line(f"train.precision=auto: {choice}, as this run began")
    else:
        ratio = measure_bf16_speedup(model, sample_rows(MAX_ROWS))
        choice = "bf16" if ratio >= MIN_SPEEDUP else "fp32"
        write_atomically(path, json.dumps({"precision": choice, "bf16_speed": round(ratio, 3)}))
        print_line(
            f"train.precision=auto: {choice}; bf16 is {ratio:.2f} times as fast as fp32 here"
        )
    model.bf16 = choice == "bf16"


def _load_choice(path: Path) -> str:
    """Return the precision in the file; raise DataError if there is none."""
    try:
        choice = load_json(path)["precision"]
        if choice in ("fp32", "bf16"):
            return str(choice)
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f'{path} does not say in which precision the run began; write {{"precision": "fp32"}} or '
        '{"precision": "bf16"} into it, or give another out='
    )


def measure_bf16_speedup(model: Model, rows: Sequence[Encoded]) -> float:
    """Return the speed of bf16 divided by that of fp32, for a forward and a backward pass.

    Uses as few rows as can be timed, so that it takes well under a second unless a single row takes
    longer. The model is left as it was, in eval mode.
    """
    precision_before = model.bf16
    started = time.perf_counter()
    model.net.train()
    time_training_pass(
        model, rows[:1], bf16=False
    )  # warm-up: the first pass allocates and compiles

    n = 1
    while n < len(rows) and time_training_pass(model, rows[:n], bf16=False) < MIN_PASS_SECONDS:
        n *= 2
    time_training_pass(model, rows[:n], bf16=True)

    fp32_seconds: list[float] = []
    bf16_seconds: list[float] = []
    while len(fp32_seconds) < MAX_ROUNDS:
        if fp32_seconds and time.perf_counter() - started >= MAX_SECONDS:
            break
        fp32_seconds.append(time_training_pass(model, rows[:n], bf16=False))
        bf16_seconds.append(time_training_pass(model, rows[:n], bf16=True))

    model.bf16 = precision_before
    model.net.zero_grad()
    model.net.eval()
    return min(fp32_seconds) / min(bf16_seconds)


def time_training_pass(model: Model, rows: Sequence[Encoded], *, bf16: bool) -> float:
    """Return the seconds of one forward and backward pass."""
    synchronize = getattr(torch, model.layout.device.type).synchronize
    model.bf16 = bf16
    synchronize()
    started = time.perf_counter()
    accumulate(nll, model, model.batch(rows).micro_batches())
    synchronize()
    return time.perf_counter() - started
