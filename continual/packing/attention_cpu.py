"""Attention over a flat row by a CPU's fused kernel, as one node of the graph: nothing is copied
for a shared prefix.

What an example attends to falls in two parts, its group's prefix and itself. Each part is a call of
the kernel, the prefix's one for all examples of a group; the parts' outputs are joined by their
log-sum-exps, as blocks of keys are in FlashAttention (Dao et al. 2022, section 3.1). Backward, each
part needs only the joined output and log-sum-exp.

Shapes: H heads, N tokens of the row, D of a head; a block has b examples of n tokens, of which m
each are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from continual.packing import attention
from continual.packing.attention import PackedRow

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
TokenIndex = slice | Tensor


def flash_row_attention(
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
    **more: Any,
) -> tuple[Tensor, None]:
    """What `attention.attend` gives, which serves where this kernel cannot: it has no window, cap
    or second derivative.

    Query (1, H, N, D), key and value (1, K, N, D) -> (1, N, H, D), zeros where nothing was asked
    for.
    """
    windowed = sliding_window is not None and sliding_window < row.max_visible
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    if (
        windowed
        or softcap is not None
        or dropout
        or not same
        or not attention.fused_kernels_allowed()
    ):
        return attention.sdpa_row_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            row=row,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            **more,
        )
    key, value = attention.repeat_kv_heads(query.shape[1], key, value)
    out: Tensor = _RowAttention.apply(
        query[0], key[0], value[0], list(_plan_groups(row, query.dtype)), scaling
    )
    return out[None], None


@dataclass(frozen=True)
class _Block:
    """Examples of one length; the queries asked of each and what they may see, or all of them
    causally.
    """

    b: int
    n: int
    keys: slice
    queries: TokenIndex  # (b * m,)
    m: int
    mask: Tensor | None = None  # (b, 1, m, n)


@dataclass(frozen=True)
class _GroupAttention:
    """A group: what attends within itself, the prefix among it, and which queries (M,) see the
    prefix besides.
    """

    blocks: list[_Block]
    prefix: slice
    prefix_queries: TokenIndex | None


def _plan_groups(row: PackedRow, dtype: torch.dtype) -> Iterator[_GroupAttention]:
    asked, end = None if row.query_positions is None else frozenset(row.query_positions), 0
    for group in row.groups:
        begin, blocks = end, []
        for b, n in ((1, group.prefix_length), *group.blocks):
            blocks.append(_make_block(b, n, end, asked, dtype))
            end += b * n
        prefix = slice(begin, begin + group.prefix_length)
        behind = [x.queries for x in blocks[1:] if x.m]
        beyond: TokenIndex | None = None
        if group.prefix_length and behind:
            whole = all(isinstance(x, slice) for x in behind) and len(behind) == len(group.blocks)
            beyond = (
                slice(prefix.stop, end) if whole else torch.cat([_to_indices(x) for x in behind])
            )
        yield _GroupAttention([x for x in blocks if x.m and x.n], prefix, beyond)


def _make_block(
    b: int, n: int, begin: int, asked: frozenset[int] | None, dtype: torch.dtype
) -> _Block:
    """As many queries of each example as of the one with most: the others' are made up by some that
    none asked for.

    Those have a gradient of zero and change nothing.
    """
    keys = slice(begin, begin + b * n)
    if asked is None:
        return _Block(b, n, keys, keys, n)
    wanted = [[t in asked for t in range(s, s + n)] for s in range(begin, keys.stop, n or 1)]
    m = max((sum(w) for w in wanted), default=0)
    if 2 * m > n or not m:
        return _Block(b, n, keys, keys, n if m else 0)
    first = [
        [t for t, w in enumerate(each) if w] + [t for t, w in enumerate(each) if not w]
        for each in wanted
    ]
    chosen = torch.tensor([sorted(each[:m]) for each in first])  # (b, m)
    mask = torch.zeros(b, 1, m, n, dtype=dtype)
    mask.masked_fill_(torch.arange(n) > chosen[:, None, :, None], -torch.inf)
    return _Block(b, n, keys, (torch.arange(b)[:, None] * n + chosen + begin).flatten(), m, mask)


def _to_indices(where: TokenIndex) -> Tensor:
    return torch.arange(where.start, where.stop) if isinstance(where, slice) else where


class _RowAttention(torch.autograd.Function):
    """(H, N, D) each -> (N, H, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: list[_GroupAttention], scale: float | None
    ) -> Tensor:
        out = q.new_zeros(q.shape[1], len(q), q.shape[2])
        lse = q.new_zeros(len(q), q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
        for part in parts:
            for x in part.blocks:
                o, each = _flash_forward(
                    _split_examples(q, x.b, x.queries),
                    _split_examples(k, x.b, x.keys),
                    _split_examples(v, x.b, x.keys),
                    0.0,
                    x.mask is None,
                    attn_mask=x.mask,
                    scale=scale,
                )
                out[x.queries] = o.transpose(1, 2).flatten(0, 1)
                lse[:, x.queries] = each.transpose(0, 1).flatten(1)
            if (at := part.prefix_queries) is not None:
                o, each = _flash_forward(
                    q[None, :, at],
                    k[None, :, part.prefix],
                    v[None, :, part.prefix],
                    0.0,
                    False,
                    scale=scale,
                )
                share = (
                    (each[0] - lse[:, at]).sigmoid().t()[..., None].to(q.dtype)
                )  # (M, H, 1) of the prefix
                out[at] = torch.lerp(out[at], o[0].transpose(0, 1), share)
                lse[:, at] = torch.logaddexp(lse[:, at], each[0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        grad, out = (x.transpose(0, 1) for x in (grad, out))
        for part in ctx.parts:
            for x in part.blocks:
                g, mine, ks, vs, o = (
                    _split_examples(t, x.b, at)
                    for t, at in (
                        (grad, x.queries),
                        (q, x.queries),
                        (k, x.keys),
                        (v, x.keys),
                        (out, x.queries),
                    )
                )
                found = _flash_backward(
                    g,
                    mine,
                    ks,
                    vs,
                    o,
                    _split_examples(lse, x.b, x.queries),
                    0.0,
                    x.mask is None,
                    attn_mask=x.mask,
                    scale=ctx.scale,
                )
                for d, at, new in zip(
                    (dq, dk, dv), (x.queries, x.keys, x.keys), found, strict=True
                ):
                    d[:, at] += new.transpose(0, 1).flatten(1, 2)
            if (at := part.prefix_queries) is not None:
                found = _flash_backward(
                    grad[None, :, at],
                    q[None, :, at],
                    k[None, :, part.prefix],
                    v[None, :, part.prefix],
                    out[None, :, at],
                    lse[None, :, at],
                    0.0,
                    False,
                    scale=ctx.scale,
                )
                for d, where, new in zip(
                    (dq, dk, dv), (at, part.prefix, part.prefix), found, strict=True
                ):
                    d[:, where] += new[0]
        return dq, dk, dv, None, None


def _split_examples(x: Tensor, b: int, at: TokenIndex) -> Tensor:
    """(H, N, ...) -> (b, H, n, ...), of the tokens `at`."""
    part = x[:, at]
    return part.view(len(part), b, -1, *part.shape[2:]).transpose(0, 1)
