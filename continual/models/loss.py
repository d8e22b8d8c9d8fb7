"""Compute the loss: a weighted sum over supervised tokens, divided once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from continual.data.types import Encoded
from continual.distributed.processes import all_reduce_gradients, world_size
from continual.distributed.work import iter_own_items
from continual.errors import ConfigError
from continual.models.model import Model
from continual.models.sharding import explain_sharded_oom, is_sharded
from continual.models.weights import Weights, gradient, weights
from continual.packing.attention import use_row_attention
from continual.packing.batch import Batch
from continual.packing.support import select_attention


def forward(model: Model, batch: Batch, at: Weights | None = None) -> Tensor:
    """Return the logits (S, V) at the supervised positions, at the weights `at` if given.

    They are float32 or wider, whatever the model computes in: a loss from bfloat16 logits would
    have three digits. The hidden states of other positions are dropped before the LM head, which
    costs more than the body of a small model, and in a packed row after the last attention already.
    Raises ConfigError for a sharded model with `at`, or if an example exceeds the context.
    """
    if at is not None and model.sharded:
        raise ConfigError(
            "a sharded model (train.shard=true) cannot be evaluated at other weights than its own; "
            "set train.shard=false, or choose another strategy"
        )
    # The last token is only a target: it needs no position.
    model.check_fits_context(max(len(e.ids) for e in batch.examples) - 1)
    with ExitStack() as stack:
        stack.enter_context(model.forward_context(model, batch.examples))
        if batch.layout.packed:
            stack.enter_context(use_row_attention(model.net, select_attention(batch.layout.device)))
        if batch.layout.packed and model.last_layer:
            stack.enter_context(model.last_layer.select_positions(batch.output_positions))
        else:
            stack.enter_context(
                _head_at_positions(model.net.get_output_embeddings(), batch.output_positions)
            )
        stack.enter_context(
            torch.autocast(batch.layout.device.type, torch.bfloat16, enabled=model.bf16)
        )
        inputs = {**batch.inputs, "use_cache": False}
        out = model.net(**inputs) if at is None else functional_call(model.net, at, (), inputs)
    return _at_least_float32(out.logits[0])


def _at_least_float32(logits: Tensor) -> Tensor:
    """Convert logits to float32 if they are narrower."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _head_at_positions(head: Any, positions: Tensor) -> Iterator[None]:
    """Give the LM head only these positions (S,) of the flattened (E * T) hidden states."""

    def select(_: Any, args: Any) -> tuple[Tensor]:
        return (args[0].flatten(0, 1)[positions].unsqueeze(0),)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def token_nll(model: Model, batch: Batch, at: Weights | None = None) -> Tensor:
    """Return the negative log-likelihood (S,) of each supervised token, in nats."""
    return F.cross_entropy(forward(model, batch, at), batch.targets, reduction="none")


def nll(model: Model, batch: Batch, at: Weights | None = None) -> Tensor:
    """Return the weighted mean nll of the supervised tokens, a scalar in nats."""
    return (token_nll(model, batch, at) * batch.token_weights).sum() / batch.supervised_tokens


@contextmanager
def capture_logits(model: Model, batch: Batch) -> Iterator[Callable[[], Tensor]]:
    """Capture the logits of a forward pass over this batch inside the context.

    Yields a function that returns the captured logits (S, V), or those of a new pass if there was
    none. So a term that needs the logits of the loss next to it costs no extra pass.
    """
    captured: list[Tensor] = []

    def capture(_: Any, args: Any, inputs: dict[str, Any], out: Any) -> None:
        if inputs.get("input_ids") is batch.inputs["input_ids"]:
            captured.append(out.logits[0])

    handle = model.net.register_forward_hook(capture, with_kwargs=True)
    try:
        yield lambda: _at_least_float32(captured[-1]) if captured else forward(model, batch)
    finally:
        handle.remove()


def number_examples(model: Model, examples: Sequence[Encoded]) -> Batch:
    """Return the examples as a batch whose ids are their indices, with masked instructions."""
    return Batch(
        tuple(replace(e, id=str(i)) for i, e in enumerate(examples)),
        replace(model.layout, instruction_weight=0.0),
    )


@torch.no_grad()
def response_logits(
    model: Model, examples: Sequence[Encoded], at: Weights | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index, response tokens (S,), logits (S, V) that predict them) of each example.

    Without dropout. Examples run in micro-batches of `tokens_per_microbatch`, in an order that
    depends on the examples only.
    """
    if not examples:
        return
    with model.eval_mode():
        for part in number_examples(model, examples).micro_batches():
            counts = torch.bincount(part.example_index, minlength=len(part.examples)).tolist()
            targets = torch.split(part.targets, counts)
            logits = torch.split(forward(model, part, at), counts)
            for e, y, z in zip(part.examples, targets, logits, strict=True):
                yield int(e.id), y, z


def evaluate_at(model: Model, at: Weights, f: Callable[[], Tensor]) -> Tensor:
    """Return `f()` with the model's weights replaced by `at`, whatever it does with the model."""

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.net

        def forward(self) -> Tensor:
            return f()

    value: Tensor = functional_call(Call(), {f"net.{n}": w for n, w in at.items()}, ())
    return value


def accumulate(
    loss: Callable[[Model, Batch], Tensor],
    model: Model,
    parts: Sequence[Batch],
    to: Sequence[Tensor] | None = None,
) -> Tensor:
    """Back-propagate `loss` through the micro-batches of a step; return the step's loss, a scalar.

    Each micro-batch counts by its share of the step's supervised tokens. The shares sum to 1, so
    the gradient is that of the whole step, also for a term that does not depend on the data. Parts
    without supervised tokens have no mean loss and are skipped. Gradients are left in everything
    that the loss depends on, or only in the leaves `to`. Several processes divide the parts, and
    all end with the gradient and loss of the whole step; with a sharded model each does equally
    many parts.
    """
    tokens = sum(part.supervised_tokens for part in parts)
    total = torch.zeros((), device=parts[0].layout.device)
    shares = [(p, p.supervised_tokens / tokens) for p in parts if p.supervised_tokens]
    if model.sharded and shares:
        # Every process must do as many passes as the others: fill up with parts of share 0.
        shortest = min((p for p, _ in shares), key=lambda p: p.num_tokens)
        shares += [(shortest, 0.0)] * (-len(shares) % world_size())
    # FSDP itself sums the gradients of sharded parameters.
    leaves = [p for p in model.trained or weights(model).values() if not is_sharded(p)]
    with all_reduce_gradients(leaves, total), explain_sharded_oom(model):
        for part, share in iter_own_items(
            shares, [p.num_tokens for p, _ in shares], level=model.sharded
        ):
            value = loss(model, part) * share
            value.backward(inputs=to)  # type: ignore[no-untyped-call]
            total += value.detach()
    return total


def gradient_of(loss: Callable[[Model, Batch], Tensor], model: Model, batch: Batch) -> Weights:
    """Return the gradient of `loss` over a batch with respect to the trainable weights.

    Replaces the weights' `.grad`; other trained tensors (a strategy's own) keep theirs.
    """
    leaves = list(weights(model).values())
    for w in leaves:
        w.grad = None
    accumulate(loss, model, batch.micro_batches(), leaves)
    return gradient(model)
