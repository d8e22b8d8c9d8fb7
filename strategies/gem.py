"""Steps that do not go against remembered tasks: the gradient, projected. GEM and A-GEM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded
from continual.models.loss import gradient_of, nll
from continual.models.model import Model
from continual.models.weights import (
    flatten_weights,
    gradient,
    set_gradient,
    to_float32,
    unflatten_weights,
)
from continual.packing.batch import Batch
from strategies.replay import Replay


@dataclass(kw_only=True)
class GEM(Replay):
    """Gradient episodic memory (Lopez-Paz & Ranzato 2017): the nearest gradient that no remembered
    task objects to.

    Each step takes the gradient of every earlier task's mean loss over its remembered examples, or
    over `sample_size` of them, and projects its own so that no such loss rises to first order (eq.
    8-11). To first order is along the gradient: an optimizer that scales each weight's step by
    itself, as AdamW, keeps it in part, train.optimizer=sgd wholly. The `margin` is the authors'
    "memory strength": it turns the step towards what the remembered tasks ask for. Their
    experiments have 0.5 on every stream, and 256 remembered examples a task.
    """

    costs: ClassVar[str] = "1 + T sample / batch + O(T P)"
    share: float = 0.0
    sample_size: int | None = None
    margin: float = 0.5

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave the projected gradient."""
        loss = super().backward(model, batch)
        if len(self.buffer):
            own = gradient(model)
            others = [
                flatten_weights(to_float32(gradient_of(nll, model, batch.with_examples(chosen))))
                for chosen in self.draw_reference_examples()
            ]
            set_gradient(
                model,
                unflatten_weights(
                    project_gradient(
                        flatten_weights(to_float32(own)), torch.stack(others), self.margin
                    ),
                    own,
                ),
            )
        return loss

    def reference_pools(self) -> list[list[Encoded]]:
        """The remembered examples, a list for each gradient that the step must not oppose."""
        return list(self.buffer.examples_by_task.values())

    def draw_reference_examples(self) -> list[Sequence[Encoded]]:
        """What this step takes those gradients of."""
        if self.sample_size is None:
            return [*self.reference_pools()]
        return [
            self.buffer.draw(min(self.sample_size, len(pool)), pool)
            for pool in self.reference_pools()
        ]


@dataclass(kw_only=True)
class AGEM(GEM):
    """Averaged GEM (Chaudhry et al. 2019, eq. 11): one gradient, of examples drawn from all
    remembered tasks.

    Where the step's gradient g opposes it, the step is g - (g.r / r.r) r. The paper draws 256 on
    MNIST and 1300 on the larger images, of memories as large.
    """

    costs: ClassVar[str] = "1 + sample / batch + O(P)"
    sample_size: int | None = 256
    margin: float = field(init=False, default=0.0)

    def reference_pools(self) -> list[list[Encoded]]:
        """All in one."""
        return [self.buffer.examples]


def project_gradient(gradient: Tensor, others: Tensor, margin: float = 0.0) -> Tensor:
    """The vector nearest to g (P,) that has no negative product with any row of `others` (K, P); g
    where g has none.

    It is g + v others, where v minimises |g + v others|^2 over v >= margin: the dual (Lopez-Paz &
    Ranzato 2017, eq. 11), with K variables. The paper adds the margin to v; its authors' code, as
    here, bounds v by it.
    """
    products = others @ gradient
    if not products.isfinite().all():
        return gradient + products.sum()  # for the stage to see
    if not (products < 0).any():
        return gradient
    from scipy.optimize import nnls

    q, r = torch.linalg.qr(
        others.T
    )  # |g + v others| is |r v + q^T g|, but for what lies outside of the rows' span
    least = torch.full_like(products, margin)
    above, _ = nnls(r.double().tolist(), (-(q.T @ gradient + r @ least)).double().tolist())
    return gradient + (torch.tensor(above).to(least) + least) @ others
