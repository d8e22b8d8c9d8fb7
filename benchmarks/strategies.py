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
class Measured:
    """What was measured of a strategy.

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
    asked = parser.parse_args()
    for choice in list_choices("strategy"):
        if not asked.texts and (not asked.names or choice.name in asked.names):
            found = measured(choice)
            print(f"{choice.name}: {found}", flush=True)
            known = rows(asked.to.read_text("utf-8"))
            asked.to.write_text(page({**known, choice.name: found}), "utf-8")
    if asked.texts:
        asked.to.write_text(page(rows(asked.to.read_text("utf-8"))), "utf-8")


def rows(text: str) -> dict[str, Measured]:
    """Return the measured numbers that a page holds, by the strategy's name."""
    found = {}
    for line in re.findall(r"^\| `\w+` \|.*$", text, re.MULTILINE):
        name, _, _, memory, cost, needs = line.strip("| ").split(" | ")
        identity = next((word for word, told in IDENTITY.items() if told and told in needs), "no")
        found[name.strip("`")] = Measured(
            _bracket(memory), _bracket(cost), OLD_EXAMPLES in needs, identity
        )
    return found


def _bracket(cell: str) -> str:
    """Return what stands in the bracket at a cell's end."""
    return cell.rpartition(" (")[2].removesuffix(")")


def page(known: Mapping[str, Measured]) -> str:
    """Return the page with the measured numbers of all strategies that still exist."""
    by_name = {choice.name: choice for choice in list_choices("strategy")}
    titles = [family.title for family in FAMILIES]
    links = " · ".join(f"[{title}](#{title.lower().replace(' ', '-')})" for title in titles)
    parts = [INTRODUCTION.format(key=KEY, links=links)]
    for family in FAMILIES:
        names = [name for name in family.when if name in known and name in by_name]
        lines = [row(by_name[name], family.when[name], known[name]) for name in names]
        table = "\n".join([_line(HEADS), "|---" * len(HEADS) + "|", *lines])
        parts.append(f"## {family.title}\n\n{family.idea}\n\n{table}\n")
    return "\n".join(parts)


def row(choice: Choice, when: str, found: Measured) -> str:
    """Return a strategy's line of the table."""
    needs = [
        OLD_EXAMPLES if found.keeps_examples else "",
        IDENTITY[found.identity],
        TASK_NAME if "route" in choice.moments else "",
    ]
    return _line(
        [
            f"`{choice.name}`",
            choice.source,
            when,
            f"{choice.facts['stores']} ({found.size})",
            f"{choice.facts['costs']} ({found.ratio})",
            ", ".join(filter(None, needs)) or NOTHING,
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def measured(choice: Choice, *words: str) -> Measured:
    """Measure a strategy; `words` are further keys of the run."""
    needed = works.NEEDED.get(choice.name, [])
    config = compose_config("run", [f"strategy=[{choice.name}]", "device=cpu", *needed, *words])
    stream = build.stream(config)
    model, strategy = build.model(config, stream), build.strategy(config)
    encoder, names = build.encoder(config, model), index_tasks(stream)
    tasks = [encoder.encode_task(stage, names, include_dev=False) for stage in stream.stages]
    recipe = replace(build.recipe(config), steps=STEPS)
    for i, task in enumerate(tasks[:-1]):
        train_stage(model, task, strategy, recipe, seed=i, log_event=lambda event: None)
    ratio = step_ratio(model, strategy, tasks[-1], config)
    strategy.end(model, tasks[-1])
    with tempfile.TemporaryDirectory() as place:
        folder = checkpoint.save(Path(place, "stage-01"), model, strategy, toy.empty_matrix())
        bytes_ = (
            checkpoint.size_bytes(folder, "memory.*") if any(strategy.state_dict().values()) else 0
        )
    old = keeps_examples(strategy.state_dict()) or any(
        len({e.task_index for e in task.train}) > 1 for task in tasks
    )
    return Measured(format_bytes(bytes_) if bytes_ else "0", f"{ratio:.2f}", old, identity(choice, config))


def step_ratio(model: Any, strategy: Strategy, task: Task[Encoded], config: DictConfig) -> float:
    """The CPU time of the strategy's step over naive's, each on the same new examples."""
    n = config.train.batch_size
    batches = [task.train[i : i + n] for i in range(0, len(task.train) - n + 1, n)]
    arms: list[Step] = []
    for made, plan in ((model, strategy), (deepcopy(model), Strategy())):
        arms.append(works.stepper(made, plan.begin(made, task), plan.backward, batches * ROUNDS))
    spent: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for took, step in zip(spent, arms, strict=True):
            began = time.thread_time()
            step()
            took.append(time.thread_time() - began)
    ours, naive = (statistics.median(took[2:]) for took in spent)
    return ours / naive


def keeps_examples(value: Any) -> bool:
    """Whether a memory value holds examples."""
    if isinstance(value, ReplayBuffer):
        return len(value) > 0
    parts = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return isinstance(value, Encoded) or any(map(keeps_examples, parts))


def subject(config: DictConfig) -> Model:
    """A toy model with the adapter that the strategy needs, if it does."""
    made = toy.make_model(lora_rank=12 if config.model.adapter == "lora" else 0)
    return toy.add_virtual_tokens(made) if config.model.adapter == "prompt_tuning" else made


def identity(choice: Choice, config: DictConfig) -> str:
    """What a strategy has to know of tasks while it trains: nothing, where they end, or of which
    one an example is.
    """
    if not {"begin", "end"} & {*choice.moments}:
        return "no"
    told, untold = subject(config), subject(config)
    one, other = build.strategy(config), build.strategy(config)
    for i in range(3):
        toy.train_stages(told, one, i)
        task = toy.make_task(i)
        train_stage(
            untold,
            replace(task, train=[replace(e, task_index=0) for e in task.train]),
            other,
            toy.RECIPE,
            seed=i,
            log_event=lambda event: None,
        )
    return (
        "boundaries"
        if toy.bitwise_equal(toy.copy_parameters(told), toy.copy_parameters(untold))
        else "of each example"
    )


if __name__ == "__main__":
    main()
