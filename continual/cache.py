"""The keys and values of a flat row of prompts, for the tokens that follow each of them.

What prompts share stays where it stands once: each block's queries meet it in one matrix product, and one softmax
spans it and the prompt's own tokens (the decomposition of Hydragen, Juravsky et al. 2024, without its second pass).

Shapes: H query heads, K key heads, D of a head, N tokens of a row, b prompts of a block, B of all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from continual.attention import Row, attend


class Block:
    """Prompts of like length behind one prefix: what each layer's newest queries attend to.

    Of each layer keys and values are (K, prefix, D) of the prefix and (b, K, own + room, D) of each prompt and its
    answer; a prompt shorter than `own` is padded between the two.
    """

    def __init__(self, begin: int, prefix: int, start: int, own: int, lengths: Tensor) -> None:
        self.shared, self.prefix = slice(begin, begin + prefix), prefix
        self.start, self.own = start, own
        self.lengths = lengths  # (b,) of whole prompts, on the CPU
        self.layers: list[list[tuple[Tensor, Tensor]]] = []
        self.masks: dict[tuple[int, int | None], Tensor | None] = {}

    def take(self, room: int, *states: Tensor) -> None:
        """Copy a layer's keys and values, (K, N, D) each, of the prompts' row."""
        b, layer = len(self.lengths), []
        for x in states:
            own = x.new_empty(b, len(x), self.own + room, x.shape[-1])
            told = x[:, self.start : self.start + b * self.own]
            own[:, :, : self.own] = told.reshape(len(x), b, self.own, x.shape[-1]).transpose(0, 1)
            layer.append((x[:, self.shared].clone(), own))
        self.layers.append(layer)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other prompts."""
        self.lengths = self.lengths[list(rows)]
        self.layers = [[(shared, own[list(rows)]) for shared, own in layer] for layer in self.layers]
        self.masks.clear()

    def read(self, layer: int, new: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None,
             cap: float | None) -> Tensor:
        """Each prompt's `new`-th token, query (H, b, D), key and value (K, b, D) -> (b, H, D)."""
        (shared_k, own_k), (shared_v, own_v) = self.layers[layer]
        heads, (h, b, d), seen = len(k), q.shape, self.own + new
        own_k[:, :, seen - 1], own_v[:, :, seen - 1] = k.transpose(0, 1), v.transpose(0, 1)
        q = (q * scale).view(heads, h // heads, b, d)
        scores = q.permute(2, 0, 1, 3) @ own_k[:, :, :seen].transpose(2, 3)  # (b, K, H / K, own + new)
        if self.prefix:
            before = (q.reshape(heads, -1, d) @ shared_k.transpose(1, 2)).view(*q.shape[:3], -1).permute(2, 0, 1, 3)
            scores = torch.cat([before, scores], -1)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        mask = self.mask(new, window, scores.device)
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        chances = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        out = chances[..., self.prefix :] @ own_v[:, :, :seen]
        if self.prefix:
            before = chances[..., : self.prefix].permute(1, 2, 0, 3).reshape(heads, -1, self.prefix) @ shared_v
            out = out + before.view(*q.shape[:3], -1).permute(2, 0, 1, 3)
        return out.flatten(1, 2)

    def mask(self, new: int, window: int | None, device: torch.device) -> Tensor | None:
        """(b, 1, 1, prefix + own + new) what the newest tokens do not see; None where they see all."""
        if (new, window) not in self.masks:
            ends, before = self.lengths[:, None], self.prefix + self.own
            slot = torch.arange(before + new)
            hidden = (slot >= ends) & (slot < before)
            if window is not None:
                hidden |= ends + new - 1 - torch.where(slot < before, slot, slot - before + ends) >= window
            self.masks[new, window] = hidden[:, None, None].to(device) if hidden.any() else None
        return self.masks[new, window]


class Cache:
    """A row's blocks; the network's `row=` within `flat_attention(net, cached)`.

    The first pass reads the prompts as `row` says, every later one a token of each prompt that is left: (1, B).
    `last` is where, in the row and in its order, each prompt's last token stands.
    """

    def __init__(self, row: Row, last: Sequence[int], room: int) -> None:
        self.row, self.room, self.new, self.layer = row, room, 0, 0
        self.blocks: list[Block] = []
        begin = done = 0
        for group in row.groups:
            start = begin + group.prefix
            whole = sum(begin <= at < start for at in last)  # prompts that are the prefix and no more
            for b, n in ((whole, 0), *group.blocks):
                lengths = [group.prefix + (at - start) % n + 1 if n else group.prefix for at in last[done : done + b]]
                if b:
                    self.blocks.append(Block(begin, group.prefix, start, n, torch.tensor(lengths)))
                start, done = start + b * n, done + b
            begin = start

    def next(self) -> Tensor:
        """(B,) the positions of the tokens that the next pass reads."""
        self.new, self.layer = self.new + 1, 0
        return torch.cat([block.lengths for block in self.blocks]) + self.new - 1

    def keep(self, rows: Sequence[int]) -> None:
        """Only these of the prompts are left."""
        begin = 0
        for block in self.blocks:
            end = begin + len(block.lengths)
            mine = [r - begin for r in rows if begin <= r < end]
            if len(mine) < end - begin:
                block.keep(mine)
            begin = end
        self.blocks = [block for block in self.blocks if len(block.lengths)]


def cached(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, row: Cache,
           scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
           **_: Any) -> tuple[Tensor, None]:
    """Attention for `transformers`, of the prompts' row or of the tokens after it: (1, H, N, D) -> (1, N, H, D)."""
    if not row.new:
        for block in row.blocks:
            block.take(row.room, key[0], value[0])
        return attend(module, query, key, value, None, row=row.row, scaling=scaling, sliding_window=sliding_window,
                      softcap=softcap)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = zip(*(x[0].split([len(block.lengths) for block in row.blocks], 1) for x in (query, key, value)),
                strict=True)
    out = [block.read(row.layer, row.new, q, k, v, scale, sliding_window, softcap)
           for block, (q, k, v) in zip(row.blocks, parts, strict=True)]
    row.layer += 1  # layers are called in their order
    return torch.cat(out)[None], None
