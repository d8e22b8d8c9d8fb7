"""Greedy answers: prompts are read as one flat row, what they share once, and answers that end leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from continual.attention import flat_attention
from continual.cache import Cache, Taken, cached
from continual.data import Encoded
from continual.model import Model
from continual.packing import common_prefix


@torch.no_grad()
def answer(model: Model, prompts: Sequence[Encoded], max_new_tokens: int, batch_size: int) -> list[str]:
    """Greedy answers, each up to the end-of-sequence token; at most `batch_size` prompts are answered together."""
    said = _from_flat_rows if model.layout.flat else _generated
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), prompts[i].ids))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids = said(model, [prompts[i] for i in part], max_new_tokens)
        for i, text in zip(part, model.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return answers


def _generated(model: Model, prompts: Sequence[Encoded], room: int) -> Any:
    """The answers' ids by `transformers`, from left-padded rows: for an encoder, or attention that is not ours."""
    from transformers import GenerationConfig

    pad, device = model.layout.pad, model.layout.device
    settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=room, pad_token_id=pad,
                                eos_token_id=model.tokenizer.eos_token_id,
                                decoder_start_token_id=model.layout.decoder_start)
    longest = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p.ids)) + [*p.ids] for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=model.bf16):
        out = model.net.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return out if model.layout.seq2seq else out[:, longest:]


def _from_flat_rows(model: Model, prompts: Sequence[Encoded], room: int) -> list[list[int]]:
    """The ids of each answer up to the end of sequence, and with it."""
    device, end = model.layout.device, model.tokenizer.eos_token_id
    asked = [replace(p, response=(False,) * (len(p.ids) - 1) + (True,)) for p in prompts]
    cache = Cache(asked, model.layout.pad, room, model.net.config.get_text_config().num_hidden_layers)
    for part in _passes([p.ids for p in prompts], model.layout.tokens):
        ids, positions = cache.lay(part).to(device)
        with suppress(Taken):
            _read(model, ids, positions, cache)
    said: list[list[int]] = [[] for _ in prompts]
    left = cache.order
    tokens = torch.tensor([prompts[i].ids[-1] for i in left], device=device)
    while True:
        tokens = _read(model, tokens, cache.next().to(device), cache).argmax(-1)
        told = tokens.tolist()
        for i, token in zip(left, told, strict=True):
            said[i].append(token)
        stay = [k for k, token in enumerate(told) if token != end]
        if not stay or cache.new == room:
            return said
        if len(stay) < len(told):
            left, tokens = [left[k] for k in stay], tokens[stay]
            cache.keep(stay)


def _passes(rows: Sequence[tuple[int, ...]], most: int) -> list[list[int]]:
    """Neighbours in parts of at most so many tokens, or single rows, what all rows begin with counted once a part."""
    shared = common_prefix(min(rows), max(rows))
    parts: list[list[int]] = []
    spent = 0
    for i, row in enumerate(rows):
        own = len(row) - shared
        if not parts or spent + own > most:
            parts.append([])
            spent = shared
        parts[-1].append(i)
        spent += own
    return parts


def _read(model: Model, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits (N, V) after each of the row's tokens (N,)."""
    with flat_attention(model.net, cached), torch.autocast(ids.device.type, torch.bfloat16, enabled=model.bf16):
        out = model.net(input_ids=ids[None], position_ids=positions[None], row=cache, use_cache=False)
    logits: Tensor = out.logits[0]
    return logits
