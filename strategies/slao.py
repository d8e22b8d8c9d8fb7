"""One LoRA for all tasks: each is learned from an orthonormal basis of the last one's, and merged
into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.lora import factors
from continual.models.model import Model
from continual.strategy.interface import Strategy, memory


@dataclass(kw_only=True)
class SLAO(Strategy):
    """Single LoRA continual learning via continual merging (Qiao & Mahdavi 2025, arXiv 2512.23017).

    Task i is learned from the last task's own factors, before they were merged: from its B, and
    from A = Q^T where Q R = A_{i-1}^T, an orthonormal basis of the rows of its A. Then A_merge =
    A_i, and B_merge takes a step towards B_i: B_merge += lambda(i) (B_i - B_merge) with lambda(i) =
    i^-power; the paper's is 1 / sqrt(i), for the changes of different tasks are about orthogonal.
    The merged LoRA is tested, and is what a checkpoint holds. Of the two matrices Q that a QR
    decomposition leaves open for each row, it is the one that points as A does, so that B meets
    what it has learned with. `power=0` does not merge, and `orthogonal_init=False` goes on from A
    itself.
    """

    stores: ClassVar[str] = "at most 8 P"
    power: float = 0.5
    orthogonal_init: bool = True
    tuned: list[list[Tensor]] = memory(list)  # of each module the last task's A and B
    merged: list[Tensor] = memory(list)  # of each module B_merge
    merges: int = memory(int)

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Go on from the last task's factors; raises ConfigError where a LoRA is not all that
        trains, or too wide.
        """
        pairs = factors(model)
        if self.orthogonal_init and (high := [a for a, _ in pairs if len(a) > a[0].numel()]):
            raise ConfigError(
                f"a LoRA of rank {len(high[0])} on {high[0][0].numel()} inputs has no "
                "orthonormal basis; set model.adapters.lora.r lower, or "
                "strategy.slao.orthogonal_init=false"
            )
        with torch.no_grad():
            for (a, b), (last_a, last_b) in zip(pairs, self.tuned or pairs, strict=True):
                a.copy_(
                    orthonormal_basis(last_a) if self.orthogonal_init and self.tuned else last_a
                )
                b.copy_(last_b)
        return super().begin(model, task)

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Merge the task's factors into those of all."""
        super().end(model, task)
        pairs = factors(model)
        self.merges += 1
        self.tuned = [[w.detach().clone() for w in pair] for pair in pairs]
        before = self.merged or [torch.zeros_like(b) for _, b in self.tuned]
        self.merged = [
            torch.lerp(m, b, self.merges**-self.power)
            for m, (_, b) in zip(before, self.tuned, strict=True)
        ]
        with torch.no_grad():
            for (_, b), m in zip(pairs, self.merged, strict=True):
                b.copy_(m)


def orthonormal_basis(a: Tensor) -> Tensor:
    """An orthonormal basis of the space that the rows of A (R, in) span, of A's shape; R is at most
    `in`.
    """
    q, r = torch.linalg.qr(a.detach().flatten(1).T.to(torch.promote_types(a.dtype, torch.float32)))
    q *= torch.where(r.diagonal() < 0, -1, 1)
    rows: Tensor = q.T.reshape(a.shape).to(a.dtype)
    return rows
