"""Attention over a flat row: many examples in one sequence, some behind a prefix that they share.

Linear layers, norms and embeddings see a plain (1, N) sequence; only attention knows which tokens
belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "continual_flat_row"


@dataclass(frozen=True)
class Group:
    """A prefix of so many tokens, then blocks of (examples, length): each example continues the
    prefix alone.
    """

    prefix: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Row:
    """The groups of one flat row, in its order."""

    groups: tuple[Group, ...]
    masks: dict[Any, Tensor] = field(default_factory=dict, compare=False)
    asked: tuple[int, ...] | None = None  # the only tokens whose attention is asked for; None: all

    @cached_property
    def longest(self) -> int:
        """The most tokens that one token can see."""
        return max(g.prefix + max((n for _, n in g.blocks), default=0) for g in self.groups)

    def mask(self, prefix: int, n: int, window: int | None, like: Tensor) -> Tensor | None:
        """(n, prefix + n) what is added to a block's scores; None where plain causal attention says
        the same.
        """
        window = window if window is not None and window < prefix + n else None
        if window is None and not prefix:
            return None
        key = (prefix, n, window)
        if key not in self.masks:
            ago = torch.arange(prefix, prefix + n)[:, None] - torch.arange(prefix + n)
            hidden = (ago < 0) if window is None else (ago < 0) | (ago >= window)
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            self.masks[key] = mask.to(device=like.device, dtype=like.dtype)
        return self.masks[key]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row: Row,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls for each layer: query (1, H, N, D), key and value (1, K, N, D) ->
    (1, N, H, D).
    """
    heads = query.shape[1]
    key, value = of_all_heads(heads, key, value)
    sizes = [size for g in row.groups for size in (g.prefix, *(b * n for b, n in g.blocks))]
    parts = zip(*(torch.split(x[0], sizes, 1) for x in (query, key, value)), strict=True)
    out: list[Tensor] = []

    def run(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> None:
        mask = row.mask(prefix, q.shape[2], sliding_window, q)
        out.append(causal(q, k, v, mask, scaling, softcap, dropout))

    for group in row.groups:
        pq, pk, pv = (x[None] for x in next(parts))
        if group.prefix:
            run(pq, pk, pv, 0)
        for b, n in group.blocks:
            q, k, v = (x.view(heads, b, n, x.shape[-1]).transpose(0, 1) for x in next(parts))
            if group.prefix:
                k, v = (torch.cat([p.expand(b, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
            run(q, k, v, group.prefix)
    return torch.cat(out)[None], None


def fused() -> bool:
    """Whether fused kernels may serve, which have no second derivative.

    Who wants one has switched them all off: `sdpa_kernel(SDPBackend.MATH)`, on a CPU too.
    """
    return bool(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]


def of_all_heads(heads: int, *states: Tensor) -> list[Tensor]:
    """Keys or values (b, K, n, D), each repeated for the query heads that share it -> (b, H, n, D)."""
    return [
        x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in states
    ]


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    cap: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Each query (b, H, n, D) on the keys up to its own, or on those that `mask` leaves -> (b n, H,
    D).
    """
    if cap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
        )
    else:
        out = _capped(q, k, v, mask, scale, dropout, cap)
    return out.transpose(1, 2).flatten(0, 1)


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    cap: float,
) -> Tensor:
    """Attention whose scores a tanh keeps below `cap`, as in Gemma 2."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    n = q.shape[2]
    mask = (
        torch.full((n, n), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        if mask is None
        else mask
    )
    chances = (cap * torch.tanh(scores / cap) + mask).softmax(-1)
    return F.dropout(chances, dropout) @ v


@contextmanager
def flat_attention(net: Any, by: Callable[..., tuple[Tensor, None]] = attend) -> Iterator[None]:
    """Within it, the network's forward pass takes `row=` and attends by it, or as `by` does with
    what `row` is.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, by)
    config = net.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
