"""Replay by instruction: the more a remembered task's instructions differ from the new one's, the
more of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.models.model import Model
from continual.strategy.instructions import (
    InstructionCounts,
    extract_instructions,
    mean_embedding,
)
from continual.strategy.interface import memory, replaces_super
from strategies.replay import Replay


@dataclass(kw_only=True)
class InsCL(Replay):
    """Instruction-based replay (Wang et al. 2024, section 3.1): of the replayed examples, task j
    has the share W_j.

    W_j is the Wasserstein distance between the instructions of task j and of the new task, divided
    by the sum over all remembered tasks. As in the authors' implementation the cost is the cosine
    distance and each instruction weighs as often as it occurs. An instruction's embedding is the
    mean of the model's own input embeddings over its tokens, instead of a sentence encoder's. What
    prompts have in common is their instruction; one that shares nothing with others is its own. The
    paper's choice of examples by tags, which a larger model writes, has no part here.
    """

    stores: ClassVar[str] = "E examples and at most 128 T instructions"
    instructions: dict[int, InstructionCounts] = memory(dict)  # of each remembered task
    task_shares: dict[int, float] = field(
        init=False, repr=False, default_factory=dict
    )  # what `begin` makes

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Measure how far each remembered task is from the new one."""
        trained, new = super().begin(model, task), extract_instructions(task.train)
        there = self.buffer.examples_by_task
        far = {
            t: instruction_distance(model, old, new)
            for t, old in self.instructions.items()
            if t in there
        }
        total = sum(far.values())
        self.task_shares = {t: d / total if total > 1e-9 else 1 / len(far) for t, d in far.items()}
        self.notes |= {
            f"share/{task.task_names[t]}": share for t, share in self.task_shares.items()
        }
        return trained

    @replaces_super
    def draw_replay_examples(self, n: int) -> Sequence[Encoded]:
        """Each task by its share."""
        return (
            self.buffer.draw_by_task(n, self.task_shares)
            if self.task_shares
            else super().draw_replay_examples(n)
        )

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Remember what the task's instructions were."""
        super().end(model, task)
        for t in {e.task_index for e in task.train}:
            self.instructions[t] = extract_instructions(
                [e for e in task.train if e.task_index == t]
            )


@torch.no_grad()
def instruction_distance(model: Model, old: InstructionCounts, new: InstructionCounts) -> float:
    """The Wasserstein distance between the embedded instructions of two tasks, with cosine distance
    as the cost.
    """
    embeddings = model.net.get_input_embeddings().weight

    def embed(counts: InstructionCounts) -> Tensor:
        means = torch.stack([mean_embedding(embeddings, ids) for ids, _ in counts])
        return F.normalize(means.double(), dim=1)

    cost = (1 - embed(old) @ embed(new).T).clamp(min=0)
    return optimal_transport_cost(cost, [n for _, n in old], [n for _, n in new])


def optimal_transport_cost(cost: Tensor, a: Sequence[float], b: Sequence[float]) -> float:
    """The least of `cost` (I, J) that moves I weights a onto J weights b, each scaled to sum 1: a
    linear programme.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    i, j = cost.shape
    leaves = kron(eye_array(i), np.ones((1, j)))  # of each row
    arrives = kron(np.ones((1, i)), eye_array(j))  # in each column
    weights = [n / sum(side) for side in (a, b) for n in side]
    # The constraints sum to the same on both sides: the last one follows from the others.
    told = linprog(
        cost.flatten().tolist(),
        A_eq=vstack([leaves, arrives]).tocsr()[:-1],
        b_eq=weights[:-1],
        method="highs",
    )
    return float(told.fun)
