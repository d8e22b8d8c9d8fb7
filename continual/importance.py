"""How much each weight matters to what has been learned, from per-example gradients.

Shapes: E examples, T positions, S supervised positions, L supervised positions of the example with most, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from continual.data import Encoded
from continual.errors import ConfigError, unknown
from continual.loss import forward
from continual.model import Model
from continual.packing import Batch, blocked
from continual.weights import Weights, weights, zeros

LABELS = ("empirical", "sampled")
PRODUCTS = 2**18  # so many numbers of per-example gradients at a time, or one example's: they stay in the cache

Draws = Sequence[Tensor | None]  # a number in [0, 1) for each response token of each example, or none of any


def fisher(model: Model, examples: Sequence[Encoded], labels: str = "empirical",
           generator: torch.Generator | None = None) -> Weights:
    """The diagonal of the Fisher information: the mean over examples of the squared gradient of log p(y | x).

    One gradient an example, of the log-likelihood summed over its response tokens, squared after that sum; over
    trainable parameters only, at the weights as they are. With `labels="empirical"` y is the response in the data;
    with "sampled" each response token is drawn from the model's own distribution given the tokens before it, which
    makes it the true Fisher of the token distributions (Kunstner et al. 2019, eq. 2 against eq. 3).

    Examples run together. A layer's inputs and output gradients hold each example's gradient apart: for a linear layer
    it is their product over that example's tokens (Goodfellow 2015, squared after the sum). A model with trainable
    parameters in other places runs one example at a time, with the same result but for rounding.
    Raises ConfigError for other labels.
    """
    draws = _draws(examples, labels, generator)
    try:
        return _together(model, examples, draws)
    except _Entangled:
        return _one_by_one(model, examples, draws)


def fisher_by_example(model: Model, examples: Sequence[Encoded], labels: str = "empirical",
                      generator: torch.Generator | None = None) -> Weights:
    """What `fisher` gives, by one backward pass an example: for any model, and slower. Raises ConfigError as it does.

    The same generator draws the same labels in both.
    """
    return _one_by_one(model, examples, _draws(examples, labels, generator))


def _draws(examples: Sequence[Encoded], labels: str, generator: torch.Generator | None) -> Draws:
    """Drawn here for all examples, so that labels do not depend on which examples run together."""
    if labels not in LABELS:
        raise ConfigError(unknown("Fisher labels", labels, LABELS))
    if labels == "empirical":
        return [None] * len(examples)
    counts = [sum(e.response) for e in examples]
    return torch.rand(sum(counts), dtype=torch.float64, generator=generator).split(counts)


def _batch(model: Model, examples: Sequence[Encoded]) -> Batch:
    """A row an example, of its response alone: a dual objective's prompt is no part of it.

    A prefix that examples share would receive their summed gradient, which cannot be taken apart.
    """
    return Batch(tuple(examples), replace(model.layout, instruction_weight=0.0, flat=False))


def _log_likelihood(model: Model, batch: Batch, draws: Draws) -> Tensor:
    """log p of the response tokens of the data, or of ones drawn from the model; a scalar."""
    log_probs = forward(model, batch).log_softmax(-1)
    y = batch.targets
    if drawn := [u for u in draws if u is not None]:
        up_to = log_probs.detach().double().exp().cumsum(-1)
        level = torch.cat(drawn).to(up_to)[:, None] * up_to[:, -1:]
        y = torch.searchsorted(up_to, level, right=True)[:, 0].clamp(max=up_to.shape[1] - 1)
    return log_probs.gather(1, y[:, None]).sum()


def _one_by_one(model: Model, examples: Sequence[Encoded], draws: Draws) -> Weights:
    total, live = zeros(model), weights(model)
    for example, u in zip(examples, draws, strict=True):
        log_p = _log_likelihood(model, _batch(model, [example]), [u])
        grads = torch.autograd.grad(log_p, list(live.values()), allow_unused=True)
        for name, g in zip(live, grads, strict=True):
            if g is not None:
                total[name] += g.square() / len(examples)
    return total


class _Entangled(Exception):
    """A trainable parameter's use by one example cannot be told from its use by others."""


def _together(model: Model, examples: Sequence[Encoded], draws: Draws) -> Weights:
    """Examples of like length at a time; raises _Entangled, on the first of them, where that cannot be done."""
    live = weights(model)
    total = {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in live.items()}
    owned = _owned(model)
    for run in blocked({i: len(e.ids) for i, e in enumerate(examples)}):
        size = max(1, model.layout.tokens // len(examples[run[-1]].ids))
        for part in (run[i : i + size] for i in range(0, len(run), size)):
            batch = _batch(model, [examples[i] for i in part])
            with _watched(model, batch, owned) as seen:
                log_p = _log_likelihood(model, batch, [draws[i] for i in part])
            if seen.keys() != owned.keys():
                raise _Entangled  # a weight is used without its layer
            grads = torch.autograd.grad(log_p, [edge for _, edge in seen.values()], allow_unused=True)
            _add(total, model, batch, owned, {m: (x, g) for (m, (x, _)), g in zip(seen.items(), grads, strict=True)
                                              if g is not None})
    return {n: (t / len(examples)).to(live[n].dtype) for n, t in total.items()}


Owned = dict[nn.Module, dict[str, str]]  # of each layer the trainable parameters: its own name for it, the model's name


def _owned(model: Model) -> Owned:
    """The layers with trainable parameters; raises _Entangled if one is of no known kind."""
    names = {p: n for n, p in model.net.named_parameters() if p.requires_grad}
    owned = {m: own for m in model.net.modules()
             if (own := {n: names[p] for n, p in m.named_parameters(recurse=False) if p in names})}
    if any(not (_linear(m) or _norm(m) or _embedding(m) and not model.layout.seq2seq) for m in owned):
        raise _Entangled
    uses = Counter(name for own in owned.values() for name in own.values())
    head, words = model.net.get_output_embeddings(), model.net.get_input_embeddings()
    tied = owned.get(head, {}).get("weight")
    if any(count > 1 and not (name == tied == owned.get(words, {}).get("weight") and count == 2)
           for name, count in uses.items()):
        raise _Entangled
    return owned


def _linear(module: nn.Module) -> bool:
    """Exactly: a subclass may compute something else."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"  # the linear layer of GPT-2, transposed


def _norm(module: nn.Module) -> bool:
    """Every architecture of `transformers` has its own class of them; what they compute is asked of them."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and not module.scale_grad_by_freq


@contextmanager
def _watched(model: Model, batch: Batch, owned: Owned) -> Iterator[dict[nn.Module, tuple[Tensor, Any]]]:
    """Within it a forward pass notes each layer's input, and where its output's gradient will be found."""
    seen: dict[nn.Module, tuple[Tensor, Any]] = {}
    n, lengths = len(batch.examples), {x.shape[1] for x in batch.inputs.values()}
    head = set(model.net.get_output_embeddings().modules())

    def see(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if module in seen or len(args) != 1 or not isinstance(out, Tensor):
            raise _Entangled
        (x,) = args
        if _embedding(module) and len(x) == 1:  # positions, told once for all examples
            x, out = x.expand(n, -1), out.expand(n, -1, -1)
        if module not in head and (out.ndim < 3 or len(x) != n or x.shape[1] not in lengths):
            raise _Entangled
        seen[module] = x.detach(), torch.autograd.graph.get_gradient_edge(out)
        return out

    handles = [m.register_forward_hook(see) for m in owned]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _add(total: Weights, model: Model, batch: Batch, owned: Owned,
         seen: dict[nn.Module, tuple[Tensor, Tensor]]) -> None:
    """Add the sum over these examples of their squared gradients, from each layer's inputs and output gradients."""
    head, words = model.net.get_output_embeddings(), model.net.get_input_embeddings()
    tied = words in seen and owned[words]["weight"] == owned.get(head, {}).get("weight")
    inside = set(head.modules())
    for module, (x, g) in seen.items():
        to = {n: total[name] for n, name in owned[module].items()}
        x, g = _as(to, x, g)
        if module in inside:
            x, g = _by_example(batch, x), _by_example(batch, g)
        if _embedding(module):
            if module.padding_idx is not None:  # which learns nothing
                g = g.masked_fill((x == module.padding_idx)[..., None], 0)
            if not tied or module is not words:
                _add_rows(to["weight"], x, g)
                continue
            hx, hg = (_by_example(batch, t) for t in _as(to, *seen[head]))
            for e in range(len(x)):
                one = (hg[e].T @ hx[e]).index_add_(0, x[e], g[e])
                to["weight"].addcmul_(one, one)
        elif _linear(module):
            if "weight" in to and not (tied and module is head):
                _add_products(to["weight"], *((g, x) if type(module) is nn.Linear else (x, g)))
            if "bias" in to:
                to["bias"] += g.sum(1).square().sum(0)
        else:
            own = {n: p.to(g.dtype) for n, p in module.named_parameters() if n in to}

            def pulled(x: Tensor, g: Tensor, module: nn.Module = module, own: Weights = own) -> Weights:
                grads: Weights = vjp(lambda p: functional_call(module, p, x), own)[1](g)[0]
                return grads

            for n, each in vmap(pulled)(x, g).items():
                to[n] += each.square().sum(0)


def _as(to: Weights, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output gradient as the layer multiplied them, in the precision of the sums."""
    dtype = next(iter(to.values())).dtype
    return x.to(g.dtype).to(dtype) if x.is_floating_point() else x, g.to(dtype)


def _by_example(batch: Batch, x: Tensor) -> Tensor:
    """(1, S, D) -> (E, L, D), filled with zeros."""
    counts = torch.bincount(batch.example, minlength=len(batch.examples)).tolist()
    return nn.utils.rnn.pad_sequence(x[0].split(counts), batch_first=True)


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (M, N) += sum over e of (a_e^T b_e)^2, of a (E, T, M) and b (E, T, N)."""
    size = max(1, PRODUCTS // total.numel())
    for i in range(0, len(a), size):
        each = a[i : i + size].mT @ b[i : i + size]
        total += each.square_().sum(0)


def _add_rows(total: Tensor, ids: Tensor, g: Tensor) -> None:
    """total (V, D) += the squared sum of g (E, T, D) over each example's positions of the same id (E, T)."""
    first = torch.arange(len(ids), device=ids.device)[:, None] * len(total)  # an example's ids are its own
    keys, at = (ids + first).unique(return_inverse=True)
    sums = g.new_zeros(len(keys), g.shape[-1]).index_add_(0, at.flatten(), g.flatten(0, 1))
    total.index_add_(0, keys % len(total), sums.square())
