"""What a strategy costs beside plain fine-tuning, and whether that grows with the number of tasks.

- Each strategy's step in its third stage against naive's step on the very same examples, LoRA and
  full fine-tuning: "naive time" is the ratio of step times; naive's own row is the noise of that
  ratio. A stage's fixed cost is what its second stage (`continual.training.stage.train_stage`) takes
  beyond its steps: its beginning, its end, and what it sets up.
- After 2, 16 and 64 tasks: the step, and the bytes of the memory as a checkpoint holds it, as
  ratios to 2 tasks. The tasks are parts of one dataset, so that a step of replay reads as many
  tokens however many there were.
"""

from __future__ import annotations

import copy
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from benchmarks import works
from benchmarks.common import ASKED, Row, Step, interleaved, medians, row
from continual.data.types import Encoded, Task
from continual.models.model import Model
from continual.models.weights import weights
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from strategies.ewc import EWC, L2, OnlineEWC
from strategies.multitask import MultiTask
from strategies.replay import Replay

STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "naive": Strategy,
    "l2": L2,
    "ewc": EWC,
    "online_ewc": OnlineEWC,
    "replay": Replay,
    "multitask": MultiTask,
}
EXAMPLES, NEW = 32, 24  # of a step, and those of them that replay leaves to the new task
GROWN = (2, 16, 64)
ROWS = 15  # of each of these tasks
GROWING: Mapping[str, Callable[[], Strategy]] = {
    "ewc": lambda: EWC(num_examples=4),
    "online_ewc": lambda: OnlineEWC(num_examples=4),
    "replay": lambda: Replay(capacity=2 * ROWS),
}


def run() -> list[Row]:
    """Both questions."""
    shape = "0.5B" if ASKED.gpu else "3M"
    rows = works.rows("agnews", max(GROWN) * ROWS)
    found = [
        one
        for adapter in ("lora", "none")
        for name in STRATEGIES
        for one in against_naive(shape, adapter, name, rows, seconds=5)
    ]
    return found + [one for name in GROWING for one in growth(shape, name, rows, GROWN, seconds=6)]


def against_naive(
    shape: str, adapter: str, name: str, rows: Sequence[Encoded], seconds: float
) -> list[Row]:
    """The strategy's row: its step against naive's on the same examples, after two stages, and a
    stage's fixed cost.
    """
    ours, theirs = (made(shape, adapter) for _ in range(2))
    strategy = STRATEGIES[name]()
    tasks = split(rows, 3, len(rows) // 3)
    stage_seconds(ours, tasks[0], strategy)
    fixed = stage_seconds(ours, tasks[1], strategy)
    new = NEW if isinstance(strategy, Replay) else EXAMPLES
    batches = [batch for batch, _ in zip(cycled(tasks[2].train, new), range(64), strict=False)]
    twin = copy.deepcopy(strategy)  # draws what the strategy will draw
    same = [
        twin.add_replay_examples(ours.batch(b)).examples if isinstance(twin, Replay) else b
        for b in batches
    ]
    spent = interleaved(
        {
            name: stepper(ours, strategy, tasks[2], batches),
            "beside": stepper(theirs, Strategy(), tasks[2], same),
        },
        seconds=seconds,
        warmup=2,
        least=10,
    )
    took = medians(spent)
    work = f"{shape} {'LoRA' if adapter == 'lora' else 'full'}, third task{works.source()}"
    return [
        row(
            "overhead",
            work,
            name,
            took[name],
            EXAMPLES,
            None,
            {"naive time": took[name] / took["beside"]},
            stage_fixed_s=fixed,
        )
    ]


def growth(
    shape: str, name: str, rows: Sequence[Encoded], counts: Sequence[int], seconds: float
) -> list[Row]:
    """A row for each number of tasks that the strategy has been through."""
    tasks = split(rows, max(counts), ROWS)
    arms: dict[int, Step] = {}
    kept: dict[int, int] = {}
    for count in counts:
        model, strategy = made(shape), GROWING[name]()
        for task in tasks[:count]:
            strategy.end(model, task)
            wander(model)
        kept[count] = size(strategy)
        new = NEW if isinstance(strategy, Replay) else EXAMPLES
        arms[count] = stepper(model, strategy, tasks[-1], cycled(rows, new))
    took = medians(
        interleaved({str(c): step for c, step in arms.items()}, seconds=seconds, warmup=2)
    )
    least = counts[0]
    return [
        row(
            "overhead",
            f"{shape} LoRA, after {c} tasks{works.source()}",
            name,
            took[str(c)],
            EXAMPLES,
            None,
            {
                f"{least} tasks time": took[str(c)] / took[str(least)],
                f"{least} tasks memory": kept[c] / kept[least],
            },
            memory_bytes=kept[c],
        )
        for c in counts
    ]


def made(shape: str, adapter: str = "lora") -> Model:
    """The model that every arm begins with."""
    return works.model(works.SHAPES[shape], adapter, bf16=ASKED.gpu, device=ASKED.device.type)


def split(rows: Sequence[Encoded], tasks: int, each: int) -> list[Task[Encoded]]:
    """The rows dealt to so many tasks."""
    names = tuple(f"task {i}" for i in range(tasks))
    return [
        Task(
            names[i],
            tuple(replace(e, task_index=i) for e in rows[i * each : (i + 1) * each]),
            task_names=names,
        )
        for i in range(tasks)
    ]


def cycled(rows: Sequence[Encoded], n: int) -> itertools.cycle[Sequence[Encoded]]:
    """The rows in batches of n, over and over."""
    return itertools.cycle([rows[i : i + n] for i in range(0, len(rows) - n + 1, n)])


def stepper(
    model: Model, strategy: Strategy, task: Task[Encoded], batches: Iterable[Sequence[Encoded]]
) -> Step:
    """A step of the stage loop on one of the batches after another."""
    return works.stepper(model, strategy.begin(model, task), strategy.backward, batches)


def stage_seconds(model: Model, task: Task[Encoded], strategy: Strategy, steps: int = 5) -> float:
    """What one stage of a few steps takes beyond them."""
    new = NEW if isinstance(strategy, Replay) else EXAMPLES
    began, at = time.perf_counter(), []
    train_stage(
        model,
        task,
        strategy,
        Recipe(lr=1e-3, steps=steps, batch_size=new),
        seed=0,
        log_event=lambda event: None,
        on_step=lambda step, _: at.append(time.perf_counter()),
    )
    each = statistics.median(b - a for a, b in itertools.pairwise(at))
    return max(0.0, time.perf_counter() - began - steps * each)


@torch.no_grad()
def wander(model: Model) -> None:
    """Move the weights a little, as a stage would."""
    for w in weights(model).values():
        w.add_(torch.randn_like(w), alpha=1e-3)


def size(strategy: Strategy) -> int:
    """The bytes of the strategy's memory in a checkpoint."""
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    return file.tell()
