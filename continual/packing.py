"""Examples to batches: what a model reads, and where its answers to the supervised positions stand.

Shapes: E examples, T positions of the longest one, S supervised positions of all of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from continual.data import Encoded


@dataclass(frozen=True)
class Layout:
    """How batches are laid out for one model."""

    pad: int
    device: torch.device
    decoder_start: int | None = None  # set for encoder-decoder models
    micro_batch: int = 32  # the most examples in one forward pass
    instruction_weight: float = 0.0  # of a prompt token's loss against a response token's

    @property
    def seq2seq(self) -> bool:
        """Whether prompts go to an encoder and responses to a decoder."""
        return self.decoder_start is not None


@dataclass(frozen=True)
class Batch:
    """Examples and, once asked for, the tensors that a model needs; padding shows nowhere else.

    `scale` multiplies the loss weight of each example's tokens (all 1 when empty); `factor` (tasks,), which may carry
    a gradient, multiplies the loss of each task's tokens and leaves the normaliser `tokens` alone.
    """

    examples: tuple[Encoded, ...]
    layout: Layout
    scale: tuple[float, ...] = field(default=())
    factor: Tensor | None = None

    def of(self, examples: Sequence[Encoded], scale: Sequence[float] = ()) -> Batch:
        """Other examples, for the same model."""
        return replace(self, examples=tuple(examples), scale=tuple(scale))

    def pick(self, indices: Sequence[int]) -> Batch:
        """Some of the examples, each with its scale."""
        return self.of([self.examples[i] for i in indices], [self.scale[i] for i in indices] if self.scale else ())

    def micro_batches(self) -> list[Batch]:
        """This batch in parts of at most `layout.micro_batch` examples, examples of like length together."""
        n = self.layout.micro_batch
        if len(self.examples) <= n:
            return [self]
        order = sorted(range(len(self.examples)), key=lambda i: len(self.examples[i].ids))
        return [self.pick(order[i : i + n]) for i in range(0, len(order), n)]

    def by_task(self) -> dict[int, Batch]:
        """This batch's examples, a batch for each task index."""
        tasks: dict[int, list[int]] = {}
        for i, e in enumerate(self.examples):
            tasks.setdefault(e.task, []).append(i)
        return {t: self.pick(tasks[t]) for t in sorted(tasks)}

    @property
    def tokens(self) -> float:
        """The sum of the supervised tokens' weights: what a summed loss is divided by."""
        return self._supervised[4]

    @property
    def targets(self) -> Tensor:
        """(S,) the token to be predicted at each supervised position."""
        return self._supervised[0]

    @property
    def example(self) -> Tensor:
        """(S,) the index in `examples` of each supervised position's example."""
        return self._supervised[1]

    @property
    def weight(self) -> Tensor:
        """(S,) each supervised position's weight in the loss."""
        weight = self._supervised[2]
        return weight if self.factor is None else weight * self.factor[self.task]

    @cached_property
    def task(self) -> Tensor:
        """(S,) each supervised position's task index."""
        return torch.tensor([e.task for e in self.examples], device=self.layout.device)[self.example]

    @cached_property
    def _supervised(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Targets, examples, weights and flat positions in the padded (E, T) output, and the weights' sum."""
        seq2seq, other = self.layout.seq2seq, self.layout.instruction_weight
        targets: list[int] = []
        owner: list[int] = []
        weight: list[float] = []
        at: list[int] = []
        width = self.inputs["decoder_input_ids" if seq2seq else "input_ids"].shape[1]
        for i, e in enumerate(self.examples):
            scale = self.scale[i] if self.scale else 1.0
            first = _turn(e) if seq2seq else 1  # a causal model predicts nothing for its first token
            for t in range(first, len(e.ids)):
                w = 1.0 if e.response[t] else other
                if w:
                    targets.append(e.ids[t])
                    owner.append(i)
                    weight.append(w * scale)
                    at.append(i * width + (t - first if seq2seq else t - 1))
        device = self.layout.device
        tensors = [torch.tensor(x, dtype=torch.long, device=device) for x in (targets, owner, at)]
        return tensors[0], tensors[1], torch.tensor(weight, device=device), tensors[2], sum(weight)

    @property
    def at(self) -> Tensor:
        """(S,) where, in the model's flattened (E * T) output, each target is predicted."""
        return self._supervised[3]

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The model's keyword arguments, (E, T) each.

        Padding stands on the right of a causal model's rows, where no real token can see it: no mask is needed.
        """
        start = self.layout.decoder_start
        if start is None:
            return {"input_ids": self._padded([e.ids for e in self.examples])}
        sources = [e.ids[: _turn(e)] for e in self.examples]
        lengths = torch.tensor([len(s) for s in sources], device=self.layout.device)
        ids = self._padded(sources)
        mask = torch.arange(ids.shape[1], device=self.layout.device) < lengths[:, None]
        decoder = self._padded([(start, *e.ids[_turn(e) : -1]) for e in self.examples])
        return {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder}

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [[*r, *[self.layout.pad] * (longest - len(r))] for r in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.layout.device)


def _turn(e: Encoded) -> int:
    """Where the response begins."""
    return e.response.index(True)
