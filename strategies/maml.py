"""Meta-learning: each step prepares the weights for a few steps of learning, on the current and
remembered tasks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from continual.data.types import Encoded, Task
from continual.distributed.processes import all_reduce_gradients, single_process
from continual.distributed.work import iter_own_items
from continual.errors import ConfigError, unknown
from continual.models.loss import accumulate, evaluate_at, nll
from continual.models.model import Model
from continual.models.weights import Weights, combine, flatten_weights, unflatten_weights, weights
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory, replaces_super, to_param_groups
from strategies.replay import Replay

INNER_SCOPES, INNER_OPTIMIZERS = ("all", "head"), ("sgd", "meta_sgd")
GRAPH_MEMORY_FACTOR = (
    3  # so many times what a forward pass leaves behind, a gradient's own graph is
)


@dataclass(kw_only=True)
class Episodic(Replay):
    """A step is one episode a task: the new examples, and remembered ones of one earlier task
    beside them.

    With `inner_steps=0` there is no inner loop, and the step is plain replay.
    """

    inner_lr: float = 0.01
    inner_steps: int = 1

    def draw_replay_examples(self, n: int) -> Sequence[Encoded]:
        """All from one remembered task, for an episode needs several examples of it."""
        pools = list(self.buffer.examples_by_task.values())
        return self.buffer.draw(n, self.buffer.rng.choice(pools)) if pools and n else []

    def episodes(self, batch: Batch) -> list[Batch]:
        """The step's examples, task by task."""
        return list(self.add_replay_examples(batch).split_by_task().values())

    @replaces_super
    def backward(self, model: Model, batch: Batch) -> Tensor:
        """The sum over episodes of what each leaves, by its share of the step's supervised tokens."""
        if not self.inner_steps:
            return super().backward(model, batch)
        episodes = [e for e in self.episodes(batch) if e.supervised_tokens]
        tokens, total = (
            sum(e.supervised_tokens for e in episodes),
            torch.zeros((), device=batch.layout.device),
        )
        with all_reduce_gradients(model.trained or list(weights(model).values()), total):
            for episode in iter_own_items(episodes, [e.num_tokens for e in episodes]):
                with single_process():
                    total += self.backward_episode(
                        model, episode, episode.supervised_tokens / tokens
                    )
        return total

    def backward_episode(self, model: Model, episode: Batch, share: float) -> Tensor:
        """Add `share` of one episode's direction to every `.grad`; that share of its loss."""
        raise NotImplementedError

    def inner_weights(self, model: Model) -> Weights:
        """The live weights that the inner loop changes."""
        return weights(model)

    def inner_rates(self, inner_weights: Weights) -> Weights:
        """The inner loop's learning rate of each of them."""
        return {n: w.new_full((), self.inner_lr) for n, w in inner_weights.items()}

    def gradient_scale(self, gradient: Weights) -> float | Tensor:
        """What an inner step's gradient `g` is multiplied by, for which nothing is differentiated."""
        return 1.0

    def inner_loop(self) -> Strategy:
        """The inner loop, if there is one."""
        return InnerLoop(meta_strategy=self) if self.inner_steps else super().inner_loop()

    def backward_at(self, model: Model, at: Weights, batch: Batch, share: float) -> Tensor:
        """Back-propagate `share` of the loss at the weights `at` to them, by micro-batches; that
        share of it.

        The terms of strategies that this one is composed with have their part in it.
        """
        return accumulate(
            lambda model, part: share * evaluate_at(model, at, lambda: self.loss(model, part)),
            model,
            batch.micro_batches(),
        )


@dataclass(kw_only=True)
class InnerLoop(Strategy):
    """The inner loop of another strategy, taken for good: under plain SGD at lr 1 a step is one of
    its own.
    """

    meta_strategy: Episodic

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Only what the inner loop changes is trained."""
        return list(self.meta_strategy.inner_weights(model).values())

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """The gradient at its pace, each part times its rate."""
        loss, changed = super().backward(model, batch), self.meta_strategy.inner_weights(model)
        found = {n: w.grad for n, w in changed.items() if w.grad is not None}
        pace, rate = (
            self.meta_strategy.gradient_scale(found),
            self.meta_strategy.inner_rates(changed),
        )
        for n, g in found.items():
            g.mul_(pace * rate[n])
        return loss


@dataclass(kw_only=True)
class MAML(Episodic):
    """Model-agnostic meta-learning (Finn et al. 2017, algorithm 1), on every optimizer step's
    examples.

    Each task's examples are halved: `inner_steps` of SGD on the support half lead to fast weights,
    whose loss on the query half is minimised with respect to the weights before them.
    `second_order=False` takes the fast weights' gradient as that of the weights (section 5.2). An
    episode of a single example serves as both halves.

    `inner_scope="head"` is ANIL (Raghu et al. 2020, section 4): all weights are meta-learned, and the
    inner loop changes the head alone. That is the LM head where its weights are trained and not the
    input embedding's as well; else, as under an adapter, what is trained in the last layer that has
    any trained weights.

    `inner_optimizer="meta_sgd"` is Meta-SGD (Li et al. 2017, algorithm 1): each weight that the inner loop
    changes has a rate of its own in place of `inner_lr`, where it begins, learned by the same
    meta-gradient, with `rates_lr` as the optimizer's learning rate. The paper takes the weights'
    one; its rates begin at random between 0.005 and 0.1.

    The second order goes back through the inner loop step by step, v <- v - H (rate * v) with the
    Hessian H of the support loss at the weights before the step; where rates are learned, their
    gradient is -g * v with the step's gradient g. The graphs of the last steps are kept for that
    while they fit `train.tokens_per_microbatch`; those of the steps before are made once more, a
    micro-batch at a time.
    """

    stores: ClassVar[str] = "E examples; 4 P more with learned rates"
    costs: ClassVar[str] = "(1 + inner_steps) / 2 / (1 - share)"
    second_order: bool = False
    inner_scope: str = "all"
    inner_optimizer: str = "sgd"
    rates_lr: float = 1e-3
    rates: Tensor = memory(
        lambda: torch.zeros(0)
    )  # (P,) of all weights that the inner loop changes, if learned

    def __post_init__(self) -> None:
        """Refuse what cannot be an inner loop."""
        super().__post_init__()
        for key, known in (("inner_scope", INNER_SCOPES), ("inner_optimizer", INNER_OPTIMIZERS)):
            if getattr(self, key) not in known:
                raise ConfigError(unknown(key, getattr(self, key), known))

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Hand the rates to the optimizer, if they are learned."""
        trained = super().begin(model, task)
        if self.inner_optimizer == "sgd" or not self.inner_steps:
            return trained
        start = self.rates.detach()
        if not len(start):
            start = flatten_weights(
                {n: torch.full_like(w, self.inner_lr) for n, w in self.inner_weights(model).items()}
            )
        self.rates = Parameter(start.to(model.layout.device))
        return [
            *to_param_groups(trained),
            {"params": [self.rates], "lr": self.rates_lr, "weight_decay": 0},
        ]

    def inner_weights(self, model: Model) -> Weights:
        """The live weights that the inner loop changes."""
        return super().inner_weights(model) if self.inner_scope == "all" else head_weights(model)

    def inner_rates(self, inner_weights: Weights) -> Weights:
        """The one rate of all, or the learned ones."""
        return (
            unflatten_weights(self.rates.detach(), inner_weights)
            if len(self.rates)
            else super().inner_rates(inner_weights)
        )

    def backward_episode(self, model: Model, episode: Batch, share: float) -> Tensor:
        """The gradient of the query loss at the fast weights, as a function of the weights before
        them.
        """
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self.second_order else nullcontext():
            return self.backward_through_steps(model, *self.split_episode(episode), share)

    def split_episode(self, episode: Batch) -> tuple[list[list[Batch]], Batch]:
        """What each inner step learns from, in micro-batches, and what then judges."""
        n = len(episode.examples)
        half = (n + 1) // 2
        support, query = episode.select(range(half)), episode.select(range(half if n > 1 else 0, n))
        return [support.micro_batches()] * self.inner_steps, query

    def backward_through_steps(
        self, model: Model, steps: Sequence[Sequence[Batch]], query: Batch, share: float
    ) -> Tensor:
        """Add `share` of the query loss's gradient through these inner steps; that share of the
        loss.
        """
        changed, path = self.inner_weights(model), []
        still = {n: w.detach() for n, w in weights(model).items() if n not in changed}
        rate = self.inner_rates(changed)
        seed, at = int(torch.randint(2**62, ())), clone_as_leaves(changed)
        for i, parts in enumerate(steps):
            torch.manual_seed(seed + i)
            left = GRAPH_MEMORY_FACTOR * sum(
                part.num_tokens for later in steps[i:] for part in later
            )
            if (
                held := self.second_order
                and left <= model.layout.tokens_per_microbatch
                and any(part.supervised_tokens for part in parts)
            ):
                g = differentiable_gradient(model, at, parts)
            else:
                accumulate(partial(nll, at=still | at), model, parts)
                g = pop_gradients(at)
            c = self.gradient_scale(g)
            if self.second_order or len(self.rates):
                path.append((seed + i, parts, at, g, held, c))
            at = clone_as_leaves(combine(lambda w, r, g, c=c: w - c * r * g, at, rate, g))
        loss = self.backward_at(model, at, query, share)
        v = pop_gradients(at)
        while path:  # so that a graph is free once it has been gone through
            again, parts, before, g, held, c = path.pop()
            if len(self.rates):
                self.add_rate_gradient(combine(lambda g, v, c=c: -c * g * v, g, v))
            if self.second_order:
                torch.manual_seed(
                    again
                )  # what was dropped out on the way there is so on the way back
                turn = combine(lambda r, v, c=c: -c * r * v, rate, v)
                v = combine(
                    torch.add,
                    v,
                    hessian_vector_product(model, before, parts, turn, g if held else None),
                )
        add_gradients(changed, v)
        return loss

    def add_rate_gradient(self, g: Weights) -> None:
        """Add to the rates' gradient."""
        row = flatten_weights(g)
        self.rates.grad = row if self.rates.grad is None else self.rates.grad + row


@dataclass(kw_only=True)
class Reptile(Episodic):
    """Reptile (Nichol et al. 2018, algorithm 2): the step points to where `inner_steps` of SGD lead
    from here.

    Each task's examples are dealt to the inner steps; the gradient is (weights - fast weights) /
    inner_lr, which is the sum of the inner gradients, averaged over the tasks by their share of the
    step's supervised tokens.
    """

    inner_steps: int = 4

    def backward_episode(self, model: Model, episode: Batch, share: float) -> Tensor:
        """Walk the inner loop and add up its gradients; the mean loss on the way."""
        n, at = len(episode.examples), clone_as_leaves(weights(model))
        k, total = min(self.inner_steps, n), torch.zeros((), device=episode.layout.device)
        for i in range(k):
            total += self.backward_at(model, at, episode.select(range(i, n, k)), share)
            g = pop_gradients(at)
            add_gradients(weights(model), g)
            at = clone_as_leaves(combine(lambda w, g: w - self.inner_lr / share * g, at, g))
        return total / k


def clone_as_leaves(w: Weights) -> Weights:
    """Weights of the same values, to which gradients can flow."""
    return {n: t.detach().clone().requires_grad_() for n, t in w.items()}


def pop_gradients(at: Weights) -> Weights:
    """The leaves' gradients, zero where there is none; the leaves have none any more."""
    found = {
        n: torch.zeros_like(w, requires_grad=False) if w.grad is None else w.grad
        for n, w in at.items()
    }
    for w in at.values():
        w.grad = None
    return found


def add_gradients(live: Weights, g: Weights) -> None:
    """Add to every weight's gradient."""
    for n, w in live.items():
        w.grad = g[n] if w.grad is None else w.grad.add_(g[n])


def differentiable_gradient(model: Model, at: Weights, parts: Sequence[Batch]) -> Weights:
    """The gradient of the parts' mean loss at the leaves `at`, to go back through."""
    tokens = sum(part.supervised_tokens for part in parts)
    loss = torch.stack(
        [
            nll(model, part, at) * (part.supervised_tokens / tokens)
            for part in parts
            if part.supervised_tokens
        ]
    ).sum()
    found = torch.autograd.grad(loss, list(at.values()), create_graph=True, materialize_grads=True)
    return dict(zip(at, found, strict=True))


def hessian_vector_product(
    model: Model, at: Weights, parts: Sequence[Batch], v: Weights, g: Weights | None
) -> Weights:
    """H v, where H is the Hessian of the parts' mean loss at the leaves `at`, from the gradient `g`
    if it is there.

    What the gradient at the leaves changes by with other weights, along v, is added to those
    weights' `.grad`.
    """

    def along(g: Weights) -> Tensor:
        return torch.stack([(d * v[n]).sum() for n, d in g.items()]).sum()

    if g is None:
        accumulate(
            lambda model, part: along(differentiable_gradient(model, at, [part])), model, parts
        )
    else:
        along(g).backward()  # type: ignore[no-untyped-call]
    return pop_gradients(at)


def head_weights(model: Model) -> Weights:
    """The LM head's live weights, if they are trained and its own, or else those of the last layer
    that has some.

    Raises ConfigError where no weight of either is trained.
    """
    live = weights(model)
    words, said = (
        {id(p) for p in part.parameters()}
        for part in (model.net.get_input_embeddings(), model.net.get_output_embeddings())
    )
    if own := {n: w for n, w in live.items() if id(w) in said - words}:
        return own
    layers = {
        n: (m[1], int(m[2])) for n in live if (m := re.match(r"(.*?)\.(\d+)\.", n))
    }  # stack and number
    if not layers:
        raise ConfigError(
            "inner_scope=head: no weight of the LM head's own and none of a layer is trained; choose "
            "another model.adapter, or inner_scope=all"
        )
    stack = [*layers.values()][-1][0]
    last = max(number for s, number in layers.values() if s == stack)
    return {n: live[n] for n, place in layers.items() if place == (stack, last)}
