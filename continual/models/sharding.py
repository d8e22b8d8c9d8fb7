"""A model in shards (FSDP2): each process holds a part of every weight, of its gradient and of its
optimizer state.

A layer's weights are gathered when a pass comes to it and let go behind it, and gradients arrive as
sums, each process its part of them. So a pass takes all processes, and each must do as many as the
others. What leaves the model for a checkpoint is whole, and what comes back is cut anew: neither
knows how many processes there were.
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
    """Deal the weights of a model, still whole in the host's memory, out over the processes'
    devices, layer by layer.

    Raises ConfigError for a network whose layers are not known, or whose answers are not flat rows.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    kinds = set(getattr(model.net, "_no_split_modules", None) or ())
    layers = [m for m in model.net.modules() if type(m).__name__ in kinds]
    if not layers or not model.layout.packed:
        raise ConfigError(
            f"train.shard=true cannot cut a {model.net.config.model_type} into shards: it takes "
            "a causal model whose layers transformers names and whose attention can read several "
            "examples as one row; set train.shard=false"
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*layers, model.net):
        made = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        assert isinstance(made, FSDPModule)
        made.set_gradient_divide_factor(1.0)  # a step's parts sum up: a mean would be another loss
        made.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.layout, model.sharded = replace(model.layout, device=device), True


def is_sharded(t: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return hasattr(t, "full_tensor")


def full_tensor(t: Any) -> Tensor:
    """All of a tensor; where it is in shards, all processes must ask for it."""
    found: Tensor = t.full_tensor() if is_sharded(t) else t
    return found


def gather_on_cpu(t: Tensor) -> Tensor:
    """All of a tensor, on the CPU; where it is in shards all processes must ask for it, and rank 0
    alone has it.
    """
    found = full_tensor(t.detach())
    return (
        found.contiguous().cpu()
        if is_main_process() or not is_sharded(t)
        else found.new_zeros(()).cpu()
    )


def shard_like(t: Tensor, other: Any) -> Tensor:
    """A whole tensor in shards as another one is, or as it is where that one is whole."""
    if is_sharded(t) or not is_sharded(other):
        return t
    from torch.distributed.tensor import distribute_tensor

    # Each process has the whole: nothing needs to be sent.
    return distribute_tensor(
        t.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )


def clip_gradients(trained: Sequence[Tensor], limit: float) -> Tensor:
    """Scale the gradients down to the norm `limit` in all, in place; returns their norm before, a
    scalar.
    """
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    kinds = [
        [p for p in trained if p.grad is not None and is_sharded(p) == kind]
        for kind in (False, True)
    ]
    norms = [
        full_tensor(get_total_norm([p.grad for p in kind if p.grad is not None]))
        for kind in kinds
        if kind
    ]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0] if norms else torch.zeros(())
    for kind in kinds:
        clip_grads_with_norm_(kind, limit, norm)
    return norm


@contextmanager
def explain_sharded_oom(model: Model) -> Iterator[None]:
    """Within it, where the model is in shards, running out of memory ends the stage: the others are
    amid a pass.

    Raises TrainingError there.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        if not model.sharded:
            raise
        raise TrainingError(
            f"out of memory with train.tokens_per_microbatch={model.layout.tokens_per_microbatch}, which a "
            "model in shards cannot go on after; set it lower, lower data.max_length, or start "
            "more processes. The same command goes on after the last checkpoint"
        ) from e


@contextmanager
def synced_passes(model: Model) -> Iterator[None]:
    """Within it each process may do as many passes without gradients as it needs: one that is done
    joins the others'.

    Otherwise those would wait for its part of the weights.
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
