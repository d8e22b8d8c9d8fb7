"""Lay out examples as one packed row: which share a prefix, which form a block, where tokens stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from continual.data.types import Encoded

# The cost of one more block, in tokens; measured on a CPU for models of 1 to 40M parameters.
BLOCK_OVERHEAD_TOKENS = 24


@dataclass(frozen=True)
class GroupPlacement:
    """Locate a group of examples in a packed row: its prefix, then blocks (start, length, examples).

    A block holds each of its examples without the prefix and without the last token, padded to the
    block's length, which may be 0.
    """

    start: int
    prefix_length: int
    blocks: tuple[tuple[int, int, list[int]], ...]


def layout_row(
    examples: Sequence[Encoded], pad_token_id: int, share_prefixes: bool = True
) -> tuple[Tensor, list[GroupPlacement]]:
    """Return (2, N) ids and positions of one row, and the placement of each group.

    A group is its prefix, then its examples in blocks of like length. Without `share_prefixes` all
    examples are one group with an empty prefix.
    """
    ids: list[int] = []
    positions: list[int] = []
    placements: list[GroupPlacement] = []
    groups = group_by_prefix(examples) if share_prefixes else [(0, [*range(len(examples))])]
    for prefix_length, members in groups:
        group_start = len(ids)
        ids += examples[members[0]].ids[:prefix_length]
        positions += range(prefix_length)

        own_lengths = {i: len(examples[i].ids) - 1 - prefix_length for i in members}
        empty = [i for i, n in own_lengths.items() if not n]
        blocks = [(len(ids), 0, empty)] if empty else []
        for block in block_by_length(own_lengths):
            longest = own_lengths[block[-1]]
            blocks.append((len(ids), longest, block))
            for i in block:
                padding = [pad_token_id] * (longest - own_lengths[i])
                ids += (*examples[i].ids[prefix_length:-1], *padding)
                positions += range(prefix_length, prefix_length + longest)
        placements.append(GroupPlacement(group_start, prefix_length, tuple(blocks)))
    return torch.tensor([ids, positions], dtype=torch.long), placements


def group_by_prefix(examples: Sequence[Encoded]) -> Iterator[tuple[int, list[int]]]:
    """Yield (prefix length, example indices) of groups that need the fewest tokens in all.

    Only prompts share a prefix, never responses. Sorted by their ids, examples that begin alike are
    neighbours. A dynamic programme over that order decides which runs of neighbours share their
    common prefix; all other examples form one group with an empty prefix.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].ids)
    prompt_lengths = [response_start(examples[i]) for i in order]
    rows = [examples[i].ids for i in order]

    # common[k]: the prefix that rows k - 1 and k can share.
    common = [0]
    for k in range(1, len(rows)):
        length = common_prefix_length(rows[k - 1], rows[k])
        common.append(min(length, prompt_lengths[k - 1], prompt_lengths[k]))

    # run_start[k]: the first row of the longest run up to row k that shares common[k] tokens.
    run_start = list(range(len(rows)))
    for k in range(1, len(rows)):
        run_start[k] = k - 1
        while common[run_start[k]] >= common[k] > 0:
            run_start[k] = run_start[run_start[k]]

    # saved[j]: the most tokens saved among the first j rows; cut[j]: start and prefix of the last run.
    saved = [0]
    cut = [(0, 0)]
    for j in range(1, len(rows) + 1):
        saved.append(saved[j - 1])
        cut.append((j - 1, 0))
        k = j - 1
        while common[k]:
            prefix_length = common[k]
            k = run_start[k]
            gain = saved[k] + (j - k - 1) * prefix_length - 2 * BLOCK_OVERHEAD_TOKENS
            if gain > saved[j]:
                saved[j] = gain
                cut[j] = (k, prefix_length)

    without_prefix: list[int] = []
    j = len(rows)
    while j:
        i, prefix_length = cut[j]
        if prefix_length:
            yield prefix_length, order[i:j]
        else:
            without_prefix.append(order[i])
        j = i
    if without_prefix:
        yield 0, without_prefix


def block_by_length(
    lengths: dict[int, int], overhead: int = BLOCK_OVERHEAD_TOKENS
) -> list[list[int]]:
    """Group the keys into blocks of like length, shortest first; keys of length 0 are left out.

    A dynamic programme finds the blocks with the least padding plus `overhead` per block.
    """
    keys_by_length: dict[int, list[int]] = {}
    for key in sorted((k for k, n in lengths.items() if n), key=lengths.__getitem__):
        keys_by_length.setdefault(lengths[key], []).append(key)
    sizes = list(keys_by_length)

    # cost[j]: the least cost of the first j sizes; cut[j]: the first size of their last block.
    cost = [0]
    cut = [0]
    for j in range(1, len(sizes) + 1):
        options = []
        count = 0
        for i in range(j - 1, -1, -1):
            count += len(keys_by_length[sizes[i]])
            options.append((cost[i] + count * sizes[j - 1] + overhead, i))
        best_cost, best_start = min(options)
        cost.append(best_cost)
        cut.append(best_start)

    blocks = []
    j = len(sizes)
    while j:
        blocks.append([key for n in sizes[cut[j] : j] for key in keys_by_length[n]])
        j = cut[j]
    return blocks[::-1]


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens that both begin with, by bisection."""
    low = 0
    high = min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def prepend_prefix(prefix: tuple[int, ...], examples: Sequence[Encoded]) -> Sequence[Encoded]:
    """Return the examples with these tokens before their prompts."""
    if not prefix:
        return examples
    not_learned = (False,) * len(prefix)
    return [
        replace(e, ids=prefix + e.ids, response_mask=not_learned + e.response_mask)
        for e in examples
    ]


def response_start(example: Encoded) -> int:
    """Return the index of the first response token; raises ValueError if there is none."""
    return example.response_mask.index(True)
