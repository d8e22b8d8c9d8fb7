"""The engine's own code run without its numbers: what it would compute and hold, for a model of any
size.

Weights, and all that is computed of them, are ghosts: shapes that take no memory. What a batch is
made of, token ids and where they stand, is real. So packing, strategies, optimizer and scoring run
as they are, and their matrix products are counted, and the memory that their tensors would take, as
they come and go.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from continual.data.types import Encoded, Task
from continual.errors import ConfigError
from continual.evaluation.scoring import PERPLEXITY, EvalSet, score_task
from continual.models.model import Model
from continual.models.weights import weights
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.serialization import serialize_value
from continual.training.stage import train_stage

aten = torch.ops.aten


def _flash_cpu_flops(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any
) -> int:
    return int(sdpa_flop(q, k, v)) // (1 + causal)


def _flash_cpu_backward_flops(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    norm: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *_: Any,
    **__: Any,
) -> int:
    return int(sdpa_backward_flop(g, q, k, v)) // (1 + causal)


# Attention by a CPU's kernel: causally it computes half of the scores.
FLOP_COUNTERS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_cpu_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_cpu_backward_flops,
}


class CostCounterMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it tensors of numbers are ghosts and tensors of indices are real; `flops` and `peak`
    bytes are counted.

    Where the code asks for a number that is not there, it is 1, a yes, or the token `said`. What is
    built within `shapes` is on the meta device, to be made a network of ghosts by `haunt`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.flops = self.live_bytes = self.peak_bytes = self.argmax_token = 0
        self.on_meta_device = False
        self.storages: dict[int, Any] = {}

    @contextmanager
    def meta_device(self) -> Iterator[None]:
        """Within it weights are made on the meta device: modules can move and adapt them there."""
        self.on_meta_device = True
        with self:
            yield
        self.on_meta_device = False

    def convert_to_fake(self, net: nn.Module) -> None:
        """Make what was built within `shapes` ghosts on a CPU; from here on memory is counted."""
        self.live_bytes, self.storages = 0, {}
        made: dict[Tensor, Tensor] = {}
        for module in net.modules():
            for kept in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                for name, t in kept.items():
                    if t is not None and t.is_meta:
                        if t not in made:
                            ghost: Any = FakeTensor(self.fake_mode, t.detach(), torch.device("cpu"))
                            self._count_bytes(ghost)
                            made[t] = (
                                nn.Parameter(ghost, t.requires_grad)
                                if isinstance(t, nn.Parameter)
                                else ghost
                            )
                        kept[name] = made[t]
        self.peak_bytes, self.flops = self.live_bytes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation: for real where all of it is, else on shapes."""
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        ghost = any(isinstance(t, FakeTensor) for t in tensors)
        meta = not ghost and any(t.is_meta for t in tensors)
        if (ghost or meta) and func is aten._local_scalar_dense.default:
            return tensors[0].dtype == torch.bool or 1
        if not tensors:
            return self._create_tensor(func, args, kwargs)
        if ghost:
            if func is aten.index.Tensor:
                args = (args[0], _masks_to_indices(args[1]))
            with self.fake_mode:
                out = func(*args, **kwargs)
        elif meta:
            args, kwargs = tree_map(
                lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs)
            )
            out = func(
                *args, **(kwargs | {"device": "meta"} if func is aten._to_copy.default else kwargs)
            )
        else:
            return func(*args, **kwargs)
        if func is aten.argmax.default:  # what the model says
            return torch.full(out.shape, self.argmax_token)
        if count := FLOP_COUNTERS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._count_bytes(t)
        return out

    def _create_tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A new tensor: a ghost, unless it is one of indices."""
        if not any(a.name == "device" for a in func._schema.arguments):
            return func(*args, **kwargs)
        with self.fake_mode:
            out = func(*args, **kwargs)
        if not out.is_floating_point():
            return func(*args, **kwargs)
        if self.on_meta_device:
            return func(*args, **{**kwargs, "device": "meta"})
        self._count_bytes(out)
        return out

    def _count_bytes(self, t: Tensor) -> None:
        """Count a tensor's memory until it is let go."""
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def gone(_: Any) -> None:
            if self.storages.get(key) is reference:
                del self.storages[key]
                self.live_bytes -= size

        reference = self.storages[key] = weakref.ref(storage, gone)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@dataclass(frozen=True)
class StageCost:
    """What a stage would take. Bytes of memory are those of one device, but for `buffer`, which the
    host has.

    FLOPs are those of a step and of what comes after the last one, the strategy's `end`; `peak` is
    the most memory that is taken at once, in a step or at the end. `weights_disk`, `memory_disk`
    and `progress_disk` are what a checkpoint has of each.
    """

    steps: int
    train_tokens: int
    step_flops: float
    end_flops: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    strategy_bytes: int
    peak_bytes: int
    end_peak_bytes: int
    buffer_bytes: int
    weight_disk_bytes: int
    memory_disk_bytes: int
    progress_disk_bytes: int

    @property
    def total_flops(self) -> float:
        """Of the whole stage."""
        return self.steps * self.step_flops + self.end_flops

    @property
    def activation_bytes(self) -> int:
        """The rest of the peak: activations, and whatever a step holds for a while."""
        return (
            self.peak_bytes
            - self.weight_bytes
            - self.gradient_bytes
            - self.optimizer_bytes
            - self.strategy_bytes
        )


def rehearse(
    counter: CostCounterMode,
    model: Model,
    task: Task[Encoded],
    strategy: Strategy,
    recipe: Recipe,
    *,
    steps: int,
    seed: int,
) -> StageCost:
    """Learn a stage without its numbers: `steps` of its steps, drawn as the stage would, and its
    end.

    Early stopping is left out: its steps are the most that the stage can take. Raises ConfigError
    for a strategy whose code asks for numbers in a way that ghosts have no answer for, such as
    NumPy's.
    """
    total, at, optimizer, saved = recipe.total_steps(len(task.train)), [counter.flops], 0, 0
    counter.peak_bytes = counter.live_bytes
    peak = 0

    def after(step: int, progress: Callable[[], dict[str, Any]]) -> None:
        nonlocal optimizer, saved, peak
        at.append(counter.flops)
        if step == min(steps, total):
            peak = counter.peak_bytes
            state = progress()
            optimizer = _tensor_bytes(state["optimizer"])
            saved = _checkpoint_bytes(state)
            counter.peak_bytes = counter.live_bytes

    before = _tensor_bytes(strategy.state_dict())
    with counter:
        try:
            train_stage(
                model,
                task,
                strategy,
                replace(recipe, steps=min(steps, total), patience=None),
                seed=seed,
                log_event=lambda event: None,
                on_step=after,
            )
        except (
            RuntimeError,
            ConfigError,
        ) as error:  # torch's own, where numbers are asked for all at once
            raise ConfigError(
                f"a plan goes through a stage of {type(strategy).__name__} without "
                f"its numbers, and was stopped: {error}\nIf that is for want of "
                "them, plan a strategy that stores as much, by the table of "
                "continual list strategies"
            ) from error
        trained = _tensor_bytes(weights(model))
        memory = _checkpoint_bytes(strategy.state_dict())
    own = sum(t.nbytes for t in {*model.net.parameters(), *model.net.buffers()})
    state = strategy.state_dict()
    return StageCost(
        total,
        sum(len(e.ids) for e in task.train),
        (at[-1] - at[0]) / (len(at) - 1),
        counter.flops - at[-1],
        own,
        sum(p.grad.nbytes for p in model.net.parameters() if p.grad is not None),
        optimizer,
        before,
        peak,
        counter.peak_bytes,
        _object_bytes(state, set()),
        trained,
        memory,
        saved,
    )


def count_scoring_flops(
    counter: CostCounterMode, model: Model, test: EvalSet, batch_size: int
) -> float:
    """The FLOPs of scoring a task once, every answer as long as it may be: those of one batch,
    times the batches.
    """
    some = min(batch_size, len(test.encoded))
    step = max(1, len(test.encoded) // some)
    part = test.select([*range(0, len(test.encoded), step)][:some])
    if test.metric != PERPLEXITY:
        part = replace(part, metric="exact_match", judge=None)  # marking is not planned
    before, counter.argmax_token = counter.flops, int(model.tokenizer.eos_token_id == 0)
    with counter:
        score_task(model, part, batch_size)
    return (counter.flops - before) * len(test.encoded) / len(part.encoded)


def _masks_to_indices(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with each real mask as the places where it holds: a ghost of a mask would not tell
    how many there are.
    """
    found: list[Tensor | None] = []
    for t in indices:
        mask = t is not None and t.dtype == torch.bool and not isinstance(t, FakeTensor)
        found += t.nonzero().unbind(-1) if mask and t is not None else [t]
    return found


def _tensor_bytes(value: Any) -> int:
    """The bytes of the tensors in a value."""
    parts = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return value.nbytes if isinstance(value, Tensor) else sum(map(_tensor_bytes, parts))


def _checkpoint_bytes(value: Any) -> int:
    """The bytes of a value in a checkpoint."""
    import json

    tensors: dict[str, Tensor] = {}
    text = json.dumps(serialize_value(value, "x", tensors), ensure_ascii=False)
    return len(text.encode()) + sum(t.nbytes for t in tensors.values())


def _object_bytes(value: Any, seen: set[int]) -> int:
    """The bytes of Python objects, tensors aside."""
    if id(value) in seen or isinstance(value, Tensor):
        return 0
    seen.add(id(value))
    parts: Sequence[Any] = ()
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        parts = value
    elif is_dataclass(value):
        parts = [getattr(value, f.name) for f in fields(value)]
    return sys.getsizeof(value) + sum(_object_bytes(p, seen) for p in parts)
