"""Which part of a step's work each of several processes does; a single one does all of it, as if
none of this were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from continual.distributed.processes import rank, world_size

T = TypeVar("T")


def assign_work(sizes: Sequence[float], *, level: bool = False) -> list[int]:
    """Which of the items of these sizes are this process's, in their order: to each about as much
    as to the others.

    With `level` each has as many, where their number is a multiple of the processes'.
    """
    if world_size() == 1:
        return list(range(len(sizes)))
    loads, hands = [0.0] * world_size(), [list[int]() for _ in range(world_size())]
    most = -(-len(sizes) // world_size()) if level else len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        to = loads.index(min(loads))
        loads[to] += sizes[i]
        hands[to].append(i)
        if len(hands[to]) == most:
            loads[to] = math.inf
    return sorted(hands[rank()])


def iter_own_items(
    items: Sequence[T], sizes: Sequence[float], *, level: bool = False
) -> Iterator[T]:
    """This process's items, one after another; what is drawn at one by torch does not depend on who
    does which.

    After the last one the generators are again the same on all processes. With `level` as in
    `deal`.
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


def split_evenly(cut: Callable[[int], list[T]], limit: int) -> list[T]:
    """What `cut` gives at the lowest limit at which no process has more parts than at this one.

    The lower its limit, the smaller and more numerous are the parts that `cut` gives.
    """
    parts = cut(limit)
    if world_size() == 1:
        return parts
    most = -(-len(parts) // world_size()) * world_size()
    low = 1
    while low < limit:
        middle = (low + limit) // 2
        if len(cut(middle)) <= most:
            limit = middle
        else:
            low = middle + 1
    return cut(limit)
