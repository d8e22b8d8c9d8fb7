"""Find the instructions of a task's prompts from their token ids alone, and embed them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from continual.data.types import Encoded
from continual.packing.layout import common_prefix_length, group_by_prefix, response_start

MAX_EXAMPLES = 128  # examples of a task whose instructions are read

InstructionCounts = list[tuple[list[int], int]]  # token ids, and how many examples have them


def extract_instructions(examples: Sequence[Encoded]) -> InstructionCounts:
    """Count the instructions of a task: the prefixes that its prompts share.

    At most MAX_EXAMPLES examples are read, at even distances. A prompt that shares nothing with
    others is its own instruction.
    """
    chosen = _subsample(examples)
    counts: Counter[tuple[int, ...]] = Counter()
    for prefix, members in group_by_prefix(chosen):
        for i in members:
            end = prefix or max(1, response_start(chosen[i]))
            counts[chosen[i].ids[:end]] += 1
    return [(list(ids), count) for ids, count in counts.items()]


def extract_prompt_prefixes(examples: Sequence[Encoded]) -> InstructionCounts:
    """Count the instructions of a task without anything that only one prompt holds.

    Prompts that share no instruction are counted by the prefix common to all of them, and left
    out if there is none. If no prompt has a prefix, the result is one empty prefix.
    """
    chosen = _subsample(examples)
    counts: Counter[tuple[int, ...]] = Counter()
    for prefix, members in group_by_prefix(chosen):
        prompts = sorted(chosen[i].ids[: response_start(chosen[i])] for i in members)
        if prefix or len(prompts) > 1:
            # Of sorted sequences, the first and the last differ the most.
            end = prefix or common_prefix_length(prompts[0], prompts[-1])
            counts[prompts[0][:end]] += len(prompts)
    return [(list(ids), count) for ids, count in counts.items() if ids] or [([], len(chosen))]


def mean_embedding(
    embeddings: Tensor, ids: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """Average the rows of `embeddings` (V, D) at these token ids: (D,), summed in `dtype`."""
    return embeddings[list(ids)].mean(0, dtype=dtype)


def _subsample(examples: Sequence[Encoded]) -> Sequence[Encoded]:
    step = -(-len(examples) // MAX_EXAMPLES)
    return examples[::step]
