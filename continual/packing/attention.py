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

ATTENTION_NAME = "continual_flat_row"


@dataclass(frozen=True)
class PrefixGroup:
    """A prefix of so many tokens, then blocks of (examples, length): each example continues the
    prefix alone.
    """

    prefix_length: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedRow:
    """Describe one packed row by its groups, in order."""

    groups: tuple[PrefixGroup, ...]
    mask_cache: dict[Any, Tensor] = field(default_factory=dict, compare=False)
    query_positions: tuple[int, ...] | None = (
        None  # the only tokens whose attention is asked for; None: all
    )

    @cached_property
    def max_visible(self) -> int:
        """Return the largest number of tokens that one token can see."""
        return max(g.prefix_length + max((n for _, n in g.blocks), default=0) for g in self.groups)

    def causal_mask(
        self, prefix_length: int, length: int, window: int | None, like: Tensor
    ) -> Tensor | None:
        """(n, prefix + n) what is added to a block's scores; None where plain causal attention says
        the same.
        """
        window = window if window is not None and window < prefix_length + length else None
        if window is None and not prefix_length:
            return None
        key = (prefix_length, length, window)
        if key not in self.mask_cache:
            ago = torch.arange(prefix_length, prefix_length + length)[:, None] - torch.arange(
                prefix_length + length
            )
            hidden = (ago < 0) if window is None else (ago < 0) | (ago >= window)
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            self.mask_cache[key] = mask.to(device=like.device, dtype=like.dtype)
        return self.mask_cache[key]


def sdpa_row_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row: PackedRow,
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
    key, value = repeat_kv_heads(heads, key, value)
    sizes = [size for g in row.groups for size in (g.prefix_length, *(b * n for b, n in g.blocks))]
    parts = zip(*(torch.split(x[0], sizes, 1) for x in (query, key, value)), strict=True)
    out: list[Tensor] = []

    def run(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> None:
        mask = row.causal_mask(prefix, q.shape[2], sliding_window, q)
        out.append(causal_attention(q, k, v, mask, scaling, softcap, dropout))

    for group in row.groups:
        pq, pk, pv = (x[None] for x in next(parts))
        if group.prefix_length:
            run(pq, pk, pv, 0)
        for b, n in group.blocks:
            q, k, v = (x.view(heads, b, n, x.shape[-1]).transpose(0, 1) for x in next(parts))
            if group.prefix_length:
                k, v = (torch.cat([p.expand(b, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
            run(q, k, v, group.prefix_length)
    return torch.cat(out)[None], None


def fused_kernels_allowed() -> bool:
    """Whether fused kernels may serve, which have no second derivative.

    Who wants one has switched them all off: `sdpa_kernel(SDPBackend.MATH)`, on a CPU too.
    """
    return bool(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]


def repeat_kv_heads(heads: int, *states: Tensor) -> list[Tensor]:
    """Keys or values (b, K, n, D), each repeated for the query heads that share it -> (b, H, n, D)."""
    return [
        x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in states
    ]


def causal_attention(
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
        out = _softcapped_attention(q, k, v, mask, scale, dropout, cap)
    return out.transpose(1, 2).flatten(0, 1)


def _softcapped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    cap: float,
) -> Tensor:
    """Attend with scores that a tanh keeps below `cap`, as in Gemma 2."""
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
def use_row_attention(
    net: Any, attention_function: Callable[..., tuple[Tensor, None]] = sdpa_row_attention
) -> Iterator[None]:
    """Within it, the network's forward pass takes `row=` and attends by it, or as `by` does with
    what `row` is.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attention_function)
    config = net.config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before
