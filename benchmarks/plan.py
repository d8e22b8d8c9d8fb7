"""What `continual plan` says before a run, against what the run then takes.

Three stages of two steps each, every one of them rehearsed, on models of 1M to 37M, wholly trained
and with LoRA. A ratio is what was planned to what was taken: FLOPs as they are executed; the peak
of resident memory above the loaded model; the tensors that come free when the strategy is let go;
the files of a checkpoint; and seconds, planned at 40 % of the speed of a large matrix product, as
`plan.flops_utilization` assumes. The buffer's row is the memory of Python objects that comes free with a
strategy that remembers half of some thousand rows.

Each arm runs in a process of its own that has learned with a far smaller model before, and whose
allocator gives freed memory back at once: what a process maps at its first step, or keeps, is not
the plan's to know.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import works
from benchmarks.common import Row, apart, flops, peak, row
from continual.data.types import Encoded, Task
from continual.models.model import Model
from continual.results.matrix import Matrix
from continual.runs.plan import measure_flops_per_second
from continual.runs.rehearse import CostCounterMode, StageCost, rehearse
from continual.strategy.interface import Strategy
from continual.training import checkpoint
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from strategies.ewc import EWC
from strategies.replay import Replay

SHAPES = {
    "tiny": works.Shape(160, 480, 2, 5, 5, 1024),
    "3M": works.SHAPES["3M"],
    "37M": works.SHAPES["37M"],
}
STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "naive": Strategy,
    "replay": lambda: Replay(capacity=0.5),
    "ewc": lambda: EWC(num_examples=8),
}
STAGES, STEPS, ROWS, MANY = 3, 2, 24, 330
RECIPE = Recipe(lr=1e-3, steps=STEPS, batch_size=12)
SHARE = 0.4
SMALLEST = works.Shape(32, 64, 1, 2, 2, 1024)
TRIM, MMAP, SMALL = (
    -1,
    -3,
    65536,
)  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and what it is to keep


@dataclass(frozen=True)
class Taken:
    """What the stages took; bytes, but for FLOPs and seconds. `peak` is None where the system does
    not tell.
    """

    flops: int
    seconds: float
    peak: int | None
    strategy: int
    disk: int


def run() -> list[Row]:
    """A row for each model, adapter and strategy, and one for a buffer."""
    speed = measure_flops_per_second()
    return [
        *(
            measure(shape, adapter, name, speed)
            for shape in SHAPES
            for adapter in ("none", "lora")
            for name in STRATEGIES
        ),
        measure_buffer(),
    ]


def measure(shape: str, adapter: str, name: str, speed: float) -> Row:
    """Planned against taken; `speed` is that of a large matrix product, in FLOP/s."""
    stages, taken = (
        planned(shape, adapter, name),
        apart({"": (take, shape, adapter, name)}, __name__)[""],
    )
    last, count = stages[-1], sum(s.total_flops for s in stages)
    most = max(max(s.peak_bytes, s.end_peak_bytes) for s in stages) - last.weight_bytes
    ratio = {
        "FLOPs": count / taken.flops,
        **({"memory": most / taken.peak} if taken.peak else {}),
        **({"strategy": last.strategy_bytes / taken.strategy} if taken.strategy else {}),
        "disk": (last.weight_disk_bytes + last.memory_disk_bytes) / taken.disk,
        "seconds": count / (speed * SHARE) / taken.seconds,
    }
    return row(
        "plan",
        f"{shape} {'LoRA' if adapter == 'lora' else 'full'}{works.source()}",
        name,
        taken.seconds,
        STAGES * STEPS * RECIPE.batch_size,
        taken.peak,
        ratio,
        planned_bytes=most,
        strategy_bytes=taken.strategy,
    )


def measure_buffer() -> Row:
    """The last stage's buffer, planned against taken."""
    told = planned("tiny", "lora", "replay", MANY)[-1].buffer_bytes
    taken, seconds = apart({"": (take_buffer,)}, __name__)[""]
    return row(
        "plan",
        f"buffer of {STAGES * MANY // 2:,} rows{works.source()}",
        "replay",
        seconds,
        STAGES * STEPS * RECIPE.batch_size,
        taken,
        {"memory": told / taken},
        planned_bytes=told,
    )


def planned(shape: str, adapter: str, name: str, rows: int = ROWS) -> list[StageCost]:
    """What the plan makes of every stage; `strategy` is what is held once the last one is over."""
    ghosts, strategy = CostCounterMode(), STRATEGIES[name]()
    with ghosts.meta_device():
        model = works.model(SHAPES[shape], adapter)
    ghosts.convert_to_fake(model.net)
    return [
        rehearse(ghosts, model, task, strategy, RECIPE, steps=STEPS, seed=i)
        for i, task in enumerate(tasks(SHAPES[shape].vocabulary, rows))
    ]


def take(shape: str, adapter: str, name: str) -> Taken:
    """The stages of a real model, twice: as they are, and with their FLOPs counted."""
    warm(adapter, name)
    model, held, seconds = works.model(SHAPES[shape], adapter), [STRATEGIES[name]()], list[float]()
    most = peak(
        lambda: lambda: seconds.append(learn_all(model, held[0], SHAPES[shape].vocabulary)), (), 1
    )
    matrix = Matrix("planned", "given", name, 0, ("task 0",), {"task 0": "exact_match"}, (), ())
    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoint.save(Path(folder) / "stage-03", model, held[0], matrix)
        disk = checkpoint.size_bytes(saved, "weights.*") + checkpoint.size_bytes(saved, "memory.*")
    before = alive()
    held.clear()
    strategy = before - alive()
    counted = flops(lambda: learn_all(model, STRATEGIES[name](), SHAPES[shape].vocabulary))
    return Taken(counted, seconds[0], most, strategy, disk)


def take_buffer() -> tuple[int, float]:
    """The bytes of Python objects that come free with the strategy, and the seconds of the stages."""
    warm("lora", "replay")
    model, held = works.model(SHAPES["tiny"], "lora"), [STRATEGIES["replay"]()]
    tracemalloc.start()
    seconds = learn_all(model, held[0], SHAPES["tiny"].vocabulary, MANY)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    held.clear()
    gc.collect()
    return before - tracemalloc.get_traced_memory()[0], seconds


def alive() -> int:
    """The bytes of all tensors there are."""
    gc.collect()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if issubclass(type(t), torch.Tensor)
    }  # isinstance would wake what is lazy
    return sum(held.values())


def warm(adapter: str, name: str) -> None:
    """Map what every process maps at its first step; from here on freed memory is given back."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(TRIM, SMALL)
        ctypes.CDLL(None).mallopt(MMAP, SMALL)
    works.tokenizer(None)
    learn_all(works.model(SMALLEST, adapter), STRATEGIES[name](), SMALLEST.vocabulary)


def learn_all(model: Model, strategy: Strategy, vocabulary: int, rows: int = ROWS) -> float:
    """The seconds of all stages; a task's rows are let go with it."""
    return sum(
        train_stage(model, task, strategy, RECIPE, seed=i, log_event=lambda event: None)[
            "train_seconds"
        ]
        for i, task in enumerate(tasks(vocabulary, rows))
    )


def tasks(vocabulary: int, rows: int) -> Iterator[Task[Encoded]]:
    """Rows of one dataset for each stage, their ids within a vocabulary."""
    names = tuple(f"task {i}" for i in range(STAGES))
    for i, name in enumerate(names):
        made: Sequence[Encoded] = works.rows("agnews", STAGES * rows)[i::STAGES]
        yield Task(
            name,
            tuple(replace(e, task_index=i, ids=tuple(t % vocabulary for t in e.ids)) for e in made),
            task_names=names,
        )
