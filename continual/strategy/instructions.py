"""What the prompts of a task ask for, found from their token ids alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from continual.data.types import Encoded
from continual.packing.layout import common_prefix_length, group_by_prefix, response_start

MAX_EXAMPLES = 128  # examples of a task whose instructions are looked at

InstructionCounts = list[tuple[list[int], int]]  # token ids, and how many examples have them


def extract_instructions(examples: Sequence[Encoded]) -> InstructionCounts:
    """What the prompts begin with together, and how many each; evenly from all examples.

    A prompt that shares nothing with others is its own instruction.
    """
    chosen = _subsample(examples)
    found: Counter[tuple[int, ...]] = Counter()
    for prefix, members in group_by_prefix(chosen):
        found.update(chosen[i].ids[: prefix or max(1, response_start(chosen[i]))] for i in members)
    return [(list(ids), count) for ids, count in found.items()]


def extract_prompt_prefixes(examples: Sequence[Encoded]) -> InstructionCounts:
    """The same, but nothing that one prompt alone holds: of those that share no instruction, what
    all have in common.

    Where that is nothing they are left out; where it is nothing of all, there is one beginning,
    without a token.
    """
    chosen = _subsample(examples)
    found: Counter[tuple[int, ...]] = Counter()
    for prefix, members in group_by_prefix(chosen):
        prompts = sorted(chosen[i].ids[: response_start(chosen[i])] for i in members)
        if prefix or len(prompts) > 1:
            found[prompts[0][: prefix or common_prefix_length(prompts[0], prompts[-1])]] += len(
                prompts
            )
    return [(list(ids), count) for ids, count in found.items() if ids] or [([], len(chosen))]


def _subsample(examples: Sequence[Encoded]) -> Sequence[Encoded]:
    return examples[:: -(-len(examples) // MAX_EXAMPLES)]
