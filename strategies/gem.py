"""Steps that do not raise the loss of earlier tasks, by projected gradients: GEM and A-GEM."""

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
    """Gradient episodic memory (Lopez-Paz & Ranzato 2017).

    Each step takes the gradient of every earlier task's mean loss over its stored examples, or over
    `sample_size` of them, and projects its own gradient so that no such loss rises to first order
    (eq. 8-11). First order means along the gradient: train.optimizer=sgd keeps this wholly, an
    optimizer that scales each weight's step by itself, as AdamW, in part. `margin` is the authors'
    "memory strength": it turns the step towards what the earlier tasks ask for. Their experiments
    have 0.5 on every stream, and 256 stored examples per task.
    """

    costs: ClassVar[str] = "1 + T sample_size / batch + O(T P)"
    share: float = 0.0
    sample_size: int | None = None
    margin: float = 0.5

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave the projected gradient."""
        loss = super().backward(model, batch)
        if len(self.buffer):
            own = gradient(model)
            references = [
                flatten_weights(to_float32(gradient_of(nll, model, batch.with_examples(chosen))))
                for chosen in self.draw_reference_examples()
            ]
            projected = project_gradient(
                flatten_weights(to_float32(own)), torch.stack(references), self.margin
            )
            set_gradient(model, unflatten_weights(projected, own))
        return loss

    def reference_pools(self) -> list[list[Encoded]]:
        """Return the stored examples, one list for each gradient that a step must not oppose."""
        return list(self.buffer.examples_by_task.values())

    def draw_reference_examples(self) -> list[Sequence[Encoded]]:
        """Draw the examples of each reference gradient of this step."""
        pools = self.reference_pools()
        if self.sample_size is None:
            return [*pools]
        return [self.buffer.draw(min(self.sample_size, len(pool)), pool) for pool in pools]


@dataclass(kw_only=True)
class AGEM(GEM):
    """Averaged GEM (Chaudhry et al. 2019, eq. 11): one reference gradient r for all earlier tasks.

    If the step's gradient g opposes it, the step is g - (g.r / r.r) r. The paper draws 256 examples
    on MNIST and 1300 on the larger images, from memories as large.
    """

    costs: ClassVar[str] = "1 + sample_size / batch + O(P)"
    sample_size: int | None = 256
    margin: float = field(init=False, default=0.0)

    def reference_pools(self) -> list[list[Encoded]]:
        """Return all stored examples as one list."""
        return [self.buffer.examples]


def project_gradient(gradient: Tensor, references: Tensor, margin: float = 0.0) -> Tensor:
    """Return the vector nearest to g (P,) with no negative product with a row of references (K, P).

    g itself if it has none. The result is g + v references, where v minimises
    |g + v references|^2 over v >= margin: the dual problem (Lopez-Paz & Ranzato 2017, eq. 11), with
    K variables. The paper adds the margin to v; its authors' code, as here, bounds v by it.
    """
    products = references @ gradient
    if not products.isfinite().all():
        return gradient + products.sum()  # not finite either, so that the stage sees it
    if not (products < 0).any():
        return gradient
    from scipy.optimize import nnls

    # With references^T = q r, |g + v references| is |r v + q^T g|, up to the part of g outside of
    # the rows' span, which v cannot change. nnls solves for v - margin, which is at least 0.
    q, r = torch.linalg.qr(references.T)
    lower = torch.full_like(products, margin)
    above, _ = nnls(r.double().tolist(), (-(q.T @ gradient + r @ lower)).double().tolist())
    return gradient + (torch.tensor(above).to(lower) + lower) @ references
