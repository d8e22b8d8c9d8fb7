"""Turn examples into batches: the tensors a model reads, and where it predicts supervised tokens.

A causal model reads one packed row of real tokens, in which examples that begin alike share that
prefix. A model that cannot read such a row, or has an encoder, reads one padded row per example.

Shapes: E examples, T positions of the longest one, N tokens of a packed row, S supervised
positions, V vocabulary.
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
    """Describe how the batches of one model are laid out.

    `tokens_per_microbatch` limits one forward pass, unless a single example is longer.
    `instruction_weight` is the loss weight of a prompt token, where a response token has 1.
    `prompt_prefix` are the ids of the virtual tokens before every example.
    """

    pad_token_id: int
    device: torch.device
    decoder_start_token_id: int | None = None  # set for encoder-decoder models
    packed: bool = False  # one packed row, or one padded row per example
    share_prefixes: bool = True  # of examples in a packed row that begin alike
    tokens_per_microbatch: int = 4096
    instruction_weight: float = 0.0
    prompt_prefix: tuple[int, ...] = ()

    @property
    def seq2seq(self) -> bool:
        """Return True if prompts go to an encoder and responses to a decoder."""
        return self.decoder_start_token_id is not None


@dataclass(frozen=True)
class TokenOffsets:
    """Locate an example's tokens in the model's flattened output.

    The first `prefix_length` tokens are shared and stand at `prefix_start`, the others at
    `own_start`.
    """

    own_start: int
    prefix_length: int = 0
    prefix_start: int = 0

    def output_index(self, t: int) -> int:
        """Return the index of token t."""
        if t < self.prefix_length:
            return self.prefix_start + t
        return self.own_start + t - self.prefix_length


@dataclass(frozen=True)
class Supervision:
    """Hold the supervised positions of a batch; each tensor is (S,).

    `positions` index the model's flattened output; `response_mask` is False for a prompt token
    that has a weight; `total_weight` is the sum of `weights`.
    """

    targets: Tensor
    example_index: Tensor
    weights: Tensor
    positions: Tensor
    response_mask: Tensor
    total_weight: float


@dataclass(frozen=True)
class BatchTensors:
    """Build the tensors of a batch when they are first used; batches of the same tokens share them."""

    examples: tuple[Encoded, ...]
    layout: Layout
    example_weights: tuple[float, ...]

    @cached_property
    def prefixed_examples(self) -> Sequence[Encoded]:
        """Return the examples with the layout's prompt prefix."""
        return prepend_prefix(self.layout.prompt_prefix, self.examples)

    @cached_property
    def task_index(self) -> Tensor:
        """Return (S,) the task index of each supervised position."""
        task_indices = torch.tensor(
            [e.task_index for e in self.examples], device=self.layout.device
        )
        return task_indices[self.supervision.example_index]

    @cached_property
    def supervision(self) -> Supervision:
        """Collect the positions that have a weight in the loss."""
        targets: list[int] = []
        owners: list[int] = []
        weights: list[float] = []
        positions: list[int] = []
        response_mask: list[bool] = []
        all_offsets = self.inputs_and_offsets[1]
        for i, (e, offsets) in enumerate(zip(self.prefixed_examples, all_offsets, strict=True)):
            example_weight = self.example_weights[i] if self.example_weights else 1.0
            for t in range(self._first_supervised(e), len(e.ids)):
                weight = 1.0 if e.response_mask[t] else self.layout.instruction_weight
                if weight:
                    targets.append(e.ids[t])
                    owners.append(i)
                    weights.append(weight * example_weight)
                    positions.append(offsets.output_index(t - 1))
                    response_mask.append(e.response_mask[t])

        device = self.layout.device
        return Supervision(
            torch.tensor(targets, dtype=torch.long, device=device),
            torch.tensor(owners, dtype=torch.long, device=device),
            torch.tensor(weights, device=device),
            torch.tensor(positions, dtype=torch.long, device=device),
            torch.tensor(response_mask, device=device),
            sum(weights),
        )

    def _first_supervised(self, example: Encoded) -> int:
        """Return the first token of an example that may have a weight.

        A prompt without weight is passed over; a causal model does not predict its first token.
        """
        if self.layout.seq2seq:
            return response_start(example)
        if self.layout.instruction_weight:
            return max(1, len(self.layout.prompt_prefix))
        return max(1, response_start(example))

    @cached_property
    def inputs_and_offsets(self) -> tuple[dict[str, Any], list[TokenOffsets]]:
        """Return the model's keyword arguments, and where each example's tokens stand in them.

        An example's last token is only predicted, never read. Padding stands on the right of a
        causal model's rows, where no real token can see it: no mask is needed.
        """
        examples = self.prefixed_examples
        if self.layout.packed:
            return _packed_inputs(examples, self.layout)

        start = self.layout.decoder_start_token_id
        if start is None:
            ids = self._pad_rows([e.ids[:-1] for e in examples])
            return {"input_ids": ids}, [TokenOffsets(i * ids.shape[1]) for i in range(len(ids))]

        sources = [e.ids[: response_start(e)] for e in examples]
        lengths = torch.tensor([len(s) for s in sources], device=self.layout.device)
        ids = self._pad_rows(sources)
        mask = torch.arange(ids.shape[1], device=self.layout.device) < lengths[:, None]
        decoder = self._pad_rows([(start, *e.ids[response_start(e) : -1]) for e in examples])
        offsets = [
            TokenOffsets(i * decoder.shape[1] + 1 - response_start(e))
            for i, e in enumerate(examples)
        ]
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder}
        return inputs, offsets

    def _pad_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return (E, T) ids, padded on the right."""
        longest = max(map(len, rows))
        padded = [[*r, *[self.layout.pad_token_id] * (longest - len(r))] for r in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.layout.device)


@dataclass(frozen=True)
class Batch:
    """Hold examples and build the tensors that a model needs; nothing else knows the layout.

    `example_weights` multiply the loss weights of each example's tokens (1 if empty).
    `task_factors` (tasks,) multiply the loss of each task's tokens, may carry a gradient, and do
    not change the normalizer `supervised_tokens`. `shared_tensors` are those of another batch with
    the same examples, layout and weights.
    """

    examples: tuple[Encoded, ...]
    layout: Layout
    example_weights: tuple[float, ...] = field(default=())
    task_factors: Tensor | None = None
    shared_tensors: BatchTensors | None = field(default=None, repr=False, compare=False)

    @cached_property
    def _tensors(self) -> BatchTensors:
        shared = self.shared_tensors
        # `replace` copies the field to batches of other examples too: these build their own.
        if (
            shared is not None
            and shared.examples is self.examples
            and shared.layout is self.layout
            and shared.example_weights is self.example_weights
        ):
            return shared
        return BatchTensors(self.examples, self.layout, self.example_weights)

    def with_examples(
        self, examples: Sequence[Encoded], example_weights: Sequence[float] = ()
    ) -> Batch:
        """Return a batch of other examples for the same model."""
        return replace(
            self,
            examples=tuple(examples),
            example_weights=tuple(example_weights),
            shared_tensors=None,
        )

    def select(self, indices: Sequence[int]) -> Batch:
        """Return a batch of some of the examples, with their weights."""
        return self.with_examples(
            [self.examples[i] for i in indices],
            [self.example_weights[i] for i in indices] if self.example_weights else (),
        )

    def with_task_factors(self, task_factors: Tensor) -> Batch:
        """Return the same batch, in the same tensors, with a factor (tasks,) for each task's loss."""
        return replace(self, task_factors=task_factors, shared_tensors=self._tensors)

    def micro_batches(self) -> list[Batch]:
        """Split into batches of at most `tokens_per_microbatch` tokens, or of single examples.

        Examples that begin alike (packed) or are of like length (padded) stay together. If several
        processes share the work, the parts are smaller, so that each process has about as much to
        do.
        """
        rows = [e.ids for e in self.prefixed_examples]
        packed = self.layout.packed
        if packed:
            order = sorted(range(len(rows)), key=rows.__getitem__)
            shared = [common_prefix_length(rows[i], rows[j]) for i, j in pairwise(order)]
        else:
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            shared = []

        def cut(limit: int) -> list[list[int]]:
            parts: list[list[int]] = [[]]
            spent = 0
            for k, i in enumerate(order):
                part = parts[-1]
                if packed:
                    cost = spent + len(rows[i]) - (shared[k - 1] if part else 0)
                else:
                    cost = len(rows[i]) * (len(part) + 1)
                if part and cost > limit:
                    parts.append([])
                    cost = len(rows[i])
                parts[-1].append(i)
                spent = cost
            return parts

        parts = split_evenly(cut, self.layout.tokens_per_microbatch)
        return [self] if len(parts) == 1 else [self.select(part) for part in parts]

    def split_by_task(self) -> dict[int, Batch]:
        """Return one batch per task index, in ascending order."""
        tasks: dict[int, list[int]] = {}
        for i, e in enumerate(self.examples):
            tasks.setdefault(e.task_index, []).append(i)
        return {t: self.select(tasks[t]) for t in sorted(tasks)}

    @property
    def prefixed_examples(self) -> Sequence[Encoded]:
        """Return the examples as the model reads them, with the layout's prompt prefix."""
        return self._tensors.prefixed_examples

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all examples."""
        return sum(len(e.ids) for e in self.examples)

    @property
    def supervised_tokens(self) -> float:
        """Return the sum of the supervised tokens' weights: the normalizer of a summed loss."""
        if self.example_weights or self.layout.instruction_weight:
            return self._tensors.supervision.total_weight
        # Count without laying out rows that another process may read. A causal model does not
        # predict the first token.
        return float(
            sum(
                sum(e.response_mask) - (e.response_mask[0] and not self.layout.seq2seq)
                for e in self.prefixed_examples
            )
        )

    @property
    def targets(self) -> Tensor:
        """Return (S,) the token to predict at each supervised position."""
        return self._tensors.supervision.targets

    @property
    def example_index(self) -> Tensor:
        """Return (S,) the index in `examples` of each supervised position."""
        return self._tensors.supervision.example_index

    @property
    def token_weights(self) -> Tensor:
        """Return (S,) the loss weight of each supervised position."""
        weights = self._tensors.supervision.weights
        if self.task_factors is None:
            return weights
        return weights * self.task_factors[self.task_index]

    @property
    def response_mask(self) -> Tensor:
        """Return (S,) True at a response token: a prompt token may have a weight too."""
        return self._tensors.supervision.response_mask

    @property
    def task_index(self) -> Tensor:
        """Return (S,) the task index of each supervised position."""
        return self._tensors.task_index

    @property
    def output_positions(self) -> Tensor:
        """Return (S,) the positions in the model's flattened output that predict the targets."""
        return self._tensors.supervision.positions

    @property
    def inputs(self) -> dict[str, Any]:
        """Return the model's keyword arguments: (1, N) and a description of the row, or (E, T)."""
        return self._tensors.inputs_and_offsets[0]


def _packed_inputs(
    examples: Sequence[Encoded], layout: Layout
) -> tuple[dict[str, Any], list[TokenOffsets]]:
    """Return the arguments of a model that reads one packed row, and each example's offsets."""
    ids_and_positions, placements = layout_row(examples, layout.pad_token_id, layout.share_prefixes)
    ids_and_positions = ids_and_positions.to(layout.device)
    groups = tuple(
        PrefixGroup(p.prefix_length, tuple((len(members), n) for _, n, members in p.blocks if n))
        for p in placements
    )
    offsets = {
        i: TokenOffsets(start + k * n, p.prefix_length, p.start)
        for p in placements
        for start, n, members in p.blocks
        for k, i in enumerate(members)
    }
    inputs = {
        "input_ids": ids_and_positions[:1],
        "position_ids": ids_and_positions[1:],
        "row": PackedRow(groups),
    }
    return inputs, [offsets[i] for i in range(len(examples))]
