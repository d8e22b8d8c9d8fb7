"""What each strategy keeps, what its step costs, and what it has to be told: the README's table of
them.

`python -m benchmarks.strategies [NAME ...] [--to PATH]`. What a strategy stores and costs as a
formula is what its class says; the rest is measured, on the embedded stream and its small model,
after five short stages and at the end of a sixth: the bytes of the memory in a checkpoint, the CPU
time of a step beside naive's on the same new examples (the two in turn, medians), whether examples
of earlier tasks are kept, and whether the strategy learns something else where examples do not say
of which task they are.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from benchmarks import works
from benchmarks.common import Step
from continual.cli.main import compose_config
from continual.config.catalogue import KEY, Choice, list_choices
from continual.data.template import index_tasks
from continual.data.types import Encoded, Task
from continual.models.model import Model
from continual.reports.figures import size
from continual.runs import build
from continual.strategy.interface import Strategy
from continual.strategy.replay_buffer import ReplayBuffer
from continual.testing import toy
from continual.training import checkpoint
from continual.training.stage import learn

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- strategies -->\n", "<!-- /strategies -->"
HEADS = (
    "strategy",
    "stores",
    "here",
    "a step takes",
    "here",
    "old data",
    "task identity in training",
    "in tests",
)
STEPS, ROUNDS = 5, 25


def main() -> None:
    """Measure the named strategies, all by default, and write their rows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.strategies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="all if none is given; others keep their rows"
    )
    parser.add_argument(
        "--to", type=Path, default=README, metavar="PATH", help="a file with the table's two marks"
    )
    asked = parser.parse_args()
    for choice in list_choices("strategy"):
        if not asked.names or choice.name in asked.names:
            line = measured(choice)
            print(line, flush=True)
            text = asked.to.read_text()
            asked.to.write_text(written(text, {**rows(text), choice.name: line}))


def rows(text: str) -> dict[str, str]:
    """The lines of the table that a file holds, by the strategy's name."""
    table = text.partition(BEGIN)[2].partition(END)[0]
    return {found[1]: found[0] for found in re.finditer(r"^\| `(\w+)` \|.*$", table, re.MULTILINE)}


def written(text: str, known: dict[str, str]) -> str:
    """The file with these lines as its table, those of strategies that there no longer are left
    out.
    """
    before, _, rest = text.partition(BEGIN)
    there = {c.name for c in list_choices("strategy")}
    lines = [
        _line(HEADS),
        "|---" * len(HEADS) + "|",
        *(known[name] for name in sorted(there & known.keys())),
    ]
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{KEY}.\n\n{END}{rest.partition(END)[2]}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def measured(choice: Choice, *words: str) -> str:
    """A strategy's line; `words` are further keys of the run."""
    needed = works.NEEDED.get(choice.name, [])
    config = compose_config("run", [f"strategy=[{choice.name}]", "device=cpu", *needed, *words])
    stream = build.stream(config)
    model, strategy = build.model(config, stream), build.strategy(config)
    encoder, names = build.encoder(config, model), index_tasks(stream)
    tasks = [encoder.encode_task(stage, names, include_dev=False) for stage in stream.stages]
    recipe = replace(build.recipe(config), steps=STEPS)
    for i, task in enumerate(tasks[:-1]):
        learn(model, task, strategy, recipe, seed=i, log=lambda event: None)
    ratio = step_ratio(model, strategy, tasks[-1], config)
    strategy.end(model, tasks[-1])
    with tempfile.TemporaryDirectory() as place:
        folder = checkpoint.save(Path(place, "stage-01"), model, strategy, toy.empty_matrix())
        bytes_ = checkpoint.size(folder, "memory.*") if any(strategy.state_dict().values()) else 0
    old = keeps_examples(strategy.state_dict()) or any(
        len({e.task_index for e in task.train}) > 1 for task in tasks
    )
    return _line(
        [
            f"`{choice.name}`",
            choice.facts["stores"],
            size(bytes_) if bytes_ else "0",
            choice.facts["costs"],
            f"{ratio:.2f}",
            "yes" if old else "no",
            identity(choice, config),
            "yes" if "route" in choice.moments else "no",
        ]
    )


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
        learn(
            untold,
            replace(task, train=[replace(e, task_index=0) for e in task.train]),
            other,
            toy.RECIPE,
            seed=i,
            log=lambda event: None,
        )
    return (
        "boundaries"
        if toy.bitwise_equal(toy.copy_parameters(told), toy.copy_parameters(untold))
        else "of each example"
    )


if __name__ == "__main__":
    main()
