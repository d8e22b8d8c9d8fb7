"""Estimate the importance of each weight from per-example gradients (Fisher, sensitivity).

Shapes: E examples, T positions, S supervised positions, L supervised positions of the example with
most, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, vjp, vmap

from continual.data.types import Encoded
from continual.distributed.processes import all_reduce_sum, world_size
from continual.distributed.work import assign_work
from continual.errors import ConfigError, TrainingError, not_finite, unknown
from continual.models.loss import forward
from continual.models.model import Model
from continual.models.sampling import inverse_cdf
from continual.models.weights import Weights, all_finite, to_float32, weights, zeros
from continual.packing.batch import Batch
from continual.packing.layout import block_by_length

LABELS = ("empirical", "sampled")
# Tokens of a pass on a CPU: more bring no speed, and output gradients are held beside activations.
CPU_TOKENS = 2048
# Numbers of per-example gradients held at a time (at least one example's), to stay in the cache.
PRODUCTS = 2**16

# For each example a number in [0, 1) for each response token, or None for the labels of the data.
Draws = Sequence[Tensor | None]


def fisher(
    model: Model,
    examples: Sequence[Encoded],
    labels: str = "empirical",
    generator: torch.Generator | None = None,
) -> Weights:
    """Compute the diagonal Fisher information: mean over examples of the squared gradient of log p.

    Each example has one gradient, of the log-likelihood summed over its response tokens, which is
    squared after that sum; over trainable parameters only, at the current weights, in float32 or
    wider. With `labels="empirical"` the response is that of the data; with "sampled" each response
    token is drawn from the model's own distribution given the tokens before it, which gives the
    true Fisher of the token distributions (Kunstner et al. 2019, eq. 2 against eq. 3).

    Examples run together: the inputs and output gradients of a layer contain each example's
    gradient separately; for a linear layer it is their product over that example's tokens
    (Goodfellow 2015, squared after the sum). A model with trainable parameters elsewhere runs one
    example at a time, with the same result up to rounding. Raises ConfigError for unknown labels,
    and TrainingError with the ids of the examples if the result is not finite.
    """
    draws = _draw_labels(model, examples, labels, generator)
    assigned = assign_work([len(e.ids) for e in examples])
    own_examples = [examples[i] for i in assigned]
    own_draws = [draws[i] for i in assigned]
    try:
        total = _sum_batched(model, own_examples, own_draws)
    except _NotSeparable:
        total = _sum_one_by_one(model, own_examples, own_draws)
    if world_size() > 1:
        total = {n: f * (len(assigned) / len(examples)) for n, f in total.items()}
        all_reduce_sum(list(total.values()))
    if not all_finite(total):
        return _sum_one_by_one(model, examples, draws)  # raises, with the ids of the examples
    return total


def fisher_per_example(
    model: Model,
    examples: Sequence[Encoded],
    labels: str = "empirical",
    generator: torch.Generator | None = None,
) -> Weights:
    """Compute `fisher` with one backward pass per example: the same labels and errors, slower."""
    return _sum_one_by_one(model, examples, _draw_labels(model, examples, labels, generator))


def per_example_gradients(
    model: Model, examples: Sequence[Encoded], objective: Callable[[Tensor, Batch], Tensor]
) -> Iterator[Weights]:
    """Yield the gradient of `objective(logits, batch)`, a scalar, of each example in turn.

    The logits (S, V) predict the example's response tokens. Once a gradient is not finite, no more
    are yielded, and TrainingError is raised at the end with the ids of all such examples.
    """
    parameters = weights(model)
    bad_ids: list[str] = []
    for example in examples:
        batch = _response_batch(model, [example])
        value = objective(forward(model, batch), batch)
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        gradient = {
            n: torch.zeros_like(w) if g is None else g
            for (n, w), g in zip(parameters.items(), grads, strict=True)
        }
        if not all_finite(gradient):
            bad_ids.append(example.id)
        if not bad_ids:
            yield gradient
    if bad_ids:
        raise TrainingError(not_finite(bad_ids))


def sensitivity(model: Model, examples: Sequence[Encoded]) -> Weights:
    """Compute the mean absolute gradient of the logits' squared norm (Aljundi et al. 2018, eq. 3).

    Each example has one gradient, of the squared L2 norms summed over its response positions; the
    absolute value is taken after that sum. The correct tokens matter only as context of the
    positions after them.
    """
    total = to_float32(zeros(model))
    for grads in per_example_gradients(model, examples, lambda logits, _: logits.square().sum()):
        for name, g in grads.items():
            total[name] += g.abs() / len(examples)
    return total


def _draw_labels(
    model: Model, examples: Sequence[Encoded], labels: str, generator: torch.Generator | None
) -> Draws:
    """Draw numbers for the sampled labels of all examples; None for each with empirical labels.

    Drawn before examples are batched, so that labels do not depend on which examples run together.
    """
    if labels not in LABELS:
        raise ConfigError(unknown("Fisher labels", labels, LABELS))
    if labels == "empirical":
        return [None] * len(examples)
    return [
        torch.rand(
            len(_response_batch(model, [e]).targets), dtype=torch.float64, generator=generator
        )
        for e in examples
    ]


def _response_batch(model: Model, examples: Sequence[Encoded], packed: bool = False) -> Batch:
    """Return a batch in which only responses are supervised, whatever the instruction's weight.

    Prefixes are not shared: a shared one would receive the summed gradient of its examples.
    """
    return Batch(
        tuple(examples),
        replace(model.layout, instruction_weight=0.0, packed=packed, share_prefixes=False),
    )


def _log_likelihood(logits: Tensor, batch: Batch, draws: Draws) -> Tensor:
    """Return the log-likelihood of the response tokens, a scalar.

    The tokens are those of the data, or drawn from the logits (S, V) where there are `draws`.
    """
    log_probs = logits.log_softmax(-1)
    y = batch.targets
    numbers = [u for u in draws if u is not None]
    if numbers:
        y = inverse_cdf(log_probs.detach().double().exp(), torch.cat(numbers)[:, None])[:, 0]
    return log_probs.gather(1, y[:, None]).sum()


def _sum_one_by_one(model: Model, examples: Sequence[Encoded], draws: Draws) -> Weights:
    """Return the mean squared gradient of the log-likelihood, one backward pass per example."""
    total = to_float32(zeros(model))
    remaining = iter(draws)

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        return _log_likelihood(logits, batch, [next(remaining)])

    for grads in per_example_gradients(model, examples, objective):
        for name, g in grads.items():
            total[name] += g.square() / len(examples)
    if not all_finite(total):
        raise TrainingError(not_finite([e.id for e in examples]))
    return total


class _NotSeparable(Exception):
    """Report that the gradients of examples in one batch cannot be separated."""


def _sum_batched(model: Model, examples: Sequence[Encoded], draws: Draws) -> Weights:
    """Return the mean squared gradient of the log-likelihood, many examples per backward pass.

    Examples of similar length run together. Raises _NotSeparable, at the first batch, for a network
    whose per-example gradients cannot be separated.
    """
    layers = _SeparableLayers(model)
    total = to_float32(zeros(model))
    max_tokens = model.layout.tokens_per_microbatch
    if model.layout.device.type == "cpu":
        max_tokens = min(max_tokens, CPU_TOKENS)
    lengths = {i: len(e.ids) - 1 for i, e in enumerate(examples)}  # the last token is not read
    for block in block_by_length(lengths):
        size = max(1, max_tokens // lengths[block[-1]])
        for start in range(0, len(block), size):
            part = block[start : start + size]
            batch = _response_batch(model, [examples[i] for i in part], model.layout.packed)
            with layers.record(batch) as records:
                log_p = _log_likelihood(forward(model, batch), batch, [draws[i] for i in part])
            if records.keys() != layers.owned.keys():
                raise _NotSeparable  # a weight is used without its layer, or not at all
            edges = [edge for _, edge in records.values()]
            grads = torch.autograd.grad(log_p, edges, allow_unused=True)
            with_gradient = {
                module: (x, g)
                for (module, (x, _)), g in zip(records.items(), grads, strict=True)
                if g is not None
            }
            layers.add(total, batch, with_gradient)
    return {n: t / max(1, len(examples)) for n, t in total.items()}


class _SeparableLayers:
    """Compute per-example gradients from the inputs and output gradients of layers.

    All layers with trainable parameters must be linear layers, norms or embeddings, and a weight
    may be in one layer only, except for an embedding tied to the head. Raises _NotSeparable for
    other models.
    """

    def __init__(self, model: Model) -> None:
        names = {p: n for n, p in model.net.named_parameters() if p.requires_grad}
        # For each layer: its own name of a parameter -> the model's name of it.
        self.owned: dict[nn.Module, dict[str, str]] = {}
        for module in model.net.modules():
            own = {n: names[p] for n, p in module.named_parameters(recurse=False) if p in names}
            if own:
                self.owned[module] = own
        self.head = model.net.get_output_embeddings()
        self.words = model.net.get_input_embeddings()
        if not all(
            is_linear(m) or _is_norm(m) or (_is_embedding(m) and not model.layout.seq2seq)
            for m in self.owned
        ):
            raise _NotSeparable
        uses = Counter(name for own in self.owned.values() for name in own.values())
        name = self.owned.get(self.words, {}).get("weight")
        self.tied = name is not None and self.owned.get(self.head, {}).get("weight") == name
        if any(count > (2 if self.tied and n == name else 1) for n, count in uses.items()):
            raise _NotSeparable

    @contextmanager
    def record(self, batch: Batch) -> Iterator[dict[nn.Module, tuple[Tensor, Any]]]:
        """Record each layer's input and the gradient edge of its output inside the context."""
        records: dict[nn.Module, tuple[Tensor, Any]] = {}
        input_shapes = {x.shape for x in batch.inputs.values() if isinstance(x, Tensor)}
        # Layers after the last attention, or the LM head, see the supervised positions only.
        supervised_shape = (1, len(batch.targets))

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if module in records or len(args) != 1:
                raise _NotSeparable
            x = args[0]
            if _is_embedding(module) and len(x) == 1 and x.shape not in input_shapes:
                # Embeddings of positions are computed once for all examples.
                x = x.expand(len(batch.examples), *x.shape[1:])
                out = out.expand(len(batch.examples), *out.shape[1:])
            if out.ndim < 3 or out.shape[:2] not in input_shapes | {supervised_shape}:
                raise _NotSeparable  # such as the tokens that a router sends to an expert
            records[module] = x.detach(), get_gradient_edge(out)
            return out

        handles = [m.register_forward_hook(hook) for m in self.owned]
        try:
            yield records
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self, total: Weights, batch: Batch, records: dict[nn.Module, tuple[Tensor, Tensor]]
    ) -> None:
        """Add each example's squared gradients, from (input, output gradient) of each layer."""
        for module, (x, g) in records.items():
            to = {n: total[name] for n, name in self.owned[module].items()}
            x, g = self._by_example(module, batch, x, g, next(iter(to.values())).dtype)
            if module is self.words and self.tied:
                head = self._by_example(self.head, batch, *records[self.head], g.dtype)
                _add_tied(to["weight"], x, g, *head)
            elif _is_embedding(module):
                _add_rows(to["weight"], x, g)
            elif is_linear(module):
                if "weight" in to and not (module is self.head and self.tied):
                    _add_products(to["weight"], *((g, x) if type(module) is nn.Linear else (x, g)))
                if "bias" in to:
                    to["bias"] += g.sum(1).square().sum(0)
            else:
                _add_norm(to, module, x, g)

    def _by_example(
        self, module: nn.Module, batch: Batch, x: Tensor, g: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return input and output gradient as (E, positions, ...), in `dtype`.

        They are first rounded as the layer rounded them when it multiplied them.
        """
        x = _split_by_example(batch, x)
        g = _split_by_example(batch, g)
        if isinstance(module, nn.Embedding):
            g = g.to(dtype)
            if module.padding_idx is not None:
                g = g.masked_fill((x == module.padding_idx)[..., None], 0)
            return x, g
        return x.to(g.dtype).to(dtype), g.to(dtype)


def _split_by_example(batch: Batch, x: Tensor) -> Tensor:
    """Return a layer's tensor as (E, positions, ...).

    `x` has a row per example, or one packed row in which every example takes as many positions as
    the longest, or only the supervised positions.
    """
    n = len(batch.examples)
    if len(x) == n:
        return x
    if batch.layout.packed and x.shape[1] == batch.inputs["input_ids"].shape[1]:
        return x.view(n, -1, *x.shape[2:])
    counts = torch.bincount(batch.example_index, minlength=n).tolist()
    return nn.utils.rnn.pad_sequence([*torch.split(x[0], counts)], batch_first=True)


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer itself: a subclass may compute something else.

    Conv1D is the linear layer of GPT-2, with a transposed weight.
    """
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _is_norm(module: nn.Module) -> bool:
    """Return True for a norm, by its name: most architectures have a class of their own."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _is_embedding(module: nn.Module) -> bool:
    """Return True for a plain embedding."""
    return type(module) is nn.Embedding and not module.scale_grad_by_freq


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add sum_e (a_e^T b_e)^2 to `total` (M, N), for a (E, T, M) and b (E, T, N)."""
    size = min(len(a), max(1, PRODUCTS // total.numel()))
    buffer = total.new_empty(size, *total.shape)
    for i in range(0, len(a), size):
        products = buffer[: len(a) - i]
        if size == 1:  # one pass over the large matrix less
            torch.mm(a[i].T, b[i], out=products[0])
            total.addcmul_(products[0], products[0])
        else:
            torch.bmm(a[i : i + size].mT, b[i : i + size], out=products)
            total += products.square_().sum(0)


def _add_rows(total: Tensor, ids: Tensor, g: Tensor) -> None:
    """Add the squared gradients of an embedding to `total` (V, D).

    They are the squared sums of g (E, T, D) over the positions of an example that have the same id
    in ids (E, T).
    """
    # Make the ids of different examples different, so that sums stay within an example.
    offset = torch.arange(len(ids), device=ids.device)[:, None] * len(total)
    keys, index = torch.unique(ids + offset, return_inverse=True)
    sums = g.new_zeros(len(keys), g.shape[-1]).index_add_(0, index.flatten(), g.flatten(0, 1))
    total.index_add_(0, keys % len(total), sums.square())


def _add_tied(total: Tensor, ids: Tensor, g: Tensor, x: Tensor, head: Tensor) -> None:
    """Add the squared gradients of an embedding that is tied to the head to `total` (V, D).

    g (E, T, D) is the embedding's output gradient at ids (E, T); x (E, L, D) and head (E, L, V) are
    the head's input and output gradient.
    """
    gradient = torch.empty_like(total)
    for e in range(len(ids)):
        torch.mm(head[e].T, x[e], out=gradient).index_add_(0, ids[e], g[e])
        total.addcmul_(gradient, gradient)


def _add_norm(to: Weights, module: nn.Module, x: Tensor, g: Tensor) -> None:
    """Add the squared gradients of a norm's parameters, by one vector-Jacobian product per example.

    x and g (E, positions, ...) are its input and output gradient.
    """
    parameters = {n: p.detach().to(g.dtype) for n, p in module.named_parameters() if n in to}

    def gradient_of_example(x: Tensor, g: Tensor) -> Weights:
        grads: Weights = vjp(lambda p: functional_call(module, p, x), parameters)[1](g)[0]
        return grads

    for n, each in vmap(gradient_of_example)(x, g).items():
        to[n] += each.square().sum(0)
