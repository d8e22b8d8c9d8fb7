"""Answer with the most likely of a task's labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from continual.data.template import Encoder
from continual.data.types import Encoded, Example
from continual.models.generation import next_logits, prefill
from continual.models.loss import token_nll
from continual.models.model import Model
from continual.packing.batch import Batch


def encode_labels(labels: Sequence[str], encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Encode each label as the template writes an answer, with the end of sequence."""
    found = {}
    for label in labels:
        example = Example(label, "", "-", outputs=(label,), location=f"label {label!r}")
        whole = encoder.encode_example(example, 0).require()
        found[label] = whole.ids[whole.response_mask.index(True) :]
    return found


def most_likely_labels(
    model: Model,
    prompts: Sequence[Encoded],
    label_token_ids: Mapping[str, tuple[int, ...]],
    batch_size: int,
) -> list[str]:
    """Return each prompt's label with the highest summed log-likelihood; of equals the first."""
    labels = list(label_token_ids)
    token_ids = list(label_token_ids.values())
    scores = label_log_likelihoods(model, prompts, token_ids, batch_size)
    return [labels[j] for j in scores.argmax(1).tolist()]


@torch.no_grad()
def label_log_likelihoods(
    model: Model,
    prompts: Sequence[Encoded],
    label_token_ids: Sequence[tuple[int, ...]],
    batch_size: int,
) -> Tensor:
    """Return the (prompts, labels) log-likelihoods of labels after prompts, in nats, float64.

    A model with packed rows reads each prompt once, and after it once each common beginning of
    labels. A forward pass holds at most `batch_size` prompts and, if possible, no more label tokens
    than `layout.tokens_per_microbatch`.
    """
    if not model.layout.packed:
        return _log_likelihoods_by_pair(model, prompts, label_token_ids)
    model.check_fits_context(
        max((len(p.ids) for p in prompts), default=0) + max(map(len, label_token_ids)) - 1
    )
    tree: dict[
        tuple[int, ...], int
    ] = {}  # each beginning of a label that another token follows, parents first
    paths = [
        (j, tree.setdefault(ids[:t], len(tree)), ids[t])
        for j, ids in enumerate(label_token_ids)
        for t in range(len(ids))
    ]
    owner, at, token = torch.tensor(paths, device=model.layout.device).T
    parents = [tree[start[:-1]] if start else -1 for start in tree]
    together = max(1, min(batch_size, model.layout.tokens_per_microbatch // len(tree)))
    order = sorted(
        range(len(prompts)), key=lambda i: prompts[i].ids
    )  # what begins alike is read together
    told = torch.zeros(len(prompts), len(label_token_ids), dtype=torch.float64)
    for begin in range(0, len(order), together):
        part = order[begin : begin + together]
        cache = prefill(model, [prompts[i] for i in part], parents)
        part = [part[i] for i in cache.prompt_order]
        tokens = [[start[-1] if start else prompts[i].ids[-1] for start in tree] for i in part]
        logits = next_logits(model, cache, torch.tensor(tokens, device=model.layout.device))
        each = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))[
            :, at, token
        ].double()
        told[part] = each.new_zeros(len(part), len(label_token_ids)).index_add(1, owner, each).cpu()
    return told


def _log_likelihoods_by_pair(
    model: Model, prompts: Sequence[Encoded], labels: Sequence[tuple[int, ...]]
) -> Tensor:
    """Return the same from one row for each pair of prompt and label."""
    pairs = [
        replace(
            p,
            id=str(i * len(labels) + j),
            ids=p.ids + ids,
            response_mask=(False,) * len(p.ids) + (True,) * len(ids),
        )
        for i, p in enumerate(prompts)
        for j, ids in enumerate(labels)
    ]
    told = torch.zeros(len(pairs), dtype=torch.float64)
    for micro in Batch(tuple(pairs), replace(model.layout, instruction_weight=0.0)).micro_batches():
        rows = torch.tensor([int(e.id) for e in micro.examples])
        told.index_add_(0, rows[micro.example_index.cpu()], -token_nll(model, micro).double().cpu())
    return told.view(len(prompts), -1)
