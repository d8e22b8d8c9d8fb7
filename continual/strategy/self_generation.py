"""Build examples whose responses the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from continual.data.types import Encoded
from continual.packing.layout import response_start

GENERATION_BATCH_SIZE = 128  # prompts that are answered together


def strip_response(example: Encoded) -> Encoded:
    """Return the example's prompt, without its response."""
    end = response_start(example)
    return replace(example, ids=example.ids[:end], response_mask=example.response_mask[:end])


def append_response(prompt: Encoded, response_ids: Sequence[int]) -> Encoded:
    """Return the prompt with these token ids as its response."""
    return replace(
        prompt,
        ids=(*prompt.ids, *response_ids),
        response_mask=(*prompt.response_mask, *(True,) * len(response_ids)),
    )
