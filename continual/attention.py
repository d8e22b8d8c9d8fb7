"""Attention over a flat row: many examples in one sequence, some behind a prefix that they share.

Linear layers, norms and embeddings see a plain (1, N) sequence; only attention knows which tokens belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "continual_flat_row"


@dataclass(frozen=True)
class Group:
    """A prefix of so many tokens, then blocks of (examples, length): each example continues the prefix alone."""

    prefix: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Row:
    """The groups of one flat row, in its order."""

    groups: tuple[Group, ...]
    masks: dict[Any, Tensor] = field(default_factory=dict, compare=False)

    def mask(self, prefix: int, n: int, window: int | None, like: Tensor) -> Tensor | None:
        """(n, prefix + n) what is added to a block's scores; None where plain causal attention says the same."""
        window = window if window is not None and window < prefix + n else None
        if window is None and not prefix:
            return None
        key = (prefix, n, window)
        if key not in self.masks:
            ago = torch.arange(prefix, prefix + n)[:, None] - torch.arange(prefix + n)
            hidden = (ago < 0) if window is None else (ago < 0) | (ago >= window)
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            self.masks[key] = mask.to(device=like.device, dtype=like.dtype)
        return self.masks[key]


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, row: Row,
           scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
           softcap: float | None = None, **_: Any) -> tuple[Tensor, None]:
    """What `transformers` calls for each layer: query (1, H, N, D), key and value (1, K, N, D) -> (1, N, H, D)."""
    heads = query.shape[1]
    key, value = of_all_heads(heads, key, value)
    sizes = [size for g in row.groups for size in (g.prefix, *(b * n for b, n in g.blocks))]
    parts = zip(*(torch.split(x[0], sizes, 1) for x in (query, key, value)), strict=True)
    out: list[Tensor] = []

    def run(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> None:
        mask = row.mask(prefix, q.shape[2], sliding_window, q)
        out.append(causal(q, k, v, mask, scaling, softcap, dropout))

    for group in row.groups:
        pq, pk, pv = (x[None] for x in next(parts))
        if group.prefix:
            run(pq, pk, pv, 0)
        for b, n in group.blocks:
            q, k, v = (x.view(heads, b, n, x.shape[-1]).transpose(0, 1) for x in next(parts))
            if group.prefix:
                k, v = (torch.cat([p.expand(b, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
            run(q, k, v, group.prefix)
    return torch.cat(out)[None], None


def of_all_heads(heads: int, *states: Tensor) -> list[Tensor]:
    """Keys or values (b, K, n, D), each repeated for the query heads that share it -> (b, H, n, D)."""
    return [x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in states]


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, cap: float | None,
           dropout: float = 0.0) -> Tensor:
    """Each query (b, H, n, D) on the keys up to its own, or on those that `mask` leaves -> (b n, H, D)."""
    if cap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                                             dropout_p=dropout)
    else:
        out = _capped(q, k, v, mask, scale, dropout, cap)
    return out.transpose(1, 2).flatten(0, 1)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float,
            cap: float) -> Tensor:
    """Attention whose scores a tanh keeps below `cap`, as in Gemma 2."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    n = q.shape[2]
    mask = torch.full((n, n), -torch.inf, dtype=q.dtype, device=q.device).triu(1) if mask is None else mask
    chances = (cap * torch.tanh(scores / cap) + mask).softmax(-1)
    return F.dropout(chances, dropout) @ v


@contextmanager
def flat_attention(net: Any, by: Callable[..., tuple[Tensor, None]] = attend) -> Iterator[None]:
    """Within it, the network's forward pass takes `row=` and attends by it, or as `by` does with what `row` is."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, by)
    config = net.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True)
class LastLayer:
    """A network's last layer, of which only the keys and values are needed everywhere: the rest, where one looks."""

    layer: nn.Module
    norm: nn.Module  # the first thing in it
    attention: nn.Module

    @contextmanager
    def only(self, at: Tensor) -> Iterator[None]:
        """Within it the network's hidden states are (1, S, H), of the positions `at` (S,) of the row alone."""
        whole: list[Tensor] = []

        def enter(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            whole.append(args[0])
            return (args[0].index_select(1, at), *args[1:])

        def read(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (whole.pop(), *args[1:])

        def leave(_: Any, args: Any, out: Any) -> Any:
            return (out[0].index_select(1, at), *out[1:]) if isinstance(out, tuple) else out.index_select(1, at)

        handles = [self.layer.register_forward_pre_hook(enter), self.norm.register_forward_pre_hook(read),
                   self.attention.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def probe(net: Any) -> tuple[bool, LastLayer | None]:
    """Whether this network, tried on two short examples, answers a flat row as it does each example alone.

    Networks whose attention is not replaceable (ALiBi) or whose memory is not attention (state-space) do not. Also its
    last layer, if what comes after attention there can be left out for most positions: tried in the same way.
    """
    if not getattr(net, "_supports_attention_backend", False) or getattr(net, "_is_stateful", False):
        return False, None
    device, training = next(net.parameters()).device, net.training
    a, b = [1, 2, 3, 4, 5], [1, 2, 3, 6, 7]
    told = torch.tensor([[*a, *b[3:]], [0, 1, 2, 3, 4, 3, 4]], device=device)
    flat = {"input_ids": told[:1], "position_ids": told[1:], "row": Row((Group(3, ((2, 2),)),)), "use_cache": False}
    reads, last = False, None
    net.eval()
    try:
        alone = torch.cat([net(input_ids=torch.tensor([x], device=device), use_cache=False).logits[0] for x in (a, b)])
        expected = alone[[0, 1, 2, 3, 4, 8, 9]]
        close = (1e-3 if alone.dtype.itemsize > 2 else 0.1) * alone.std()
        with _called(net) as order, flat_attention(net):
            reads = bool((net(**flat).logits[0] - expected).abs().max() <= close)
        found, at = _last(net, order), torch.tensor([4, 6], device=device)
        with found.only(at), flat_attention(net):
            if reads and (net(**flat).logits[0] - expected[at]).abs().max() <= close:
                last = found
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        pass  # it does not take a row, or its last layer is built otherwise
    finally:
        net.train(training)
    return reads, last


@contextmanager
def _called(net: Any) -> Iterator[list[nn.Module]]:
    """The modules that run within it, in their order."""
    order: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda m, _: order.append(m)) for m in net.modules()]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _last(net: Any, order: Sequence[nn.Module]) -> LastLayer:
    """The last of the modules that ran as one of a list, the first of its parts, and the part that attends."""
    listed = {m for parent in net.modules() if isinstance(parent, nn.ModuleList) for m in parent}
    layer = [m for m in order if m in listed][-1]
    parts = [m for m in order if m in set(layer.children())]
    attends = [m for m in parts if "attention" in type(m).__name__.lower()]
    return LastLayer(layer, parts[0], attends[0])
