"""Divide the work of a step among processes; a single process does all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from continual.distributed.processes import all_gather, rank, world_size

T = TypeVar("T")


def assign_work(sizes: Sequence[float], *, level: bool = False) -> list[int]:
    """Return the indices of the items that this process does, in ascending order.

    Items go, largest first, to the process with the smallest total size so far. With `level` no
    process gets more than ceil(items / processes) items.
    """
    if world_size() == 1:
        return list(range(len(sizes)))

    loads = [0.0] * world_size()
    assigned = [list[int]() for _ in range(world_size())]
    max_items = -(-len(sizes) // world_size()) if level else len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        process = loads.index(min(loads))
        loads[process] += sizes[i]
        assigned[process].append(i)
        if len(assigned[process]) == max_items:
            loads[process] = math.inf
    return sorted(assigned[rank()])


def gather_by_index(indices: Sequence[int], values: Sequence[T]) -> list[T]:
    """Gather each process's values, which JSON must be able to hold, in the order of their indices.

    The indices of all processes together are 0, 1, 2, ..., each once.
    """
    own = [*zip(indices, values, strict=True)]
    by_index: dict[int, T] = {i: value for share in all_gather(own) for i, value in share}
    return [by_index[i] for i in range(len(by_index))]


def iter_own_items(
    items: Sequence[T], sizes: Sequence[float], *, level: bool = False
) -> Iterator[T]:
    """Yield the items of this process, one after another; `level` as in `assign_work`.

    What torch draws for an item does not depend on which process does it: the global generator is
    seeded by the item's index. After the last item it is in the same state in all processes.
    """
    if world_size() == 1:
        yield from items
        return
    import torch

    seed = int(torch.randint(2**62, ()))
    for i in assign_work(sizes, level=level):
        torch.manual_seed(seed + i)
        yield items[i]
    torch.manual_seed(seed)


def split_evenly(split: Callable[[int], list[T]], limit: int) -> list[T]:
    """Split work into parts of equal size, without giving any process more parts.

    `split(limit)` returns the parts; the lower its limit, the smaller and more numerous they are.
    Returns its parts at the lowest limit that needs no more rounds of all processes than `limit`.
    """
    parts = split(limit)
    if world_size() == 1:
        return parts

    max_parts = -(-len(parts) // world_size()) * world_size()
    low = 1
    while low < limit:
        middle = (low + limit) // 2
        if len(split(middle)) <= max_parts:
            limit = middle
        else:
            low = middle + 1
    return split(limit)
