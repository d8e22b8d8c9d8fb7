"""What test_sharding does in two processes: all that is learned there with a model in shards."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from continual.cli.main import compose_config
from continual.distributed import processes
from continual.models import sharding
from continual.models.loading import add_adapter
from continual.runs.adapt import adapt
from continual.runs.run import run
from continual.tracking import events
from continual.training import checkpoint
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from tests.support import toy
from tests.support.all_strategies import train_two_stages
from tests.support.strategy_table import CONFIGS, make, sized

# Every strategy that can as it is configured, two together, one with parameters of its own, and two
# with an adapter.
EXTRA_CASES = [
    (("lwf,der",), False),
    (("multitask", "multitask.weighting=uncertainty", "multitask.capacity=0.5"), False),
    (("naive",), True),
    (("der",), True),
]
SHARDED_CASES = [
    *((entry, False) for entry in map(sized, CONFIGS) if make(*entry).is_shardable()),
    *EXTRA_CASES,
]
RECIPE = Recipe(lr=3e-3, epochs=1, batch_size=4, patience=1)
CHECKPOINT_STEP = 3  # the step at which a stage is kept


def add_lora(made) -> None:
    made.net = add_adapter(
        made.net, "lora", {"lora": {"r": 2, "target_modules": "all-linear"}}, seq2seq=False
    )


def shard_model(made) -> None:
    sharding.shard_model(made, torch.device("cpu"))


def train_cases(out: Path) -> None:
    """Two stages of each strategy that can."""
    for i, (entry, lora) in enumerate(SHARDED_CASES):
        losses, tensors = train_two_stages(
            entry, lambda made, lora=lora: (lora and add_lora(made), shard_model(made))
        )
        save_file(
            {n: t.detach().clone() for n, t in tensors.items()},
            out / f"{i}-{processes.rank()}.safetensors",
            {"losses": json.dumps(losses)},
        )


def train_one_stage(
    save_to: Path | None = None, resume_from: Path | None = None, prepare=lambda made: None
) -> dict[str, torch.Tensor]:
    """The weights after a stage that is kept at one step, or that goes on from where it was kept."""
    made, strategy = toy.make_model(torch.float64), make("replay")
    prepare(made)

    def after(step, progress):
        if save_to and step == CHECKPOINT_STEP:
            checkpoint.save(save_to, made, strategy, toy.empty_matrix(), progress())

    def go_on():
        checkpoint.load(resume_from, made, strategy)
        return checkpoint.load_stage_state(resume_from, made)

    task = toy.Task(
        "a",
        tuple(toy.make_examples(0, 20)),
        tuple(toy.make_examples(0, 5, seed=1)),
        task_names=toy.TASK_NAMES,
    )
    train_stage(
        made,
        task,
        strategy,
        RECIPE,
        seed=0,
        log_event=lambda event: None,
        on_step=after,
        restore_state=go_on if resume_from else None,
    )
    return {n: sharding.full_tensor(t) for n, t in toy.copy_parameters(made).items()}


def run_verb(verb: str, out: Path, *words: str) -> None:
    """A verb of the command line, in a group of processes that is there already."""
    said = Console(file=io.StringIO())
    {"run": run, "adapt": adapt}[verb](compose_config(verb, [*words, f"out={out}"]), said)


def run_all_cases(out: Path, keys: list[str]) -> None:
    """All of it."""
    events.silence_libraries()
    with processes.process_group("cpu"):
        train_cases(out)
        weights = train_one_stage(save_to=out / "sharded", prepare=shard_model)
        again = train_one_stage(resume_from=out / "whole", prepare=shard_model)
        if processes.is_main_process():
            save_file(weights, out / "weights.safetensors")
            save_file(again, out / "again.safetensors")
        run_verb("run", out / "run", *keys)
        for shard in ("true", "false"):
            run_verb("adapt", out / f"adapt-{shard}", *to_adapt_keys(keys, shard))


def to_adapt_keys(keys: list[str], shard: str) -> list[str]:
    """The keys of a run as those of an adaptation to one of its tasks."""
    left = [
        k for k in keys if not k.startswith(("checkpoint.", "train.shard=", "score.every_steps="))
    ]
    return [
        *left,
        f"train.shard={shard}",
        "stream.tasks=[first]",
        "adapt.init_from=base",
        "adapt.steps=4",
        "adapt.eval_steps=[2]",
        "adapt.shots=[4]",
        "model.adapter=lora",
    ]
