"""Treat weights as values: a vector space over {parameter name: tensor}.

All functions return new tensors; only `restore` and `set_gradient` change the model.
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
    """Return the trainable parameters by name: the live tensors, not copies."""
    return {n: p for n, p in model.net.named_parameters() if p.requires_grad}


def snapshot(model: Model) -> Weights:
    """Copy the trainable parameters."""
    return {n: p.detach().clone() for n, p in weights(model).items()}


@torch.no_grad()
def restore(model: Model, saved: Weights) -> None:
    """Set the trainable parameters to `saved`; raises KeyError if one is missing there."""
    for n, p in weights(model).items():
        p.copy_(shard_like(saved[n], p))


def gradient(model: Model) -> Weights:
    """Copy the gradients of the trainable parameters, zero where there is none."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for n, p in weights(model).items()
    }


def set_gradient(model: Model, g: Weights) -> None:
    """Set the gradients of the trainable parameters to `g`."""
    for n, p in weights(model).items():
        p.grad = g[n]


def zeros(model: Model) -> Weights:
    """Return zeros in the shapes of the trainable parameters."""
    return {n: torch.zeros_like(p, requires_grad=False) for n, p in weights(model).items()}


def combine(f: Callable[..., Tensor], *terms: Weights) -> Weights:
    """Apply `f` to the terms parameter by parameter, without recording a graph."""
    with torch.no_grad():
        return {n: f(*(t[n] for t in terms)) for n in terms[0]}


def all_finite(w: Weights) -> bool:
    """Return True if every value is finite."""
    return bool(torch.stack([t.isfinite().all() for t in w.values()]).all())


def flatten_weights(w: Weights) -> Tensor:
    """Concatenate all tensors to one vector (P,)."""
    return torch.cat([t.flatten() for t in w.values()])


def unflatten_weights(vector: Tensor, like: Weights) -> Weights:
    """Split a vector (P,) into the names, shapes and dtypes of `like`."""
    return {n: part.to(like[n].dtype) for n, part in _split_like(vector, like).items()}


def top_mask(scores: Weights, fraction: float) -> Weights:
    """Mark the largest values: True for `fraction` of all, rounded down, but at least one."""
    vector = flatten_weights(scores)
    mask = torch.zeros(len(vector), dtype=torch.bool, device=vector.device)
    count = max(1, int(fraction * len(vector)))
    mask[vector.topk(count).indices] = True
    return _split_like(mask, scores)


def safe_ratio(part: Weights, whole: Weights) -> Weights:
    """Divide `part` by `whole`; 1 where `whole` is 0."""
    return combine(lambda p, s: torch.where(s > 0, p / s, torch.ones_like(s)), part, whole)


def to_float32(w: Weights) -> Weights:
    """Convert to float32 if narrower: sums over stages would lose too many digits."""
    return {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in w.items()}


def _split_like(vector: Tensor, like: Weights) -> Weights:
    """Split a vector (P,) into tensors of the names and shapes of `like`."""
    parts = torch.split(vector, [t.numel() for t in like.values()])
    return {n: part.view_as(t) for (n, t), part in zip(like.items(), parts, strict=True)}
