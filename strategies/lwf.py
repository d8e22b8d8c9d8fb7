"""Distillation: on the new task's examples the model is held to what an earlier one would have
said. LwF and ASFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, unknown
from continual.models.loss import capture_logits, response_logits
from continual.models.model import Model
from continual.models.weights import Weights, snapshot
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory

TEACHERS = ("previous", "base")
TeacherOutput = tuple[
    Tensor, Tensor | None
]  # log-probabilities (S, K), and of fewer than all their columns (S, K - 1)


@dataclass(kw_only=True)
class LwF(Strategy):
    """Learning without forgetting (Li & Hoiem 2016, eq. 1 to 3), at response positions of the new
    task's examples.

    The term is `strength` times the mean over the step's tokens of KL(teacher || model), both
    softened by `temperature`: eq. 2's cross-entropy less the teacher's entropy, which has no
    gradient. The `teacher` is the model as it was before the stage ("previous") or before the first
    ("base", whose trainable weights are kept). It answers once, in `begin`, without dropout.
    Examples of other tasks, which another strategy may bring along, have no term.

    Where the vocabulary has more than `top_logits` tokens, the teacher's likeliest are told apart and all
    others count as one. That divergence is exact for what it tells apart and never above the whole
    one.

    With `weight_by_probability` the loss of each token of the step is weighed by the probability p that the model
    gives it, a factor without a gradient: dynamic fine-tuning (DFT, Wu et al. 2025).
    """

    shardable = True
    stores: ClassVar[str] = "nothing; 4 P with the base as teacher"
    costs: ClassVar[str] = "1 + O(V) a response token; a stage begins with one pass"
    strength: float = 1.0
    temperature: float = 2.0
    teacher: str = "previous"
    top_logits: int = 1024
    weight_by_probability: bool = False
    base: Weights = memory(dict)
    teacher_outputs: dict[tuple[int, str], TeacherOutput] = field(
        init=False, repr=False, default_factory=dict
    )  # what `begin` makes

    def __post_init__(self) -> None:
        """Refuse a teacher that does not exist and numbers that cannot work."""
        super().__post_init__()
        if self.teacher not in TEACHERS:
            raise ConfigError(unknown("teacher", self.teacher, TEACHERS))
        if self.strength < 0 or not self.temperature > 0 or self.top_logits < 1:
            raise ConfigError(
                f"LwF with strength {self.strength}, temperature {self.temperature} and top "
                f"{self.top_logits}: expected a strength of at least 0, a temperature above it and a "
                "top of at least 1"
            )

    def is_shardable(self) -> bool:
        """Return True unless the base is the teacher, which answers at other weights."""
        return super().is_shardable() and self.teacher == "previous"

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Ask the teacher for every example of the task."""
        trained = super().begin(model, task)
        self.teacher_outputs = {}
        if self.strength:
            if self.teacher == "base":
                self.base = self.base or snapshot(model)
            for i, _, logits in response_logits(model, task.train, self.base or None):
                self.teacher_outputs[task.train[i].task_index, task.train[i].id] = (
                    self.soften_logits(logits)
                )
        return trained

    def soften_logits(self, logits: Tensor) -> TeacherOutput:
        """The softened distribution of logits (S, V), with the rest as the last of its columns
        where it is cut.
        """
        whole = (logits / self.temperature).log_softmax(-1)
        if self.top_logits >= whole.shape[1]:
            return whole.clone(), None
        kept, columns = whole.topk(self.top_logits)
        return append_rest(kept), columns.int()

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The task's loss and the divergence from the teacher."""
        if not self.teacher_outputs and not self.weight_by_probability:
            return super().loss(model, batch)
        with capture_logits(model, batch) as logits:
            loss = super().loss(model, batch)
        if self.weight_by_probability:
            loss = loss + dynamic_loss_correction(batch, logits())
        return (
            loss + self.strength * self.divergence(batch, logits())
            if self.teacher_outputs
            else loss
        )

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """KL(teacher || model), a scalar: summed over the response tokens that were taught, by the
        step's tokens.
        """
        keys = [(e.task_index, e.id) for e in batch.examples]
        known = torch.tensor([k in self.teacher_outputs for k in keys], device=logits.device)
        at = batch.response_mask & known[batch.example_index]
        if not at.any():
            return logits.new_zeros(())
        taught = [self.teacher_outputs[k] for k in keys if k in self.teacher_outputs]
        p = torch.cat([t for t, _ in taught])
        q = (logits[at] / self.temperature).log_softmax(-1)
        if taught[0][1] is not None:
            q = append_rest(q.gather(1, torch.cat([c for _, c in taught if c is not None]).long()))
        return (
            (p.exp() * (p - q)).sum(-1) * batch.token_weights[at]
        ).sum() / batch.supervised_tokens


def dynamic_loss_correction(batch: Batch, logits: Tensor) -> Tensor:
    """What weighing each token's loss by its probability p changes of the mean: that of (p - 1)
    times it, a scalar.
    """
    loss = F.cross_entropy(logits, batch.targets, reduction="none")
    return (
        ((-loss.detach()).exp() - 1) * loss * batch.token_weights
    ).sum() / batch.supervised_tokens


def append_rest(log_p: Tensor) -> Tensor:
    """Log-probabilities (S, K) and, as one more, that of everything else."""
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    return torch.cat([log_p, rest.clamp(min=torch.finfo(log_p.dtype).eps).log()], -1)


@dataclass(kw_only=True)
class ASFT(LwF):
    """Anchored supervised fine-tuning (Zhu et al. 2025): dynamic fine-tuning beside the divergence
    from the base.

    The defaults are those of the authors' command line.
    """

    stores: ClassVar[str] = "4 P"
    strength: float = 0.05
    temperature: float = 1.0
    teacher: str = "base"
    weight_by_probability: bool = True
