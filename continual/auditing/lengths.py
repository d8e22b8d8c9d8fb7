"""How many tokens rows take, against how many fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from continual.data.template import Encoder, render_segments
from continual.data.types import Example
from continual.evaluation.scoring import PERPLEXITY, EvalSet

TokenCount = tuple[
    int, bool
]  # the tokens that a row takes once it is learned (0: it does not fit), and if it was shortened


@dataclass(frozen=True)
class Lengths:
    """One task's training rows in whole tokens, rising, and the rows to which their length does
    something.

    Training and scored rows are `shortened` or `left out`; of a scored one that is `too long` every
    accepted answer takes more than score.max_new_tokens.
    """

    tokens: Sequence[int]
    train_by_kind: Mapping[str, Sequence[Example]]
    scored_by_kind: Mapping[str, Sequence[Example]]

    def quantile(self, share: float) -> int | None:
        """The least length that at least this share of the training rows does not exceed; None
        without rows.
        """
        return self.tokens[max(1, math.ceil(share * len(self.tokens))) - 1] if self.tokens else None

    def summarize(self) -> dict[str, int | None]:
        """Of the training rows."""
        return {
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "longest": self.quantile(1.0),
            **{kind: len(rows) for kind, rows in self.train_by_kind.items()},
        }


def count_row_tokens(encoder: Encoder, examples: Sequence[Example]) -> list[TokenCount]:
    """What becomes of each as a training row; the encoder counts none of it."""
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
    """One task's lengths: `fits` tells of its `train` rows, `test` of the `scored` ones, if there
    are any.

    `room` is score.max_new_tokens: where it is None, every answer has room.
    """
    rows, unbounded = (
        list(zip(train, token_counts, strict=True)),
        replace(encoder, max_tokens=sys.maxsize),
    )
    whole = [
        length
        for e, (n, cut) in rows
        if (length := _full_length(unbounded, e) if cut or not n else n)
    ]
    asked = list(zip(eval_set.examples, eval_set.encoded, strict=True)) if eval_set else []
    kept = {id(e) for e, _ in asked}
    answered = eval_set and not eval_set.label_token_ids and eval_set.metric != PERPLEXITY
    scored_rows = {
        "left out": [e for e in scored if id(e) not in kept],
        "too long": [
            e for e, _ in asked if max_new_tokens and _shortest_answer(encoder, e) > max_new_tokens
        ]
        if answered
        else [],
        "shortened": [
            e for e, prompt in asked if not prompt.text.startswith(_render_prompt(encoder, e))
        ],
    }
    return Lengths(
        sorted(whole),
        {
            "left out": [e for e, (n, _) in rows if not n],
            "shortened": [e for e, (_, cut) in rows if cut],
        },
        scored_rows,
    )


def _full_length(unbounded: Encoder, example: Example) -> int:
    """The tokens of the row as it stands, 0 without a response."""
    encoded = unbounded.encode_example(example, 0).encoded
    return len(encoded.ids) if encoded else 0


def _render_prompt(encoder: Encoder, example: Example) -> str:
    return "".join(
        text for text, _ in render_segments(example, encoder.template, encoder.tokenizer)[:-1]
    )


def _shortest_answer(encoder: Encoder, example: Example) -> int:
    """The tokens of the shortest accepted answer."""
    return min(
        (encoder.count_answer_tokens(replace(example, outputs=(o,))) for o in example.outputs),
        default=0,
    )
