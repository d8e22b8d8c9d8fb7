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
    """The network reads all examples alike."""
    return nullcontext()


@dataclass
class Model:
    """A `transformers` (or `peft`) network, its tokenizer, and how its batches are laid out.

    `context` is the most positions it has, None if unbounded; with `bf16` it computes in bfloat16
    by autocast. `last` is its last layer where most of what that computes for unsupervised
    positions can be left out. `trained` is all that the optimizer changes, also of the strategy's
    own, once there is one. If `sharded`, each process has a part of every weight, and a pass takes
    all processes. Each pass over padded rows runs within `around`, which is given the examples
    whose rows they are: so a strategy may let the network read each in a way of its own.
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
        """The examples as one batch for this model."""
        return Batch(tuple(examples), self.layout)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Within it the network drops nothing out; behind it is in the mode that it was in."""
        training = self.net.training
        self.net.eval()
        try:
            yield
        finally:
            self.net.train(training)

    def set_prompt_prefix(self, fixed: Sequence[torch.Tensor], *, live: bool = True) -> None:
        """Read examples behind the virtual tokens that train, if `live`, and then these (n, H)
        each, which do not.

        Raises ConfigError for a model that has none.
        """
        if (virtual := getattr(self.net, "virtual", None)) is None:
            raise ConfigError(
                "this model has no virtual tokens; give it some with model.adapter=prompt_tuning"
            )
        self.layout = replace(self.layout, prompt_prefix=virtual.behind(fixed, live=live))

    def check_fits_context(self, tokens: int, virtual: int | None = None) -> None:
        """Raise ConfigError where so many tokens have no positions behind the virtual ones, those
        of now or so many.
        """
        before = len(self.layout.prompt_prefix) if virtual is None else virtual
        if before and self.context_length is not None and before + tokens > self.context_length:
            raise ConfigError(
                f"{tokens} tokens of an example stand behind {before} virtual ones, and the "
                f"model has {self.context_length} positions; lower "
                "model.adapters.prompt_tuning.num_virtual_tokens or data.max_length, or choose a "
                "model with a longer context"
            )


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or for "auto" the best there is: cuda, then mps, then cpu; raises
    ConfigError without it.
    """
    there = [
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
        "cpu",
    ]
    if name in ("auto", "cuda") and there[0] == "cuda" and num_started_processes() > 1:
        return torch.device(
            "cuda", torch.cuda.current_device()
        )  # named, for files are read to the first otherwise
    if name == "auto":
        return torch.device(there[0])
    if name.partition(":")[0] not in there:
        raise ConfigError(unknown("device", name, ["auto", *there]))
    return torch.device(name)
