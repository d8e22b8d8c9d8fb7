"""What tests start as several processes: `learn OUT` with every strategy, or `die STEP WORDS...`, a run that does."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import toy
from safetensors.torch import save_file
from test_contract import TABLE, make, network

from continual import parallel
from continual.stage import Recipe, learn

RECIPE = Recipe(lr=3e-3, epochs=1, batch_size=5, patience=2)


def learned(entry) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step of two stages, and all weights and memory after them."""
    made, strategy, losses = network(entry[0], torch.float64), make(*entry), []

    def log(event):
        losses.extend([event["loss"]] if event["event"] == "step" else [])

    for i in (0, 1):
        task = toy.Task(toy.NAMES[i], tuple(toy.examples(i, 8)), tuple(toy.examples(i, 5, seed=1)), columns=toy.NAMES)
        learn(made, task, strategy, toy.replace(RECIPE, log_every=1), seed=i, log=log)
    kept = {f"memory{path}": t for path, t in toy.memory_tensors(strategy).items()}
    return losses, {n: t.contiguous() for n, t in {**toy.everything(made), **kept}.items()}


def learn_all(out: Path) -> None:
    """Each process writes what it came to, so that the test can see that they are alike."""
    with parallel.joined("cpu"):
        for i, entry in enumerate(TABLE):
            losses, tensors = learned(entry)
            save_file({n: t.detach().clone() for n, t in tensors.items()}, out / f"{i}-{parallel.rank()}.safetensors",
                      {"losses": json.dumps(losses)})


def die(step: int) -> None:
    """The process of rank 1 is gone in the middle of its so-manieth step, as if killed."""
    from continual import stage

    backward, calls = stage._gradient, []

    def step_or_end(*args):
        calls.append(1)
        if len(calls) == step and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(*args)

    stage._gradient = step_or_end


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "learn":
        learn_all(Path(sys.argv[2]))
    else:
        from continual.cli import main

        die(int(sys.argv[2]))
        main(sys.argv[3:])
