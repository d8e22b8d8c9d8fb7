"""Detect by trial what a network can do with a packed row."""

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

# Known architectures: class of a decoder layer -> the name of its attention module. In all others the
# attention is the first child whose class has "attention" in its name. `detect_packing_support`
# verifies every candidate, so a wrong one costs speed and never correctness.
ATTENTION_BY_LAYER: dict[str, str] = {
    "LlamaDecoderLayer": "self_attn",
    "MistralDecoderLayer": "self_attn",
    "Qwen2DecoderLayer": "self_attn",
    "Qwen3DecoderLayer": "self_attn",
    "Gemma2DecoderLayer": "self_attn",
    "Gemma3DecoderLayer": "self_attn",
    "Phi3DecoderLayer": "self_attn",
    "OPTDecoderLayer": "self_attn",
    "GPTNeoXLayer": "attention",
}


def select_attention(device: torch.device) -> Callable[..., tuple[Tensor, None]]:
    """Return the attention function over packed rows for this device; all give equal results."""
    by_device = {
        "cpu": attention_cpu.flash_row_attention,
        "cuda": attention_flex.flex_row_attention,
    }
    return by_device.get(device.type, sdpa_row_attention)


@dataclass(frozen=True)
class LastLayer:
    """Name the parts of a network's last layer, to compute it for some positions only.

    Every position needs its keys and values, but the rest of the layer is needed only where logits
    are read. `norm` is the first module in the layer; `output_name` names the last module in its
    attention, which an adapter may wrap later.
    """

    layer: nn.Module
    norm: nn.Module
    attention: nn.Module
    output_name: str

    @contextmanager
    def select_positions(self, positions: Tensor) -> Iterator[None]:
        """Within the context the network returns hidden states (1, S, H) of `positions` (S,)."""
        full_states: list[Tensor] = []
        # On an accelerator, copying the positions to the host would cost more than it saves.
        on_cpu = positions.device.type == "cpu"
        query_positions = tuple(positions.tolist()) if on_cpu else None

        def select(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].index_select(1, positions), *args[1:])

        def enter_layer(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            full_states.append(args[0])  # the residual connection takes the selected positions
            return select(_, args)

        def enter_norm(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (full_states.pop(), *args[1:])  # keys and values need all positions

        def enter_attention(
            _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, Any]:
            row = replace(kwargs["row"], query_positions=query_positions)
            return args, {**kwargs, "row": row}

        output = self.attention.get_submodule(self.output_name)
        handles = [
            self.layer.register_forward_pre_hook(enter_layer),
            self.norm.register_forward_pre_hook(enter_norm),
            self.attention.register_forward_pre_hook(enter_attention, with_kwargs=True),
            output.register_forward_pre_hook(select),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def detect_packing_support(net: Any) -> tuple[bool, LastLayer | None]:
    """Return whether the network can read packed rows, and its last layer if that can be thinned.

    It is tried on two short examples: the logits of the packed row, and those by the key-value
    cache, must be those of each example by itself. Networks fail whose attention is not replaceable
    (ALiBi), whose memory is not attention (state-space), or that do not call attention once in each
    layer. A layer with another rule than a window (chunks) is refused without a trial, because it
    may look the same on a short example. The last layer is tried in the same way: can everything
    after its attention be left out for most positions?
    """
    layer_types = {*(getattr(net.config.get_text_config(), "layer_types", None) or ())}
    if (
        not getattr(net, "_supports_attention_backend", False)
        or getattr(net, "_is_stateful", False)
        or layer_types - {"full_attention", "sliding_attention"}
    ):
        return False, None

    device = next(net.parameters()).device
    training = net.training
    a = [1, 2, 3, 4, 5]
    b = [1, 2, 3, 6, 7]
    ids_and_positions = torch.tensor([[*a, *b[3:]], [0, 1, 2, 3, 4, 3, 4]], device=device)
    packed = {
        "input_ids": ids_and_positions[:1],
        "position_ids": ids_and_positions[1:],
        "row": PackedRow((PrefixGroup(3, ((2, 2),)),)),
        "use_cache": False,
    }
    can_pack = False
    last_layer = None
    net.eval()
    try:
        separate = torch.cat(
            [
                net(input_ids=torch.tensor([x], device=device), use_cache=False).logits[0]
                for x in (a, b)
            ]
        )
        expected = separate[[0, 1, 2, 3, 4, 8, 9]]
        tolerance = (1e-3 if separate.dtype.itemsize > 2 else 0.1) * separate.std()

        with _record_calls(net) as calls, use_row_attention(net):
            logits = net(**packed).logits[0]
        can_pack = bool((logits - expected).abs().max() <= tolerance)
        if can_pack:
            cached = _cached_logits(net, a, b)
            can_pack = bool((cached - separate[[3, 4, 8, 9]]).abs().max() <= tolerance)

        layer = _find_last_layer(net, calls)
        positions = torch.tensor([4, 6], device=device)
        if can_pack:
            with layer.select_positions(positions), use_row_attention(net):
                logits = net(**packed).logits[0]
            if (logits - expected[positions]).abs().max() <= tolerance:
                last_layer = layer
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        pass  # the network does not take `row=`, or its last layer has another structure
    finally:
        net.train(training)
    return can_pack, last_layer


def _cached_logits(net: Any, *rows: Sequence[int]) -> Tensor:
    """Return the logits of each row's last two tokens, read one by one after a cached prefill."""
    prompts = [
        Encoded(str(i), 0, tuple(r[:-1]), (False,) * (len(r) - 1)) for i, r in enumerate(rows)
    ]
    num_layers = net.config.get_text_config().num_hidden_layers
    cache = KVCache(prompts, 0, range(-1, 1), num_layers)
    device = next(net.parameters()).device

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = net(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            row=cache,
            use_cache=False,
        ).logits[0]
        return logits

    steps = []
    with use_row_attention(net, cached_attention):
        for ids, positions in cache.prefill_passes(len(rows) * len(rows[0])):
            with suppress(PrefillDone):
                forward(ids, positions)
        for t in (-2, -1):
            ids = torch.tensor([rows[i][t] for i in cache.prompt_order])
            steps.append(forward(ids, cache.advance()))

    by_prompt = sorted(range(len(rows)), key=cache.prompt_order.__getitem__)
    return torch.stack(steps, 1)[by_prompt].flatten(0, 1)


@contextmanager
def _record_calls(net: Any) -> Iterator[list[nn.Module]]:
    """Yield a list that collects the modules that run within the context, in their order."""
    calls: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda m, _: calls.append(m)) for m in net.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _find_last_layer(net: Any, calls: Sequence[nn.Module]) -> LastLayer:
    """Find the parts of the last layer among the modules that ran, in their order.

    A layer is a member of a ModuleList. Raises IndexError or KeyError if there is no such layer.
    """
    members = {m for parent in net.modules() if isinstance(parent, nn.ModuleList) for m in parent}
    layer = [m for m in calls if m in members][-1]
    children = [m for m in calls if m in set(layer.children())]
    attention = _find_attention(layer, children)
    names = {m: name for name, m in attention.named_children()}
    output_name = [names[m] for m in calls if m in names][-1]
    return LastLayer(layer, children[0], attention, output_name)


def _find_attention(layer: nn.Module, children: Sequence[nn.Module]) -> nn.Module:
    """Return the layer's attention: by its class if that is known, else by the word in a name."""
    name = ATTENTION_BY_LAYER.get(type(layer).__name__)
    if name is not None:
        return layer.get_submodule(name)
    for child in children:
        if "attention" in type(child).__name__.lower():
            return child
    raise KeyError("no child of the layer is an attention")
