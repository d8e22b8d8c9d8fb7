"""Examples to one flat row: which of them share a prefix, which stand in one block, and where their
tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from continual.data.types import Encoded

BLOCK_OVERHEAD_TOKENS = (
    24  # what one more block costs, in tokens: measured on a CPU for models of 1 to 40M parameters
)


@dataclass(frozen=True)
class GroupPlacement:
    """Where a group of examples stands in a flat row: its prefix, then blocks of (start, length,
    examples).

    An example stands in its block but for prefix and last token, padded to the block's length,
    which may be 0.
    """

    start: int
    prefix_length: int
    blocks: tuple[tuple[int, int, list[int]], ...]


def layout_row(
    examples: Sequence[Encoded], pad_token_id: int, share_prefixes: bool = True
) -> tuple[Tensor, list[GroupPlacement]]:
    """(2, N) ids and positions of one row: for each group its prefix, then its examples in blocks
    of like length.

    Unless prefixes are `shared`, all examples are one group without one.
    """
    ids: list[int] = []
    positions: list[int] = []
    places: list[GroupPlacement] = []
    for prefix, members in (
        group_by_prefix(examples) if share_prefixes else [(0, [*range(len(examples))])]
    ):
        begin = len(ids)
        ids += examples[members[0]].ids[:prefix]
        positions += range(prefix)
        left = {i: len(examples[i].ids) - 1 - prefix for i in members}
        bare = [i for i, n in left.items() if not n]
        blocks = [(len(ids), 0, bare)] if bare else []
        for block in block_by_length(left):
            longest = left[block[-1]]
            blocks.append((len(ids), longest, block))
            for i in block:
                ids += (*examples[i].ids[prefix:-1], *[pad_token_id] * (longest - left[i]))
                positions += range(prefix, prefix + longest)
        places.append(GroupPlacement(begin, prefix, tuple(blocks)))
    return torch.tensor([ids, positions], dtype=torch.long), places


def group_by_prefix(examples: Sequence[Encoded]) -> Iterator[tuple[int, list[int]]]:
    """Which examples share how long a prefix of their prompts: (length, indices), as few tokens in
    all as can be.

    In the order of their ids, examples that begin alike are neighbours. A dynamic programme over
    that order decides which runs of neighbours share their common prefix; the others stand together
    without one.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].ids)
    most = [response_start(examples[i]) for i in order]
    rows = [examples[i].ids for i in order]
    common = [
        0,
        *(
            min(common_prefix_length(rows[k - 1], rows[k]), most[k - 1], most[k])
            for k in range(1, len(rows))
        ),
    ]
    before = list(range(len(rows)))  # where the run that has common[k] in common begins
    for k in range(1, len(rows)):
        before[k] = k - 1
        while common[before[k]] >= common[k] > 0:
            before[k] = before[before[k]]
    saved, cut = (
        [0],
        [(0, 0)],
    )  # the tokens saved among the first j, and the last run's begin and prefix
    for j in range(1, len(rows) + 1):
        saved.append(saved[j - 1])
        cut.append((j - 1, 0))
        k = j - 1
        while prefix := common[k]:
            k = before[k]
            if (gain := saved[k] + (j - k - 1) * prefix - 2 * BLOCK_OVERHEAD_TOKENS) > saved[j]:
                saved[j], cut[j] = gain, (k, prefix)
    alone: list[int] = []
    j = len(rows)
    while j:
        i, prefix = cut[j]
        if prefix:
            yield prefix, order[i:j]
        else:
            alone.append(order[i])
        j = i
    if alone:
        yield 0, alone


def block_by_length(
    lengths: dict[int, int], overhead: int = BLOCK_OVERHEAD_TOKENS
) -> list[list[int]]:
    """The keys in runs of like length, shortest first: the least padding plus `overhead` a run, by
    a dynamic programme.

    What has no length stands in no block.
    """
    by_length: dict[int, list[int]] = {}
    for key in sorted((k for k, n in lengths.items() if n), key=lengths.__getitem__):
        by_length.setdefault(lengths[key], []).append(key)
    sizes = list(by_length)
    cost, cut = [0], [0]
    for j in range(1, len(sizes) + 1):
        options, count = [], 0
        for i in range(j - 1, -1, -1):
            count += len(by_length[sizes[i]])
            options.append((cost[i] + count * sizes[j - 1] + overhead, i))
        best = min(options)
        cost.append(best[0])
        cut.append(best[1])
    runs, j = [], len(sizes)
    while j:
        runs.append([key for n in sizes[cut[j] : j] for key in by_length[n]])
        j = cut[j]
    return runs[::-1]


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def prepend_prefix(prefix: tuple[int, ...], examples: Sequence[Encoded]) -> Sequence[Encoded]:
    """The examples with these tokens before their prompts."""
    if not prefix:
        return examples
    nothing = (False,) * len(prefix)
    return [
        replace(e, ids=prefix + e.ids, response_mask=nothing + e.response_mask) for e in examples
    ]


def response_start(example: Encoded) -> int:
    """Where the response begins."""
    return example.response_mask.index(True)
