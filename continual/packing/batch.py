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
from continual.distributed.work import split_evenly
from continual.packing.attention import PackedRow, PrefixGroup
from continual.packing.layout import (
    common_prefix_length,
    layout_row,
    prepend_prefix,
    response_start,
)


@dataclass(frozen=True)
class Layout:
    """How batches are laid out for one model."""

    pad_token_id: int
    device: torch.device
    decoder_start_token_id: int | None = None  # set for encoder-decoder models
    packed: bool = False  # one flat row, or one padded row an example
    share_prefixes: bool = True  # in a flat row, examples that begin alike share that prefix
    tokens_per_microbatch: int = (
        4096  # the most tokens in one forward pass, if no single example is longer
    )
    instruction_weight: float = 0.0  # of a prompt token's loss against a response token's
    prompt_prefix: tuple[int, ...] = ()  # the virtual tokens that stand before every example

    @property
    def seq2seq(self) -> bool:
        """Whether prompts go to an encoder and responses to a decoder."""
        return self.decoder_start_token_id is not None


@dataclass(frozen=True)
class Batch:
    """Examples and, once asked for, the tensors that a model needs; the layout shows nowhere else.

    `scale` multiplies the loss weight of each example's tokens (all 1 when empty); `factor`
    (tasks,), which may carry a gradient, multiplies the loss of each task's tokens and leaves the
    normaliser `tokens` alone.
    """

    examples: tuple[Encoded, ...]
    layout: Layout
    example_weights: tuple[float, ...] = field(default=())
    task_factors: Tensor | None = None

    def with_examples(
        self, examples: Sequence[Encoded], example_weights: Sequence[float] = ()
    ) -> Batch:
        """Other examples, for the same model."""
        return replace(self, examples=tuple(examples), example_weights=tuple(example_weights))

    def select(self, indices: Sequence[int]) -> Batch:
        """Some of the examples, each with its scale."""
        return self.with_examples(
            [self.examples[i] for i in indices],
            [self.example_weights[i] for i in indices] if self.example_weights else (),
        )

    def with_task_factors(self, task_factors: Tensor) -> Batch:
        """The same tokens, in the same tensors, the loss of each task's times its `factor`
        (tasks,).
        """
        other = replace(self, task_factors=task_factors)
        vars(other).update(
            {
                name: getattr(self, name)
                for name in ("_inputs_and_offsets", "_supervision", "task_index")
            }
        )
        return other

    def micro_batches(self) -> list[Batch]:
        """This batch in parts of at most `layout.tokens` tokens, or single examples; like stays
        with like.

        Where several processes share the work the parts are smaller, so that each has about as much
        to do.
        """
        rows, flat = [e.ids for e in self.prefixed_examples], self.layout.packed
        if flat:
            order = sorted(range(len(rows)), key=rows.__getitem__)
        else:
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        shared = (
            [common_prefix_length(rows[i], rows[j]) for i, j in pairwise(order)] if flat else []
        )

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

        parts = split_evenly(cut, self.layout.tokens_per_microbatch)
        return [self] if len(parts) == 1 else [self.select(part) for part in parts]

    def split_by_task(self) -> dict[int, Batch]:
        """This batch's examples, a batch for each task index."""
        tasks: dict[int, list[int]] = {}
        for i, e in enumerate(self.examples):
            tasks.setdefault(e.task_index, []).append(i)
        return {t: self.select(tasks[t]) for t in sorted(tasks)}

    @cached_property
    def prefixed_examples(self) -> Sequence[Encoded]:
        """The examples as they are read, behind the layout's prefix."""
        return prepend_prefix(self.layout.prompt_prefix, self.examples)

    @property
    def num_tokens(self) -> int:
        """How many tokens the examples have."""
        return sum(len(e.ids) for e in self.examples)

    @property
    def supervised_tokens(self) -> float:
        """The sum of the supervised tokens' weights: what a summed loss is divided by."""
        if self.example_weights or self.layout.instruction_weight:
            return self._supervision[4]
        # Counted without laying out what another process may read; a causal model predicts nothing
        # for a first token.
        return float(
            sum(
                sum(e.response_mask) - (e.response_mask[0] and not self.layout.seq2seq)
                for e in self.prefixed_examples
            )
        )

    @property
    def targets(self) -> Tensor:
        """(S,) the token to be predicted at each supervised position."""
        return self._supervision[0]

    @property
    def example_index(self) -> Tensor:
        """(S,) the index in `examples` of each supervised position's example."""
        return self._supervision[1]

    @property
    def token_weights(self) -> Tensor:
        """(S,) each supervised position's weight in the loss."""
        weight = self._supervision[2]
        return weight if self.task_factors is None else weight * self.task_factors[self.task_index]

    @property
    def response_mask(self) -> Tensor:
        """(S,) whether each supervised position is a response's: a prompt's may have a weight too."""
        return self._supervision[5]

    @cached_property
    def task_index(self) -> Tensor:
        """(S,) each supervised position's task index."""
        return torch.tensor([e.task_index for e in self.examples], device=self.layout.device)[
            self.example_index
        ]

    @cached_property
    def _supervision(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor]:
        """Targets, examples, weights and positions in the model's output, the weights' sum, and
        what is a response.
        """
        seq2seq, other = self.layout.seq2seq, self.layout.instruction_weight
        targets: list[int] = []
        owner: list[int] = []
        weight: list[float] = []
        at: list[int] = []
        response: list[bool] = []
        for i, (e, home) in enumerate(
            zip(self.prefixed_examples, self._inputs_and_offsets[1], strict=True)
        ):
            scale = self.example_weights[i] if self.example_weights else 1.0
            # A prompt without weight is passed over; a causal model predicts nothing for its first
            # token.
            first = (
                response_start(e)
                if seq2seq
                else max(1, len(self.layout.prompt_prefix) if other else response_start(e))
            )
            for t in range(first, len(e.ids)):
                w = 1.0 if e.response_mask[t] else other
                if w:
                    targets.append(e.ids[t])
                    owner.append(i)
                    weight.append(w * scale)
                    at.append(home.output_index(t - 1))
                    response.append(e.response_mask[t])
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
    def output_positions(self) -> Tensor:
        """(S,) where, in the model's flattened output, each target is predicted."""
        return self._supervision[3]

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's keyword arguments: (1, N) and the row's description, or (E, T) each."""
        return self._inputs_and_offsets[0]

    @cached_property
    def _inputs_and_offsets(self) -> tuple[dict[str, Any], list[TokenOffsets]]:
        """The model's keyword arguments, and where each example stands in them.

        An example's last token is only predicted, never read. Padding stands on the right of a
        causal model's rows, where no real token can see it: no mask is needed.
        """
        if self.layout.packed:
            return _packed_inputs(self.prefixed_examples, self.layout)
        start = self.layout.decoder_start_token_id
        if start is None:
            ids = self._pad_rows([e.ids[:-1] for e in self.prefixed_examples])
            return {"input_ids": ids}, [TokenOffsets(i * ids.shape[1]) for i in range(len(ids))]
        sources = [e.ids[: response_start(e)] for e in self.prefixed_examples]
        lengths = torch.tensor([len(s) for s in sources], device=self.layout.device)
        ids = self._pad_rows(sources)
        mask = torch.arange(ids.shape[1], device=self.layout.device) < lengths[:, None]
        decoder = self._pad_rows(
            [(start, *e.ids[response_start(e) : -1]) for e in self.prefixed_examples]
        )
        return (
            {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder},
            [
                TokenOffsets(i * decoder.shape[1] + 1 - response_start(e))
                for i, e in enumerate(self.prefixed_examples)
            ],
        )

    def _pad_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [[*r, *[self.layout.pad_token_id] * (longest - len(r))] for r in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.layout.device)


@dataclass(frozen=True)
class TokenOffsets:
    """Where an example's tokens stand in the model's flattened output: `prefix` of them apart from
    the others.
    """

    own_start: int
    prefix_length: int = 0
    prefix_start: int = 0

    def output_index(self, t: int) -> int:
        """Where token t stands."""
        return (
            self.prefix_start + t
            if t < self.prefix_length
            else self.own_start + t - self.prefix_length
        )


def _packed_inputs(
    examples: Sequence[Encoded], layout: Layout
) -> tuple[dict[str, Any], list[TokenOffsets]]:
    """The arguments of a model that reads one row, and where each example stands in it."""
    told, places = layout_row(examples, layout.pad_token_id, layout.share_prefixes)
    told = told.to(layout.device)
    row = PackedRow(
        tuple(
            PrefixGroup(p.prefix_length, tuple((len(b), n) for _, n, b in p.blocks if n))
            for p in places
        )
    )
    homes = {
        i: TokenOffsets(start + k * n, p.prefix_length, p.start)
        for p in places
        for start, n, block in p.blocks
        for k, i in enumerate(block)
    }
    return {"input_ids": told[:1], "position_ids": told[1:], "row": row}, [
        homes[i] for i in range(len(examples))
    ]
