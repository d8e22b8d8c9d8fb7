"""The weights of all stages so far, merged into one set. Methods differ in how they are combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, unknown
from continual.models.model import Model
from continual.models.weights import (
    Weights,
    combine,
    flatten_weights,
    restore,
    safe_ratio,
    snapshot,
    to_float32,
    top_mask,
    weights,
)
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory
from strategies.ewc import task_fisher

INIT_SOURCES = ("merged", "own", "base")


@dataclass(kw_only=True)
class Merge(Strategy):
    """When a stage ends, its weights give way to what they and those of the earlier stages are
    merged into.

    The next stage begins there (`init_from="merged"`), or at the stage's own weights ("own": plain
    sequential fine-tuning, merged for the test alone, as Marczak et al. 2024, "MagMax"), or where
    the first one began ("base": every task is learned alone, as the task vectors of Ilharco et al.
    2023). `interpolation` is how far a stage's weights go towards the merged ones: 1 is all the way, as in
    every paper below, and 0 no merging.

    What is merged are the trainable weights. Of a LoRA adapter these are A and B, each by itself:
    their product is not what merging the products would give.
    """

    interpolation: float = 1.0
    init_from: str = "merged"
    own: Weights = memory(dict)
    origin: Weights = memory(dict)

    def __post_init__(self) -> None:
        """Refuse a beginning that does not exist."""
        super().__post_init__()
        if self.init_from not in INIT_SOURCES:
            raise ConfigError(unknown("init_from", self.init_from, INIT_SOURCES))
        if not 0 <= self.interpolation <= 1:
            raise ConfigError(
                f"merging with blend {self.interpolation}: expected 0 (the stage's own weights) to 1 "
                "(merged)"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Go to where this stage begins."""
        if self.interpolation:
            if self.init_from == "base":
                self.origin = self.origin or snapshot(model)
            if there := {"own": self.own, "base": self.origin}.get(self.init_from):
                restore(model, there)
        return super().begin(model, task)

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Merge. What is listed after this strategy sees the stage's own weights, what is listed
        before it the new.
        """
        super().end(model, task)
        if not self.interpolation:
            return
        here = snapshot(model)
        if self.init_from == "own":
            self.own = here
        merged = self.merge(model, task, to_float32(here))
        restore(
            model, combine(lambda w, m: w.lerp(m.to(w.dtype), self.interpolation), here, merged)
        )

    def merge(self, model: Model, task: Task[Encoded], stage_weights: Weights) -> Weights:
        """What this stage's weights, `here`, and those of all stages before it are merged into."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Average(Merge):
    """The mean of all stages' weights (Wortsman et al. 2022, "Model soups"), each a stage of one
    model's life.

    A running mean, weighted by what `weigh` gives. Where each stage begins at the mean so far it is
    continual model averaging (CoMA, Marouf et al. 2024) with 1/t as the weight of stage t, which
    makes all stages weigh alike.
    """

    stores: ClassVar[str] = "4 P; 8 P where stages begin elsewhere"
    mean: Weights = memory(dict)
    total: Weights = memory(dict)  # of what the stages' weights were weighted by

    def merge(self, model: Model, task: Task[Encoded], stage_weights: Weights) -> Weights:
        """Move the mean by this stage's portion of all that was measured."""
        measured = self.merge_coefficients(model, task)
        self.total = combine(torch.add, self.total, measured) if self.total else measured
        self.mean = combine(
            torch.lerp, self.mean or stage_weights, stage_weights, safe_ratio(measured, self.total)
        )
        return self.mean

    def merge_coefficients(self, model: Model, task: Task[Encoded]) -> Weights:
        """How much each of the stage's weights counts: a number, or one for every weight."""
        return to_float32(
            {n: torch.ones((), dtype=w.dtype, device=w.device) for n, w in weights(model).items()}
        )


@dataclass(kw_only=True)
class FisherMerge(Average):
    """Fisher-weighted averaging (Matena & Raffel 2022): sum_t F_t w_t / sum_t F_t, weight by
    weight.

    It is where the sum of the stages' losses would be lowest, were each a quadratic with curvature
    F_t. Each F_t, of `num_examples` with `labels` "sampled" (the paper's expectation) or "empirical",
    is divided by its norm as in the authors' code, for Fisher values differ by orders of magnitude
    between tasks; a weight that has none in any task stays as it is. Where each stage begins at the
    merged weights it is CoFiMA (Marouf et al. 2024).
    """

    stores: ClassVar[str] = "8 P; 12 P where stages begin elsewhere"
    costs: ClassVar[str] = "1; a Fisher a stage"
    num_examples: int = 100
    labels: str = "sampled"
    seed: int = 0
    merges: int = memory(int)

    def merge_coefficients(self, model: Model, task: Task[Encoded]) -> Weights:
        """The diagonal Fisher information at the stage's own weights, of norm 1."""
        self.merges += 1
        f = task_fisher(model, task, self.num_examples, self.labels, f"{self.seed}/{self.merges}")
        norm = flatten_weights(f).norm().clamp(min=torch.finfo(torch.float32).tiny)
        return combine(lambda t: t / norm, f)


@dataclass(kw_only=True)
class EMA(Merge):
    """An exponential moving average over all steps of all stages (Soutif-Cormerais et al. 2023),
    tested in their place.

    After each optimizer step mean = decay mean + (1 - decay) weights, from where the first stage
    began. Training goes on from its own weights, and knows nothing of the mean. 0.99 is the
    authors' momentum.
    """

    stores: ClassVar[str] = "8 P; 4 P with init_from=merged"
    costs: ClassVar[str] = "1 + O(P)"
    init_from: str = "own"
    decay: float = 0.99
    mean: Weights = memory(dict)
    taken: int = memory(int)  # steps of this stage, the one under way included

    def __post_init__(self) -> None:
        """Refuse a decay that is none."""
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ConfigError(
                f"a moving average with decay {self.decay}: expected 0 up to but not including 1"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """The mean begins with the first stage."""
        trained = super().begin(model, task)
        self.mean, self.taken = self.mean or to_float32(snapshot(model)), 0
        return trained

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Take in what the step before this one came to."""
        loss = super().backward(model, batch)
        if self.taken:
            self.update_average(snapshot(model))
        self.taken += 1
        return loss

    def merge(self, model: Model, task: Task[Encoded], stage_weights: Weights) -> Weights:
        """Take in the last step."""
        self.update_average(stage_weights)
        return self.mean

    def update_average(self, step_weights: Weights) -> None:
        """One step of the average."""
        self.mean = combine(
            lambda m, w: m.lerp(w.to(m.dtype), 1 - self.decay), self.mean, step_weights
        )


@dataclass(kw_only=True)
class TaskVectors(Merge):
    """Where the first stage began plus `scale` times what the stages' task vectors, their ways from
    there, join into.

    By default each stage begins there too, so that its vector is its own task's. From the merged
    weights it cannot begin: each vector would hold the ones before it once more.
    """

    init_from: str = "base"
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse to count a vector twice."""
        super().__post_init__()
        if self.init_from == "merged":
            raise ConfigError(
                "task vectors with init_from=merged: each would hold the ones before it once "
                "more; give base (every task alone) or own (one after another)"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Where the first stage begins, all vectors do."""
        self.origin = self.origin or snapshot(model)
        return super().begin(model, task)

    def merge(self, model: Model, task: Task[Encoded], stage_weights: Weights) -> Weights:
        """Join this stage's vector to those before it."""
        joined = self.merge_vector(combine(torch.sub, stage_weights, to_float32(self.origin)))
        return combine(lambda o, v: o + self.scale * v, to_float32(self.origin), joined)

    def merge_vector(self, vector: Weights) -> Weights:
        """One vector for all, with this one among them."""
        raise NotImplementedError


@dataclass(kw_only=True)
class TaskArithmetic(TaskVectors):
    """Task arithmetic (Ilharco et al. 2023, section 4): the sum of the task vectors, scaled.

    0.4 is what Yadav et al. (2023) take from the authors for when there is nothing to tune it on.
    """

    stores: ClassVar[str] = "8 P; 12 P with init_from=own"
    scale: float = 0.4
    total: Weights = memory(dict)

    def merge_vector(self, vector: Weights) -> Weights:
        """The sum."""
        self.total = combine(torch.add, self.total, vector) if self.total else vector
        return self.total


@dataclass(kw_only=True)
class TIES(TaskVectors):
    """TIES-merging (Yadav et al. 2023, algorithm 1): trim, elect a sign, and average what has it.

    Of each vector the `density` largest values are kept; a weight's sign is that of their sum; its
    value is their mean over the vectors that agree. Sums and counts of the positive and of the
    negative values say all that, so the vectors themselves are not kept. 20% and a scale of 1 are
    the paper's for when there is nothing to tune them on.
    """

    stores: ClassVar[str] = "16 P; 20 P with init_from=own"
    density: float = 0.2
    up: Weights = memory(
        dict
    )  # sums of the positive and of the negative values kept, and how many these are
    down: Weights = memory(dict)
    ups: Weights = memory(dict)
    downs: Weights = memory(dict)

    def __post_init__(self) -> None:
        """Refuse a density that is none."""
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ConfigError(f"TIES with density {self.density}: expected more than 0, up to 1")

    def merge_vector(self, vector: Weights) -> Weights:
        """The disjoint mean of all vectors so far."""
        if not self.up:
            self.up = self.down = combine(torch.zeros_like, vector)
            self.ups = self.downs = combine(
                lambda v: torch.zeros_like(v, dtype=torch.int16), vector
            )
        kept = combine(torch.mul, vector, top_mask(combine(torch.abs, vector), self.density))
        self.up = combine(lambda s, v: s + v.clamp(min=0), self.up, kept)
        self.down = combine(lambda s, v: s + v.clamp(max=0), self.down, kept)
        self.ups = combine(lambda n, v: n + (v > 0), self.ups, kept)
        self.downs = combine(lambda n, v: n + (v < 0), self.downs, kept)
        return combine(
            lambda a, b, n, m: torch.where(a + b >= 0, a / n.clamp(min=1), b / m.clamp(min=1)),
            self.up,
            self.down,
            self.ups,
            self.downs,
        )
