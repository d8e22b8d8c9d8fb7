"""Generative replay: the model also learns to write the tasks' prompts, and later writes and
answers them itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, DataError
from continual.models.generation import generate_ids, top_k_rule
from continual.models.model import Model
from continual.packing.batch import Batch
from continual.packing.layout import response_start
from continual.strategy.instructions import extract_prompt_prefixes
from continual.strategy.interface import memory
from continual.strategy.replay_buffer import ReplayBuffer
from continual.strategy.self_generation import GENERATION_BATCH_SIZE, append_response
from strategies.replay import Rehearsal


@dataclass(kw_only=True)
class LAMOL(Rehearsal):
    """Language modelling for lifelong language learning (Sun et al. 2020): no example of an earlier
    task is kept.

    A step's loss is (L_QA + `lm_weight` L_LM) / (1 + `lm_weight`) (section 3.2): that of the
    responses, and that of the prompts, each written after a start token, closed with it, and
    averaged over its own tokens. Before a stage the model writes so many examples that `share` =
    gamma / (1 + gamma) of all are its own, equally many of each earlier task (section 3.3): it goes
    on from the start token and one of the task's instructions, drawn by how many of its examples
    have it, which stands for the paper's task token, sampling from the `top_k` likeliest tokens,
    and then answers what it wrote, greedily. What is not closed in the length that the task's
    examples had is discarded. The start token is the padding token. In the paper and its authors'
    code L_LM is also that of the answers, and a whole example is sampled in one pass; here the
    model answers as it is asked.
    """

    shardable = True
    stores: ClassVar[str] = "at most 64 T instructions"
    costs: ClassVar[str] = (
        "1 / (1 - share), and its prompts are learned too; a stage begins by writing"
    )
    lm_weight: float = 0.25
    top_k: int = 20
    tasks: dict[int, dict[str, Any]] = memory(
        dict
    )  # of each: its instructions, and its longest lengths

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        super().__post_init__()
        if self.lm_weight < 0 or self.top_k < 1:
            raise ConfigError(
                f"LAMOL with lm_weight {self.lm_weight} and top_k {self.top_k}: expected at "
                "least 0 and at least 1"
            )

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """Write and answer examples of the earlier tasks."""
        trained = super().begin(model, task)
        if model.layout.seq2seq:
            raise ConfigError(
                "lamol writes prompts with the part of a model that reads them, which an encoder "
                "cannot; choose a causal model, or another strategy"
            )
        if any(model.layout.pad_token_id in e.ids[: response_start(e)] for e in task.train):
            raise DataError(
                f"a prompt of task {task.name!r} holds the padding token, with which lamol marks "
                "where prompts begin and end; give the tokenizer a padding token that no prompt "
                "holds"
            )
        wanted = round(len(task.train) * self.share / (1 - self.share))
        with model.eval_mode():
            self.buffer.tasks = {
                task.task_names[t]: self.generate_examples(model, t, -(-wanted // len(self.tasks)))
                for t in self.tasks
                if wanted
            }
        if self.tasks:
            self.notes["pseudo"] = len(self.buffer)
        return trained

    def generate_examples(self, model: Model, index: int, n: int) -> list[Encoded]:
        """What is usable of `n` examples of a task that the model writes."""
        told, mark, end = self.tasks[index], model.layout.pad_token_id, model.tokenizer.eos_token_id
        generator = torch.Generator().manual_seed(self.buffer.rng.getrandbits(63))
        begins, counts = zip(*told["begins"], strict=True)
        prompts: list[list[int]] = []
        for i, many in sorted(
            Counter(self.buffer.rng.choices(range(len(begins)), counts, k=n)).items()
        ):
            starts, room = (
                [make_prompt("", index, [mark, *begins[i]])] * many,
                told["prompt"] - len(begins[i]) + 1,
            )
            draws = torch.rand(many, room, dtype=torch.float64, generator=generator)
            said = generate_ids(
                model, starts, room, GENERATION_BATCH_SIZE, mark, top_k_rule(self.top_k, draws)
            )
            prompts += [[*begins[i], *ids[:-1]] for ids in said if ids[-1] == mark]
        asked = [
            make_prompt(f"pseudo/{index}/{i}", index, ids) for i, ids in enumerate(prompts) if ids
        ]
        answers = generate_ids(model, asked, told["response"], GENERATION_BATCH_SIZE, end)
        answered = [
            append_response(e, ids) for e, ids in zip(asked, answers, strict=True) if ids[-1] == end
        ]
        return [replace(e, text=decode_text(model, e.ids)) for e in answered]

    def add_replay_examples(self, batch: Batch) -> Batch:
        """New and self-written examples, and the prompts of both to be written."""
        batch = super().add_replay_examples(batch)
        if not self.lm_weight:
            return batch
        mark = batch.layout.pad_token_id
        prompts = [
            replace(
                e,
                id=f"prompt/{e.id}",
                ids=(mark, *e.ids[: response_start(e)], mark),  # what is kept of e is not its
                response_mask=(False, *(True,) * (response_start(e) + 1)),
            )
            for e in batch.examples
        ]
        weight = (
            self.lm_weight
            * batch.supervised_tokens
            / batch.with_examples(prompts).supervised_tokens
        )
        answers = batch.example_weights or (1.0,) * len(batch.examples)
        return batch.with_examples(
            [*batch.examples, *prompts], [*answers, *(weight,) * len(prompts)]
        )

    def update_buffer(self, model: Model, task: Task[Encoded]) -> None:
        """Forget what was written; remember each task's instructions and its lengths."""
        for t in {e.task_index for e in task.train}:
            rows = [e for e in task.train if e.task_index == t]
            self.tasks[t] = {
                "begins": extract_prompt_prefixes(rows),
                "prompt": max(map(response_start, rows)),
                "response": max(len(e.ids) - response_start(e) for e in rows),
            }
        self.buffer = ReplayBuffer(0, seed=self.seed + len(self.tasks))


def make_prompt(id: str, task: int, ids: Sequence[int]) -> Encoded:
    """A prompt."""
    return Encoded(id, task, tuple(ids), (False,) * len(ids))


def decode_text(model: Model, ids: Sequence[int]) -> str:
    """The text, for people who inspect a checkpoint."""
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))
