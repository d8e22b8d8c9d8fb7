"""Shard a model (FSDP2): each process holds a part of every weight, gradient and optimizer state.

A layer's weights are gathered when a pass reaches it and freed after it; gradients arrive as sums,
each process holding its part. So a pass needs all processes, and every process must do as many
passes as the others. Checkpoints hold full tensors, which are sharded again when they are loaded:
they do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from continual.distributed.processes import (
    all_processes,
    all_reduce_max,
    is_main_process,
    world_size,
)
from continual.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from continual.models.model import Model


def shard_model(model: Model, device: torch.device) -> None:
    """Shard a model that is still complete in host memory over the processes' devices, by layer.

    Raises ConfigError for a network whose layers transformers does not name or that cannot read
    packed rows.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    kinds = set(getattr(model.net, "_no_split_modules", None) or ())
    layers = [m for m in model.net.modules() if type(m).__name__ in kinds]
    if not layers or not model.layout.packed:
        raise ConfigError(
            f"train.shard=true cannot shard a {model.net.config.model_type}: it needs a causal "
            "model whose layers transformers names and whose attention can read several examples "
            "in one packed row; set train.shard=false"
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*layers, model.net):
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)  # parts of a step are summed, not averaged
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    model.layout = replace(model.layout, device=device)
    model.sharded = True


def is_sharded(t: Tensor) -> bool:
    """Return True if this process holds only a part of the tensor."""
    return hasattr(t, "full_tensor")


def full_tensor(t: Any) -> Tensor:
    """Return the full tensor; if it is sharded, all processes must call this."""
    full: Tensor = t.full_tensor() if is_sharded(t) else t
    return full


def gather_on_cpu(t: Tensor) -> Tensor:
    """Return the full tensor on the CPU.

    If it is sharded, all processes must call this, and only rank 0 gets the values.
    """
    full = full_tensor(t.detach())
    if is_sharded(t) and not is_main_process():
        return full.new_zeros(()).cpu()
    return full.contiguous().cpu()


def shard_like(t: Tensor, other: Any) -> Tensor:
    """Shard a full tensor as `other` is sharded; unchanged if `other` is not."""
    if is_sharded(t) or not is_sharded(other):
        return t
    from torch.distributed.tensor import distribute_tensor

    # Each process has the full tensor: nothing needs to be sent.
    return distribute_tensor(
        t.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )


def clip_gradients(trained: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place to a total norm of at most `max_norm`; return the norm before.

    Sharded and full tensors may be mixed; the norm is over all of them, a scalar.
    """
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    with_gradient = [p for p in trained if p.grad is not None]
    groups = [
        [p for p in with_gradient if not is_sharded(p)],
        [p for p in with_gradient if is_sharded(p)],
    ]
    norms = [
        full_tensor(get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in groups
        if group
    ]
    norm: Tensor = torch.stack(norms).norm() if norms else torch.zeros(())
    for group in groups:
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


@contextmanager
def explain_sharded_oom(model: Model) -> Iterator[None]:
    """Raise TrainingError if a sharded model runs out of memory inside the context.

    The other processes are in the middle of a pass then, so the step cannot be tried again.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        if not model.sharded:
            raise
        raise TrainingError(
            "out of memory with train.tokens_per_microbatch="
            f"{model.layout.tokens_per_microbatch}; a sharded model cannot continue after that: "
            "set it lower, lower data.max_length, or start more processes. The same command resumes "
            "after the last checkpoint"
        ) from e


@contextmanager
def synced_passes(model: Model) -> Iterator[None]:
    """Let each process do as many passes without gradients as it needs inside the context.

    A process that has finished joins the passes of the others, which would otherwise wait for its
    part of the weights.
    """
    if not model.sharded:
        yield
        return

    def announce(*_: Any) -> None:
        with all_processes():
            all_reduce_max(True)

    handle = model.net.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.layout.device)
    with all_processes(), torch.no_grad():
        while any(all_reduce_max(False)):
            model.net(input_ids=token, use_cache=False)
