"""Measure what each strategy stores and what its step costs; write docs/strategies.md.

`python -m benchmarks.strategies [NAME ...] [--texts] [--to PATH]`. What a strategy stores and costs
as a formula, and its source, come from its class and configuration; when to use it from
benchmarks/families.py. The rest is measured on the embedded stream and its small model, after five
short stages and at the end of a sixth: the bytes of the strategy's memory in a checkpoint, the CPU
time of a step over naive's on the same new examples (the two in turn, medians), whether examples
of earlier tasks are kept, and whether the strategy learns something else where examples do not say
which task they belong to. `--texts` measures nothing: it writes the texts again around the numbers
that the page holds.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from benchmarks import works
from benchmarks.common import Step
from benchmarks.families import FAMILIES
from continual.cli.main import compose_config
from continual.config.catalogue import KEY, Choice, list_choices
from continual.data.template import index_tasks
from continual.data.types import Encoded, Task
from continual.models.model import Model
from continual.reports.figures import format_bytes
from continual.runs import build
from continual.strategy.interface import Strategy
from continual.strategy.replay_buffer import ReplayBuffer
from continual.testing import toy
from continual.training import checkpoint
from continual.training.stage import train_stage

PAGE = Path(__file__).parents[1] / "docs" / "strategies.md"
STEPS, ROUNDS = 5, 25
HEADS = ("strategy", "idea and paper", "when to use it", "memory", "cost of a step", "needs")
OLD_EXAMPLES, TASK_NAME = "old examples", "task name in tests"
IDENTITY = {"no": "", "boundaries": "task boundaries", "of each example": "each example's task"}
NOTHING = "–"
INTRODUCTION = """# Strategies

<!-- Written by `python -m benchmarks.strategies`; see CONTRIBUTING.md. -->

All strategies by family: the paper, when to use it, what it stores between stages, what a step \
costs, and what it needs to know. `strategy=NAME` runs one, `strategy=[A,B]` composes several. \
[Choosing a strategy](guides/choosing.md) asks the questions that decide; the \
[leaderboard](leaderboard.md) compares 35 of them.

- **memory**: a formula, and in brackets the bytes measured on the embedded stream after six tasks.
- **cost of a step**: a formula relative to plain fine-tuning on as many new examples, and in \
brackets the measured ratio of CPU times.
- **needs**: old training examples; task boundaries (when a task ends) or each example's task \
during training; the task's name in tests.

{key}.

{links}
"""


@dataclass(frozen=True)
class Measurement:
    """The measured numbers of a strategy.

    `size` is the memory as text, such as "6.2 MB"; `ratio` the time of a step over naive's;
    `identity` one of IDENTITY.
    """

    size: str
    ratio: str
    keeps_examples: bool
    identity: str


def main() -> None:
    """Measure the named strategies, all by default, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.strategies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="all if none is given; others keep their numbers"
    )
    parser.add_argument(
        "--texts", action="store_true", help="measure nothing, write the texts again"
    )
    parser.add_argument(
        "--to", type=Path, default=PAGE, metavar="PATH", help="another file than docs/strategies.md"
    )
    arguments = parser.parse_args()
    path = arguments.to
    for choice in list_choices("strategy"):
        if not arguments.texts and (not arguments.names or choice.name in arguments.names):
            measurement = measure_strategy(choice)
            print(f"{choice.name}: {measurement}", flush=True)
            known = parse_page(path.read_text("utf-8"))
            path.write_text(render_page({**known, choice.name: measurement}), "utf-8")
    if arguments.texts:
        path.write_text(render_page(parse_page(path.read_text("utf-8"))), "utf-8")


def parse_page(text: str) -> dict[str, Measurement]:
    """Return the measured numbers that a page holds, by the strategy's name."""
    measurements = {}
    for line in re.findall(r"^\| `\w+` \|.*$", text, re.MULTILINE):
        name, _, _, memory, cost, needs = line.strip("| ").split(" | ")
        identity = next((key for key, need in IDENTITY.items() if need and need in needs), "no")
        measurements[name.strip("`")] = Measurement(
            _bracket(memory), _bracket(cost), OLD_EXAMPLES in needs, identity
        )
    return measurements


def _bracket(cell: str) -> str:
    """Return what stands in the bracket at a cell's end."""
    return cell.rpartition(" (")[2].removesuffix(")")


def render_page(known: Mapping[str, Measurement]) -> str:
    """Return the page with the measured numbers of all strategies that still exist."""
    by_name = {choice.name: choice for choice in list_choices("strategy")}
    titles = [family.title for family in FAMILIES]
    links = " · ".join(f"[{title}](#{title.lower().replace(' ', '-')})" for title in titles)
    parts = [INTRODUCTION.format(key=KEY, links=links)]
    for family in FAMILIES:
        names = [name for name in family.when if name in known and name in by_name]
        lines = [render_row(by_name[name], family.when[name], known[name]) for name in names]
        table = "\n".join([_line(HEADS), "|---" * len(HEADS) + "|", *lines])
        parts.append(f"## {family.title}\n\n{family.idea}\n\n{table}\n")
    return "\n".join(parts)


def render_row(choice: Choice, when: str, measurement: Measurement) -> str:
    """Return a strategy's line of the table."""
    needs = [
        OLD_EXAMPLES if measurement.keeps_examples else "",
        IDENTITY[measurement.identity],
        TASK_NAME if "route" in choice.moments else "",
    ]
    return _line(
        [
            f"`{choice.name}`",
            choice.source,
            when,
            f"{choice.facts['stores']} ({measurement.size})",
            f"{choice.facts['costs']} ({measurement.ratio})",
            ", ".join(filter(None, needs)) or NOTHING,
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def measure_strategy(choice: Choice, *words: str) -> Measurement:
    """Measure a strategy; `words` are further keys of the run."""
    needed = works.NEEDED.get(choice.name, [])
    config = compose_config("run", [f"strategy=[{choice.name}]", "device=cpu", *needed, *words])
    stream = build.stream(config)
    model = build.model(config, stream)
    strategy = build.strategy(config)
    encoder = build.encoder(config, model)
    names = index_tasks(stream)
    tasks = [encoder.encode_task(stage, names, include_dev=False) for stage in stream.stages]
    recipe = replace(build.recipe(config), steps=STEPS)
    for i, task in enumerate(tasks[:-1]):
        train_stage(model, task, strategy, recipe, seed=i, log_event=lambda event: None)
    ratio = measure_step_ratio(model, strategy, tasks[-1], config)
    strategy.end(model, tasks[-1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint.save(Path(temporary, "stage-01"), model, strategy, toy.empty_matrix())
        has_memory = any(strategy.state_dict().values())
        size = checkpoint.size_bytes(folder, "memory.*") if has_memory else 0
    keeps = keeps_examples(strategy.state_dict()) or any(
        len({e.task_index for e in task.train}) > 1 for task in tasks
    )
    return Measurement(
        format_bytes(size) if size else "0",
        f"{ratio:.2f}",
        keeps,
        required_identity(choice, config),
    )


def measure_step_ratio(
    model: Any, strategy: Strategy, task: Task[Encoded], config: DictConfig
) -> float:
    """Return the CPU time of the strategy's step over naive's, on the same new examples."""
    n = config.train.batch_size
    batches = [task.train[i : i + n] for i in range(0, len(task.train) - n + 1, n)]
    arms: list[Step] = []
    for subject, method in ((model, strategy), (deepcopy(model), Strategy())):
        parameters = method.begin(subject, task)
        arms.append(works.stepper(subject, parameters, method.backward, batches * ROUNDS))

    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for times, step in zip(seconds, arms, strict=True):
            start = time.thread_time()
            step()
            times.append(time.thread_time() - start)

    # The first two steps of each arm warm up.
    ours, naive = (statistics.median(times[2:]) for times in seconds)
    return ours / naive


def keeps_examples(value: Any) -> bool:
    """Return True if a memory value holds examples, at any depth."""
    if isinstance(value, ReplayBuffer):
        return len(value) > 0
    if isinstance(value, dict):
        return any(map(keeps_examples, value.values()))
    if isinstance(value, list | tuple):
        return any(map(keeps_examples, value))
    return isinstance(value, Encoded)


def make_toy_model(config: DictConfig) -> Model:
    """Build a toy model with the adapter that the strategy needs, if any."""
    model = toy.make_model(lora_rank=12 if config.model.adapter == "lora" else 0)
    return toy.add_virtual_tokens(model) if config.model.adapter == "prompt_tuning" else model


def required_identity(choice: Choice, config: DictConfig) -> str:
    """Return what a strategy must know of tasks while it trains: a key of IDENTITY.

    It learns the same from examples that all claim to belong to the first task if it needs nothing
    but the boundaries.
    """
    if not {"begin", "end"} & {*choice.moments}:
        return "no"
    informed = make_toy_model(config)
    uninformed = make_toy_model(config)
    first = build.strategy(config)
    second = build.strategy(config)
    for i in range(3):
        toy.train_stages(informed, first, i)
        task = toy.make_task(i)
        examples = [replace(example, task_index=0) for example in task.train]
        train_stage(
            uninformed,
            replace(task, train=examples),
            second,
            toy.RECIPE,
            seed=i,
            log_event=lambda event: None,
        )
    same = toy.bitwise_equal(toy.copy_parameters(informed), toy.copy_parameters(uninformed))
    return "boundaries" if same else "of each example"


if __name__ == "__main__":
    main()
