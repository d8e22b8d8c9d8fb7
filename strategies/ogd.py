"""Orthogonal gradient descent: steps do not change the logits of earlier tasks' examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.models.importance import per_example_gradients
from continual.models.model import Model
from continual.models.weights import flatten_weights, gradient, set_gradient, unflatten_weights
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory
from continual.strategy.projection import project_out
from continual.strategy.replay_buffer import sample_task_examples


@dataclass(kw_only=True)
class OGD(Strategy):
    """Orthogonal gradient descent, OGD-GTL (Farajtabar et al. 2020, algorithm 1).

    For `num_examples` of each task it keeps the gradient of the ground-truth logits, summed over an
    example's response tokens, and removes these directions from every later gradient. The paper
    keeps 200 examples per task. To first order a step along the gradient, as train.optimizer=sgd
    takes it, does not change those logits; an optimizer that scales each weight's step by itself,
    as AdamW, undoes this in part.
    """

    stores: ClassVar[str] = "4 P num_examples T"
    costs: ClassVar[str] = "1 + O(P num_examples T)"
    num_examples: int = 200
    seed: int = 0
    turns: int = memory(int)  # finished stages
    basis: Tensor = memory(lambda: torch.zeros(0, 0))  # (K, P): orthonormal directions

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave the part of the gradient that is orthogonal to every stored direction."""
        loss = super().backward(model, batch)
        if len(self.basis):
            g = gradient(model)
            free = project_out(flatten_weights(g), self.basis.T)  # algorithm 1, line 5
            set_gradient(model, unflatten_weights(free, g))
        return loss

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Store the directions of some of the task's examples."""
        super().end(model, task)
        self.turns += 1
        sampled = sample_task_examples(task, self.num_examples, f"{self.seed}/{self.turns}")
        for g in per_example_gradients(model, sampled, _sum_target_logits):
            self.basis = add_direction(self.basis, flatten_weights(g))


def _sum_target_logits(logits: Tensor, batch: Batch) -> Tensor:
    """Sum the logits (S, V) of the right tokens."""
    return logits.gather(1, batch.targets[:, None]).sum()


def add_direction(basis: Tensor, u: Tensor) -> Tensor:
    """Add a direction u (P,) to the rows of an orthonormal basis (K, P), unless they span it.

    Gram-Schmidt, twice: once loses orthogonality to rounding (Giraud et al. 2005).
    """
    residual = u
    if len(basis):
        residual = project_out(project_out(u, basis.T), basis.T)
    if residual.norm() <= 1e-4 * u.norm():
        return basis
    row = (residual / residual.norm())[None]
    return torch.cat([basis, row]) if len(basis) else row
