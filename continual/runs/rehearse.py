"""Run the engine's own code on fake tensors, to count FLOPs and memory for a model of any size.

Weights, and everything computed from them, are fake tensors: shapes that take no memory. The token
ids of a batch and their positions are real. So packing, strategies, optimizer and scoring run as
they are, while their matrix products are counted, and the memory of their tensors from creation to
release.
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


# The CPU kernel of causal attention computes half of the scores.
FLOP_COUNTERS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_cpu_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_cpu_backward_flops,
}


class CostCounterMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count FLOPs and peak bytes, with fake floating-point tensors and real index tensors.

    Where code reads a value that does not exist, it is 1, True, or for argmax `argmax_token`. Build
    the network within `meta_device`, and convert it by `convert_to_fake`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.flops = self.live_bytes = self.peak_bytes = self.argmax_token = 0
        self.on_meta_device = False
        self.storages: dict[int, Any] = {}

    @contextmanager
    def meta_device(self) -> Iterator[None]:
        """Create weights on the meta device, where modules can move and adapt them."""
        self.on_meta_device = True
        with self:
            yield
        self.on_meta_device = False

    def convert_to_fake(self, net: nn.Module) -> None:
        """Replace meta tensors of the network by fake CPU tensors; start counting memory here."""
        self.live_bytes = 0
        self.storages = {}
        converted: dict[Tensor, Tensor] = {}  # tied weights stay one tensor
        for module in net.modules():
            for tensors in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                for name, t in tensors.items():
                    if t is None or not t.is_meta:
                        continue
                    if t not in converted:
                        converted[t] = self._fake_copy(t)
                    tensors[name] = converted[t]
        self.peak_bytes = self.live_bytes
        self.flops = 0

    def _fake_copy(self, t: Tensor) -> Tensor:
        """Return a fake CPU tensor, or parameter, of the same shape, and count its memory."""
        fake: Any = FakeTensor(self.fake_mode, t.detach(), torch.device("cpu"))
        self._count_bytes(fake)
        return nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation: on real tensors if all are real, else on shapes."""
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        is_fake = any(isinstance(t, FakeTensor) for t in tensors)
        is_meta = not is_fake and any(t.is_meta for t in tensors)
        if (is_fake or is_meta) and func is aten._local_scalar_dense.default:
            return tensors[0].dtype == torch.bool or 1  # `.item()` of a value that does not exist
        if not tensors:
            return self._create_tensor(func, args, kwargs)
        if is_fake:
            if func is aten.index.Tensor:
                args = (args[0], _masks_to_indices(args[1]))
            with self.fake_mode:
                out = func(*args, **kwargs)
        elif is_meta:
            args, kwargs = tree_map(
                lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs)
            )
            out = func(
                *args, **(kwargs | {"device": "meta"} if func is aten._to_copy.default else kwargs)
            )
        else:
            return func(*args, **kwargs)
        if func is aten.argmax.default:  # the next token in greedy decoding
            return torch.full(out.shape, self.argmax_token)
        count_flops = FLOP_COUNTERS.get(func._overloadpacket)
        if count_flops:
            self.flops += count_flops(*args, **kwargs, out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._count_bytes(t)
        return out

    def _create_tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Create a tensor: fake if it is of floating point, else real."""
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
        """Count a tensor's memory until it is released."""
        storage = t.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self.storages:
            return

        def on_release(_: Any) -> None:
            if self.storages.get(key) is reference:
                del self.storages[key]
                self.live_bytes -= size

        reference = weakref.ref(storage, on_release)
        self.storages[key] = reference
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@dataclass(frozen=True)
class StageCost:
    """Costs of one stage.

    Bytes are in the memory of one device, except `buffer_bytes` (host) and `*_disk_bytes` (parts of
    a checkpoint: weights, strategy memory, stage state). `peak_bytes` and `end_peak_bytes` are the
    most at one time in a step and after the last one, in the strategy's `end`; FLOPs are of the
    same two.
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
        """FLOPs of the whole stage."""
        return self.steps * self.step_flops + self.end_flops

    @property
    def activation_bytes(self) -> int:
        """Peak bytes of a step that are activations and other temporary tensors."""
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
    """Run the first `steps` steps of a stage and its end on fake tensors; return the stage's costs.

    Early stopping is off, so the costs are the most that the stage can take. Raises ConfigError for
    a strategy whose code reads values that fake tensors do not have, for example through NumPy.
    """
    total_steps = recipe.total_steps(len(task.train))
    num_steps = min(steps, total_steps)
    flop_marks = [counter.flops]  # before the first step and after each
    counter.peak_bytes = counter.live_bytes
    step_peak_bytes = optimizer_bytes = progress_disk_bytes = 0

    def measure(step: int, get_state: Callable[[], dict[str, Any]]) -> None:
        nonlocal step_peak_bytes, optimizer_bytes, progress_disk_bytes
        flop_marks.append(counter.flops)
        if step == num_steps:
            step_peak_bytes = counter.peak_bytes
            state = get_state()
            optimizer_bytes = _tensor_bytes(state["optimizer"])
            progress_disk_bytes = _checkpoint_bytes(state)
            counter.peak_bytes = counter.live_bytes

    strategy_bytes = _tensor_bytes(strategy.state_dict())
    with counter:
        try:
            train_stage(
                model,
                task,
                strategy,
                replace(recipe, steps=num_steps, patience=None),
                seed=seed,
                log_event=lambda event: None,
                on_step=measure,
            )
        except (RuntimeError, ConfigError) as error:  # torch raises RuntimeError for missing values
            raise ConfigError(
                f"a plan runs a stage of {type(strategy).__name__} without values, and failed: "
                f"{error}\nIf the strategy needs the values, plan one that stores as much, by the "
                "table of continual list strategies"
            ) from error
        weight_disk_bytes = _tensor_bytes(weights(model))
        memory_disk_bytes = _checkpoint_bytes(strategy.state_dict())

    gradients = [p.grad for p in model.net.parameters() if p.grad is not None]
    return StageCost(
        steps=total_steps,
        train_tokens=sum(len(e.ids) for e in task.train),
        step_flops=(flop_marks[-1] - flop_marks[0]) / (len(flop_marks) - 1),
        end_flops=counter.flops - flop_marks[-1],
        weight_bytes=sum(t.nbytes for t in {*model.net.parameters(), *model.net.buffers()}),
        gradient_bytes=sum(g.nbytes for g in gradients),
        optimizer_bytes=optimizer_bytes,
        strategy_bytes=strategy_bytes,
        peak_bytes=step_peak_bytes,
        end_peak_bytes=counter.peak_bytes,
        buffer_bytes=_object_bytes(strategy.state_dict(), set()),
        weight_disk_bytes=weight_disk_bytes,
        memory_disk_bytes=memory_disk_bytes,
        progress_disk_bytes=progress_disk_bytes,
    )


def count_scoring_flops(
    counter: CostCounterMode, model: Model, test: EvalSet, batch_size: int
) -> float:
    """Return the FLOPs of scoring a task once, with every answer of the greatest length.

    One batch of rows from all over the task is counted, and scaled to all rows.
    """
    size = min(batch_size, len(test.encoded))
    stride = max(1, len(test.encoded) // size)
    sample = test.select([*range(0, len(test.encoded), stride)][:size])
    if test.metric != PERPLEXITY:
        sample = replace(sample, metric="exact_match", judge=None)  # grading is not planned
    counter.argmax_token = int(model.tokenizer.eos_token_id == 0)  # never the end of an answer
    flops_before = counter.flops
    with counter:
        score_task(model, sample, batch_size)
    return (counter.flops - flops_before) * len(test.encoded) / len(sample.encoded)


def _masks_to_indices(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace each real boolean mask by the indices where it is true.

    Indexing a fake tensor with a mask would need a result of unknown size.
    """
    result: list[Tensor | None] = []
    for t in indices:
        if t is not None and t.dtype == torch.bool and not isinstance(t, FakeTensor):
            result += t.nonzero().unbind(-1)
        else:
            result.append(t)
    return result


def _tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_tensor_bytes(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(part) for part in value)
    return 0


def _checkpoint_bytes(value: Any) -> int:
    """Return the bytes of a value in a checkpoint."""
    import json

    tensors: dict[str, Tensor] = {}
    text = json.dumps(serialize_value(value, "x", tensors), ensure_ascii=False)
    return len(text.encode()) + sum(t.nbytes for t in tensors.values())


def _object_bytes(value: Any, seen: set[int]) -> int:
    """Return the bytes of Python objects, without tensors."""
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
