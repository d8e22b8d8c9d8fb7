"""Incremental LoRA: each task learns a block of the LoRA's rank, and those of earlier tasks stay as
they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.models.lora import factors
from continual.models.model import Model
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, to_param_groups


@dataclass(kw_only=True)
class IncrementalLoRA(Strategy):
    """A new LoRA of `rank` for each task, the sum of all of them active (IncLoRA, a baseline of
    Wang et al. 2023).

    The model's one LoRA, of rank R, is the sum of R / rank such blocks, each some rows of A and
    columns of B: B A = sum_k B_k A_k. A task learns the block behind the last one whose B is not
    zero, for a LoRA begins with B = 0 and a checkpoint goes on where it is. Earlier blocks are
    frozen, later ones give nothing. Weight decay is off, for it would shrink the frozen blocks too.
    With `rank=0` the whole LoRA learns every task, as without the strategy.
    """

    rank: int = 8  # the authors' lora_dim
    first_row: int = field(
        init=False, repr=False, default=0
    )  # row of A where the task's block begins; `begin` finds it
    frozen_blocks: list[Tensor] = field(
        init=False, repr=False, default_factory=list
    )  # the blocks before it, as they were

    def __post_init__(self) -> None:
        """Refuse a rank below 0."""
        super().__post_init__()
        if self.rank < 0:
            raise ConfigError(
                f"found {self.rank} as the rank of a task's block of the LoRA; expected at least "
                "1, or 0 to let all of it learn every task"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Find the task's block; raises ConfigError where there is no room, for a stream's first
        task for all of it.
        """
        trained = super().begin(model, task)
        if not self.rank:
            return trained
        pairs = factors(model)
        used = max(_count_used_columns(b) for _, b in pairs)
        self.first_row = -(-used // self.rank) * self.rank
        left = (min(len(a) for a, _ in pairs) - self.first_row) // self.rank
        wanted = (
            1
            if used
            else 1 + len(set(range(len(task.task_names))) - {e.task_index for e in task.train})
        )
        if left < wanted:
            raise ConfigError(
                f"the LoRA has room for {left} more tasks of rank {self.rank}, expected "
                f"{wanted}; set model.adapters.lora.r={self.first_row + wanted * self.rank} or more "
                "(its lora_alpha in proportion, for a LoRA's scale is lora_alpha / r), or a "
                "lower rank for each task"
            )
        self.frozen_blocks = [t.clone() for t in self.earlier_blocks(model)]
        return [{**group, "weight_decay": 0.0} for group in to_param_groups(trained)]

    def earlier_blocks(self, model: Model) -> list[Tensor]:
        """What each factor has of the blocks before the task's."""
        return [
            t
            for a, b in factors(model)
            for t in (a.detach()[: self.first_row], b.detach()[:, : self.first_row])
        ]

    @property
    def block(self) -> slice:
        """The rows of A and the columns of B that the task learns."""
        return slice(self.first_row, self.first_row + self.rank)

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave a direction for the task's block alone."""
        loss = super().backward(model, batch)
        if self.rank:
            for a, b in factors(model):
                for g in (a.grad, None if b.grad is None else b.grad.transpose(0, 1)):
                    if g is not None:
                        g[: self.block.start] = 0
                        g[self.block.stop :] = 0
        return loss

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """See that no step moved another block: earlier ones stand still, and later ones would be
        in use.
        """
        before = zip(self.frozen_blocks, self.earlier_blocks(model), strict=True)
        if self.rank and (
            max(_count_used_columns(b) for _, b in factors(model)) > self.block.stop
            or not all((was == now).all() for was, now in before)
        ):
            raise ConfigError(
                "a strategy that is listed beside this one moved other blocks than the task's, "
                "for its steps do not end here; list this one first"
            )
        super().end(model, task)


def _count_used_columns(b: Tensor) -> int:
    """The columns of B (out, R) up to the last one that is not zero."""
    there = b.detach().transpose(0, 1).flatten(1).any(1)
    return int((there * torch.arange(1, len(there) + 1, device=b.device)).max())
