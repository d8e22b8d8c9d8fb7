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

from continual.attention import Group, Row, attend
from continual.data import Encoded
from continual.packing import blocked, grouped


class Block:
    """Prompts of like length behind one prefix: what each layer's newest queries attend to.

    Of each layer keys and values are (K, prefix, D) of the prefix and (b, K, own + room, D) of each prompt and its
    answer; a prompt shorter than `own` is padded between the two.
    """

    def __init__(self, begin: int, prefix: int, start: int, own: int, lengths: Sequence[int]) -> None:
        self.shared, self.prefix = slice(begin, begin + prefix), prefix
        self.start, self.own = start, own
        self.lengths = torch.tensor(lengths)  # (b,) with the prefix, on the CPU
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
    """Prompts but for their last tokens, and what follows them; the network's `row=`.

    First come passes that each read some prompts, (1, N); every later pass reads a token of each prompt that is left,
    (1, B), in the order `order` of the prompts.
    """

    def __init__(self, prompts: Sequence[Encoded], pad: int, room: int, layers: int) -> None:
        self.prompts, self.pad, self.room, self.depth = prompts, pad, room, layers
        self.new = self.layer = 0
        self.blocks: list[Block] = []
        self.order: list[int] = []

    def lay(self, members: Sequence[int]) -> Tensor:
        """(2, N) the ids and positions of a row of these prompts, for the next pass to read."""
        ids: list[int] = []
        positions: list[int] = []
        groups, known = [], len(self.blocks)

        def add(more: Sequence[int], at: int) -> None:
            ids.extend(more)
            positions.extend(range(at, at + len(more)))

        rows = {i: self.prompts[i].ids for i in members}
        for prefix, found in grouped([self.prompts[i] for i in members]):
            group = [members[i] for i in found]
            begin = len(ids)
            add(rows[group[0]][:prefix], 0)
            left = {i: len(rows[i]) - 1 - prefix for i in group}
            # A prompt with nothing to read is given a token that it does not see: no row is empty.
            bare = ([i for i, n in left.items() if not n], 0 if prefix else 1)
            blocks = [(b, n) for b, n in (bare, *((b, left[b[-1]]) for b in blocked(left))) if b]
            for block, own in blocks:
                self.blocks.append(Block(begin, prefix, len(ids), own, [prefix + left[i] for i in block]))
                self.order += block
                for i in block:
                    add((*rows[i][prefix:-1], *[self.pad] * (own - left[i])), prefix)
            groups.append(Group(prefix, tuple((len(b), n) for b, n in blocks if n)))
        self.row, self.fresh, self.layer = Row(tuple(groups)), self.blocks[known:], 0
        return torch.tensor([ids, positions])

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


class Taken(Exception):
    """The last layer's keys and values of the prompts are taken: the rest of that pass would be for nothing."""


def cached(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, row: Cache,
           scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
           **_: Any) -> tuple[Tensor, None]:
    """Attention for `transformers` within `flat_attention(net, cached)`: (1, H, N, D) -> (1, N, H, D).

    Raises Taken in the last layer of the prompts' pass.
    """
    row.layer += 1  # layers are called in their order
    if not row.new:
        for block in row.fresh:
            block.take(row.room, key[0], value[0])
        if row.layer == row.depth:
            raise Taken
        return attend(module, query, key, value, None, row=row.row, scaling=scaling, sliding_window=sliding_window,
                      softcap=softcap)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sizes = [len(block.lengths) for block in row.blocks]
    parts = zip(*(torch.split(x[0], sizes, 1) for x in (query, key, value)), strict=True)
    out = [block.read(row.layer - 1, row.new, q, k, v, scale, sliding_window, softcap)
           for block, (q, k, v) in zip(row.blocks, parts, strict=True)]
    return torch.cat(out)[None], None
