"""Answers: prompts are read as one flat row, what they share once, and answers that end leave the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from continual.data.types import Encoded
from continual.models.model import Model
from continual.packing.attention import use_row_attention
from continual.packing.kv_cache import KVCache, PrefillDone, cached_attention
from continual.packing.layout import prepend_prefix

CPU_PASS = (
    1024  # tokens: what a longer pass computes falls out of a CPU's caches, and takes longer for it
)


# Chooses the next tokens (B,) by the logits (B, V) behind the prompts of these indices, for the so
# manieth time.
Pick = Callable[[Tensor, Sequence[int], int], Tensor]


def greedy_rule(logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
    """Greedy decoding."""
    return logits.argmax(-1)


def top_k_rule(top_k: int, draws: Tensor) -> Pick:
    """Sampling from the `top_k` likeliest tokens, by numbers in [0, 1) for each prompt and step,
    (prompts, room).

    What one prompt is given does not depend on the others.
    """

    def pick(logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        best, tokens = logits.double().topk(min(top_k, logits.shape[-1]))
        up_to = best.softmax(-1).cumsum(-1)
        level = draws[list(prompts), step, None].to(up_to) * up_to[:, -1:]
        at = torch.searchsorted(up_to, level, right=True).clamp(max=up_to.shape[1] - 1)
        return tokens.gather(1, at)[:, 0]

    return pick


def generate_answers(
    model: Model, prompts: Sequence[Encoded], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers, each up to the end-of-sequence token; at most `batch_size` prompts are
    answered together.
    """
    ids = generate_ids(model, prompts, max_new_tokens, batch_size, model.tokenizer.eos_token_id)
    return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def generate_ids(
    model: Model,
    prompts: Sequence[Encoded],
    room: int,
    batch_size: int,
    end: int,
    pick: Pick = greedy_rule,
) -> list[list[int]]:
    """At most `room` tokens behind each prompt, up to the token `end` and with it."""
    said = _generate_packed if model.layout.packed else _generate_padded
    model.check_fits_context(
        max((len(p.ids) for p in prompts), default=0) + room - 1
    )  # the last token is not read
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), prompts[i].ids))
    found: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for i, ids in zip(part, said(model, prompts, part, room, end, pick), strict=True):
            found[i] = ids
    return found


def _generate_padded(
    model: Model, prompts: Sequence[Encoded], part: Sequence[int], room: int, end: int, pick: Pick
) -> list[list[int]]:
    """By `transformers`, from left-padded rows: for an encoder, or attention that is not ours."""
    from transformers import GenerationConfig

    pad, device = model.layout.pad_token_id, model.layout.device
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=room,
        pad_token_id=pad,
        eos_token_id=end,
        decoder_start_token_id=model.layout.decoder_start_token_id,
    )
    asked = [p.ids for p in prepend_prefix(model.layout.prompt_prefix, [prompts[i] for i in part])]
    longest = max(map(len, asked))
    ids = torch.tensor([[pad] * (longest - len(p)) + [*p] for p in asked], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked], device=device)
    before = 1 if model.layout.seq2seq else longest

    def only(read: Tensor, scores: Tensor) -> Tensor:
        chosen = pick(scores, part, read.shape[1] - before)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    more = {} if pick is greedy_rule else {"logits_processor": [only]}
    with (
        model.forward_context(model, [prompts[i] for i in part]),
        torch.autocast(device.type, torch.bfloat16, enabled=model.bf16),
    ):
        out = model.net.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, **more
        )
    rows: list[list[int]] = (out if model.layout.seq2seq else out[:, longest:]).tolist()
    return [
        row[: row.index(end, first) + 1] if end in row[first:] else row
        for row, first in ((row, int(model.layout.seq2seq)) for row in rows)
    ]


def _generate_packed(
    model: Model, prompts: Sequence[Encoded], part: Sequence[int], room: int, end: int, pick: Pick
) -> list[list[int]]:
    asked, device = [prompts[i] for i in part], model.layout.device
    cache = prefill(model, asked, range(-1, room - 1))
    said: list[list[int]] = [[] for _ in part]
    left = cache.prompt_order
    tokens = torch.tensor([asked[i].ids[-1] for i in left], device=device)
    while True:
        logits = next_logits(model, cache, tokens[:, None])[:, 0]
        tokens = pick(logits, [part[i] for i in left], cache.new_indices.start)
        told = tokens.tolist()
        for i, token in zip(left, told, strict=True):
            said[i].append(token)
        stay = [k for k, token in enumerate(told) if token != end]
        if not stay or cache.new_indices.stop == room:
            return said
        if len(stay) < len(told):
            left, tokens = [left[k] for k in stay], tokens[stay]
            cache.keep_prompts(stay)


def prefill(model: Model, prompts: Sequence[Encoded], parents: Sequence[int]) -> KVCache:
    """The prompts, read but for their last tokens; behind each there is room for tokens with these
    `parents`.
    """
    layers = model.net.config.get_text_config().num_hidden_layers
    layers = 0 if model.sharded else layers  # a pass that ends early would leave weights gathered
    cache, most = (
        KVCache(
            prepend_prefix(model.layout.prompt_prefix, prompts),
            model.layout.pad_token_id,
            parents,
            layers,
        ),
        model.layout.tokens_per_microbatch,
    )
    for part in cache.prefill_passes(
        min(most, CPU_PASS) if model.layout.device.type == "cpu" else most
    ):
        ids, positions = part.to(model.layout.device)
        with suppress(PrefillDone):
            _forward_pass(model, ids, positions, cache)
    return cache


def next_logits(model: Model, cache: KVCache, tokens: Tensor) -> Tensor:
    """Logits (B, n, V) after each of the next tokens (B, n) behind the prompts that are left, in
    `cache.order`.
    """
    positions = cache.advance(tokens.shape[1]).to(tokens.device)
    return _forward_pass(model, tokens.flatten(), positions, cache).view(*tokens.shape, -1)


def _forward_pass(model: Model, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """Logits (N, V) after each of the row's tokens (N,)."""
    with (
        use_row_attention(model.net, cached_attention),
        torch.autocast(ids.device.type, torch.bfloat16, enabled=model.bf16),
    ):
        out = model.net(
            input_ids=ids[None], position_ids=positions[None], row=cache, use_cache=False
        )
    logits: Tensor = out.logits[0]
    return logits
