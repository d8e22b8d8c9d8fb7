"""What `continual plan` says before a run, against what the run then takes: executed FLOPs, and peak resident memory.

Three stages of a few steps each, every one of them rehearsed, on models of 1M to 37M, wholly trained and with LoRA.
Peak memory is that above the loaded model, in a process of its own that has taken a step with a far smaller model
before, and whose allocator gives freed memory back at once: what it keeps besides is not the plan's to know.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from benchmarks import works
from benchmarks.common import Row, Step, flops, peaks, row, timed
from continual.data import Encoded, Task
from continual.model import Model
from continual.rehearse import Ghosts, rehearse
from continual.stage import Recipe, learn
from continual.strategy import Strategy
from strategies.anchor import EWC
from strategies.replay import Replay

SHAPES = {"tiny": works.Shape(160, 480, 2, 5, 5, 1024), "3M": works.SHAPES["3M"], "37M": works.SHAPES["37M"]}
STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "naive": Strategy, "replay": lambda: Replay(capacity=0.5), "ewc": lambda: EWC(examples=16),
}
STAGES, ROWS, STEPS = 3, 64, 2
RECIPE = Recipe(lr=1e-3, steps=STEPS, batch_size=24)
SMALLEST = works.Shape(32, 64, 1, 2, 2, 1024)
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # as glibc reads it


def run() -> list[Row]:
    """A row for each model, adapter and strategy."""
    return [measure(shape, adapter, name) for shape in SHAPES for adapter in ("none", "lora") for name in STRATEGIES]


def measure(shape: str, adapter: str, name: str) -> Row:
    """Planned against taken."""
    planned_flops, planned_peak = planned(shape, adapter, name)
    step = taken(shape, adapter, name)
    executed = flops(step)
    os.environ.update(GIVES_BACK)
    peak = peaks({name: (shape, adapter, name)}, fresh, steps=1)[name]
    ratio = {"taken FLOPs": planned_flops / executed, **({"taken memory": planned_peak / peak} if peak else {})}
    return row("plan", f"{shape} {'LoRA' if adapter == 'lora' else 'full'}{works.source()}", name, timed(step), ROWS,
               peak, ratio, planned_bytes=planned_peak)


def planned(shape: str, adapter: str, name: str) -> tuple[float, int]:
    """The FLOPs of all stages, and the peak of memory above the model."""
    ghosts, strategy = Ghosts(), STRATEGIES[name]()
    with ghosts.shapes():
        model = works.model(SHAPES[shape], adapter)
    ghosts.haunt(model.net)
    stages = [rehearse(ghosts, model, task, strategy, RECIPE, steps=STEPS, seed=i)
              for i, task in enumerate(tasks(SHAPES[shape].vocabulary))]
    return sum(s.flops for s in stages), max(max(s.peak, s.end_peak) for s in stages) - stages[0].weights


def taken(shape: str, adapter: str, name: str) -> Step:
    """The stages, of a real model."""
    work = tasks(SHAPES[shape].vocabulary)
    return functools.partial(stages, works.model(SHAPES[shape], adapter), STRATEGIES[name](), work)


def fresh(shape: str, adapter: str, name: str) -> Step:
    """The same in a process that has mapped what every process maps at its first step."""
    works.tokenizer(None)
    stages(works.model(SMALLEST, adapter), STRATEGIES[name](), tasks(SMALLEST.vocabulary))
    return taken(shape, adapter, name)


def stages(model: Model, strategy: Strategy, work: Sequence[Task[Encoded]]) -> None:
    """Learn them all."""
    for i, task in enumerate(work):
        learn(model, task, strategy, RECIPE, seed=i, log=lambda event: None)


def tasks(vocabulary: int) -> list[Task[Encoded]]:
    """Rows of one dataset dealt to the stages, their ids within a vocabulary."""
    rows = [replace(e, ids=tuple(t % vocabulary for t in e.ids)) for e in works.rows("agnews", STAGES * ROWS)]
    names = tuple(f"task {i}" for i in range(STAGES))
    return [Task(name, tuple(replace(e, task=i) for e in rows[i * ROWS : (i + 1) * ROWS]), columns=names)
            for i, name in enumerate(names)]
