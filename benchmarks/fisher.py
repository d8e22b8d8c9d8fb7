"""The diagonal Fisher of 256 agnews rows: ours, a loop over single examples, and Avalanche's EWC at
batch size 1.

- continual: `continual.models.importance.fisher`, examples together; loop: `fisher_by_example`, its
  oracle.
- avalanche: `EWCPlugin.compute_importances` on the same summed log-likelihood of the same response
  tokens. At a larger batch size it squares the gradients of means over a batch, which is something
  else.

All three must give the same numbers on the first 16 rows, or the run fails; on a GPU they are
compared in fp32 and then run in bf16. "ratio to" is in examples a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import works
from benchmarks.common import ASKED, Row, Step, interleaved, medians, peaks, ratios, row
from continual.data.types import Encoded
from continual.models.importance import fisher, fisher_per_example
from continual.models.model import Model
from continual.models.weights import Weights, weights

PEERS = ("loop", "avalanche")
EXAMPLES, COMPARED, ALLOWED = 256, 16, 1e-4


def engine(made: Model, rows: Sequence[Encoded]) -> Step:
    """Ours."""
    return lambda: fisher(made, rows)


def loop(made: Model, rows: Sequence[Encoded]) -> Step:
    """Ours, one example at a time."""
    return lambda: fisher_per_example(made, rows)


def avalanche(made: Model, rows: Sequence[Encoded]) -> Step:
    """The peer, on a module that gives a row's logits as its cross entropy takes them, (1, V, T)."""
    from avalanche.training.plugins import EWCPlugin

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = made.net

        def forward(self, ids: Tensor) -> Tensor:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=made.bf16):
                logits: Tensor = self.net(input_ids=ids, use_cache=False).logits
            return logits.float().transpose(1, 2)

    data = [
        (
            torch.tensor(e.ids[:-1]),
            torch.tensor(
                [y if r else -100 for y, r in zip(e.ids[1:], e.response_mask[1:], strict=True)]
            ),
            torch.tensor(0),
        )
        for e in rows
    ]
    plugin, module = EWCPlugin(ewc_lambda=1.0), Logits()
    loss = torch.nn.CrossEntropyLoss(ignore_index=-100, reduction="sum")
    optimizer = torch.optim.SGD(weights(made).values(), lr=0.1)

    def step() -> Weights:
        found = plugin.compute_importances(
            module, loss, optimizer, data, made.layout.device.type, batch_size=1
        )
        return {n: found[f"net.{n}"].data for n in weights(made)}

    return step


ARMS: Mapping[str, Callable[[Model, Sequence[Encoded]], Step]] = {
    "continual": engine,
    "loop": loop,
    "avalanche": avalanche,
}


def build(arm: str, rows: Sequence[Encoded], *of: Any) -> Step:
    """One arm's step on a model of its own."""
    return ARMS[arm](works.stirred(*of), rows)


def run() -> list[Row]:
    """LoRA and full fine-tuning; raises RuntimeError where the arms' numbers differ by more than
    rounding.
    """
    rows = works.rows("agnews", EXAMPLES)
    sets = (
        (("0.5B", "lora"), ("0.5B", "none"), ("1.5B", "lora"))
        if ASKED.gpu
        else (("3M", "lora"), ("3M", "none"))
    )
    return [
        one
        for shape, adapter in sets
        for one in measure(shape, adapter, rows, list(ARMS), seconds=20)
    ]


def measure(
    shape: str, adapter: str, rows: Sequence[Encoded], arms: Sequence[str], seconds: float
) -> list[Row]:
    """Each arm's row, once they have agreed."""
    of = works.SHAPES[shape], adapter, ASKED.gpu, ASKED.device.type
    made = works.stirred(*of)
    made.bf16 = False
    compare({arm: ARMS[arm](made, rows[:COMPARED])() for arm in arms})  # and a warm-up
    made.bf16 = ASKED.gpu
    took = medians(
        interleaved(
            {arm: ARMS[arm](made, rows) for arm in arms}, seconds=seconds, least=3, warmup=0
        )
    )
    memory = peaks({arm: (arm, rows, *of) for arm in arms}, build, steps=1)
    work = f"{shape} {'LoRA' if adapter == 'lora' else 'full'}{' bf16' if ASKED.gpu else ''}, agnews{works.source()}"
    return [
        row(
            "fisher", work, arm, took[arm], len(rows), memory[arm], ratios(arm, PEERS, took, memory)
        )
        for arm in arms
    ]


def compare(found: Mapping[str, Weights]) -> None:
    """Raise RuntimeError unless each arm's Fisher is ours but for rounding."""
    for arm, theirs in found.items():
        for name, f in found["continual"].items():
            apart = ((f - theirs[name]).norm() / f.norm()).item()
            if not apart < ALLOWED:
                raise RuntimeError(f"the Fisher of {arm} differs by {apart:.1e} in {name}")
