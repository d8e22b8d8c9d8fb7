"""A set of trained weights a task, and for each prompt those of the task whose instruction it
begins with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.models.model import Model
from continual.models.weights import restore, weights
from continual.strategy.instructions import extract_instructions
from continual.strategy.interface import memory
from strategies.per_task import TaskAdapters

TIE_TOLERANCE = 1e-6  # of two cosines that differ by less, neither is nearer


@dataclass(kw_only=True)
class Router(TaskAdapters):
    """One adapter a task, chosen for each prompt alone: the one whose instruction is nearest to the
    prompt's beginning.

    The retrieval of LoraRetriever (Zhao et al. 2024: the nearest adapter by the cosine between
    embeddings), with the instructions of a task as its prototypes instead of the mean of some
    examples, and the mean of the model's own input embeddings, at the weights before the first
    stage, instead of a sentence encoder's. The prompt is compared with an instruction of L tokens
    by its first L. Of equally near ones the longest counts, for it says most: what all prompts of a
    task have in common may begin another's too. A prompt of a task that no stage has learned also
    goes to the nearest one; before the first stage the model answers as it is.
    """

    stores: ClassVar[str] = "4 P (T + 1) and T instructions"
    instructions: dict[str, list[list[int]]] = memory(dict)  # of each adapter

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """Keep what the task's prompts begin with."""
        super().end(model, task)
        self.instructions[task.name] = [ids for ids, _ in extract_instructions(task.train)]

    def dispatch(self, model: Model, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """The prompts of one adapter after another."""
        if not self.adapters:
            yield from super().dispatch(model, prompts)
            return
        chosen = self.nearest_adapters(model, prompts)
        for name in dict.fromkeys(chosen):
            restore(model, self.adapters[name])
            yield [i for i, found in enumerate(chosen) if found == name]

    @torch.no_grad()
    def nearest_adapters(self, model: Model, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The adapter for each of the prompts; there must be one."""
        words, known = (
            self.base_input_embeddings(model),
            [(name, ids) for name, told in self.instructions.items() for ids in told],
        )
        lengths = torch.tensor([len(ids) for _, ids in known], device=words.device)
        prototypes = torch.stack([mean_prefix_embeddings(words, ids)[-1] for _, ids in known])
        chosen = []
        for prompt in prompts:
            here = mean_prefix_embeddings(words, prompt)[lengths.clamp(max=len(prompt)) - 1]
            near = F.cosine_similarity(here, prototypes)
            told = torch.where(near >= near.max() - TIE_TOLERANCE, lengths, 0)
            chosen.append(known[int(told.argmax())][0])
        return chosen

    def base_input_embeddings(self, model: Model) -> Tensor:
        """(V, D) the input embeddings, whichever adapter the model has now."""
        live = model.net.get_input_embeddings().weight
        return next((self.base[n] for n, w in weights(model).items() if w is live), live)


def mean_prefix_embeddings(words: Tensor, ids: Sequence[int]) -> Tensor:
    """(T, D) the mean embedding of the first 1, 2, ... T tokens."""
    rows = words[list(ids)].double()
    return rows.cumsum(0) / torch.arange(1, len(rows) + 1, device=rows.device)[:, None]
