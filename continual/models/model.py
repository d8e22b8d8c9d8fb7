"""A network with its tokenizer, device and batch layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from continual.data.types import Encoded
from continual.distributed.processes import num_started_processes
from continual.errors import ConfigError, unknown
from continual.packing.batch import Batch, Layout
from continual.packing.support import LastLayer

Around = Callable[["Model", Sequence[Encoded]], AbstractContextManager[None]]


def _no_context(model: Model, examples: Sequence[Encoded]) -> AbstractContextManager[None]:
    """Return an empty context: the network reads all examples the same way."""
    return nullcontext()


@dataclass
class Model:
    """Hold a `transformers` (or `peft`) network, its tokenizer, and its batch layout.

    `context_length` is the number of positions, None if unbounded. With `bf16` forward passes run
    in bfloat16 (autocast). `last_layer` is set if most of what the last layer computes for
    unsupervised positions can be skipped. `trained` holds every tensor that the optimizer changes,
    including those of a strategy, once a stage has begun. If `sharded`, each process has a part of
    every weight, and a forward pass needs all processes. Every pass over padded rows runs inside
    `forward_context(model, examples)`, with which a strategy can change how the network reads each
    example (GainLoRA's gates).
    """

    net: Any
    tokenizer: Any
    layout: Layout
    context_length: int | None = None
    bf16: bool = False
    last_layer: LastLayer | None = None
    trained: Sequence[torch.Tensor] = ()
    sharded: bool = False
    forward_context: Around = _no_context

    def batch(self, examples: Sequence[Encoded]) -> Batch:
        """Return the examples as one batch in this model's layout."""
        return Batch(tuple(examples), self.layout)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Run the context in evaluation mode (no dropout), then restore the mode."""
        training = self.net.training
        self.net.eval()
        try:
            yield
        finally:
            self.net.train(training)

    def set_prompt_prefix(self, fixed: Sequence[torch.Tensor], *, live: bool = True) -> None:
        """Put virtual tokens before every example: the trainable ones if `live`, then `fixed`.

        `fixed` are embeddings (n, H) that do not train. Raises ConfigError for a model without
        virtual tokens.
        """
        virtual = getattr(self.net, "virtual", None)
        if virtual is None:
            raise ConfigError(
                "this model has no virtual tokens; give it some with model.adapter=prompt_tuning"
            )
        self.layout = replace(self.layout, prompt_prefix=virtual.set_fixed(fixed, live=live))

    def check_fits_context(self, tokens: int, virtual: int | None = None) -> None:
        """Raise ConfigError if the prompt prefix plus `tokens` exceed the context length.

        `virtual` is the length of the prefix, by default that of the current one.
        """
        prefix = len(self.layout.prompt_prefix) if virtual is None else virtual
        if prefix and self.context_length is not None and prefix + tokens > self.context_length:
            raise ConfigError(
                f"an example of {tokens} tokens follows {prefix} virtual tokens, and the model has "
                f"{self.context_length} positions; lower "
                "model.adapters.prompt_tuning.num_virtual_tokens or data.max_length, or choose a "
                "model with a longer context"
            )


def pick_device(name: str = "auto") -> torch.device:
    """Return the named device, or for "auto" the first available of cuda, mps, cpu.

    Raises ConfigError if the named device is not available.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name in ("auto", "cuda") and available[0] == "cuda" and num_started_processes() > 1:
        # With an index: without one, safetensors loads files to the first GPU.
        return torch.device("cuda", torch.cuda.current_device())
    if name == "auto":
        return torch.device(available[0])
    if name.partition(":")[0] not in available:
        raise ConfigError(unknown("device", name, ["auto", *available]))
    return torch.device(name)
