"""Steps and references of meta-learning, by autograd through the unrolled inner loop."""

from __future__ import annotations

import torch

from continual.models.weights import gradient, weights
from tests.support import toy

INNER = 0.5  # large, so that the second-order part cannot hide


def halves(episode: list) -> tuple[list, list]:
    middle = (len(episode) + 1) // 2
    return episode[:middle], episode[middle:]


def step(made, strategy, chosen: list) -> dict[str, torch.Tensor]:
    made.net.zero_grad()
    strategy.backward(made, made.batch(chosen))
    return gradient(made)


def remembering(kind, *tasks: int, **keys):
    """A strategy that has all of these small tasks in memory."""
    made, strategy = (
        toy.make_model(torch.float64, kind="gpt2"),
        kind(capacity=4.0 * len(tasks), **keys),
    )
    for t in tasks:
        strategy.begin(made, toy.make_task(t, 4))
        strategy.end(made, toy.make_task(t, 4))
    return made, strategy


def functional(net, chosen: list, at: dict) -> torch.Tensor:
    """The mean loss at other weights, by torch's own means."""

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            return toy.mean_loss(self.net, chosen)

    with toy.no_fused_attention():
        return torch.func.functional_call(Loss(), {f"net.{n}": w for n, w in at.items()}, ())


def looked_ahead(
    net, steps: list[list], query: list, rates: dict, second_order: bool, pace=lambda g: 1.0
) -> tuple[dict, dict]:
    """The gradients of the query's loss after the steps, with respect to the weights and to the
    rates, by one graph.

    An inner gradient, a vector, is multiplied by its `pace`.
    """
    start = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    rates, fast = {n: r.detach().clone().requires_grad_() for n, r in rates.items()}, start
    for chosen in steps:
        g = torch.autograd.grad(
            functional(net, chosen, fast), [fast[n] for n in rates], create_graph=second_order
        )
        c = pace(torch.cat([d.detach().flatten() for d in g]))
        fast = fast | {n: fast[n] - c * r * d for (n, r), d in zip(rates.items(), g, strict=True)}
    found = torch.autograd.grad(functional(net, query, fast), [*start.values(), *rates.values()])
    return dict(zip(start, found, strict=False)), dict(zip(rates, found[len(start) :], strict=True))


def scattered(made, seed: int = 0) -> dict[str, torch.Tensor]:
    """A rate of each weight, between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(w.shape, generator=generator, dtype=w.dtype) for n, w in weights(made).items()
    }
