"""What a network can do with a flat row, found by trying it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from continual.data.types import Encoded
from continual.packing import attention_cpu, attention_flex
from continual.packing.attention import (
    PackedRow,
    PrefixGroup,
    sdpa_row_attention,
    use_row_attention,
)
from continual.packing.kv_cache import KVCache, PrefillDone, cached_attention


def select_attention(device: torch.device) -> Callable[..., tuple[Tensor, None]]:
    """What attends over a flat row on this device, with equal results: a fused kernel where there
    is one.
    """
    return {
        "cpu": attention_cpu.flash_row_attention,
        "cuda": attention_flex.flex_row_attention,
    }.get(device.type, sdpa_row_attention)


@dataclass(frozen=True)
class LastLayer:
    """A network's last layer, of which only the keys and values are needed everywhere: the rest,
    where one looks.
    """

    layer: nn.Module
    norm: nn.Module  # the first thing in it
    attention: nn.Module
    output_name: str  # the name there of the last thing in that, which an adapter may wrap later

    @contextmanager
    def select_positions(self, positions: Tensor) -> Iterator[None]:
        """Within it the network's hidden states are (1, S, H), of the positions `at` (S,) of the
        row alone.
        """
        whole: list[Tensor] = []
        asked = (
            tuple(positions.tolist()) if positions.device.type == "cpu" else None
        )  # elsewhere the wait would cost more

        def pick(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].index_select(1, positions), *args[1:])

        def enter(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            whole.append(args[0])
            return pick(_, args)

        def read(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (whole.pop(), *args[1:])

        def ask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return args, {**kwargs, "row": replace(kwargs["row"], query_positions=asked)}

        handles = [
            self.layer.register_forward_pre_hook(enter),
            self.norm.register_forward_pre_hook(read),
            self.attention.register_forward_pre_hook(ask, with_kwargs=True),
            self.attention.get_submodule(self.output_name).register_forward_pre_hook(pick),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def detect_packing_support(net: Any) -> tuple[bool, LastLayer | None]:
    """Whether this network, tried on two short examples, answers a flat row as it does each example
    alone.

    Networks whose attention is not replaceable (ALiBi) or whose memory is not attention
    (state-space) do not, nor those that do not call it once in each layer. A layer that sees by
    another rule than a window (in chunks) is not tried: it may look the same on a short example.
    Also the network's last layer, if what comes after attention there can be left out for most
    positions: tried in the same way.
    """
    kinds = {*(getattr(net.config.get_text_config(), "layer_types", None) or ())}
    if (
        not getattr(net, "_supports_attention_backend", False)
        or getattr(net, "_is_stateful", False)
        or kinds - {"full_attention", "sliding_attention"}
    ):
        return False, None
    device, training = next(net.parameters()).device, net.training
    a, b = [1, 2, 3, 4, 5], [1, 2, 3, 6, 7]
    told = torch.tensor([[*a, *b[3:]], [0, 1, 2, 3, 4, 3, 4]], device=device)
    flat = {
        "input_ids": told[:1],
        "position_ids": told[1:],
        "row": PackedRow((PrefixGroup(3, ((2, 2),)),)),
        "use_cache": False,
    }
    reads, last = False, None
    net.eval()
    try:
        alone = torch.cat(
            [
                net(input_ids=torch.tensor([x], device=device), use_cache=False).logits[0]
                for x in (a, b)
            ]
        )
        expected = alone[[0, 1, 2, 3, 4, 8, 9]]
        close = (1e-3 if alone.dtype.itemsize > 2 else 0.1) * alone.std()
        with _record_calls(net) as order, use_row_attention(net):
            found = net(**flat).logits[0]
        reads = bool((found - expected).abs().max() <= close) and bool(
            (_cached_logits(net, a, b) - alone[[3, 4, 8, 9]]).abs().max() <= close
        )
        layer, at = _find_last_layer(net, order), torch.tensor([4, 6], device=device)
        with layer.select_positions(at), use_row_attention(net):
            if reads and (net(**flat).logits[0] - expected[at]).abs().max() <= close:
                last = layer
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        pass  # it does not take a row, or its last layer is built otherwise
    finally:
        net.train(training)
    return reads, last


def _cached_logits(net: Any, *rows: Sequence[int]) -> Tensor:
    """The logits of each row's last two tokens, row by row, where what is before them has been read
    as answers do.
    """
    prompts = [
        Encoded(str(i), 0, tuple(r[:-1]), (False,) * (len(r) - 1)) for i, r in enumerate(rows)
    ]
    cache = KVCache(prompts, 0, range(-1, 1), net.config.get_text_config().num_hidden_layers)
    device, found = next(net.parameters()).device, []

    def read(ids: Tensor, positions: Tensor) -> Tensor:
        told = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device)}
        logits: Tensor = net(**told, row=cache, use_cache=False).logits[0]
        return logits

    with use_row_attention(net, cached_attention):
        for ids, positions in cache.prefill_passes(len(rows) * len(rows[0])):
            with suppress(PrefillDone):
                read(ids, positions)
        for t in (-2, -1):
            found.append(
                read(torch.tensor([rows[i][t] for i in cache.prompt_order]), cache.advance())
            )
    back = sorted(range(len(rows)), key=cache.prompt_order.__getitem__)
    return torch.stack(found, 1)[back].flatten(0, 1)


@contextmanager
def _record_calls(net: Any) -> Iterator[list[nn.Module]]:
    """The modules that run within it, in their order."""
    order: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda m, _: order.append(m)) for m in net.modules()]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _find_last_layer(net: Any, order: Sequence[nn.Module]) -> LastLayer:
    """The last of the modules that ran as one of a list, the first of its parts, and the part that
    attends.
    """
    listed = {m for parent in net.modules() if isinstance(parent, nn.ModuleList) for m in parent}
    layer = [m for m in order if m in listed][-1]
    parts = [m for m in order if m in set(layer.children())]
    attends = [m for m in parts if "attention" in type(m).__name__.lower()]
    names = {m: name for name, m in attends[0].named_children()}
    return LastLayer(layer, parts[0], attends[0], [names[m] for m in order if m in names][-1])
