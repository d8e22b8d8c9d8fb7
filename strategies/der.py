"""Dark experience replay: stored examples keep their logits, and the model is held to these."""

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
    logits of `minibatch_size` stored examples and the logits they had when they were stored, plus
    `beta` times the loss of `minibatch_size` others. The buffer is one reservoir of `capacity`
    examples over all that the steps bring, so logits are those of the weights during training, and
    an example may be stored twice, as it was at two times.

    Logits are kept at response positions only, in half precision (a relative error of at most
    2^-11), and only the `top_logits` greatest of each position if the vocabulary has more; the mean
    is over what is kept. The mean over a vocabulary rather than the sum of eq. 5 is that of the
    authors' implementation.
    """

    shardable = True
    stores: ClassVar[str] = "E examples, (2 V or 6 top_logits) S E"
    costs: ClassVar[str] = "1 + 2 minibatch_size / batch"
    capacity: int = 500
    alpha: float = 0.1
    beta: float = 1.0
    minibatch_size: int = 8
    top_logits: int = 1024
    seed: int = 0
    # Records: "example"; "logits" (S, K); "columns" (S, K), the logits' tokens, or None for all.
    kept: list[dict[str, Any]] = memory(list)
    seen: int = memory(int)
    rng: random.Random = memory(random.Random)

    def __post_init__(self) -> None:
        """Validate the settings; seed the generator."""
        super().__post_init__()
        too_small = min(self.minibatch_size, self.top_logits) < 1
        if too_small or min(self.capacity, self.alpha, self.beta) < 0:
            raise ConfigError(
                f"DER with capacity {self.capacity}, minibatch_size {self.minibatch_size}, "
                f"top_logits {self.top_logits}, alpha {self.alpha} and beta {self.beta}: expected "
                "minibatch_size and top_logits of at least 1, and no number below 0"
            )
        self.rng.seed(self.seed)

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Add the gradients of the two terms; then offer the step's examples to the buffer."""
        total = super().backward(model, batch)
        if self.kept and self.alpha:
            records = self.draw_records()
            replayed = number_examples(model, [r["example"] for r in records])
            logit_loss = accumulate(
                lambda model, part: self.alpha * logit_distance(model, part, records),
                model,
                replayed.micro_batches(),
            )
            total = total + logit_loss
            self.notes["logits"] = float(logit_loss)
        if self.kept and self.beta:
            replayed = number_examples(model, [r["example"] for r in self.draw_records()])
            total = total + accumulate(
                lambda model, part: self.beta * nll(model, part), model, replayed.micro_batches()
            )

        # The norm is finite only if every gradient is; the stage skips the step otherwise.
        norm = clip_gradients([*weights(model).values()], math.inf)
        if torch.isfinite(total + norm):
            self.store_logits(model, batch)
        return total

    def draw_records(self) -> list[dict[str, Any]]:
        """Draw records, each at most once."""
        return self.rng.sample(self.kept, min(self.minibatch_size, len(self.kept)))

    def store_logits(self, model: Model, batch: Batch) -> None:
        """Offer the examples to the reservoir, and store the current logits of those it takes."""
        arrivals: list[dict[str, Any]] = [{"example": e} for e in batch.examples]
        kept = [*self.kept]
        rng = copy(self.rng)
        update_reservoir(kept, arrivals, self.capacity, self.seen, rng)

        new = [r for r in kept if "logits" not in r]
        for i, _, logits in response_logits(model, [r["example"] for r in new]):
            columns = None
            if self.top_logits < logits.shape[1]:
                logits, columns = logits.topk(self.top_logits)
            new[i]["logits"] = logits.half().cpu().clone()
            new[i]["columns"] = None if columns is None else columns.int().cpu().clone()

        # All state changes together, and last: if memory runs out before, the step is tried again,
        # and must not offer its examples twice.
        self.kept = kept
        self.rng = rng
        self.seen += len(arrivals)


def logit_distance(model: Model, batch: Batch, records: list[dict[str, Any]]) -> Tensor:
    """Return the mean squared distance between the batch's logits and the stored ones, a scalar.

    An example's id is the index of its record.
    """
    logits = forward(model, batch)
    records = [records[int(e.id)] for e in batch.examples]
    stored = torch.cat([r["logits"] for r in records]).to(logits)
    if records[0]["columns"] is not None:
        columns = torch.cat([r["columns"] for r in records]).to(logits.device).long()
        logits = logits.gather(1, columns)
    return (logits - stored).square().mean()
