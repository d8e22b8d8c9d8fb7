"""Virtual tokens (prompt tuning, Lester et al. 2021): trained embeddings before every example.

Their ids follow the ids of the vocabulary, so row layout, attention and generation treat them as
ordinary tokens, and as a prefix that all examples share. Only the input embedding knows them.

Shapes: n virtual tokens that train, m that do not, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VirtualEmbedding:
    """Replace the forward of an input embedding.

    Ids past the vocabulary are looked up in `live` (n, H), then in `fixed` (m, H).
    """

    def __init__(self, words: nn.Embedding, live: nn.Embedding) -> None:
        self.embed_words: Callable[[Tensor], Tensor] = words.forward
        self.vocab_size = words.num_embeddings
        self.live = live
        self.fixed = live.weight.detach()[:0]
        words.forward = self  # type: ignore[assignment]

    def set_fixed(self, fixed: Sequence[Tensor], *, live: bool = True) -> tuple[int, ...]:
        """Set the embeddings that do not train, (m, H) in all; return the ids of the whole prefix.

        The ids of the trainable tokens come first, if `live`.
        """
        trainable = self.live.weight
        self.fixed = torch.cat([trainable.detach()[:0], *(f.to(trainable) for f in fixed)])
        first_fixed = self.vocab_size + len(trainable)
        fixed_ids = range(first_fixed, first_fixed + len(self.fixed))
        live_ids = range(self.vocab_size, first_fixed) if live else ()
        return (*live_ids, *fixed_ids)

    def __call__(self, ids: Tensor) -> Tensor:
        """Embed ids (...,) as (..., H)."""
        n = len(self.live.weight)
        index = ids - self.vocab_size  # below 0 for words
        out = self.embed_words(ids.where(index < 0, 0))

        is_live = (index >= 0) & (index < n)
        live = self.live(index.where(is_live, 0)).to(out.dtype)
        out = torch.where(is_live[..., None], live, out)
        if len(self.fixed):
            is_fixed = index >= n
            fixed = F.embedding((index - n).where(is_fixed, 0), self.fixed).to(out.dtype)
            out = torch.where(is_fixed[..., None], fixed, out)
        return out


def add_prompt_tuning(net: Any, config: Any, *, seq2seq: bool) -> Any:
    """Return the network with peft's prompt tuning, whose tokens rows name by id (`net.virtual`).

    peft's own forward, which puts the embeddings before each padded row, is not used; its format
    for saving is.
    """
    import peft

    # For an encoder-decoder peft would also keep tokens for the decoder, and not use them.
    config.num_transformer_submodules = 1
    tuned: Any = peft.get_peft_model(net, config)
    tuned.forward = net.forward
    tuned.generate = net.generate
    embedding_owner = net.get_encoder() if seq2seq else net
    tuned.virtual = VirtualEmbedding(
        embedding_owner.get_input_embeddings(), tuned.prompt_encoder["default"].embedding
    )
    return tuned
