"""Measure rows in tokens, and find those that exceed the limits."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from continual.data.template import Encoder, render_segments
from continual.data.types import Example
from continual.evaluation.scoring import PERPLEXITY, EvalSet

# The tokens of a training row (0: it does not fit), and True if it was shortened.
TokenCount = tuple[int, bool]


@dataclass(frozen=True)
class Lengths:
    """One task's training rows in tokens, and the rows that exceed a limit by kind of problem.

    `tokens` are lengths before shortening, in increasing order. Training and scored rows may be
    "shortened" or "left out". A scored row is "too long" if every accepted answer has more than
    score.max_new_tokens tokens.
    """

    tokens: Sequence[int]
    train_by_kind: Mapping[str, Sequence[Example]]
    scored_by_kind: Mapping[str, Sequence[Example]]

    def quantile(self, share: float) -> int | None:
        """Return the nearest-rank quantile of the training rows' lengths; None without rows."""
        if not self.tokens:
            return None
        rank = max(1, math.ceil(share * len(self.tokens)))
        return self.tokens[rank - 1]

    def summarize(self) -> dict[str, int | None]:
        """Return quantiles of the training rows' lengths, and the number of rows by kind."""
        return {
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "longest": self.quantile(1.0),
            **{kind: len(rows) for kind, rows in self.train_by_kind.items()},
        }


def count_row_tokens(encoder: Encoder, examples: Sequence[Example]) -> list[TokenCount]:
    """Count the tokens of each example as a training row."""
    encodings = [encoder.encode_example(e, 0) for e in examples]
    return [(len(x.encoded.ids) if x.encoded else 0, x.shortened) for x in encodings]


def measure_lengths(
    encoder: Encoder,
    train: Sequence[Example],
    token_counts: Sequence[TokenCount],
    scored: Sequence[Example],
    eval_set: EvalSet | None,
    max_new_tokens: int | None,
) -> Lengths:
    """Measure the lengths of one task's `train` and `scored` rows.

    `token_counts` are those of the train rows, and `eval_set` holds the scored rows, if there are
    any. `max_new_tokens` is that of the score section; None means no limit.
    """
    counted_rows = list(zip(train, token_counts, strict=True))
    unlimited_encoder = replace(encoder, max_tokens=sys.maxsize)
    full_lengths = []
    for example, (num_tokens, is_shortened) in counted_rows:
        is_whole = num_tokens and not is_shortened
        length = num_tokens if is_whole else _full_length(unlimited_encoder, example)
        if length:
            full_lengths.append(length)

    prompts = list(zip(eval_set.examples, eval_set.encoded, strict=True)) if eval_set else []
    encoded_ids = {id(e) for e, _ in prompts}
    generates = eval_set and not eval_set.label_token_ids and eval_set.metric != PERPLEXITY
    too_long = []
    if generates and max_new_tokens:
        too_long = [e for e, _ in prompts if _shortest_answer(encoder, e) > max_new_tokens]
    shortened = [e for e, p in prompts if not p.text.startswith(_render_prompt(encoder, e))]
    return Lengths(
        sorted(full_lengths),
        train_by_kind={
            "left out": [e for e, (num_tokens, _) in counted_rows if not num_tokens],
            "shortened": [e for e, (_, is_shortened) in counted_rows if is_shortened],
        },
        scored_by_kind={
            "left out": [e for e in scored if id(e) not in encoded_ids],
            "too long": too_long,
            "shortened": shortened,
        },
    )


def _full_length(unlimited_encoder: Encoder, example: Example) -> int:
    """Return the tokens of the row without shortening, 0 without a response."""
    encoded = unlimited_encoder.encode_example(example, 0).encoded
    return len(encoded.ids) if encoded else 0


def _render_prompt(encoder: Encoder, example: Example) -> str:
    segments = render_segments(example, encoder.template, encoder.tokenizer)
    return "".join(text for text, _ in segments[:-1])


def _shortest_answer(encoder: Encoder, example: Example) -> int:
    """Return the tokens of the shortest accepted answer, 0 without answers."""
    single_answers = [replace(example, outputs=(output,)) for output in example.outputs]
    return min(map(encoder.count_answer_tokens, single_answers), default=0)
