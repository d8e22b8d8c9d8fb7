"""Orthogonal gradient descent: steps leave the answers to remembered examples alone."""

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
from continual.strategy.replay_buffer import sample_task_examples


@dataclass(kw_only=True)
class OGD(Strategy):
    """Orthogonal gradient descent, OGD-GTL (Farajtabar et al. 2020, algorithm 1).

    Of `num_examples` of each task it keeps the gradient of the ground-truth logits, summed over an
    example's response tokens, and takes from each later gradient what points along these
    directions. The paper keeps 200 a task. To first order a step along the gradient, as
    train.optimizer=sgd takes it, leaves those logits as they are; an optimizer that scales each
    weight's step by itself, as AdamW, turns it back in part.
    """

    stores: ClassVar[str] = "4 P examples T"
    costs: ClassVar[str] = "1 + O(P examples T)"
    num_examples: int = 200
    seed: int = 0
    turns: int = memory(int)  # stages that are over
    basis: Tensor = memory(lambda: torch.zeros(0, 0))  # (K, P): orthonormal directions

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave the part of the gradient that is orthogonal to every direction kept."""
        loss = super().backward(model, batch)
        if len(self.basis):
            g = gradient(model)
            set_gradient(model, unflatten_weights(project_out(flatten_weights(g), self.basis), g))
        return loss

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Keep the directions of some of the task's examples."""
        super().end(model, task)
        self.turns += 1
        kept = sample_task_examples(task, self.num_examples, f"{self.seed}/{self.turns}")
        for g in per_example_gradients(model, kept, _sum_target_logits):
            self.basis = extend_basis(self.basis, flatten_weights(g))


def _sum_target_logits(logits: Tensor, batch: Batch) -> Tensor:
    """The logits (S, V) of the right tokens, summed."""
    return logits.gather(1, batch.targets[:, None]).sum()


def project_out(g: Tensor, basis: Tensor) -> Tensor:
    """g (P,) less its projection on an orthonormal basis (K, P): algorithm 1, line 5."""
    return g - (basis @ g) @ basis


def extend_basis(basis: Tensor, u: Tensor) -> Tensor:
    """An orthonormal basis (K, P) with one more direction u (P,), unless it spans that already.

    Gram-Schmidt, twice: once loses orthogonality to rounding (Giraud et al. 2005).
    """
    left = project_out(project_out(u, basis), basis) if len(basis) else u
    if left.norm() <= 1e-4 * u.norm():
        return basis
    row = (left / left.norm())[None]
    return torch.cat([basis, row]) if len(basis) else row
