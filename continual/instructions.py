"""What the prompts of a task ask for, found from their token ids alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from continual.data import Encoded
from continual.rows import grouped, turn

SAMPLE = 128  # examples of a task whose instructions are looked at

Instructions = list[tuple[list[int], int]]  # token ids, and how many examples have them


def instructions(examples: Sequence[Encoded]) -> Instructions:
    """What the prompts begin with together, and how many each; evenly from all examples.

    A prompt that shares nothing with others is its own instruction.
    """
    chosen = examples[:: -(-len(examples) // SAMPLE)]
    found: Counter[tuple[int, ...]] = Counter()
    for prefix, members in grouped(chosen):
        found.update(chosen[i].ids[: prefix or max(1, turn(chosen[i]))] for i in members)
    return [(list(ids), count) for ids, count in found.items()]
