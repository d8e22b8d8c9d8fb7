"""What test_sharding does in two processes: all that is learned there with a model in shards."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from continual.cli.main import configure
from continual.distributed import processes
from continual.models import sharding
from continual.models.loading import adapt_with
from continual.runs.adapt import adapt
from continual.runs.run import run
from continual.tracking import events
from continual.training import checkpoint
from continual.training.recipe import Recipe
from continual.training.stage import learn
from tests.support import toy
from tests.support.all_strategies import learned
from tests.support.strategy_table import CONFIGS, make, sized

# Every strategy that can as it is configured, two together, one with parameters of its own, and two
# with an adapter.
MORE = [
    (("lwf,der",), False),
    (("multitask", "multitask.weighting=uncertainty", "multitask.capacity=0.5"), False),
    (("naive",), True),
    (("der",), True),
]
SHARDED = [*((entry, False) for entry in map(sized, CONFIGS) if make(*entry).shardable), *MORE]
RECIPE = Recipe(lr=3e-3, epochs=1, batch_size=4, patience=1)
CUT = 3  # the step at which a stage is kept


def with_lora(made) -> None:
    made.net = adapt_with(
        made.net, "lora", {"lora": {"r": 2, "target_modules": "all-linear"}}, seq2seq=False
    )


def in_shards(made) -> None:
    sharding.shard(made, torch.device("cpu"))


def entries(out: Path) -> None:
    """Two stages of each strategy that can."""
    for i, (entry, lora) in enumerate(SHARDED):
        losses, tensors = learned(
            entry, lambda made, lora=lora: (lora and with_lora(made), in_shards(made))
        )
        save_file(
            {n: t.detach().clone() for n, t in tensors.items()},
            out / f"{i}-{processes.rank()}.safetensors",
            {"losses": json.dumps(losses)},
        )


def stage(
    kept: Path | None = None, begun: Path | None = None, ready=lambda made: None
) -> dict[str, torch.Tensor]:
    """The weights after a stage that is kept at one step, or that goes on from where it was kept."""
    made, strategy = toy.model(torch.float64), make("replay")
    ready(made)

    def after(step, progress):
        if kept and step == CUT:
            checkpoint.save(kept, made, strategy, toy.matrix(), progress())

    def go_on():
        checkpoint.load(begun, made, strategy)
        return checkpoint.progress(begun, made)

    task = toy.Task(
        "a", tuple(toy.examples(0, 20)), tuple(toy.examples(0, 5, seed=1)), columns=toy.NAMES
    )
    learn(
        made,
        task,
        strategy,
        RECIPE,
        seed=0,
        log=lambda event: None,
        after=after,
        progress=go_on if begun else None,
    )
    return {n: sharding.whole(t) for n, t in toy.everything(made).items()}


def command(verb: str, out: Path, *words: str) -> None:
    """A verb of the command line, in a group of processes that is there already."""
    said = Console(file=io.StringIO())
    {"run": run, "adapt": adapt}[verb](configure(verb, [*words, f"out={out}"]), said)


def main(out: Path, keys: list[str]) -> None:
    """All of it."""
    events.quiet()
    with processes.joined("cpu"):
        entries(out)
        weights = stage(kept=out / "sharded", ready=in_shards)
        again = stage(begun=out / "whole", ready=in_shards)
        if processes.leads():
            save_file(weights, out / "weights.safetensors")
            save_file(again, out / "again.safetensors")
        command("run", out / "run", *keys)
        for shard in ("true", "false"):
            command("adapt", out / f"adapt-{shard}", *adapted(keys, shard))


def adapted(keys: list[str], shard: str) -> list[str]:
    """The keys of a run as those of an adaptation to one of its tasks."""
    left = [k for k in keys if not k.startswith(("checkpoint.", "train.shard=", "score.during="))]
    return [
        *left,
        f"train.shard={shard}",
        "stream.tasks=[first]",
        "adapt.start=base",
        "adapt.steps=4",
        "adapt.at=[2]",
        "adapt.shots=[4]",
        "model.adapter=lora",
    ]
