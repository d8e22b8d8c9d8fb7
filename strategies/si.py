"""A weight matters by what its own path did to the loss: synaptic intelligence and Riemannian walk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.models.importance import fisher
from continual.models.model import Model
from continual.models.weights import (
    Weights,
    all_finite,
    combine,
    gradient,
    snapshot,
    to_float32,
    weights,
    zeros,
)
from continual.packing.batch import Batch
from continual.strategy.interface import memory
from strategies.ewc import SummedImportance


@dataclass(kw_only=True)
class SI(SummedImportance):
    """Synaptic intelligence (Zenke et al. 2017, eq. 3-5).

    omega_i sums -g_i * (the step of weight i) over the stage, g the gradient of the task's own
    loss, without the pull: a path integral, all of them together the fall of the loss. A task's
    importance is omega / (distance^2 + damping), and that of all tasks is their sum, negative sums
    counted as 0 as in the authors' code. Their damping xi is 0.1 on permuted MNIST, where their c,
    half our `strength`, is 0.1.
    """

    stores: ClassVar[str] = "8 P; 24 P within a stage"
    costs: ClassVar[str] = "1 + O(P)"
    strength: float = 0.2
    damping: float = 0.1
    omega: Weights = memory(dict)
    start: Weights = memory(dict)  # where omega began
    before: Weights = memory(dict)  # the weights at the last step's begin, and the gradient there
    slope: Weights = memory(dict)
    path_importance: Weights = field(
        init=False, repr=False, default_factory=dict
    )  # the importance, once the path is over

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """A new path begins."""
        trained = super().begin(model, task)
        if self.strength:
            self.omega, self.start, self.before, self.slope = (
                to_float32(zeros(model)),
                snapshot(model),
                {},
                {},
            )
        return trained

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Add what the last step did; note where this one begins."""
        loss = super().backward(model, batch)
        if self.strength:
            self.add_path_integral(model)
            self.before, self.slope = snapshot(model), self.gradient_without_penalty(model)
        return loss

    def add_path_integral(self, model: Model) -> None:
        """Add the last step's part of the integral. A weight that stood still adds nothing,
        whatever its gradient.
        """
        if self.slope:
            moved = combine(torch.sub, weights(model), self.before)
            self.omega = combine(
                lambda o, g, d: o - torch.where(d == 0, 0, g.to(o.dtype) * d),
                self.omega,
                self.slope,
                moved,
            )

    def gradient_without_penalty(self, model: Model) -> Weights:
        """The gradient without the penalty's part, strength * importance * (w - anchor)."""
        g = gradient(model)
        if not self.anchor:
            return g
        return combine(
            lambda g, i, w, a: g - self.strength * i * (w - a),
            g,
            self.importance,
            weights(model),
            self.anchor,
        )

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """The path is over: where a strategy that is listed behind, as a merge, then puts the
        weights is no step.
        """
        if self.strength:
            self.add_path_integral(model)
            self.path_importance = self.compute_path_importance(model)
            self.omega, self.start, self.before, self.slope = {}, {}, {}, {}
        super().end(model, task)

    def measure_importance(self, model: Model, task: Task[Encoded]) -> Weights:
        """The task's importance, of its path alone."""
        found, self.path_importance = self.path_importance, {}
        return found

    def compute_path_importance(self, model: Model) -> Weights:
        """Of the path from its start to here."""
        return combine(
            lambda o, w, s: o / ((w - s).square() + self.damping),
            self.omega,
            weights(model),
            self.start,
        )


@dataclass(kw_only=True)
class RWalk(SI):
    """Riemannian walk (Chaudhry et al. 2018, eq. 6-8).

    Every `every_steps` steps a weight's score grows by the loss that its path took off since, over the KL
    divergence that it caused, omega / (F (w - start)^2 / 2 + damping), negative ones counted as 0
    (eq. 7); and F becomes alpha times the Fisher of the step's batch plus (1 - alpha) F (EWC++, eq.
    6). At a task's end the scores are averaged with those of earlier tasks, and the importance is F
    + score, each divided by its largest value (eq. 8, section 4.3). alpha is the paper's, the
    damping that of the authors' code. Its lambda is half our `strength`.
    """

    stores: ClassVar[str] = "16 P; 36 P within a stage"
    costs: ClassVar[str] = "1 + O(P) + a Fisher of the step / every"
    strength: float = 2.0
    damping: float = 1e-3
    alpha: float = 0.9
    every_steps: int = 10
    running: Weights = memory(dict)  # the Fisher information
    score: Weights = memory(dict)  # of the stage
    scores: Weights = memory(dict)  # of the stages before
    steps: int = memory(int)

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """A new score begins; the Fisher information runs on."""
        trained = super().begin(model, task)
        if self.strength:
            self.score, self.steps = to_float32(zeros(model)), 0
        return trained

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Now and then, score the path walked since and move the running Fisher on."""
        loss = super().backward(model, batch)
        # A step that is not finite is not taken.
        if self.strength and (
            self.steps % self.every_steps or all_finite({"": loss, **self.slope})
        ):
            if self.steps % self.every_steps == 0:
                self.update_score(model)
                now = fisher(model, batch.examples)
                self.running = combine(
                    lambda n, f: self.alpha * n + (1 - self.alpha) * f, now, self.running or now
                )
            self.steps += 1
        return loss

    def update_score(self, model: Model) -> None:
        """Add the walked path's part to the score, and begin another here."""
        part = combine(
            lambda o, f, w, s: (o / (f / 2 * (w - s).square() + self.damping)).clamp(min=0),
            self.omega,
            self.running or self.omega,
            weights(model),
            self.start,
        )
        self.score = combine(torch.add, self.score, part)
        self.omega, self.start = to_float32(zeros(model)), snapshot(model)

    def compute_path_importance(self, model: Model) -> Weights:
        """Of the whole stage, and the earlier ones."""
        self.update_score(model)
        self.scores = combine(
            lambda old, new: (old + new) / 2, self.scores or self.score, self.score
        )
        self.score = {}
        return combine(
            torch.add, scale_to_unit(self.running or zeros(model)), scale_to_unit(self.scores)
        )

    def consolidate(self, end_weights: Weights, task_importance: Weights) -> None:
        """It stands for all tasks already."""
        self.anchor, self.importance = end_weights, task_importance


def scale_to_unit(w: Weights) -> Weights:
    """Divided by the largest of all values, none of which is negative, so that they lie between 0
    and 1.
    """
    largest = torch.stack([t.max() for t in w.values()]).max()
    return combine(lambda t: torch.where(largest > 0, t / largest, t), w)
