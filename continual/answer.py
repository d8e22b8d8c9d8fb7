"""Greedy answers: prompts are read as one flat row, what they share once, and answers that end leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from continual.attention import flat_attention
from continual.cache import Cache, cached
from continual.data import Encoded
from continual.model import Model
from continual.packing import Batch


@torch.no_grad()
def answer(model: Model, prompts: Sequence[Encoded], max_new_tokens: int, batch_size: int) -> list[str]:
    """Greedy answers, each up to the end-of-sequence token; at most `batch_size` prompts are answered together."""
    if model.layout.flat:
        said, order = _from_flat_rows, sorted(range(len(prompts)), key=lambda i: prompts[i].ids)
    else:
        said, order = _generated, sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
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
    """The answers' ids by flat rows of at most `layout.tokens` prompt tokens."""
    end = model.tokenizer.eos_token_id
    # As examples whose one supervised token is the answer's first, of which a batch knows where it is predicted.
    asked = tuple(replace(p, id=str(i), ids=(*p.ids, end), response=(False,) * len(p.ids) + (True,))
                  for i, p in enumerate(prompts))
    said: list[list[int]] = [[] for _ in asked]
    for batch in Batch(asked, replace(model.layout, instruction_weight=0.0)).micro_batches():
        at = batch.at.tolist()
        order = sorted(range(len(at)), key=at.__getitem__)  # as they stand in the row
        mine = [int(batch.examples[i].id) for i in order]
        cache = Cache(batch.inputs["row"], [at[i] for i in order], room)
        logits = _read(model, batch.inputs["input_ids"], batch.inputs["position_ids"], cache, batch.at[order])
        for left in range(room, 0, -1):
            tokens = logits.argmax(-1)
            told = tokens.tolist()
            for i, token in zip(mine, told, strict=True):
                said[i].append(token)
            stay = [k for k, token in enumerate(told) if token != end]
            if not stay or left == 1:
                break
            if len(stay) < len(told):
                mine, tokens = [mine[k] for k in stay], tokens[stay]
                cache.keep(stay)
            logits = _read(model, tokens[None], cache.next()[None].to(tokens.device), cache)
    return said


def _read(model: Model, ids: Tensor, positions: Tensor, cache: Cache, at: Tensor | None = None) -> Tensor:
    """Logits (B, V) after the tokens `at` (B,) of a row (1, N), by default all of them."""
    def gather(_: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if at is None else (args[0][:, at],)

    hook = model.net.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        with flat_attention(model.net, cached), torch.autocast(ids.device.type, torch.bfloat16, enabled=model.bf16):
            out = model.net(input_ids=ids, position_ids=positions, row=cache, use_cache=False)
    finally:
        hook.remove()
    logits: Tensor = out.logits[0]
    return logits
