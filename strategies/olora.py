"""Orthogonal low-rank adaptation: a task's LoRA keeps away from the directions that earlier ones
read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from continual.models.lora import factors
from continual.models.model import Model
from continual.packing.batch import Batch
from strategies.incremental_lora import IncrementalLoRA


@dataclass(kw_only=True)
class OLoRA(IncrementalLoRA):
    """O-LoRA (Wang et al. 2023, arXiv 2310.14152): incremental LoRA and a loss for what is not
    orthogonal.

    The rows of A stand for the directions that a task's gradients have. The loss adds lambda_1 *
    sum_i |A_i A_t^T|, all entries' absolute values over every earlier task i and every module, and
    lambda_2 * the norms of the task's own A_t and B_t, as the authors' code does. The defaults are
    those of their scripts, which train large models at a rate of 1e-3: the pull is as strong for a
    small entry as for a large one, and at a higher rate A jitters and learns nothing.
    """

    costs: ClassVar[str] = "1 + O(rank P)"
    lambda_1: float = 0.5
    lambda_2: float = 0.0

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The task's loss and the two terms."""
        loss, terms = super().loss(model, batch), self.penalty_terms(model) if self.rank else []
        return loss + torch.stack(terms).sum() if terms else loss

    def penalty_terms(self, model: Model) -> list[Tensor]:
        """What each module adds; none where nothing does."""
        told = []
        for a, b in factors(model):
            new, old = a[self.block].flatten(1), a[: self.first_row].flatten(1).detach()
            if self.lambda_1 and len(old):
                told.append(self.lambda_1 * (old @ new.T).abs().sum())
            if self.lambda_2:
                told.append(self.lambda_2 * (new.norm() + b[:, self.block].norm()))
        return told
