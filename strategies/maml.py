"""Meta-learning: each step prepares the weights for a few steps of learning, on the current and remembered tasks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from continual.data import Encoded
from continual.dealing import dealt
from continual.loss import accumulate, evaluated_at, nll
from continual.model import Model
from continual.packing import Batch
from continual.parallel import add_up, alike
from continual.weights import Weights, combine, restore, set_gradient, snapshot, weights, zeros
from strategies.replay import Replay


@dataclass(kw_only=True)
class Episodic(Replay):
    """A step is one episode a task: the new examples, and remembered ones of one earlier task beside them.

    With `inner_steps=0` there is no inner loop, and the step is plain replay.
    """

    inner_lr: float = 0.01
    inner_steps: int = 1

    def recall(self, n: int) -> Sequence[Encoded]:
        """All from one remembered task, for an episode needs several examples of it."""
        pools = list(self.buffer.by_task.values())
        return self.buffer.draw(n, self.buffer.rng.choice(pools)) if pools and n else []

    def episodes(self, batch: Batch) -> list[Batch]:
        """The step's examples, task by task."""
        return list(self.joined(batch).by_task().values())


@dataclass(kw_only=True)
class MAML(Episodic):
    """Model-agnostic meta-learning (Finn et al. 2017, algorithm 1), on every optimizer step's examples.

    Each task's examples are halved: `inner_steps` of SGD on the support half lead to fast weights, whose loss on the
    query half is minimised with respect to the weights before them. `second_order=False` takes the fast weights'
    gradient as that of the weights (section 5.2). An episode of a single example serves as both halves.
    """

    costs: ClassVar[str] = "(1 + inner_steps) / 2 / (1 - share)"
    second_order: bool = False

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """The meta-gradient, the sum over episodes by their share of the step's supervised tokens."""
        if not self.inner_steps:
            return super().backward(model, batch)
        return accumulate(self.loss, model, self.episodes(batch))

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The query loss at fast weights of one episode; Strategy.loss with no inner step."""
        outer = super().loss  # with the terms of strategies that this one is composed with
        if not self.inner_steps:
            return outer(model, batch)
        n = len(batch.examples)
        half = (n + 1) // 2
        support, query = batch.pick(range(half)), batch.pick(range(half if n > 1 else 0, n))
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self.second_order else nullcontext():
            return evaluated_at(model, self.fast(model, support), lambda: outer(model, query))

    def fast(self, model: Model, support: Batch) -> Weights:
        """The weights after the inner loop, a function of the model's own."""
        fast = weights(model)
        for _ in range(self.inner_steps):
            g = torch.autograd.grad(nll(model, support, fast), list(fast.values()), create_graph=self.second_order,
                                    allow_unused=True)
            fast = {n: w if d is None else w - self.inner_lr * d for (n, w), d in zip(fast.items(), g, strict=True)}
        return fast


@dataclass(kw_only=True)
class Reptile(Episodic):
    """Reptile (Nichol et al. 2018, algorithm 2): the step points to where `inner_steps` of SGD lead from here.

    Each task's examples are dealt to the inner steps; the gradient is (weights - fast weights) / inner_lr, averaged
    over the tasks by their share of the step's supervised tokens.
    """

    inner_steps: int = 4

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Walk the inner loop of each episode from the same start, and leave the mean direction."""
        if not self.inner_steps:
            return super().backward(model, batch)
        episodes = [e for e in self.episodes(batch) if e.tokens]
        start, direction = snapshot(model), zeros(model)
        tokens, total = sum(e.tokens for e in episodes), torch.zeros((), device=batch.layout.device)
        with alike():
            for episode in dealt(episodes, [e.length for e in episodes]):
                share = episode.tokens / tokens
                total += share * self.walk(model, episode)
                direction = combine(lambda d, s, w, share=share: d + share / self.inner_lr * (s - w), direction, start,
                                    weights(model))
                restore(model, start)
        add_up([*direction.values(), total])
        set_gradient(model, direction)
        return total

    def walk(self, model: Model, episode: Batch) -> Tensor:
        """Move the model's weights by the inner loop; the mean loss on the way."""
        k = min(self.inner_steps, len(episode.examples))
        total = torch.zeros((), device=episode.layout.device)
        for i in range(k):
            live = list(weights(model).values())
            loss = self.loss(model, episode.pick(range(i, len(episode.examples), k)))
            grads = torch.autograd.grad(loss, live, allow_unused=True)
            with torch.no_grad():
                for w, g in zip(live, grads, strict=True):
                    if g is not None:
                        w -= self.inner_lr * g
            total += loss.detach() / k
        return total
