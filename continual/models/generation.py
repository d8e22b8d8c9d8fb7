"""Generate answers: prompts are read as one packed row, shared prefixes once.

Answers that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from continual.data.types import Encoded
from continual.models.model import Model
from continual.models.sampling import inverse_cdf
from continual.packing.attention import use_row_attention
from continual.packing.kv_cache import KVCache, PrefillDone, cached_attention
from continual.packing.layout import prepend_prefix

CPU_PASS = 1024  # tokens of a prefill pass on a CPU; longer passes fall out of its caches

# Next-token rule: (logits (B, V), prompt indices, decoding step) -> token ids (B,).
NextTokenRule = Callable[[Tensor, Sequence[int], int], Tensor]


def greedy_rule(logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
    """Choose the most likely token."""
    return logits.argmax(-1)


def top_k_rule(top_k: int, draws: Tensor) -> NextTokenRule:
    """Return a rule that samples from the `top_k` most likely tokens.

    `draws` (prompts, max_new_tokens) has a number in [0, 1) for each prompt and step, so what one
    prompt gets does not depend on the others.
    """

    def sample(logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        best, tokens = logits.double().topk(min(top_k, logits.shape[-1]))
        index = inverse_cdf(best.softmax(-1), draws[list(prompts), step, None])
        return tokens.gather(1, index)[:, 0]

    return sample


def generate_answers(
    model: Model, prompts: Sequence[Encoded], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Generate greedy answers, each up to the end-of-sequence token, `batch_size` at a time."""
    ids = generate_ids(model, prompts, max_new_tokens, batch_size, model.tokenizer.eos_token_id)
    return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def generate_ids(
    model: Model,
    prompts: Sequence[Encoded],
    max_new_tokens: int,
    batch_size: int,
    end: int,
    rule: NextTokenRule = greedy_rule,
) -> list[list[int]]:
    """Generate at most `max_new_tokens` token ids after each prompt, up to and including `end`."""
    generate = _generate_packed if model.layout.packed else _generate_padded
    longest = max((len(p.ids) for p in prompts), default=0)
    model.check_fits_context(longest + max_new_tokens - 1)  # the last token is not read
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), prompts[i].ids))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        generated = generate(model, prompts, part, max_new_tokens, end, rule)
        for i, ids in zip(part, generated, strict=True):
            answers[i] = ids
    return answers


def _generate_padded(
    model: Model,
    prompts: Sequence[Encoded],
    part: Sequence[int],
    max_new_tokens: int,
    end: int,
    rule: NextTokenRule,
) -> list[list[int]]:
    """Generate with `transformers` from left-padded rows.

    Used for encoder-decoder models, and where attention cannot read packed rows.
    """
    from transformers import GenerationConfig

    pad, device = model.layout.pad_token_id, model.layout.device
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=end,
        decoder_start_token_id=model.layout.decoder_start_token_id,
    )
    chosen = [prompts[i] for i in part]
    rows_in = [p.ids for p in prepend_prefix(model.layout.prompt_prefix, chosen)]
    longest = max(map(len, rows_in))
    ids = torch.tensor([[pad] * (longest - len(p)) + [*p] for p in rows_in], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in rows_in], device=device)
    prompt_length = 1 if model.layout.seq2seq else longest

    def apply_rule(sequence: Tensor, scores: Tensor) -> Tensor:
        tokens = rule(scores, part, sequence.shape[1] - prompt_length)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)

    options = {} if rule is greedy_rule else {"logits_processor": [apply_rule]}
    with (
        model.forward_context(model, chosen),
        torch.autocast(device.type, torch.bfloat16, enabled=model.bf16),
    ):
        out = model.net.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, **options
        )
    rows: list[list[int]] = (out if model.layout.seq2seq else out[:, longest:]).tolist()
    first = int(model.layout.seq2seq)  # a decoder's start token may equal `end`
    return [row[: row.index(end, first) + 1] if end in row[first:] else row for row in rows]


def _generate_packed(
    model: Model,
    prompts: Sequence[Encoded],
    part: Sequence[int],
    max_new_tokens: int,
    end: int,
    rule: NextTokenRule,
) -> list[list[int]]:
    """Generate from packed rows with a key-value cache, which ended answers leave."""
    chosen = [prompts[i] for i in part]
    cache = prefill(model, chosen, range(-1, max_new_tokens - 1))
    answers: list[list[int]] = [[] for _ in part]
    active = cache.prompt_order
    tokens = torch.tensor([chosen[i].ids[-1] for i in active], device=model.layout.device)
    while True:
        logits = next_logits(model, cache, tokens[:, None])[:, 0]
        tokens = rule(logits, [part[i] for i in active], cache.new_indices.start)
        token_list = tokens.tolist()
        for i, token in zip(active, token_list, strict=True):
            answers[i].append(token)

        unfinished = [k for k, token in enumerate(token_list) if token != end]
        if not unfinished or cache.new_indices.stop == max_new_tokens:
            return answers
        if len(unfinished) < len(token_list):
            active = [active[k] for k in unfinished]
            tokens = tokens[unfinished]
            cache.keep_prompts(unfinished)


def prefill(model: Model, prompts: Sequence[Encoded], parents: Sequence[int]) -> KVCache:
    """Read the prompts except for their last tokens; return the key-value cache.

    After each prompt there is space for tokens with these `parents` (a continuation tree).
    """
    layout = model.layout
    layers = model.net.config.get_text_config().num_hidden_layers
    if model.sharded:
        layers = 0  # read all layers: a pass that ends early would leave weights gathered
    cache = KVCache(
        prepend_prefix(layout.prompt_prefix, prompts), layout.pad_token_id, parents, layers
    )
    max_tokens = layout.tokens_per_microbatch
    if layout.device.type == "cpu":
        max_tokens = min(max_tokens, CPU_PASS)
    for part in cache.prefill_passes(max_tokens):
        ids, positions = part.to(model.layout.device)
        with suppress(PrefillDone):
            _forward_pass(model, ids, positions, cache)
    return cache


def next_logits(model: Model, cache: KVCache, tokens: Tensor) -> Tensor:
    """Return the logits (B, n, V) after each of the next tokens (B, n).

    The B prompts are the ones still in the cache, in the order of `cache.prompt_order`.
    """
    positions = cache.advance(tokens.shape[1]).to(tokens.device)
    return _forward_pass(model, tokens.flatten(), positions, cache).view(*tokens.shape, -1)


def _forward_pass(model: Model, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """Return the logits (N, V) after each token (N,) of the packed row."""
    with (
        use_row_attention(model.net, cached_attention),
        torch.autocast(ids.device.type, torch.bfloat16, enabled=model.bf16),
    ):
        out = model.net(
            input_ids=ids[None], position_ids=positions[None], row=cache, use_cache=False
        )
    logits: Tensor = out.logits[0]
    return logits
