"""The keys and values of prompts, read as one flat row, for the tokens that follow each of them.

What prompts share stays where it stands once: each block's queries meet it in one matrix product,
and one softmax spans it and the prompt's own tokens (the decomposition of Hydragen, Juravsky et al.
2024, without its second pass).

Shapes: H query heads, K key heads, D of a head, N tokens of a pass, b prompts of a block, B of all
blocks, n tokens that follow a prompt and are read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from continual.data.types import Encoded
from continual.packing.attention import Row, causal, of_all_heads
from continual.packing.layout import Place, blocked, lay

OVERHEAD = (
    512  # what one more block costs each token that is read behind it, in keys: measured on a CPU
)


class Follow:
    """What follows each prompt, a chain or a tree: `parents` (room,) has of each token the one
    before it, or -1.

    `depth` (room,) is how many are before it, and `sees` (room, room) which of them, and itself.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        self.depth = torch.zeros(len(parents), dtype=torch.long)
        self.sees = torch.eye(len(parents), dtype=torch.bool)
        for i, parent in enumerate(parents):
            if parent >= 0:
                self.depth[i] = self.depth[parent] + 1
                self.sees[i] |= self.sees[parent]


@dataclass
class Prefix:
    """What a group of prompts begins with: of each layer its keys and values, (K, length, D) each."""

    length: int
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Block:
    """Prompts of like length behind one prefix, and what follows them.

    Of each layer keys and values are (b, K, own + room, D); a prompt shorter than `own` is padded
    between the two.
    """

    def __init__(self, prefix: Prefix, own: int, lengths: Sequence[int], follow: Follow) -> None:
        self.prefix, self.own, self.follow = prefix, own, follow
        self.lengths = torch.tensor(lengths)  # (b,) with the prefix, on the CPU
        self.layers: list[list[Tensor]] = []
        self.masks: dict[int | None, Tensor | None] = {}

    def put(self, layer: int, rows: slice, at: int, *states: Tensor) -> None:
        """Take a layer's keys and values, (b, K, n, D) each, of some of the prompts into their
        places from `at` on.
        """
        if layer == len(self.layers):
            room = self.own + len(self.follow.depth)
            self.layers.append(
                [x.new_zeros(len(self.lengths), x.shape[1], room, x.shape[3]) for x in states]
            )
        for kept, x in zip(self.layers[layer], states, strict=True):
            kept[rows, :, at : at + x.shape[2]] = x

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other prompts."""
        self.lengths = self.lengths[list(rows)]
        for layer in self.layers:  # one by one: never all of them twice
            layer[:] = [x[list(rows)] for x in layer]

    def read(
        self,
        layer: int,
        new: range,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        """The `new` tokens behind each prompt, query (H, b n, D), key and value (K, b n, D) -> (b
        n, H, D).
        """
        heads, d, b, n, shared = (
            len(k),
            q.shape[-1],
            len(self.lengths),
            len(new),
            self.prefix.length,
        )
        self.put(
            layer,
            slice(None),
            self.own + new.start,
            *(x.view(heads, b, n, d).transpose(0, 1) for x in (k, v)),
        )
        own_k, own_v = (x[:, :, : self.own + new.stop] for x in self.layers[layer])
        q = (q * scale).view(heads, -1, b, n, d)
        scores = (q.permute(2, 0, 1, 3, 4).reshape(b, heads, -1, d) @ own_k.transpose(2, 3)).view(
            b, heads, -1, n, own_k.shape[2]
        )
        if shared:
            shared_k, shared_v = self.prefix.layers[layer]
            before = (q.reshape(heads, -1, d) @ shared_k.transpose(1, 2)).view(
                *q.shape[:-1], shared
            )
            scores = torch.cat(
                [before.permute(2, 0, 1, 3, 4), scores], -1
            )  # (b, K, H / K, n, prefix + own + stop)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if (mask := self.mask(new, window, scores.device)) is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        chances = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
            v.dtype
        )
        out = (chances[..., shared:].flatten(2, 3) @ own_v).view(*chances.shape[:4], d)
        if shared:
            before = (
                chances[..., :shared].permute(1, 2, 0, 3, 4).reshape(heads, -1, shared) @ shared_v
            )
            out = out + before.view(heads, -1, b, n, d).permute(2, 0, 1, 3, 4)
        return out.permute(0, 3, 1, 2, 4).reshape(b * n, -1, d)

    def mask(self, new: range, window: int | None, device: torch.device) -> Tensor | None:
        """(b, 1, 1, n, prefix + own + stop) what the new tokens do not see; None where they see
        all.
        """
        if window not in self.masks:
            ends, before = self.lengths[:, None], self.prefix.length + self.own
            at = torch.arange(before).expand(len(ends), -1)
            follows = ends + self.follow.depth[: new.stop]
            hidden = torch.cat(
                [
                    (at >= ends)[:, None].expand(-1, len(new), -1),
                    ~self.follow.sees[new.start : new.stop, : new.stop].expand(len(ends), -1, -1),
                ],
                2,
            )
            if window is not None:
                hidden |= (
                    follows[:, new.start :, None] - torch.cat([at, follows], 1)[:, None] >= window
                )
            self.masks[window] = hidden[:, None, None].to(device) if hidden.any() else None
        return self.masks[window]


@dataclass(frozen=True)
class Piece:
    """Tokens of a pass: those of a prefix, or of some prompts of a block, equally many of each."""

    start: int
    length: int
    prefix: Prefix
    block: Block | None = None
    rows: range = range(1)

    @property
    def stop(self) -> int:
        """Where in the row it ends."""
        return self.start + len(self.rows) * self.length

    def cut(self, count: int) -> tuple[Piece, Piece]:
        """The first so many prompts, and the others."""
        first = replace(self, rows=self.rows[:count])
        return first, replace(self, start=first.stop, rows=self.rows[count:])


class Cache:
    """Prompts but for their last tokens, and what follows them, that last token first; the
    network's `row=`.

    First come the `passes` that each read a part of the prompts, (1, N); every later pass, after
    `next`, reads a number of tokens behind each prompt that is left, (1, B n), in the order `order`
    of the prompts.
    """

    def __init__(
        self, prompts: Sequence[Encoded], pad: int, parents: Sequence[int], layers: int
    ) -> None:
        asked = [replace(p, response=(False,) * (len(p.ids) - 1) + (True,)) for p in prompts]
        self.row, places = lay(asked, pad)
        self.follow, self.depth = Follow(parents), layers
        self.layer, self.new = 0, range(0)
        self.blocks: list[Block] = []
        self.order: list[int] = []
        self.pieces: list[Piece] = []
        self.reading: list[Piece] = []
        for place in places:
            self._add(place, [len(p.ids) - 1 for p in prompts])

    def _add(self, place: Place, lengths: Sequence[int]) -> None:
        """A group's pieces to be read, and its blocks, which are longer: a key more costs less than
        a token more.
        """
        prefix = Prefix(place.prefix)
        if place.prefix:
            self.pieces.append(Piece(place.begin, place.prefix, prefix))
        home: dict[int, tuple[Block, int]] = {}
        own = {i: n for _, n, members in place.blocks for i in members}
        for run in blocked(
            {i: n + 1 for i, n in own.items()}, OVERHEAD
        ):  # with the token that follows
            block = Block(prefix, own[run[-1]], [lengths[i] for i in run], self.follow)
            self.blocks.append(block)
            self.order += run
            home.update({i: (block, row) for row, i in enumerate(run)})
        for start, n, members in place.blocks:
            if n:
                block, first = home[members[0]]
                self.pieces.append(
                    Piece(start, n, prefix, block, range(first, first + len(members)))
                )

    def passes(self, most: int) -> Iterator[Tensor]:
        """(2, N) ids and positions of at most so many tokens, or of one prefix or prompt, for the
        next pass to read.
        """
        waiting = self.pieces[::-1]
        while waiting:
            self.reading, left = [], most
            while waiting and (count := left // waiting[-1].length or int(not self.reading)):
                piece, rest = waiting.pop().cut(count)
                self.reading.append(piece)
                left = max(0, left - (piece.stop - piece.start))  # a piece alone may be longer
                if rest.rows:
                    waiting.append(rest)
            self.layer, self.masks = 0, Row(())
            yield self.row[:, self.reading[0].start : self.reading[-1].stop]

    def next(self, count: int = 1) -> Tensor:
        """(B n,) the positions of the so many tokens behind each prompt that the next pass reads."""
        self.reading, self.layer, self.new = [], 0, range(self.new.stop, self.new.stop + count)
        for block in self.blocks:
            block.masks.clear()
        depth = self.follow.depth[self.new.start : self.new.stop]
        return torch.cat([block.lengths for block in self.blocks])[:, None].add(depth).flatten()

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

    def sizes(self) -> list[int]:
        """How many tokens of the pass belong together."""
        return [p.stop - p.start for p in self.reading] or [
            len(block.lengths) * len(self.new) for block in self.blocks
        ]


class Taken(Exception):
    """The last layer's keys and values of the prompts are taken: the rest of that pass would be for
    nothing.
    """


def cached(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row: Cache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for `transformers` within `flat_attention(net, cached)`: (1, H, N, D) -> (1, N, H,
    D).

    Raises Taken in the last layer of a pass over prompts.
    """
    layer, row.layer = row.layer, row.layer + 1  # layers are called in their order
    parts = zip(*(torch.split(x[0], row.sizes(), 1) for x in (query, key, value)), strict=True)
    if not row.reading:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        read = [
            block.read(layer, row.new, q, k, v, scale, sliding_window, softcap)
            for block, (q, k, v) in zip(row.blocks, parts, strict=True)
        ]
        return torch.cat(read)[None], None
    out = []
    for piece, states in zip(row.reading, parts, strict=True):
        q, k, v = (
            x.view(len(x), len(piece.rows), piece.length, -1).transpose(0, 1) for x in states
        )
        before = 0
        if piece.block is None:
            piece.prefix.layers.append((k[0].clone(), v[0].clone()))
        else:
            piece.block.put(layer, slice(piece.rows.start, piece.rows.stop), 0, k, v)
            before = piece.prefix.length
        if row.layer == row.depth:
            continue
        if before:
            k, v = (
                torch.cat([shared.expand(len(x), -1, -1, -1), x], 2)
                for shared, x in zip(piece.prefix.layers[layer], (k, v), strict=True)
            )
        mask = row.masks.mask(before, piece.length, sliding_window, q)
        k, v = of_all_heads(q.shape[1], k, v)
        out.append(causal(q, k, v, mask, scaling, softcap))
    if row.layer == row.depth:
        raise Taken
    return torch.cat(out)[None], None
