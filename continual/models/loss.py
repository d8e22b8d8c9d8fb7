"""The loss: a weighted sum over supervised tokens, divided once per optimizer step."""

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
    """Logits (S, V) at the supervised positions only, optionally at other weights than the model's
    own.

    They are in float32 at least, whatever the model computes in: a loss of them in bfloat16 has
    three digits.

    The hidden states of all other positions are dropped before the LM head, which costs more than a
    small model's body, and in a flat row already behind the last layer's attention.
    """
    if at is not None and model.sharded:
        raise ConfigError(
            "a model in shards (train.shard=true) cannot be evaluated at other weights than its "
            "own; set train.shard=false, or choose another strategy"
        )
    model.check_fits_context(
        max(len(e.ids) for e in batch.examples) - 1
    )  # the last token is not read
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
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _head_at_positions(head: Any, at: Tensor) -> Iterator[None]:
    """Within it the LM head sees the positions `at` (S,) of the flattened (E * T) output alone."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[at].unsqueeze(0),))
    try:
        yield
    finally:
        hook.remove()


def token_nll(model: Model, batch: Batch, at: Weights | None = None) -> Tensor:
    """(S,) negative log-likelihood of each supervised token, in nats."""
    return F.cross_entropy(forward(model, batch, at), batch.targets, reduction="none")


def nll(model: Model, batch: Batch, at: Weights | None = None) -> Tensor:
    """The weighted mean negative log-likelihood of the batch's supervised tokens, in nats; a
    scalar.
    """
    return (token_nll(model, batch, at) * batch.token_weights).sum() / batch.supervised_tokens


@contextmanager
def capture_logits(model: Model, batch: Batch) -> Iterator[Callable[[], Tensor]]:
    """Gives the logits (S, V) that a forward pass of this very batch gave within it, or else those
    of one more pass.

    A term that needs the logits of the loss beside it has them for nothing.
    """
    heard: list[Tensor] = []

    def hear(_: Any, args: Any, inputs: dict[str, Any], out: Any) -> None:
        if inputs.get("input_ids") is batch.inputs["input_ids"]:
            heard.append(out.logits[0])

    handle = model.net.register_forward_hook(hear, with_kwargs=True)
    try:
        yield lambda: _at_least_float32(heard[-1]) if heard else forward(model, batch)
    finally:
        handle.remove()


def number_examples(model: Model, examples: Sequence[Encoded]) -> Batch:
    """The examples as a batch of their responses alone, each with its place among them as its id."""
    return Batch(
        tuple(replace(e, id=str(i)) for i, e in enumerate(examples)),
        replace(model.layout, instruction_weight=0.0),
    )


@torch.no_grad()
def response_logits(
    model: Model, examples: Sequence[Encoded], at: Weights | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each example its index, its response tokens (S,), and the logits (S, V) that predict them,
    without dropout.

    Examples run together as `layout.tokens` allows, in an order that follows from them alone.
    """
    with model.eval_mode():
        for part in number_examples(model, examples).micro_batches() if examples else ():
            counts = torch.bincount(part.example_index, minlength=len(part.examples)).tolist()
            told = (torch.split(x, counts) for x in (part.targets, forward(model, part, at)))
            for e, y, z in zip(part.examples, *told, strict=True):
                yield int(e.id), y, z


def evaluate_at(model: Model, at: Weights, f: Callable[[], Tensor]) -> Tensor:
    """What `f` gives where the model's weights are `at`, whatever it does with the model."""

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
    """Back-propagate `loss` through the parts of a step, each by its share of the step's supervised
    tokens.

    Gradients are left in all that the loss depends on, or in the leaves `to` alone.

    The shares sum to 1, so the gradient is the whole step's, also of a term that does not depend on
    the data. A part whose tokens all weigh nothing has no mean loss, and a share of 0: it is passed
    over. Several processes take a part of the parts each, and all have the whole step's gradient
    and loss; where the model is in shards, each has as many.
    """
    tokens = sum(part.supervised_tokens for part in parts)
    total = torch.zeros((), device=parts[0].layout.device)
    learned = [(p, p.supervised_tokens / tokens) for p in parts if p.supervised_tokens]
    if model.sharded and learned:
        shortest = min((p for p, _ in learned), key=lambda p: p.num_tokens)
        learned += [(shortest, 0.0)] * (-len(learned) % world_size())
    leaves = [
        p for p in model.trained or weights(model).values() if not is_sharded(p)
    ]  # those in shards sum up by FSDP
    with all_reduce_gradients(leaves, total), explain_sharded_oom(model):
        for part, share in iter_own_items(
            learned, [p.num_tokens for p, _ in learned], level=model.sharded
        ):
            value = loss(model, part) * share
            value.backward(inputs=to)  # type: ignore[no-untyped-call]
            total += value.detach()
    return total


def gradient_of(loss: Callable[[Model, Batch], Tensor], model: Model, batch: Batch) -> Weights:
    """The weights' gradient of `loss` over a batch, in place of what they had; what else is learned
    keeps its own.
    """
    live = [*weights(model).values()]
    for w in live:
        w.grad = None
    accumulate(loss, model, batch.micro_batches(), live)
    return gradient(model)
