"""Several processes at one run, as torchrun or accelerate start them: the work of a step is dealt
out among them.

Every process holds the same model and strategy memory and draws the same examples; nothing is
sharded. What is heavy (passes over micro-batches, episodes, prompts) each does for a part of the
items, and the results are summed or gathered, so that all go on with the same. The process of rank
0 alone writes. In a single process nothing here does anything.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from continual.errors import ConfigError, ContinualError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

NEEDED = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SILENCE = timedelta(minutes=30)  # after which a process that does not answer counts as lost
GRACE = 3.0  # seconds in which rank 0 says what is wrong, for all
BUCKET = 2**25  # so many numbers are sent at a time

_world = 1


def world_size() -> int:
    """How many processes share the work."""
    return _world


def rank() -> int:
    """This process's number among those that were started together, 0 if it was started alone."""
    return int(os.environ["RANK"]) if num_started_processes() > 1 else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def num_started_processes() -> int:
    """How many processes were started together, whether or not they have met."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdecimal() and "RANK" in os.environ else 1


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Within it this process shares the work with those it was started with; on a GPU of its own
    where there are some.

    Raises ConfigError where they cannot meet on this device, ContinualError, in whatever is shared,
    where one is lost.
    """
    global _world
    if (count := num_started_processes()) == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if missing := [name for name in NEEDED if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={count} and RANK are set, as for one of several processes, and not "
            f"{', '.join(missing)}; start with torchrun --nproc-per-node {count} -m continual, "
            "or unset them"
        )
    gpu = torch.cuda.is_available() and device != "cpu"
    _check_device_share(
        device, int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() if gpu else 0
    )
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _call_collective(
        dist.init_process_group, "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=SILENCE
    )
    _world = count
    try:
        yield
        dist.destroy_process_group()
    finally:
        _world = 1


def _check_device_share(device: str, local: int, gpus: int) -> None:
    import torch

    if gpus and device not in ("auto", "cuda"):
        raise ConfigError(
            f"device={device} is one device for several processes; set device=cuda for a GPU "
            "each, or device=cpu"
        )
    if gpus and local >= gpus:
        raise ConfigError(
            f"process {local} of this machine has no GPU, for there are {gpus}; start with "
            f"--nproc-per-node {gpus}, or set device=cpu"
        )
    if not gpus and device != "cpu" and torch.backends.mps.is_available():
        raise ConfigError(
            "several processes cannot share an mps device; set device=cpu, or start one process"
        )


@contextmanager
def single_process() -> Iterator[None]:
    """Within it this process works for itself."""
    with _limit_world(1):
        yield


@contextmanager
def all_processes() -> Iterator[None]:
    """Within it this process shares with all, even where it works for itself."""
    with _limit_world(num_started_processes()):
        yield


@contextmanager
def _limit_world(count: int) -> Iterator[None]:
    global _world
    before, _world = _world, count
    try:
        yield
    finally:
        _world = before


@contextmanager
def main_process_first() -> Iterator[None]:
    """Within it each works for itself, rank 0 before the others: what it builds and keeps on disk
    they find.
    """
    if not is_main_process():
        barrier()
    with single_process():
        yield
    if is_main_process():
        barrier()


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Make each tensor, in place, the sum of all processes'."""
    if _world == 1:
        return
    import torch
    import torch.distributed as dist

    for bucket in _buckets(tensors):
        row = (
            bucket[0].reshape(-1)
            if len(bucket) == 1
            else torch.cat([t.reshape(-1) for t in bucket])
        )
        _call_collective(dist.all_reduce, row)
        for t, whole in zip(bucket, torch.split(row, [t.numel() for t in bucket]), strict=True):
            t.copy_(whole.view_as(t))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, that are sent as one."""
    bucket: list[Tensor] = []
    for t in tensors:
        if bucket and (
            t.dtype != bucket[0].dtype or sum(b.numel() for b in bucket) + t.numel() > BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


@contextmanager
def all_reduce_gradients(leaves: Sequence[Tensor], *more: Tensor) -> Iterator[None]:
    """What is back-propagated within it to the `leaves`, and what `more` then hold, become the sums
    of all processes'.

    Out of memory on one is out of memory on all.
    """
    if _world == 1:
        yield
        return
    import torch

    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    with sync_oom():
        yield
    with torch.no_grad():
        reached = [
            leaf
            for leaf, here in zip(
                leaves, all_reduce_max(*(leaf.grad is not None for leaf in leaves)), strict=True
            )
            if here
        ]
        for leaf in reached:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        all_reduce_sum([*(leaf.grad for leaf in reached if leaf.grad is not None), *more])
        for leaf, g in zip(leaves, before, strict=True):
            leaf.grad = g if leaf.grad is None else leaf.grad if g is None else leaf.grad + g


@contextmanager
def sync_oom() -> Iterator[None]:
    """Each does its part within it; where one runs out of memory, all do."""
    import torch

    error: Exception | None = None
    try:
        yield
    except torch.OutOfMemoryError as e:
        if _world == 1:
            raise
        error = e
    if all_reduce_max(error is not None)[0]:
        torch.manual_seed(0)  # some have drawn more than others
        raise error or torch.OutOfMemoryError("another process ran out of memory")


def all_reduce_max(*values: float) -> list[int]:
    """The largest of all processes' whole numbers, place by place; the same on all."""
    if _world == 1:
        return [int(v) for v in values]
    import torch
    import torch.distributed as dist

    row = torch.tensor([int(v) for v in values])
    _call_collective(dist.all_reduce, row, dist.ReduceOp.MAX)
    return [int(v) for v in row.tolist()]


def barrier() -> None:
    """Until all processes are here."""
    all_reduce_max(0)


def all_gather(value: Any) -> list[Any]:
    """Every process's value, which can be JSON, by rank."""
    if _world == 1:
        return [value]
    import torch
    import torch.distributed as dist

    text = bytearray(json.dumps(value).encode())
    longest = all_reduce_max(len(text))[0]
    row = torch.frombuffer(text.ljust(longest), dtype=torch.uint8)
    rows = [torch.empty_like(row) for _ in range(_world)]
    _call_collective(dist.all_gather, rows, row)
    return [json.loads(bytes(r.tolist())) for r in rows]


def broadcast(value: T) -> T:
    """Rank 0's value, which can be JSON, on all."""
    found: T = all_gather(value)[0]
    return found


def check_equal_on_all(tensors: Sequence[Tensor]) -> None:
    """Raise TrainingError where these are not the same in all processes, as where a strategy draws
    without a seed.
    """
    if _world == 1:
        return
    norms = all_gather([float(t.detach().norm()) for t in tensors])
    if any(
        not math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) and not math.isnan(a)
        for told in norms
        for a, b in zip(norms[0], told, strict=True)
    ):
        raise TrainingError(
            f"the {_world} processes have come apart: their weights differ. A strategy must draw "
            "from a seeded generator and compute gradients by accumulate, or the same in each "
            "process; go on with one process, which is always right"
        )


def _call_collective(call: Callable[..., Any], *args: Any, **more: Any) -> None:
    """A call that needs the other processes."""
    import torch

    try:
        call(*args, **more)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as e:
        raise ContinualError(
            f"another of the {num_started_processes()} processes is lost or cannot be reached: "
            f"{str(e).splitlines()[0]} The same command with the same out= goes on after the last "
            "checkpoint, also with another number of processes"
        ) from e


def wait_for_first_message() -> None:
    """Before this process fails: rank 0 most likely fails of the same, and says so; then this one
    is ended with it.
    """
    if not is_main_process():
        time.sleep(GRACE)
        print(f"process {rank()} of {num_started_processes()}:", file=sys.stderr)
