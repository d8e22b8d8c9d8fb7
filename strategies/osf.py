"""Orthogonal subspace fine-tuning: the strongest directions of every weight matrix stay as they
were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.model import Model
from continual.models.weights import Weights, weights
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy


@dataclass(kw_only=True)
class OSF(Strategy):
    """Orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv 2504.07097): full fine-tuning
    beside what is known.

    At a stage's begin each matrix is decomposed, W = U S V^T. Of its singular vectors the first
    ones, the share `rank_share` of the smaller dimension, stay with their singular values: the change D
    of the matrix has U_high^T D = 0 and D V_high = 0. Gradients are projected, g - U U^T g - g V
    V^T + U U^T g V V^T, which is what the paper's projected gradients of the factors U_low, S_low
    and V_low add up to. An optimizer that scales each weight's step by itself, as AdamW and not
    train.optimizer=sgd, leaves that subspace again: so before the next step, and at the end, the
    stage's whole change is projected.

    peft's OSF has a `rank_share` of 0.5 by default. The paper lets it differ from layer to layer, by how
    alike a layer's inputs and outputs are; here it is one number, as in peft's and the authors'
    training code. Embeddings and vectors train freely, as do directions that do nothing: of an
    adapter, whose factors are matrices too, those still at zero.
    """

    stores: ClassVar[str] = "nothing"
    costs: ClassVar[str] = "1 + two projections of each matrix; an SVD a stage"
    rank_share: float = 0.5
    frozen_subspaces: dict[str, tuple[Tensor, Tensor, Tensor]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        super().__post_init__()
        if not 0 <= self.rank_share <= 1:
            raise ConfigError(
                f"osf with keep {self.rank_share}: expected a share from 0 to 1 of each matrix's "
                "directions"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Decompose the matrices as they are now."""
        trained = super().begin(model, task)
        self.frozen_subspaces = (
            {
                n: (w.detach().clone(), *top_singular_vectors(w.detach(), self.rank_share))
                for n, w in trained_matrices(model).items()
            }
            if self.rank_share
            else {}
        )
        return trained

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave the projected gradient, at weights whose change is projected."""
        self.restore_frozen(model)
        loss = super().backward(model, batch)
        for w, _, u, v in self.frozen_with_weights(model):
            if w.grad is not None:
                w.grad = project_off_subspaces(w.grad, u, v)
        return loss

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Project the last step too."""
        self.restore_frozen(model)
        self.frozen_subspaces = {}
        super().end(model, task)

    @torch.no_grad()
    def restore_frozen(self, model: Model) -> None:
        """Take from the stage's change so far what lies in the kept directions; exactly nothing,
        where nothing does.
        """
        for w, start, u, v in self.frozen_with_weights(model):
            w.copy_(start + project_off_subspaces(w - start, u, v))

    def frozen_with_weights(self, model: Model) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Each live matrix (M, N) with its start (M, N) and what is kept of it, U (M, k) and V (N,
        k).
        """
        live = weights(model)
        return [(live[n], *kept) for n, kept in self.frozen_subspaces.items()]


def trained_matrices(model: Model) -> Weights:
    """The live trainable weights with two dimensions, but for embeddings, of words or positions,
    and the head.
    """
    others = [
        *(m for m in model.net.modules() if isinstance(m, nn.Embedding)),
        model.net.get_output_embeddings(),
    ]
    free = {id(m.weight) for m in others if m}
    return {n: w for n, w in weights(model).items() if w.ndim == 2 and id(w) not in free}


def top_singular_vectors(w: Tensor, rank_share: float) -> tuple[Tensor, Tensor]:
    """U (M, k) and V (N, k): the left and right singular vectors of w (M, N) with the largest
    singular values.

    k is the share of min(M, N), rounded down as peft does; a vector whose singular value is 0 is 0
    itself.
    """
    u, s, vt = torch.linalg.svd(
        w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False
    )
    there = s > s[0] * max(w.shape) * torch.finfo(s.dtype).eps  # as torch.linalg.matrix_rank
    k = int(min(w.shape) * rank_share)
    return (u * there)[:, :k].to(w.dtype), (vt.T * there)[:, :k].to(w.dtype)


def project_off_subspaces(d: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The part of d (M, N) that is orthogonal to the columns of u (M, k) on the left and of v (N,
    k) on the right.
    """
    d = d - u @ (u.T @ d)
    return d - (d @ v) @ v.T
