"""Dark experience replay: remembered examples keep the logits that they had, and the model is held
to them.
"""

from __future__ import annotations

import math
import random
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.errors import ConfigError
from continual.models.loss import accumulate, forward, nll, number_examples, response_logits
from continual.models.model import Model
from continual.models.sharding import clip_gradients
from continual.models.weights import weights
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory
from continual.strategy.replay_buffer import update_reservoir


@dataclass(kw_only=True)
class DER(Strategy):
    """Dark experience replay (Buzzega et al. 2020, eq. 5), and with `beta` above 0 DER++ (eq. 6).

    The loss is that of the new examples, plus `alpha` times the mean squared distance between the
    logits of `minibatch_size` remembered examples and those they had when they came into the buffer,
    plus `beta` times the loss of `minibatch_size` others. The buffer is one reservoir of `capacity`
    examples over all that the steps bring, so logits are of the weights along the way, and an
    example may be in it as it was at two times.

    Logits are kept at response positions alone, in half precision (a relative error of at most
    2^-11), and only the `top_logits` greatest of each position where the vocabulary has more; the mean is
    over what is kept. The mean over a vocabulary rather than the sum of eq. 5 is that of the
    authors' implementation.
    """

    shardable = True
    stores: ClassVar[str] = "E examples, (2 V or 6 top) S E"
    costs: ClassVar[str] = "1 + 2 minibatch / batch"
    capacity: int = 500
    alpha: float = 0.1
    beta: float = 1.0
    minibatch_size: int = 8
    top_logits: int = 1024
    seed: int = 0
    kept: list[dict[str, Any]] = memory(
        list
    )  # example, logits (S, K) and, of fewer than all, their columns (S, K)
    seen: int = memory(int)
    rng: random.Random = memory(random.Random)

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work; seed the generator."""
        super().__post_init__()
        if (
            self.capacity < 0
            or self.minibatch_size < 1
            or self.top_logits < 1
            or min(self.alpha, self.beta) < 0
        ):
            raise ConfigError(
                f"DER with capacity {self.capacity}, minibatch {self.minibatch_size}, top {self.top_logits}, "
                f"alpha {self.alpha} and beta {self.beta}: expected minibatch and top of at "
                "least 1, and no number below 0"
            )
        self.rng.seed(self.seed)

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """The step's own gradient and those of the two terms; then the step's examples are offered
        to the buffer.
        """
        total = super().backward(model, batch)
        if self.kept and self.alpha:
            drawn = self.draw_records()
            far = accumulate(
                lambda model, part: self.alpha * logit_distance(model, part, drawn),
                model,
                number_examples(model, [r["example"] for r in drawn]).micro_batches(),
            )
            total, self.notes["logits"] = total + far, float(far)
        if self.kept and self.beta:
            again = number_examples(model, [r["example"] for r in self.draw_records()])
            total = total + accumulate(
                lambda *at: self.beta * nll(*at), model, again.micro_batches()
            )
        if torch.isfinite(
            total + clip_gradients([*weights(model).values()], math.inf)
        ):  # else the step is not taken
            self.store_logits(model, batch)
        return total

    def draw_records(self) -> list[dict[str, Any]]:
        """Remembered examples, none twice."""
        return self.rng.sample(self.kept, min(self.minibatch_size, len(self.kept)))

    def store_logits(self, model: Model, batch: Batch) -> None:
        """Offer the examples to the reservoir; those it takes are kept with the logits they have
        now.
        """
        arrivals: list[dict[str, Any]] = [{"example": e} for e in batch.examples]
        kept, rng = [*self.kept], copy(self.rng)
        update_reservoir(kept, arrivals, self.capacity, self.seen, rng)
        new = [r for r in kept if "logits" not in r]
        for i, _, logits in response_logits(model, [r["example"] for r in new]):
            columns = None
            if self.top_logits < logits.shape[1]:
                logits, columns = logits.topk(self.top_logits)
            new[i]["logits"] = logits.half().cpu().clone()
            new[i]["columns"] = None if columns is None else columns.int().cpu().clone()
        # Together, and last: where memory runs out before, the step is tried again, and offers its
        # examples once.
        self.kept, self.rng, self.seen = kept, rng, self.seen + len(arrivals)


def logit_distance(model: Model, batch: Batch, records: list[dict[str, Any]]) -> Tensor:
    """The mean squared distance between the batch's logits and those kept; an example's id is its
    place in `kept`.
    """
    ours = forward(model, batch)
    records = [records[int(e.id)] for e in batch.examples]
    theirs = torch.cat([r["logits"] for r in records]).to(ours)
    if records[0]["columns"] is not None:
        ours = ours.gather(1, torch.cat([r["columns"] for r in records]).to(ours.device).long())
    return (ours - theirs).square().mean()
