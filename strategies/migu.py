"""Only the neurons that speak loudest on a step's examples learn from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from continual.data.types import Encoded, Task
from continual.distributed.processes import all_reduce_sum
from continual.errors import ConfigError
from continual.models.importance import is_linear
from continual.models.model import Model
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory


@dataclass(kw_only=True)
class MIGU(Strategy):
    """Magnitude-based gradient updating (Du et al. 2024), from the second stage on as in the
    authors' code.

    Of each linear layer with trained weights, a LoRA's A and B each by itself, the outputs'
    absolute values are divided by their sum and added up over the step's tokens; only the `neuron_share`
    part of the layer's neurons, those with the largest, keeps its gradient. 0.3 is the authors'
    (they name what is masked: 0.7). A layer that was silent, as B is before its first step, is not
    masked, nor is what is no linear layer; an embedding tied to the head is the head.

    The tokens are those that predict a supervised one (of an encoder, all), so that how a step is
    laid out does not change its mask; the authors' are all, padding included. AdamW's momentum
    still moves what an earlier step let by.
    """

    stores: ClassVar[str] = "one flag"
    costs: ClassVar[str] = "1 + O(P)"
    neuron_share: float = 0.3
    later: bool = memory(bool)  # a stage is over
    magnitude_sums: dict[str, Tensor] = field(
        init=False, repr=False, default_factory=dict
    )  # of the step under way

    def __post_init__(self) -> None:
        """Refuse a part that is none."""
        super().__post_init__()
        if not 0 < self.neuron_share <= 1:
            raise ConfigError(
                f"MIGU with updated {self.neuron_share}: expected more than 0, up to 1 (no mask)"
            )

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """Leave the gradient of each layer's loudest neurons."""
        layers = trained_linear_layers(model) if self.later and self.neuron_share < 1 else {}
        self.magnitude_sums = {
            n: torch.zeros(
                count_neurons(m),
                dtype=torch.promote_types(m.weight.dtype, torch.float32),
                device=m.weight.device,
            )
            for n, m in layers.items()
        }
        loss = super().backward(model, batch)
        all_reduce_sum([*self.magnitude_sums.values()])
        for n, m in layers.items():
            if self.magnitude_sums[n].any():
                mask_gradient(
                    m,
                    self.magnitude_sums[n]
                    .topk(max(1, round(self.neuron_share * count_neurons(m))))
                    .indices,
                )
        self.magnitude_sums = {}
        return loss

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The task's loss, overheard."""
        if not self.magnitude_sums:
            return super().loss(model, batch)
        with record_magnitudes(model, batch, self.magnitude_sums):
            return super().loss(model, batch)

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """The first stage is over."""
        super().end(model, task)
        self.later = True


def trained_linear_layers(model: Model) -> dict[str, Any]:
    """Those whose weights are trained, by name."""
    return {n: m for n, m in model.net.named_modules() if is_linear(m) and m.weight.requires_grad}


def count_neurons(layer: Any) -> int:
    """How many outputs it has; GPT-2's layers are transposed."""
    return int(layer.weight.shape[0 if isinstance(layer, nn.Linear) else 1])


def mask_gradient(layer: nn.Module, neurons: Tensor) -> None:
    """Only these neurons keep their gradient: rows of a weight, or a transposed one's columns, and
    of a bias.
    """
    heard = torch.zeros(count_neurons(layer), dtype=torch.bool, device=neurons.device).index_fill_(
        0, neurons, True
    )
    for p in layer.parameters(recurse=False):
        if p.grad is not None:
            rows = p.ndim > 1 and isinstance(layer, nn.Linear)
            p.grad = p.grad * (heard[:, None] if rows else heard)


@contextmanager
def record_magnitudes(model: Model, batch: Batch, sums: dict[str, Tensor]) -> Iterator[None]:
    """Within it the forward passes of this very batch add their outputs' magnitudes to the layers'
    `sums`.
    """
    own = False

    def come(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        nonlocal own
        own = inputs.get("input_ids") is batch.inputs["input_ids"]

    def hear(name: str, encoder: bool) -> Callable[[nn.Module, Any, Tensor], None]:
        def see(_: nn.Module, __: Any, out: Tensor) -> None:
            if own:
                heard = (
                    select_token_outputs(batch, out.detach(), encoder).to(sums[name].dtype).abs()
                )
                sums[name] += (
                    heard / heard.sum(-1, keepdim=True).clamp(min=torch.finfo(heard.dtype).tiny)
                ).sum(0)

        return see

    inside = {*model.net.get_encoder().modules()} if batch.layout.seq2seq else set()
    with ExitStack() as stack:
        stack.enter_context(model.net.register_forward_pre_hook(come, with_kwargs=True))
        for n, m in trained_linear_layers(model).items():
            stack.enter_context(m.register_forward_hook(hear(n, m in inside)))
        yield


def select_token_outputs(batch: Batch, out: Tensor, encoder: bool) -> Tensor:
    """Of a layer's output (..., D) what it says at the tokens that count: (S, D), or for an
    encoder's (all tokens, D).

    Where a row is as long as what it is answered with, keys and values of the encoder's states pass
    for the decoder's.
    """
    rows, ids = out.flatten(0, -2), batch.inputs["input_ids"]
    said = batch.inputs.get("decoder_input_ids", ids)
    if len(rows) == ids.numel() and (encoder or ids.numel() != said.numel()):
        return rows[batch.inputs["attention_mask"].flatten().bool()]
    return (
        rows[batch.output_positions] if len(rows) == said.numel() else rows
    )  # or looked up before, or an expert's
