"""Collectives for several processes that share one run, started by torchrun or accelerate.

Every process holds the same model and strategy memory and draws the same examples; nothing is
sharded here. The expensive parts (passes over micro-batches, episodes, prompts) are divided: each
process does some of the items, and the results are summed or gathered, so that all processes
continue with the same values. Only rank 0 writes files. In a single process all of these functions
do nothing.
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
SILENCE = timedelta(minutes=30)  # a process that does not answer for this long counts as lost
GRACE = 3.0  # seconds that other ranks give rank 0 to print the error for all
BUCKET = 2**25  # numbers sent in one all-reduce

_world = 1


def world_size() -> int:
    """Return the number of processes that share the work now."""
    return _world


def rank() -> int:
    """Return this process's number among those started together; 0 for a single process."""
    return int(os.environ["RANK"]) if num_started_processes() > 1 else 0


def is_main_process() -> bool:
    """Return True in the process that writes files and prints."""
    return rank() == 0


def num_started_processes() -> int:
    """Return how many processes were started together, connected or not."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdecimal() and "RANK" in os.environ else 1


@contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Connect the processes that were started together, for the duration of the context.

    Each process uses a GPU of its own if there are GPUs. Raises ConfigError if they cannot connect
    on this device; inside the context, collectives raise ContinualError if a process is lost.
    """
    global _world
    count = num_started_processes()
    if count == 1:
        yield
        return

    import torch
    import torch.distributed as dist

    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={count} and RANK are set, as for one of several processes, but not "
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
            f"process {local} of this machine has no GPU: there are {gpus}; start with "
            f"--nproc-per-node {gpus}, or set device=cpu"
        )
    if not gpus and device != "cpu" and torch.backends.mps.is_available():
        raise ConfigError(
            "several processes cannot share an mps device; set device=cpu, or start one process"
        )


@contextmanager
def single_process() -> Iterator[None]:
    """Run the context without the other processes: collectives do nothing."""
    with _limit_world(1):
        yield


@contextmanager
def all_processes() -> Iterator[None]:
    """Run the context with all processes, also inside `single_process`."""
    with _limit_world(num_started_processes()):
        yield


@contextmanager
def _limit_world(count: int) -> Iterator[None]:
    global _world
    previous = _world
    _world = count
    try:
        yield
    finally:
        _world = previous


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the context in rank 0 first, then in the others, each on its own.

    The others find on disk what rank 0 has built.
    """
    if not is_main_process():
        barrier()
    with single_process():
        yield
    if is_main_process():
        barrier()


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    if _world == 1:
        return
    import torch
    import torch.distributed as dist

    for bucket in _buckets(tensors):
        if len(bucket) == 1:
            flat = bucket[0].reshape(-1)
        else:
            flat = torch.cat([t.reshape(-1) for t in bucket])
        _call_collective(dist.all_reduce, flat)
        sums = torch.split(flat, [t.numel() for t in bucket])
        for t, total in zip(bucket, sums, strict=True):
            t.copy_(total.view_as(t))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield groups of neighbouring tensors of one dtype, to be sent together."""
    bucket: list[Tensor] = []
    for t in tensors:
        full = sum(b.numel() for b in bucket) + t.numel() > BUCKET
        if bucket and (t.dtype != bucket[0].dtype or full):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


@contextmanager
def all_reduce_gradients(leaves: Sequence[Tensor], *more: Tensor) -> Iterator[None]:
    """Sum over all processes what the context back-propagates to `leaves`, and the tensors `more`.

    Gradients that the leaves had before are kept and added to. If one process runs out of memory,
    all of them raise torch.OutOfMemoryError.
    """
    if _world == 1:
        yield
        return
    import torch

    previous_grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    with sync_oom():
        yield
    with torch.no_grad():
        # A leaf takes part if any process has a gradient for it.
        flags = all_reduce_max(*(leaf.grad is not None for leaf in leaves))
        reached = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
        for leaf in reached:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        all_reduce_sum([*(leaf.grad for leaf in reached if leaf.grad is not None), *more])

        for leaf, previous in zip(leaves, previous_grads, strict=True):
            if leaf.grad is None:
                leaf.grad = previous
            elif previous is not None:
                leaf.grad = leaf.grad + previous


@contextmanager
def sync_oom() -> Iterator[None]:
    """Raise torch.OutOfMemoryError in all processes if the context runs out of memory in one."""
    import torch

    error: Exception | None = None
    try:
        yield
    except torch.OutOfMemoryError as e:
        if _world == 1:
            raise
        error = e
    if all_reduce_max(error is not None)[0]:
        torch.manual_seed(0)  # the processes may have drawn different amounts of random numbers
        raise error or torch.OutOfMemoryError("another process ran out of memory")


def all_reduce_max(*values: float) -> list[int]:
    """Return the element-wise maximum over all processes of these integers."""
    if _world == 1:
        return [int(v) for v in values]
    import torch
    import torch.distributed as dist

    row = torch.tensor([int(v) for v in values])
    _call_collective(dist.all_reduce, row, dist.ReduceOp.MAX)
    return [int(v) for v in row.tolist()]


def barrier() -> None:
    """Wait until all processes have reached this call."""
    all_reduce_max(0)


def all_gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank; a value must be JSON-serialisable."""
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
    """Return rank 0's value in all processes; it must be JSON-serialisable."""
    main_value: T = all_gather(value)[0]
    return main_value


def check_equal_on_all(tensors: Sequence[Tensor]) -> None:
    """Raise TrainingError if the norms of these tensors differ between processes.

    They do, for example, if a strategy draws from a generator without a seed.
    """
    if _world == 1:
        return
    norms = all_gather([float(t.detach().norm()) for t in tensors])
    if any(
        not math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) and not math.isnan(a)
        for others in norms
        for a, b in zip(norms[0], others, strict=True)
    ):
        raise TrainingError(
            f"the weights of the {_world} processes differ. A strategy must draw from a seeded "
            "generator, and compute its gradients with accumulate or the same way in each "
            "process; continue with one process, which is always correct"
        )


def _call_collective(call: Callable[..., Any], *args: Any, **more: Any) -> None:
    """Call a collective; raise ContinualError if another process is lost."""
    import torch

    try:
        call(*args, **more)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as e:
        raise ContinualError(
            f"another of the {num_started_processes()} processes is lost or cannot be reached: "
            f"{str(e).splitlines()[0]} The same command with the same out= resumes after the last "
            "checkpoint, also with another number of processes"
        ) from e


def wait_for_first_message() -> None:
    """Wait, in other ranks than 0, before printing an error.

    Rank 0 most likely fails for the same reason and prints it; the launcher then ends this process.
    """
    if not is_main_process():
        time.sleep(GRACE)
        print(f"process {rank()} of {num_started_processes()}:", file=sys.stderr)
