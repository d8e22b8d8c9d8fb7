"""One MAML meta-gradient over 4 tasks, 8 examples and 5 inner steps each: this engine's, and
learn2learn's.

- continual: `strategies.maml.MAML` through the engine, on a batch whose examples belong to 4 tasks.
- learn2learn: `algorithms.MAML`, cloned and adapted for each task, on padded batches with prompts
  labelled -100. LoRA takes its `allow_nograd`. Each query loss is weighted by its task's share of
  the response tokens, as ours are.

LoRA (r=8 on q and v); the tasks are parts of agnews. Half of a task's examples lead to its fast
weights, the other half are its query. Both arms use SDPA's math kernel for the second order: the
fused ones have no second derivative. Their meta-gradients must be equal but for rounding, or the
run fails; on a GPU they are compared in fp32 and then run in bf16. "ratio to" is in examples a
second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import works
from benchmarks.common import ASKED, Row, Step, interleaved, medians, peaks, ratios, row
from continual.data.types import Encoded
from continual.models.model import Model
from continual.models.weights import Weights, gradient
from strategies.maml import MAML

TASKS, EXAMPLES = 4, 8
INNER_STEPS, INNER_LR, ALLOWED = 5, 0.1, 1e-4


def engine(made: Model, tasks: Sequence[Sequence[Encoded]], second_order: bool) -> Step:
    """Ours."""
    strategy = MAML(
        capacity=0, inner_lr=INNER_LR, inner_steps=INNER_STEPS, second_order=second_order
    )
    examples = [e for rows in tasks for e in rows]

    def step() -> None:
        made.net.zero_grad()
        strategy.backward(made, made.batch(examples))

    return step


def learn2learn(made: Model, tasks: Sequence[Sequence[Encoded]], second_order: bool) -> Step:
    """The peer."""
    from learn2learn.algorithms import MAML as Wrapper

    wrapper = Wrapper(made.net, lr=INNER_LR, first_order=not second_order, allow_nograd=True)
    device = made.layout.device.type
    tokens = [sum(sum(e.response_mask) for e in rows) for rows in tasks]

    def loss(learner: Any, rows: Sequence[Encoded]) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=made.bf16):
            found: Tensor = learner(**labelled(made, rows), use_cache=False).loss
        return found

    def step() -> None:
        made.net.zero_grad()
        with sdpa_kernel(SDPBackend.MATH) if second_order else nullcontext():
            for rows, n in zip(tasks, tokens, strict=True):
                learner, half = wrapper.clone(), len(rows) // 2
                for _ in range(INNER_STEPS):
                    learner.adapt(loss(learner, rows[:half]))
                (loss(learner, rows[half:]) * (n / sum(tokens))).backward()

    return step


def labelled(made: Model, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """A padded batch (E, T) as transformers' models take it."""
    longest = max(len(e.ids) for e in rows)

    def padded(of: Callable[[Encoded], list[int]], by: int) -> Tensor:
        return torch.tensor(
            [of(e) + [by] * (longest - len(e.ids)) for e in rows], device=made.layout.device
        )

    return {
        "input_ids": padded(lambda e: list(e.ids), made.layout.pad_token_id),
        "attention_mask": padded(lambda e: [1] * len(e.ids), 0),
        "labels": padded(
            lambda e: [t if r else -100 for t, r in zip(e.ids, e.response_mask, strict=True)], -100
        ),
    }


ARMS: Mapping[str, Callable[[Model, Sequence[Sequence[Encoded]], bool], Step]] = {
    "continual": engine,
    "learn2learn": learn2learn,
}


def build(arm: str, tasks: Sequence[Sequence[Encoded]], second_order: bool, *of: Any) -> Step:
    """One arm's step on a model of its own."""
    return ARMS[arm](works.stirred(*of), tasks, second_order)


def run() -> list[Row]:
    """First and second order; raises RuntimeError where the meta-gradients differ by more than
    rounding.
    """
    shape = "0.5B" if ASKED.gpu else "3M"
    rows = works.rows("agnews", TASKS * EXAMPLES)
    tasks = [[replace(e, task_index=i) for e in rows[i::TASKS]] for i in range(TASKS)]
    return [
        one
        for second_order in (False, True)
        for one in measure(shape, tasks, second_order, seconds=20)
    ]


def measure(
    shape: str, tasks: Sequence[Sequence[Encoded]], second_order: bool, seconds: float
) -> list[Row]:
    """Each arm's row, once they have agreed."""
    of = works.SHAPES[shape], "lora", ASKED.gpu, ASKED.device.type
    made = works.stirred(*of)
    steps = {arm: make(made, tasks, second_order) for arm, make in ARMS.items()}
    made.bf16 = False
    found: dict[str, Weights] = {}
    for arm, step in steps.items():
        step()
        found[arm] = gradient(made)
    compare(found)
    made.bf16 = ASKED.gpu
    took = medians(interleaved(steps, seconds=seconds, warmup=0))
    memory = peaks({arm: (arm, tasks, second_order, *of) for arm in ARMS}, build, steps=1)
    work = f"{shape} LoRA{' bf16' if ASKED.gpu else ''}, {'second' if second_order else 'first'} order{works.source()}"
    return [
        row(
            "maml",
            work,
            arm,
            took[arm],
            sum(map(len, tasks)),
            memory[arm],
            ratios(arm, ["learn2learn"], took, memory),
        )
        for arm in ARMS
    ]


def compare(found: Mapping[str, Weights]) -> None:
    """Raise RuntimeError unless both arms have the same meta-gradient but for rounding."""
    ours, theirs = (
        torch.cat([g.flatten() for g in found[arm].values()])
        for arm in ("continual", "learn2learn")
    )
    apart = ((ours - theirs).norm() / ours.norm()).item()
    if not apart < ALLOWED:
        raise RuntimeError(f"the meta-gradient of learn2learn differs by {apart:.1e}")
