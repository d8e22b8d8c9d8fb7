"""Weights are values: a vector space over {parameter name: tensor}.

Everything here returns new tensors; only `restore` and `set_gradient` touch the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from continual.models.sharding import shard_like

if TYPE_CHECKING:
    from continual.models.model import Model

Weights = dict[str, Tensor]


def weights(model: Model) -> Weights:
    """The live trainable parameters, by name: not a copy."""
    return {n: p for n, p in model.net.named_parameters() if p.requires_grad}


def snapshot(model: Model) -> Weights:
    """A copy of the trainable parameters that later training leaves alone."""
    return {n: p.detach().clone() for n, p in weights(model).items()}


@torch.no_grad()
def restore(model: Model, saved: Weights) -> None:
    """Give the trainable parameters the `saved` values; raises KeyError where one is missing."""
    for n, p in weights(model).items():
        p.copy_(shard_like(saved[n], p))


def gradient(model: Model) -> Weights:
    """A copy of every trainable parameter's gradient, zero where there is none."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for n, p in weights(model).items()
    }


def set_gradient(model: Model, g: Weights) -> None:
    """Make `g` the gradient that the optimizer will see."""
    for n, p in weights(model).items():
        p.grad = g[n]


def zeros(model: Model) -> Weights:
    """The origin."""
    return {n: torch.zeros_like(p, requires_grad=False) for n, p in weights(model).items()}


def combine(f: Callable[..., Tensor], *terms: Weights) -> Weights:
    """`f` of the terms, parameter by parameter, without a graph."""
    with torch.no_grad():
        return {n: f(*(t[n] for t in terms)) for n in terms[0]}


def all_finite(w: Weights) -> bool:
    """Whether all of it is."""
    return bool(torch.stack([t.isfinite().all() for t in w.values()]).all())


def flatten_weights(w: Weights) -> Tensor:
    """All of it as one vector (P,)."""
    return torch.cat([t.flatten() for t in w.values()])


def unflatten_weights(row: Tensor, like: Weights) -> Weights:
    """A vector (P,) as weights, in the names, shapes and precisions of others."""
    return {n: part.to(like[n].dtype) for n, part in _split_like(row, like).items()}


def top_mask(scores: Weights, fraction: float) -> Weights:
    """True for this fraction of all values, the largest, rounded down but at least one."""
    row = flatten_weights(scores)
    chosen = torch.zeros(len(row), dtype=torch.bool, device=row.device)
    chosen[row.topk(max(1, int(fraction * len(row)))).indices] = True
    return _split_like(chosen, scores)


def safe_ratio(part: Weights, whole: Weights) -> Weights:
    """part / whole, and 1 where there is nothing of either."""
    return combine(lambda p, s: torch.where(s > 0, p / s, torch.ones_like(s)), part, whole)


def to_float32(w: Weights) -> Weights:
    """In float32 at least: sums over stages lose too much in less."""
    return {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in w.items()}


def _split_like(row: Tensor, like: Weights) -> Weights:
    parts = torch.split(row, [t.numel() for t in like.values()])
    return {n: part.view_as(t) for (n, t), part in zip(like.items(), parts, strict=True)}
