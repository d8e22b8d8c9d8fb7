"""Examples to batches: what a model reads, and where its answers to the supervised positions stand.

A causal model reads one flat row of real tokens in which examples that begin alike share that
prefix; a model that cannot read such a row, or has an encoder, reads a padded row an example.

Shapes: E examples, T positions of the longest one, N tokens of a flat row, S supervised positions,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from continual.data.types import Encoded
from continual.distributed.work import evenly
from continual.packing.attention import Group, Row
from continual.packing.layout import behind, common_prefix, lay, turn


@dataclass(frozen=True)
class Layout:
    """How batches are laid out for one model."""

    pad: int
    device: torch.device
    decoder_start: int | None = None  # set for encoder-decoder models
    flat: bool = False  # one flat row, or one padded row an example
    shared: bool = True  # in a flat row, examples that begin alike share that prefix
    tokens: int = 4096  # the most tokens in one forward pass, if no single example is longer
    instruction_weight: float = 0.0  # of a prompt token's loss against a response token's
    prefix: tuple[int, ...] = ()  # the virtual tokens that stand before every example

    @property
    def seq2seq(self) -> bool:
        """Whether prompts go to an encoder and responses to a decoder."""
        return self.decoder_start is not None


@dataclass(frozen=True)
class Batch:
    """Examples and, once asked for, the tensors that a model needs; the layout shows nowhere else.

    `scale` multiplies the loss weight of each example's tokens (all 1 when empty); `factor`
    (tasks,), which may carry a gradient, multiplies the loss of each task's tokens and leaves the
    normaliser `tokens` alone.
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
        return self.of(
            [self.examples[i] for i in indices],
            [self.scale[i] for i in indices] if self.scale else (),
        )

    def times(self, factor: Tensor) -> Batch:
        """The same tokens, in the same tensors, the loss of each task's times its `factor`
        (tasks,).
        """
        other = replace(self, factor=factor)
        vars(other).update({name: getattr(self, name) for name in ("_laid", "_supervised", "task")})
        return other

    def micro_batches(self) -> list[Batch]:
        """This batch in parts of at most `layout.tokens` tokens, or single examples; like stays
        with like.

        Where several processes share the work the parts are smaller, so that each has about as much
        to do.
        """
        rows, flat = [e.ids for e in self.whole], self.layout.flat
        if flat:
            order = sorted(range(len(rows)), key=rows.__getitem__)
        else:
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        shared = [common_prefix(rows[i], rows[j]) for i, j in pairwise(order)] if flat else []

        def cut(limit: int) -> list[list[int]]:
            parts: list[list[int]] = [[]]
            spent = 0
            for k, i in enumerate(order):
                part = parts[-1]
                cost = (
                    spent + len(rows[i]) - (shared[k - 1] if part else 0)
                    if flat
                    else len(rows[i]) * (len(part) + 1)
                )
                if part and cost > limit:
                    parts.append([])
                    cost = len(rows[i])
                parts[-1].append(i)
                spent = cost
            return parts

        parts = evenly(cut, self.layout.tokens)
        return [self] if len(parts) == 1 else [self.pick(part) for part in parts]

    def by_task(self) -> dict[int, Batch]:
        """This batch's examples, a batch for each task index."""
        tasks: dict[int, list[int]] = {}
        for i, e in enumerate(self.examples):
            tasks.setdefault(e.task, []).append(i)
        return {t: self.pick(tasks[t]) for t in sorted(tasks)}

    @cached_property
    def whole(self) -> Sequence[Encoded]:
        """The examples as they are read, behind the layout's prefix."""
        return behind(self.layout.prefix, self.examples)

    @property
    def length(self) -> int:
        """How many tokens the examples have."""
        return sum(len(e.ids) for e in self.examples)

    @property
    def tokens(self) -> float:
        """The sum of the supervised tokens' weights: what a summed loss is divided by."""
        if self.scale or self.layout.instruction_weight:
            return self._supervised[4]
        # Counted without laying out what another process may read; a causal model predicts nothing
        # for a first token.
        return float(
            sum(sum(e.response) - (e.response[0] and not self.layout.seq2seq) for e in self.whole)
        )

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

    @property
    def response(self) -> Tensor:
        """(S,) whether each supervised position is a response's: a prompt's may have a weight too."""
        return self._supervised[5]

    @cached_property
    def task(self) -> Tensor:
        """(S,) each supervised position's task index."""
        return torch.tensor([e.task for e in self.examples], device=self.layout.device)[
            self.example
        ]

    @cached_property
    def _supervised(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor]:
        """Targets, examples, weights and positions in the model's output, the weights' sum, and
        what is a response.
        """
        seq2seq, other = self.layout.seq2seq, self.layout.instruction_weight
        targets: list[int] = []
        owner: list[int] = []
        weight: list[float] = []
        at: list[int] = []
        response: list[bool] = []
        for i, (e, home) in enumerate(zip(self.whole, self._laid[1], strict=True)):
            scale = self.scale[i] if self.scale else 1.0
            # A prompt without weight is passed over; a causal model predicts nothing for its first
            # token.
            first = turn(e) if seq2seq else max(1, len(self.layout.prefix) if other else turn(e))
            for t in range(first, len(e.ids)):
                w = 1.0 if e.response[t] else other
                if w:
                    targets.append(e.ids[t])
                    owner.append(i)
                    weight.append(w * scale)
                    at.append(home.place(t - 1))
                    response.append(e.response[t])
        device = self.layout.device
        tensors = [torch.tensor(x, dtype=torch.long, device=device) for x in (targets, owner, at)]
        said = torch.tensor(response, device=device)
        return (
            tensors[0],
            tensors[1],
            torch.tensor(weight, device=device),
            tensors[2],
            sum(weight),
            said,
        )

    @property
    def at(self) -> Tensor:
        """(S,) where, in the model's flattened output, each target is predicted."""
        return self._supervised[3]

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's keyword arguments: (1, N) and the row's description, or (E, T) each."""
        return self._laid[0]

    @cached_property
    def _laid(self) -> tuple[dict[str, Any], list[Home]]:
        """The model's keyword arguments, and where each example stands in them.

        An example's last token is only predicted, never read. Padding stands on the right of a
        causal model's rows, where no real token can see it: no mask is needed.
        """
        if self.layout.flat:
            return _flat(self.whole, self.layout)
        start = self.layout.decoder_start
        if start is None:
            ids = self._padded([e.ids[:-1] for e in self.whole])
            return {"input_ids": ids}, [Home(i * ids.shape[1]) for i in range(len(ids))]
        sources = [e.ids[: turn(e)] for e in self.whole]
        lengths = torch.tensor([len(s) for s in sources], device=self.layout.device)
        ids = self._padded(sources)
        mask = torch.arange(ids.shape[1], device=self.layout.device) < lengths[:, None]
        decoder = self._padded([(start, *e.ids[turn(e) : -1]) for e in self.whole])
        return (
            {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder},
            [Home(i * decoder.shape[1] + 1 - turn(e)) for i, e in enumerate(self.whole)],
        )

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [[*r, *[self.layout.pad] * (longest - len(r))] for r in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.layout.device)


@dataclass(frozen=True)
class Home:
    """Where an example's tokens stand in the model's flattened output: `prefix` of them apart from
    the others.
    """

    own: int
    prefix: int = 0
    shared: int = 0

    def place(self, t: int) -> int:
        """Where token t stands."""
        return self.shared + t if t < self.prefix else self.own + t - self.prefix


def _flat(examples: Sequence[Encoded], layout: Layout) -> tuple[dict[str, Any], list[Home]]:
    """The arguments of a model that reads one row, and where each example stands in it."""
    told, places = lay(examples, layout.pad, layout.shared)
    told = told.to(layout.device)
    row = Row(
        tuple(Group(p.prefix, tuple((len(b), n) for _, n, b in p.blocks if n)) for p in places)
    )
    homes = {
        i: Home(start + k * n, p.prefix, p.begin)
        for p in places
        for start, n, block in p.blocks
        for k, i in enumerate(block)
    }
    return {"input_ids": told[:1], "position_ids": told[1:], "row": row}, [
        homes[i] for i in range(len(examples))
    ]
