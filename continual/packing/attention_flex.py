"""A flat row's attention in one kernel: FlexAttention, which visits only blocks of 128 by 128 that
hold a visible pair.

A token sees two runs of its row: of the prefix that it stands behind, and of its own example up to
itself. Where runs begin and end says, block by block, how many pairs are visible: nothing of the
size N x N is ever held.

Shapes: H query heads, K key heads, D of a head, N tokens of a row, B blocks of them, the last one
filled up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from continual.packing import attention
from continual.packing.attention import PackedRow

BLOCK_SIZE = 128
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def flex_row_attention(
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
    """As `attention.attend`, by whom it has done what the kernel cannot: query (1, H, N, D) -> (1,
    N, H, D).
    """
    kind, n = query.device.type, query.shape[2]
    if torch.is_autocast_enabled(kind):  # as SDPA does by itself
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if not _kernel_supports(query, value, dropout):
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
        )
    mask = make_block_mask(row, sliding_window, query.device)
    filled = (0, 0, 0, mask.seq_lengths[0] - n)
    query, key, value = (
        F.pad(x, filled).contiguous() for x in (query, key, value)
    )  # compiled for one order alone
    kernel: Any = _compiled_kernel() if query.is_cuda else flex_attention
    out = kernel(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcap_score_mod(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"BACKEND": "TRITON"},
    )
    return out[:, :, :n].transpose(1, 2), None


def _kernel_supports(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel can do it: it has no dropout, and no second derivative."""
    fits = query.dtype in KERNEL_DTYPES and all(16 <= x.shape[-1] <= 256 for x in (query, value))
    return not dropout and attention.fused_kernels_allowed() and (fits or not query.is_cuda)


@cache
def _compiled_kernel() -> Callable[..., Tensor]:
    """The kernel for rows of every length; never in its uncompiled form, which holds all N x N
    scores.
    """
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


@cache
def _softcap_score_mod(cap: float) -> Callable[..., Tensor]:
    """Keeps scores below `cap` by a tanh, as in Gemma 2."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@lru_cache(maxsize=8)
def make_block_mask(row: PackedRow, window: int | None, device: torch.device) -> BlockMask:
    """Which tokens of the row see which, over its N tokens and as many more as fill the last block.

    What is added sees itself alone. For a row that ends within a block torch's kernel checks bounds
    everywhere, and has been seen to give NaN gradients under a soft cap (pytorch issue 153799).
    Kept for the next layers.
    """
    seen = visible_ranges(row, window)
    n, held = seen.shape[1], _count_visible_pairs(seen)
    first, last, own = seen.to(device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible: Tensor = ((first[q] <= k) & (k < last[q])) | ((own[q] <= k) & (k <= q))
        return visible

    full = held == BLOCK_SIZE * BLOCK_SIZE
    return BlockMask.from_kv_blocks(
        *_to_kv_blocks((held > 0) & ~full),
        *_to_kv_blocks(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=sees,
        seq_lengths=(n, n),
    ).to(device)


def visible_ranges(row: PackedRow, window: int | None = None) -> Tensor:
    """(3, 128 B) of each token i: it sees the tokens from the first to before the second, and from
    the third to i.
    """
    pieces: list[
        tuple[int, ...]
    ] = []  # its prefix from, to; itself from, its first position, its length
    at = 0
    for group in row.groups:
        begin, end = at, at + group.prefix_length
        pieces.append((begin, begin, begin, 0, group.prefix_length))
        at = end
        for b, n in group.blocks:
            pieces += [(begin, end, at + i * n, group.prefix_length, n) for i in range(b)]
            at += b * n
    blocks = max(
        2, -(-at // BLOCK_SIZE)
    )  # for a single one the kernel would have to be compiled anew
    pieces += [(0, 0, i, 0, 1) for i in range(at, blocks * BLOCK_SIZE)]
    told = torch.tensor(pieces, dtype=torch.int32)
    first, last, own, position = told[:, :4].repeat_interleave(told[:, 4], 0).T
    if window is not None:
        i = torch.arange(len(own), dtype=torch.int32)
        first = torch.minimum(torch.maximum(first, first + position + i - own - window + 1), last)
        own = torch.maximum(own, i - window + 1)
    return torch.stack([first, last, own])


def _count_visible_pairs(seen: Tensor) -> Tensor:
    """(B, B) how many pairs are visible in each block of queries and keys.

    A run's end x has 128 tokens before it in each block before its own, and x % 128 in that.
    """
    n = seen.shape[1]
    i, b = torch.arange(n), n // BLOCK_SIZE
    ends = torch.stack([*seen.long(), i + 1])
    sign = torch.tensor([-1, 1, -1, 1])[:, None]
    at = (i // BLOCK_SIZE * (b + 1) + ends // BLOCK_SIZE).flatten()
    part, whole = (
        torch.zeros(b * (b + 1), dtype=torch.long)
        .index_add_(0, at, (sign * x).flatten())
        .view(b, b + 1)
        for x in (ends % BLOCK_SIZE, torch.full_like(ends, BLOCK_SIZE))
    )
    return (part + whole.sum(1, keepdim=True) - whole.cumsum(1))[:, :b]


def _to_kv_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of a table (B, B): how many are true (1, 1, B), and which, before the others (1,
    1, B, B).
    """
    blocks = blocks[None, None].int()
    return blocks.sum(3, dtype=torch.int32), blocks.argsort(
        dim=3, descending=True, stable=True
    ).int()
