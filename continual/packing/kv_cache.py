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
from continual.packing.attention import PackedRow, causal_attention, repeat_kv_heads
from continual.packing.layout import GroupPlacement, block_by_length, layout_row

BLOCK_OVERHEAD_KEYS = (
    512  # what one more block costs each token that is read behind it, in keys: measured on a CPU
)


class ContinuationTree:
    """What follows each prompt, a chain or a tree: `parents` (room,) has of each token the one
    before it, or -1.

    `depth` (room,) is how many are before it, and `sees` (room, room) which of them, and itself.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        self.depth = torch.zeros(len(parents), dtype=torch.long)
        self.ancestor_mask = torch.eye(len(parents), dtype=torch.bool)
        for i, parent in enumerate(parents):
            if parent >= 0:
                self.depth[i] = self.depth[parent] + 1
                self.ancestor_mask[i] |= self.ancestor_mask[parent]


@dataclass
class SharedPrefix:
    """What a group of prompts begins with: of each layer its keys and values, (K, length, D) each."""

    length: int
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class PromptBlock:
    """Prompts of like length behind one prefix, and what follows them.

    Of each layer keys and values are (b, K, own + room, D); a prompt shorter than `own` is padded
    between the two.
    """

    def __init__(
        self, prefix: SharedPrefix, own: int, lengths: Sequence[int], follow: ContinuationTree
    ) -> None:
        self.prefix, self.own_length, self.tree = prefix, own, follow
        self.lengths = torch.tensor(lengths)  # (b,) with the prefix, on the CPU
        self.layers: list[list[Tensor]] = []
        self.mask_cache: dict[int | None, Tensor | None] = {}

    def store(self, layer: int, rows: slice, start: int, *states: Tensor) -> None:
        """Take a layer's keys and values, (b, K, n, D) each, of some of the prompts into their
        places from `at` on.
        """
        if layer == len(self.layers):
            room = self.own_length + len(self.tree.depth)
            self.layers.append(
                [x.new_zeros(len(self.lengths), x.shape[1], room, x.shape[3]) for x in states]
            )
        for kept, x in zip(self.layers[layer], states, strict=True):
            kept[rows, :, start : start + x.shape[2]] = x

    def keep_prompts(self, rows: Sequence[int]) -> None:
        """Drop all prompts but these rows."""
        self.lengths = self.lengths[list(rows)]
        for layer in self.layers:  # one by one: never all of them twice
            layer[:] = [x[list(rows)] for x in layer]

    def attend(
        self,
        layer: int,
        new: range,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
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
        self.store(
            layer,
            slice(None),
            self.own_length + new.start,
            *(x.view(heads, b, n, d).transpose(0, 1) for x in (k, v)),
        )
        own_k, own_v = (x[:, :, : self.own_length + new.stop] for x in self.layers[layer])
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
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if (mask := self.hidden_mask(new, window, scores.device)) is not None:
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

    def hidden_mask(self, new: range, window: int | None, device: torch.device) -> Tensor | None:
        """(b, 1, 1, n, prefix + own + stop) what the new tokens do not see; None where they see
        all.
        """
        if window not in self.mask_cache:
            ends, before = self.lengths[:, None], self.prefix.length + self.own_length
            at = torch.arange(before).expand(len(ends), -1)
            follows = ends + self.tree.depth[: new.stop]
            hidden = torch.cat(
                [
                    (at >= ends)[:, None].expand(-1, len(new), -1),
                    ~self.tree.ancestor_mask[new.start : new.stop, : new.stop].expand(
                        len(ends), -1, -1
                    ),
                ],
                2,
            )
            if window is not None:
                hidden |= (
                    follows[:, new.start :, None] - torch.cat([at, follows], 1)[:, None] >= window
                )
            self.mask_cache[window] = hidden[:, None, None].to(device) if hidden.any() else None
        return self.mask_cache[window]


@dataclass(frozen=True)
class PassSegment:
    """Tokens of a pass: those of a prefix, or of some prompts of a block, equally many of each."""

    start: int
    length: int
    prefix: SharedPrefix
    block: PromptBlock | None = None
    rows: range = range(1)

    @property
    def stop(self) -> int:
        """Return the index after its last token in the row."""
        return self.start + len(self.rows) * self.length

    def split_at(self, count: int) -> tuple[PassSegment, PassSegment]:
        """Split into the first `count` prompts and the others."""
        first = replace(self, rows=self.rows[:count])
        return first, replace(self, start=first.stop, rows=self.rows[count:])


class KVCache:
    """Prompts but for their last tokens, and what follows them, that last token first; the
    network's `row=`.

    First come the `passes` that each read a part of the prompts, (1, N); every later pass, after
    `next`, reads a number of tokens behind each prompt that is left, (1, B n), in the order `order`
    of the prompts.
    """

    def __init__(
        self, prompts: Sequence[Encoded], pad_token_id: int, parents: Sequence[int], num_layers: int
    ) -> None:
        asked = [replace(p, response_mask=(False,) * (len(p.ids) - 1) + (True,)) for p in prompts]
        self.ids_and_positions, places = layout_row(asked, pad_token_id)
        self.tree, self.num_layers = ContinuationTree(parents), num_layers
        self.layer_index, self.new_indices = 0, range(0)
        self.blocks: list[PromptBlock] = []
        self.prompt_order: list[int] = []
        self.segments: list[PassSegment] = []
        self.pass_segments: list[PassSegment] = []
        for place in places:
            self._add_group(place, [len(p.ids) - 1 for p in prompts])

    def _add_group(self, place: GroupPlacement, lengths: Sequence[int]) -> None:
        """A group's pieces to be read, and its blocks, which are longer: a key more costs less than
        a token more.
        """
        prefix = SharedPrefix(place.prefix_length)
        if place.prefix_length:
            self.segments.append(PassSegment(place.start, place.prefix_length, prefix))
        home: dict[int, tuple[PromptBlock, int]] = {}
        own = {i: n for _, n, members in place.blocks for i in members}
        for run in block_by_length(
            {i: n + 1 for i, n in own.items()}, BLOCK_OVERHEAD_KEYS
        ):  # with the token that follows
            block = PromptBlock(prefix, own[run[-1]], [lengths[i] for i in run], self.tree)
            self.blocks.append(block)
            self.prompt_order += run
            home.update({i: (block, row) for row, i in enumerate(run)})
        for start, n, members in place.blocks:
            if n:
                block, first = home[members[0]]
                self.segments.append(
                    PassSegment(start, n, prefix, block, range(first, first + len(members)))
                )

    def prefill_passes(self, max_tokens: int) -> Iterator[Tensor]:
        """(2, N) ids and positions of at most so many tokens, or of one prefix or prompt, for the
        next pass to read.
        """
        waiting = self.segments[::-1]
        while waiting:
            self.pass_segments, left = [], max_tokens
            while waiting and (count := left // waiting[-1].length or int(not self.pass_segments)):
                piece, rest = waiting.pop().split_at(count)
                self.pass_segments.append(piece)
                left = max(0, left - (piece.stop - piece.start))  # a piece alone may be longer
                if rest.rows:
                    waiting.append(rest)
            self.layer_index, self.prefill_masks = 0, PackedRow(())
            yield self.ids_and_positions[
                :, self.pass_segments[0].start : self.pass_segments[-1].stop
            ]

    def advance(self, count: int = 1) -> Tensor:
        """(B n,) the positions of the so many tokens behind each prompt that the next pass reads."""
        self.pass_segments, self.layer_index, self.new_indices = (
            [],
            0,
            range(self.new_indices.stop, self.new_indices.stop + count),
        )
        for block in self.blocks:
            block.mask_cache.clear()
        depth = self.tree.depth[self.new_indices.start : self.new_indices.stop]
        return torch.cat([block.lengths for block in self.blocks])[:, None].add(depth).flatten()

    def keep_prompts(self, rows: Sequence[int]) -> None:
        """Drop all prompts but these rows, counted over all blocks."""
        begin = 0
        for block in self.blocks:
            end = begin + len(block.lengths)
            mine = [r - begin for r in rows if begin <= r < end]
            if len(mine) < end - begin:
                block.keep_prompts(mine)
            begin = end
        self.blocks = [block for block in self.blocks if len(block.lengths)]

    def split_sizes(self) -> list[int]:
        """Return the number of tokens of each segment or block of the pass."""
        return [p.stop - p.start for p in self.pass_segments] or [
            len(block.lengths) * len(self.new_indices) for block in self.blocks
        ]


class PrefillDone(Exception):
    """End a prefill pass once the last layer's keys and values are stored.

    The rest of the pass (the last layer's output, the final norm and the head over all prompt
    tokens) would be computed and thrown away. The forward pass is code of `transformers`, which
    calls us only for attention and has no way to stop early, so an exception is the one way out.
    It carries no error: callers suppress it.
    """


def cached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row: KVCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with a KVCache, within `use_row_attention(net, cached_attention)`.

    (1, H, N, D) -> (1, N, H, D). Raises PrefillDone in the last layer of a pass over prompts.
    """
    layer, row.layer_index = (
        row.layer_index,
        row.layer_index + 1,
    )  # layers are called in their order
    parts = zip(
        *(torch.split(x[0], row.split_sizes(), 1) for x in (query, key, value)), strict=True
    )
    if not row.pass_segments:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        read = [
            block.attend(layer, row.new_indices, q, k, v, scale, sliding_window, softcap)
            for block, (q, k, v) in zip(row.blocks, parts, strict=True)
        ]
        return torch.cat(read)[None], None
    out = []
    for piece, states in zip(row.pass_segments, parts, strict=True):
        q, k, v = (
            x.view(len(x), len(piece.rows), piece.length, -1).transpose(0, 1) for x in states
        )
        before = 0
        if piece.block is None:
            piece.prefix.layers.append((k[0].clone(), v[0].clone()))
        else:
            piece.block.store(layer, slice(piece.rows.start, piece.rows.stop), 0, k, v)
            before = piece.prefix.length
        if row.layer_index == row.num_layers:
            continue
        if before:
            k, v = (
                torch.cat([shared.expand(len(x), -1, -1, -1), x], 2)
                for shared, x in zip(piece.prefix.layers[layer], (k, v), strict=True)
            )
        mask = row.prefill_masks.causal_mask(before, piece.length, sliding_window, q)
        k, v = repeat_kv_heads(q.shape[1], k, v)
        out.append(causal_attention(q, k, v, mask, scaling, softcap))
    if row.layer_index == row.num_layers:
        raise PrefillDone
    return torch.cat(out)[None], None
