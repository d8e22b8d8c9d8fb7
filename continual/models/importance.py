"""How much each weight matters to what has been learned, from per-example gradients.

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
CPU_TOKENS = 2048  # a CPU gains nothing from more at a time, and outputs' gradients are held besides activations
PRODUCTS = (
    2**16
)  # so many numbers of per-example gradients at a time, or one example's: they stay in the cache

Draws = Sequence[
    Tensor | None
]  # a number in [0, 1) for each response token of each example, or none of any


def fisher(
    model: Model,
    examples: Sequence[Encoded],
    labels: str = "empirical",
    generator: torch.Generator | None = None,
) -> Weights:
    """The diagonal of the Fisher information: the mean over examples of the squared gradient of log
    p(y | x).

    One gradient an example, of the log-likelihood summed over its response tokens, squared after
    that sum; over trainable parameters only, at the weights as they are, in float32 at least. With
    `labels="empirical"` y is the response in the data; with "sampled" each response token is drawn
    from the model's own distribution given the tokens before it, which makes it the true Fisher of
    the token distributions (Kunstner et al. 2019, eq. 2 against eq. 3).

    Examples run together. A layer's inputs and output gradients hold each example's gradient apart:
    for a linear layer it is their product over that example's tokens (Goodfellow 2015, squared
    after the sum). A model with trainable parameters in other places runs one example at a time,
    with the same result but for rounding. Raises ConfigError for other labels, TrainingError with
    the examples' ids where it is not finite.
    """
    draws = _draw_labels(model, examples, labels, generator)
    mine = assign_work([len(e.ids) for e in examples])
    part = [examples[i] for i in mine], [draws[i] for i in mine]
    try:
        found = _sum_batched(model, *part)
    except _Entangled:
        found = _sum_one_by_one(model, *part)
    if world_size() > 1:
        found = {n: f * (len(mine) / len(examples)) for n, f in found.items()}
        all_reduce_sum(list(found.values()))
    return (
        found if all_finite(found) else _sum_one_by_one(model, examples, draws)
    )  # which names those at fault


def fisher_per_example(
    model: Model,
    examples: Sequence[Encoded],
    labels: str = "empirical",
    generator: torch.Generator | None = None,
) -> Weights:
    """What `fisher` gives and raises, of the labels that it draws, by one backward pass an example:
    slower.
    """
    return _sum_one_by_one(model, examples, _draw_labels(model, examples, labels, generator))


def per_example_gradients(
    model: Model, examples: Sequence[Encoded], of: Callable[[Tensor, Batch], Tensor]
) -> Iterator[Weights]:
    """The gradient of `of`(logits, batch), a scalar, of each example alone, in their order.

    The logits (S, V) predict its response tokens. Raises TrainingError in place of a first gradient
    not finite.
    """
    live = weights(model)
    bad: list[str] = []
    for batch in (_batch(model, [e]) for e in examples):
        grads = torch.autograd.grad(
            of(forward(model, batch), batch), list(live.values()), allow_unused=True
        )
        found = {
            n: torch.zeros_like(w) if g is None else g
            for (n, w), g in zip(live.items(), grads, strict=True)
        }
        bad += [] if all_finite(found) else [e.id for e in batch.examples]
        if not bad:
            yield found
    if bad:
        raise TrainingError(not_finite(bad))


def sensitivity(model: Model, examples: Sequence[Encoded]) -> Weights:
    """The mean over examples of the absolute gradient of the logits' squared norm (Aljundi et al.
    2018, eq. 3).

    One gradient an example, of the squared L2 norms summed over its response positions, and its
    absolute value taken after that sum. Which tokens are right does not matter, but for those
    before a position.
    """
    total = to_float32(zeros(model))
    for grads in per_example_gradients(model, examples, lambda logits, _: logits.square().sum()):
        for name, g in grads.items():
            total[name] += g.abs() / len(examples)
    return total


def _draw_labels(
    model: Model, examples: Sequence[Encoded], labels: str, generator: torch.Generator | None
) -> Draws:
    """Drawn here for all examples, so that labels do not depend on which examples run together."""
    if labels not in LABELS:
        raise ConfigError(unknown("Fisher labels", labels, LABELS))
    if labels == "empirical":
        return [None] * len(examples)
    return [
        torch.rand(len(_batch(model, [e]).targets), dtype=torch.float64, generator=generator)
        for e in examples
    ]


def _batch(model: Model, examples: Sequence[Encoded], flat: bool = False) -> Batch:
    """Examples with their responses alone supervised: a dual objective's prompt is no part of it.

    A prefix that examples share would receive their summed gradient, which cannot be taken apart.
    """
    return Batch(
        tuple(examples),
        replace(model.layout, instruction_weight=0.0, packed=flat, share_prefixes=False),
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
    total, left = to_float32(zeros(model)), iter(draws)
    for grads in per_example_gradients(
        model, examples, lambda logits, batch: _log_likelihood(logits, batch, [next(left)])
    ):
        for name, g in grads.items():
            total[name] += g.square() / len(examples)
    if not all_finite(total):
        raise TrainingError(not_finite([e.id for e in examples]))
    return total


class _Entangled(Exception):
    """A trainable parameter's use by one example cannot be told from its use by others."""


def _sum_batched(model: Model, examples: Sequence[Encoded], draws: Draws) -> Weights:
    """Examples of like length at a time; raises _Entangled, on the first of them, where that cannot
    be done.
    """
    layers, total = _Layers(model), to_float32(zeros(model))
    tokens = (
        min(model.layout.tokens_per_microbatch, CPU_TOKENS)
        if model.layout.device.type == "cpu"
        else model.layout.tokens_per_microbatch
    )
    for run in block_by_length(
        {i: len(e.ids) - 1 for i, e in enumerate(examples)}
    ):  # the last token is not read
        size = max(1, tokens // (len(examples[run[-1]].ids) - 1))
        for part in (run[i : i + size] for i in range(0, len(run), size)):
            batch = _batch(model, [examples[i] for i in part], model.layout.packed)
            with layers.watched(batch) as seen:
                log_p = _log_likelihood(forward(model, batch), batch, [draws[i] for i in part])
            if seen.keys() != layers.owned.keys():
                raise _Entangled  # a weight is used without its layer, or not at all
            grads = torch.autograd.grad(
                log_p, [edge for _, edge in seen.values()], allow_unused=True
            )
            layers.add(
                total,
                batch,
                {
                    m: (x, g)
                    for (m, (x, _)), g in zip(seen.items(), grads, strict=True)
                    if g is not None
                },
            )
    return {n: t / max(1, len(examples)) for n, t in total.items()}


class _Layers:
    """A model's layers with trainable parameters, each of a kind that works on every example apart.

    Raises _Entangled for a model that has others, or a weight in several layers, but for an
    embedding tied to the head.
    """

    def __init__(self, model: Model) -> None:
        names = {p: n for n, p in model.net.named_parameters() if p.requires_grad}
        # Of each layer, its own name for each parameter and the model's.
        self.owned = {
            m: own
            for m in model.net.modules()
            if (own := {n: names[p] for n, p in m.named_parameters(recurse=False) if p in names})
        }
        self.head, self.words = model.net.get_output_embeddings(), model.net.get_input_embeddings()
        if not all(
            is_linear(m) or _is_norm(m) or (_is_embedding(m) and not model.layout.seq2seq)
            for m in self.owned
        ):
            raise _Entangled
        uses = Counter(name for own in self.owned.values() for name in own.values())
        name = self.owned.get(self.words, {}).get("weight")
        self.tied = name is not None and self.owned.get(self.head, {}).get("weight") == name
        if any(count > (2 if self.tied and n == name else 1) for n, count in uses.items()):
            raise _Entangled

    @contextmanager
    def watched(self, batch: Batch) -> Iterator[dict[nn.Module, tuple[Tensor, Any]]]:
        """Within it a forward pass notes each layer's input, and where its output's gradient will
        arrive.
        """
        seen: dict[nn.Module, tuple[Tensor, Any]] = {}
        whole = {x.shape for x in batch.inputs.values() if isinstance(x, Tensor)}
        looked_up = (
            1,
            len(batch.targets),
        )  # what comes after the last layer's attention, or the LM head alone

        def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if module in seen or len(args) != 1:
                raise _Entangled
            x = args[0]
            if (
                _is_embedding(module) and len(x) == 1 and x.shape not in whole
            ):  # positions, once for all examples
                x, out = (t.expand(len(batch.examples), *t.shape[1:]) for t in (x, out))
            if out.ndim < 3 or out.shape[:2] not in whole | {looked_up}:
                raise _Entangled  # as an expert's tokens
            seen[module] = x.detach(), get_gradient_edge(out)
            return out

        handles = [m.register_forward_hook(see) for m in self.owned]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self, total: Weights, batch: Batch, seen: dict[nn.Module, tuple[Tensor, Tensor]]
    ) -> None:
        """Add each example's squared gradients, from the layers' inputs and output gradients."""
        for module, (x, g) in seen.items():
            to = {n: total[name] for n, name in self.owned[module].items()}
            x, g = self._read(module, batch, x, g, next(iter(to.values())).dtype)
            if module is self.words and self.tied:
                _add_tied(
                    to["weight"], x, g, *self._read(self.head, batch, *seen[self.head], g.dtype)
                )
            elif _is_embedding(module):
                _add_rows(to["weight"], x, g)
            elif is_linear(module):
                if "weight" in to and not (module is self.head and self.tied):
                    _add_products(to["weight"], *((g, x) if type(module) is nn.Linear else (x, g)))
                if "bias" in to:
                    to["bias"] += g.sum(1).square().sum(0)
            else:
                _add_norm(to, module, x, g)

    def _read(
        self, module: nn.Module, batch: Batch, x: Tensor, g: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Input and output gradient, (E, positions, ...) each, as the layer multiplied them, in
        this precision.
        """
        x, g = (_split_by_example(batch, t) for t in (x, g))
        if isinstance(module, nn.Embedding):
            g = g.to(dtype)
            return x, g if module.padding_idx is None else g.masked_fill(
                (x == module.padding_idx)[..., None], 0
            )
        return x.to(g.dtype).to(dtype), g.to(dtype)


def _split_by_example(batch: Batch, x: Tensor) -> Tensor:
    """(E, positions, ...) of what stands in rows of an example each, in one row, or at supervised
    positions alone.

    The examples of a run stand in its row as they come, shortest first, each as long as the
    longest.
    """
    n = len(batch.examples)
    if len(x) == n:
        return x
    if batch.layout.packed and x.shape[1] == batch.inputs["input_ids"].shape[1]:
        return x.view(n, -1, *x.shape[2:])
    counts = torch.bincount(batch.example_index, minlength=n).tolist()
    return nn.utils.rnn.pad_sequence([*torch.split(x[0], counts)], batch_first=True)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, exactly: a subclass may compute something else."""
    return (
        type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    )  # the linear layer of GPT-2, transposed


def _is_norm(module: nn.Module) -> bool:
    """Most architectures of `transformers` have their own."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _is_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and not module.scale_grad_by_freq


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (M, N) += the sum over e of (a_e^T b_e)^2, of a (E, T, M) and b (E, T, N)."""
    size = min(len(a), max(1, PRODUCTS // total.numel()))
    held = total.new_empty(size, *total.shape)
    for i in range(0, len(a), size):
        each = held[: len(a) - i]
        if size == 1:  # one pass less over what is large
            torch.mm(a[i].T, b[i], out=each[0])
            total.addcmul_(each[0], each[0])
        else:
            torch.bmm(a[i : i + size].mT, b[i : i + size], out=each)
            total += each.square_().sum(0)


def _add_rows(total: Tensor, ids: Tensor, g: Tensor) -> None:
    """total (V, D) += the squared sums of g (E, T, D) over the positions of an example with the
    same id (E, T).
    """
    first = torch.arange(len(ids), device=ids.device)[:, None] * len(
        total
    )  # each example has ids of its own
    keys, at = torch.unique(ids + first, return_inverse=True)
    sums = g.new_zeros(len(keys), g.shape[-1]).index_add_(0, at.flatten(), g.flatten(0, 1))
    total.index_add_(0, keys % len(total), sums.square())


def _add_tied(total: Tensor, ids: Tensor, g: Tensor, x: Tensor, head: Tensor) -> None:
    """total (V, D) += the squared gradients of an embedding, g (E, T, D) at ids (E, T), that is the
    head as well.

    The head's input x (E, L, D) and output gradient (E, L, V).
    """
    one = torch.empty_like(total)
    for e in range(len(ids)):
        torch.mm(head[e].T, x[e], out=one).index_add_(0, ids[e], g[e])
        total.addcmul_(one, one)


def _add_norm(to: Weights, module: nn.Module, x: Tensor, g: Tensor) -> None:
    """Add the squared gradients of a module's few parameters, whatever it computes of each example
    x (E, ...).
    """
    own = {n: p.detach().to(g.dtype) for n, p in module.named_parameters() if n in to}

    def pulled(x: Tensor, g: Tensor) -> Weights:
        grads: Weights = vjp(lambda p: functional_call(module, p, x), own)[1](g)[0]
        return grads

    for n, each in vmap(pulled)(x, g).items():
        to[n] += each.square().sum(0)
