"""Greedy answers: prompts are read as one flat row, what they share once, and answers that end leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from continual.attention import flat_attention
from continual.cache import Cache, Taken, cached
from continual.data import Encoded
from continual.model import Model

CPU_PASS = 1024  # tokens: what a longer pass computes falls out of a CPU's caches, and takes longer for it


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
    cache = read(model, prompts, range(-1, room - 1))
    said: list[list[int]] = [[] for _ in prompts]
    left = cache.order
    tokens = torch.tensor([prompts[i].ids[-1] for i in left], device=device)
    while True:
        tokens = follow(model, cache, tokens[:, None])[:, 0].argmax(-1)
        told = tokens.tolist()
        for i, token in zip(left, told, strict=True):
            said[i].append(token)
        stay = [k for k, token in enumerate(told) if token != end]
        if not stay or cache.new.stop == room:
            return said
        if len(stay) < len(told):
            left, tokens = [left[k] for k in stay], tokens[stay]
            cache.keep(stay)


def read(model: Model, prompts: Sequence[Encoded], parents: Sequence[int]) -> Cache:
    """The prompts, read but for their last tokens; behind each there is room for tokens with these `parents`."""
    layers = model.net.config.get_text_config().num_hidden_layers
    cache, most = Cache(prompts, model.layout.pad, parents, layers), model.layout.tokens
    for part in cache.passes(min(most, CPU_PASS) if model.layout.device.type == "cpu" else most):
        ids, positions = part.to(model.layout.device)
        with suppress(Taken):
            _pass(model, ids, positions, cache)
    return cache


def follow(model: Model, cache: Cache, tokens: Tensor) -> Tensor:
    """Logits (B, n, V) after each of the next tokens (B, n) behind the prompts that are left, in `cache.order`."""
    positions = cache.next(tokens.shape[1]).to(tokens.device)
    return _pass(model, tokens.flatten(), positions, cache).view(*tokens.shape, -1)


def _pass(model: Model, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits (N, V) after each of the row's tokens (N,)."""
    with flat_attention(model.net, cached), torch.autocast(ids.device.type, torch.bfloat16, enabled=model.bf16):
        out = model.net(input_ids=ids[None], position_ids=positions[None], row=cache, use_cache=False)
    logits: Tensor = out.logits[0]
    return logits
