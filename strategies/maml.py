"""Meta-learning: each step prepares the weights for a few steps of learning, on the current and remembered tasks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from continual.data import Encoded
from continual.dealing import dealt
from continual.loss import accumulate, evaluated_at, nll
from continual.model import Model
from continual.packing import Batch
from continual.parallel import apart, summed
from continual.weights import Weights, combine, weights
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

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """The sum over episodes of what each leaves, by its share of the step's supervised tokens."""
        if not self.inner_steps:
            return super().backward(model, batch)
        episodes = [e for e in self.episodes(batch) if e.tokens]
        tokens, total = sum(e.tokens for e in episodes), torch.zeros((), device=batch.layout.device)
        with summed(model.trained or list(weights(model).values()), total):
            for episode in dealt(episodes, [e.length for e in episodes]):
                with apart():
                    total += self.episode(model, episode, episode.tokens / tokens)
        return total

    def episode(self, model: Model, episode: Batch, share: float) -> Tensor:
        """Add `share` of one episode's direction to every `.grad`; that share of its loss."""
        raise NotImplementedError

    def judged(self, model: Model, at: Weights, batch: Batch, share: float) -> Tensor:
        """Back-propagate `share` of the loss at the weights `at` to them, by micro-batches; that share of it.

        The terms of strategies that this one is composed with have their part in it.
        """
        return accumulate(lambda model, part: share * evaluated_at(model, at, lambda: self.loss(model, part)), model,
                          batch.micro_batches())


@dataclass(kw_only=True)
class MAML(Episodic):
    """Model-agnostic meta-learning (Finn et al. 2017, algorithm 1), on every optimizer step's examples.

    Each task's examples are halved: `inner_steps` of SGD on the support half lead to fast weights, whose loss on the
    query half is minimised with respect to the weights before them. `second_order=False` takes the fast weights'
    gradient as that of the weights (section 5.2). An episode of a single example serves as both halves.

    No more than one micro-batch's graph is held at a time: the second order goes back through the inner loop step by
    step, v <- v - inner_lr H v with the Hessian H of the support loss at the weights before the step.
    """

    second_order: bool = False

    def episode(self, model: Model, episode: Batch, share: float) -> Tensor:
        """The gradient of the query loss at the fast weights, as a function of the weights before them."""
        n = len(episode.examples)
        half = (n + 1) // 2
        support, query = episode.pick(range(half)), episode.pick(range(half if n > 1 else 0, n))
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self.second_order else nullcontext():
            return self.through(model, [support.micro_batches()] * self.inner_steps, query, share)

    def through(self, model: Model, steps: Sequence[Sequence[Batch]], query: Batch, share: float) -> Tensor:
        """Add `share` of the query loss's gradient through these inner steps, each of some micro-batches; its loss."""
        seed, at = int(torch.randint(2**62, ())), leaves(weights(model))
        path: list[Weights] = []
        for i, parts in enumerate(steps):
            torch.manual_seed(seed + i)
            accumulate(partial(nll, at=at), model, parts)
            path += [at] * self.second_order
            at = leaves(combine(lambda w, g: w - self.inner_lr * g, at, taken(at)))
        loss = self.judged(model, at, query, share)
        v = taken(at)
        for i, before in reversed([*enumerate(path)]):
            torch.manual_seed(seed + i)  # what was dropped out on the way there is so on the way back
            v = combine(lambda v, h: v - self.inner_lr * h, v, bent(model, before, steps[i], v))
        add(model, v)
        return loss


@dataclass(kw_only=True)
class Reptile(Episodic):
    """Reptile (Nichol et al. 2018, algorithm 2): the step points to where `inner_steps` of SGD lead from here.

    Each task's examples are dealt to the inner steps; the gradient is (weights - fast weights) / inner_lr, which is the
    sum of the inner gradients, averaged over the tasks by their share of the step's supervised tokens.
    """

    inner_steps: int = 4

    def episode(self, model: Model, episode: Batch, share: float) -> Tensor:
        """Walk the inner loop and add up its gradients; the mean loss on the way."""
        n, at = len(episode.examples), leaves(weights(model))
        k, total = min(self.inner_steps, n), torch.zeros((), device=episode.layout.device)
        for i in range(k):
            total += self.judged(model, at, episode.pick(range(i, n, k)), share)
            g = taken(at)
            add(model, g)
            at = leaves(combine(lambda w, g: w - self.inner_lr / share * g, at, g))
        return total / k


def leaves(w: Weights) -> Weights:
    """Weights of the same values, to which gradients can flow."""
    return {n: t.detach().clone().requires_grad_() for n, t in w.items()}


def taken(at: Weights) -> Weights:
    """The leaves' gradients, zero where there is none; the leaves have none any more."""
    found = {n: torch.zeros_like(w, requires_grad=False) if w.grad is None else w.grad for n, w in at.items()}
    for w in at.values():
        w.grad = None
    return found


def add(model: Model, g: Weights) -> None:
    """Add to every weight's gradient."""
    for n, w in weights(model).items():
        w.grad = g[n] if w.grad is None else w.grad.add_(g[n])


def bent(model: Model, at: Weights, parts: Sequence[Batch], v: Weights) -> Weights:
    """H v, where H is the Hessian of the parts' mean loss at the leaves `at`: one backward pass through another's."""
    def along(model: Model, part: Batch) -> Tensor:
        g = torch.autograd.grad(nll(model, part, at), list(at.values()), create_graph=True, allow_unused=True)
        return torch.stack([(d * v[n]).sum() for n, d in zip(at, g, strict=True) if d is not None]).sum()

    accumulate(along, model, parts)
    return taken(at)
