"""What every strategy comes to in two stages, in one process or in several that share the work."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from continual.distributed import processes
from continual.models.sharding import full_tensor
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from tests.support import toy
from tests.support.strategy_table import TABLE, make, network

RECIPE = Recipe(lr=3e-3, epochs=1, batch_size=5, patience=2, log_every_steps=1)


def train_two_stages(
    entry, prepare=lambda made: None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step of two stages, and all weights and memory after them."""
    made, strategy, losses = network(entry[0], torch.float64), make(*entry), []
    prepare(made)

    def log(event):
        losses.extend([event["loss"]] if event["event"] == "step" else [])

    for i in (0, 1):
        task = toy.Task(
            toy.TASK_NAMES[i],
            tuple(toy.make_examples(i, 8)),
            tuple(toy.make_examples(i, 5, seed=1)),
            task_names=toy.TASK_NAMES,
        )
        train_stage(made, task, strategy, RECIPE, seed=i, log_event=log)
    kept = {f"memory{path}": t for path, t in toy.memory_tensors(strategy).items()}
    return losses, {
        n: full_tensor(t).contiguous() for n, t in {**toy.copy_parameters(made), **kept}.items()
    }


def train_all_strategies(out: Path) -> None:
    """Each process writes what it came to, so that a test can see that they are alike."""
    with processes.process_group("cpu"):
        for i, entry in enumerate(TABLE):
            losses, tensors = train_two_stages(entry)
            save_file(
                {n: t.detach().clone() for n, t in tensors.items()},
                out / f"{i}-{processes.rank()}.safetensors",
                {"losses": json.dumps(losses)},
            )
