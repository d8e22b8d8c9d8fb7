"""Virtual tokens (prompt tuning, Lester et al. 2021): embeddings of no word, which stand before
every example.

Their ids follow the vocabulary's: to what lays out rows, attends and answers they are tokens like
others, and the prefix that all examples share is found to be one. Only the layer that looks words
up knows better.

Shapes: n virtual tokens that train, m that do not, H of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Virtual:
    """What a network's input embedding does with ids behind its vocabulary: those of `live` (n, H),
    then of `fixed`.
    """

    def __init__(self, words: nn.Embedding, live: nn.Embedding) -> None:
        self.read: Callable[[Tensor], Tensor] = words.forward
        self.vocabulary, self.live = words.num_embeddings, live
        self.fixed = live.weight.detach()[:0]
        words.forward = self  # type: ignore[assignment]

    def behind(self, fixed: Sequence[Tensor], *, live: bool = True) -> tuple[int, ...]:
        """The ids of what trains, if `live`, and of these (n, H) each, which are looked up from now
        on.
        """
        own = self.live.weight
        self.fixed = torch.cat([own.detach()[:0], *(f.to(own) for f in fixed)])
        first = self.vocabulary + len(own)
        return (
            *range(self.vocabulary, first if live else self.vocabulary),
            *range(first, first + len(self.fixed)),
        )

    def __call__(self, ids: Tensor) -> Tensor:
        """Embeddings (..., H) of ids (...,)."""
        at = ids - self.vocabulary
        out = self.read(ids.where(at < 0, 0))
        n = len(self.live.weight)
        mine, theirs = (at >= 0) & (at < n), at >= n
        out = torch.where(mine[..., None], self.live(at.where(mine, 0)).to(out.dtype), out)
        if len(self.fixed):
            out = torch.where(
                theirs[..., None],
                F.embedding((at - n).where(theirs, 0), self.fixed).to(out.dtype),
                out,
            )
        return out


def prompted(net: Any, config: Any, *, seq2seq: bool) -> Any:
    """The network with peft's prompt tuning of this configuration, as `virtual`: rows bring the ids
    of its tokens.

    So peft's own way, which puts the embeddings before each padded row, is left aside; what it
    saves is its own.
    """
    import peft

    config.num_transformer_submodules = (
        1  # for an encoder-decoder it would also keep a decoder's, and use none
    )
    made: Any = peft.get_peft_model(net, config)
    made.forward, made.generate = net.forward, net.generate
    reader = net.get_encoder() if seq2seq else net
    made.virtual = Virtual(reader.get_input_embeddings(), made.prompt_encoder["default"].embedding)
    return made
