"""Self-distillation: the model, shown the right answer, teaches itself without it, on answers of
its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.distributed.processes import single_process
from continual.distributed.work import assign_work, gather_by_index
from continual.errors import ConfigError, DataError
from continual.models.generation import generate_ids, top_k_rule
from continual.models.loss import accumulate, forward, number_examples, response_logits
from continual.models.model import Model
from continual.models.weights import Weights, combine, snapshot, to_float32, weights
from continual.packing.batch import Batch
from continual.packing.layout import response_start
from continual.strategy.interface import Strategy, memory
from continual.strategy.self_generation import (
    GENERATION_BATCH_SIZE,
    append_response,
    strip_response,
)

ALL_TOKENS = 2**31  # of the vocabulary


@dataclass(kw_only=True)
class SDFT(Strategy):
    """Self-distillation fine-tuning (Shenfeld et al. 2026): on-policy learning from demonstrations,
    without a reward.

    At each step the model samples an answer y to every prompt x, and the loss is the mean over
    their tokens of KL(model(. | x, y_<t) || teacher(. | c, x, y_<t)), the paper's reverse
    divergence, over the whole vocabulary and without a gradient through the draw. The demonstration
    c, x with its right answer, stands before x as a turn of its own; the paper writes the answer
    into x, in words for models that follow them. The teacher's weights, in float32 at least, are a
    moving average of the model's that begins anew with each stage, `ema_rate` weights + (1 - `ema_rate`)
    teacher.

    `strength` is that loss's share, the rest is the usual one's. The paper's is 1, of models that
    learn in context.
    """

    stores: ClassVar[str] = "a generator; 4 P within a stage"
    costs: ClassVar[str] = "3 and answering its prompts"
    strength: float = 0.1
    ema_rate: float = 0.01
    seed: int = 0
    teacher: Weights = memory(dict)
    generator: random.Random = memory(random.Random)

    def __post_init__(self) -> None:
        """Refuse shares that are none; seed the generator."""
        super().__post_init__()
        if not (0 <= self.strength <= 1 and 0 <= self.ema_rate <= 1):
            raise ConfigError(
                f"SDFT with strength {self.strength} and rate {self.ema_rate}: expected shares from "
                "0 to 1"
            )
        self.generator.seed(self.seed)

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """The teacher is the model as it is; raises DataError where an example does not fit twice
        into its context.
        """
        trained = super().begin(model, task)
        if self.strength:
            self.teacher = to_float32(snapshot(model))
            longest = max(len(e.ids) + response_start(e) for e in task.train) + longest_response(
                task.train
            )
            if model.context_length and longest > model.context_length:
                raise DataError(
                    f"an example of task {task.name!r} behind its demonstration takes {longest} "
                    f"tokens, and the model has {model.context_length}; set "
                    f"data.max_length={model.context_length // 2}, or choose a model with a longer "
                    "context"
                )
        return trained

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """What the usual loss counts."""
        loss = super().loss(model, batch)
        return (1 - self.strength) * loss if self.strength else loss

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """The step's usual gradient, and that of the divergence on answers of the model's own."""
        total = super().backward(model, batch)
        if not self.strength:
            return total
        here = weights(model)
        self.teacher = combine(
            lambda w, t: self.ema_rate * w.to(t.dtype) + (1 - self.ema_rate) * t,
            here,
            self.teacher or to_float32(here),
        )
        own = self.sample_answers(model, batch.examples)
        shown = [prepend_demonstration(e, y) for e, y in zip(batch.examples, own, strict=True)]
        far = accumulate(
            lambda model, part: self.strength * self.divergence(model, part, shown),
            model,
            number_examples(model, own).micro_batches(),
        )
        self.notes["divergence"] = float(far) / self.strength
        return total + far

    def sample_answers(self, model: Model, examples: Sequence[Encoded]) -> list[Encoded]:
        """The prompts, with answers sampled from the model as responses; several processes answer a
        part each.
        """
        prompts = [strip_response(e) for e in examples]
        most = longest_response(examples)
        generator = torch.Generator().manual_seed(self.generator.getrandbits(63))
        draws = torch.rand(len(prompts), most, dtype=torch.float64, generator=generator)
        mine = assign_work([len(p.ids) for p in prompts])
        with model.eval_mode(), single_process():
            said = (
                generate_ids(
                    model,
                    [prompts[i] for i in mine],
                    most,
                    GENERATION_BATCH_SIZE,
                    model.tokenizer.eos_token_id,
                    top_k_rule(ALL_TOKENS, draws[mine]),
                )
                if mine
                else []
            )
        told = gather_by_index(mine, said)
        return [append_response(p, told[i]) for i, p in enumerate(prompts)]

    def divergence(self, model: Model, batch: Batch, teacher_examples: Sequence[Encoded]) -> Tensor:
        """KL(model || teacher), a mean over the batch's tokens. The teacher sees `shown`, where ids
        say which stand.
        """
        q = forward(model, batch).log_softmax(-1)
        at = combine(lambda w, t: t.to(w.dtype), weights(model), self.teacher)
        told = {
            i: z
            for i, _, z in response_logits(
                model, [teacher_examples[int(e.id)] for e in batch.examples], at
            )
        }
        p = torch.cat([told[i] for i in range(len(told))]).log_softmax(-1)
        return ((q.exp() * (q - p)).sum(-1) * batch.token_weights).sum() / batch.supervised_tokens

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """The teacher is no longer needed."""
        super().end(model, task)
        self.teacher = {}


def longest_response(examples: Sequence[Encoded]) -> int:
    """The tokens of the longest response."""
    return max(len(e.ids) - response_start(e) for e in examples)


def prepend_demonstration(example: Encoded, own_answer: Encoded) -> Encoded:
    """The example, and after it its prompt again with an answer of the model's own, the response."""
    return replace(
        own_answer,
        ids=(*example.ids, *own_answer.ids),
        response_mask=(*(False,) * len(example.ids), *own_answer.response_mask),
    )
