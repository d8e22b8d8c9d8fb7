"""One stage: masked SFT on one task under one strategy."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from continual.data.types import Encoded, Task
from continual.distributed.processes import check_equal_on_all
from continual.errors import DataError, TrainingError, listed
from continual.models.loss import accumulate, nll
from continual.models.model import Model
from continual.models.sharding import clip_gradients, is_sharded
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy
from continual.training.early_stopping import EarlyStopping
from continual.training.recipe import SCHEDULES, Recipe
from continual.training.stage_state import StageState

LogEvent = Callable[[dict[str, Any]], None]


def train_stage(
    model: Model,
    task: Task[Encoded],
    strategy: Strategy,
    recipe: Recipe,
    *,
    seed: int,
    log_event: LogEvent,
    on_step: Callable[[int, Callable[[], dict[str, Any]]], float | None] | None = None,
    restore_state: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Train `model` on `task` under `strategy`; returns what it took: steps, supervised tokens,
    seconds.

    `log` gets a "step" event now and then and one "stage" event. `after` is called after each step
    with its number and a function that gives the stage's progress, all that the next step depends
    on beside weights and strategy memory; it may return seconds that were no training. A stage goes
    on where `progress` says, which also gives model and strategy what they had then. All randomness
    follows from `seed` and the strategy's own saved generators. Raises DataError for a task without
    train rows, TrainingError where a loss or gradient is not finite or memory runs out twice.
    """
    if not task.train:
        raise DataError(
            f"task {task.name!r} has no train rows, and a stage needs some; add rows or leave it "
            "out"
        )
    torch.manual_seed(seed)
    model.net.train()
    optimizer = _make_optimizer(model, strategy.begin(model, task), recipe)
    total, budget = recipe.total_steps(len(task.train)), model.layout.tokens_per_microbatch
    patience = _make_early_stopping(model, strategy, task, recipe)
    at = StageState(model, optimizer, _make_scheduler(optimizer, recipe, total), patience)
    model.trained, began = at.parameters, time.perf_counter()
    if restore_state:
        at.load_state_dict(restore_state())
        began -= at.seconds
    draws = _iter_step_examples(task, recipe, model, random.Random(seed))
    last = (
        at.step if patience and patience.should_stop else total
    )  # it may go on where it had come to its end
    for step, examples in enumerate(islice(draws, at.step, last), at.step + 1):
        lr, loss = (
            at.scheduler.get_last_lr()[0],
            _optimizer_step(at, strategy, recipe, task, step, examples, budget, log_event),
        )
        at.seconds = time.perf_counter() - began
        if step % recipe.log_every_steps == 0 or step == total:
            log_event(
                {
                    "event": "step",
                    "task": task.name,
                    "step": step,
                    "steps": total,
                    "loss": _finite_or_none(loss),
                    "lr": lr,
                    "tokens": at.supervised_tokens,
                    "seconds": at.seconds,
                    "notes": dict(strategy.notes),
                }
            )
        if patience:
            patience.check_step(step)
        if on_step:
            began += on_step(step, at.state_dict) or 0.0
        if patience and patience.should_stop:
            break
    _restore_best(at, task)
    check_equal_on_all([p for p in at.parameters if not is_sharded(p)])
    strategy.end(model, _drop_nonfinite_rows(at, task, log_event))
    spent = {
        "steps": at.step,
        "tokens": at.supervised_tokens,
        "train_seconds": time.perf_counter() - began,
        "skipped_steps": at.skipped_steps,
    }
    log_event({"event": "stage", "task": task.name, "seconds": spent["train_seconds"], **spent})
    return spent


def _backward_or_halve(
    model: Model,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Encoded],
    budget: int,
    log: LogEvent,
) -> tuple[Batch, torch.Tensor]:
    """The step's batch and loss, its gradient left in the parameters; once more with less if memory
    runs out.
    """
    while True:
        optimizer.zero_grad()
        batch = model.batch(examples)
        try:
            return batch, strategy.backward(model, batch)
        except torch.OutOfMemoryError:
            _halve_token_budget(model, budget, log)


def _halve_token_budget(model: Model, budget: int, log: LogEvent) -> None:
    """Half as many tokens in a forward pass from now on; raises TrainingError where the stage's
    budget already was.
    """
    if model.layout.tokens_per_microbatch < budget:
        raise TrainingError(
            f"out of memory again with train.tokens_per_microbatch={model.layout.tokens_per_microbatch}; set it "
            "lower, lower data.max_length, or choose an adapter (model.adapter=lora)"
        )
    model.layout = replace(model.layout, tokens_per_microbatch=budget // 2)
    log(
        {
            "event": "warning",
            "text": f"out of memory: from now on train.tokens_per_microbatch={budget // 2}",
        }
    )


def _clip_and_check_finite(
    loss: torch.Tensor,
    trained: Sequence[torch.Tensor],
    recipe: Recipe,
    task: Task[Encoded],
    step: int,
    examples: Sequence[Encoded],
    log: LogEvent,
) -> bool:
    """Clip the gradient; whether it and the loss are finite. Raises TrainingError where they are
    not and must be.
    """
    norm = clip_gradients(trained, recipe.max_grad_norm or math.inf)
    if torch.isfinite(
        norm + loss
    ):  # the one wait of a step: a weight that is not finite cannot be fixed
        return True
    what = (
        f"the loss is {loss.item()}"
        if not torch.isfinite(loss)
        else f"the gradient's norm is {norm.item()}"
    )
    told = f"{what} at step {step} of task {task.name!r}, on the examples {', '.join(e.id for e in examples)}"
    if recipe.on_nonfinite == "stop":
        raise TrainingError(
            f"{told}; the last checkpoint is kept. Lower train.lr, set train.max_grad_norm, train in "
            "fp32, or set train.on_nonfinite=skip"
        )
    log({"event": "warning", "text": f"skipped: {told}"})
    return False


def _finite_or_none(loss: torch.Tensor) -> float | None:
    """A loss for the log, which is JSON and knows no NaN."""
    return value if math.isfinite(value := loss.item()) else None


def _optimizer_step(
    at: StageState,
    strategy: Strategy,
    recipe: Recipe,
    task: Task[Encoded],
    step: int,
    examples: Sequence[Encoded],
    budget: int,
    log: LogEvent,
) -> torch.Tensor:
    """One optimizer step, unless it is skipped; the loss before it."""
    batch, loss = _backward_or_halve(at.model, strategy, at.optimizer, examples, budget, log)
    if not _clip_and_check_finite(loss, at.parameters, recipe, task, step, examples, log):
        at.optimizer.zero_grad()  # and so the optimizer passes over the step
        at.skipped_steps += 1
        at.suspect_ids |= {e.id for e in examples}
    at.optimizer.step()
    at.scheduler.step()
    at.step, at.supervised_tokens = step, at.supervised_tokens + batch.supervised_tokens
    return loss


def _restore_best(at: StageState, task: Task[Encoded]) -> None:
    """The best weights and the memory of then, where they were kept; raises TrainingError where no
    step was taken.
    """
    if at.skipped_steps == at.step:
        raise TrainingError(
            f"every step of task {task.name!r} had a loss or gradient that is not finite; lower "
            "train.lr, set train.max_grad_norm, or train in fp32"
        )
    if at.early_stopping:
        at.early_stopping.restore_best()
    at.model.net.eval()


def _drop_nonfinite_rows(at: StageState, task: Task[Encoded], log: LogEvent) -> Task[Encoded]:
    """The task less those rows of skipped steps that are the reason: no strategy measures or
    remembers them.

    Raises TrainingError where no row is left.
    """
    bad = {
        (e.task_index, e.id)
        for e in task.train
        if e.id in at.suspect_ids and not _has_finite_gradient(at, e)
    }
    if not bad:
        return task
    kept = tuple(e for e in task.train if (e.task_index, e.id) not in bad)
    told = (
        f"the loss or gradient of {len(task.train) - len(kept)} of the {len(task.train)} rows of "
        f"task {task.name!r} is not finite: {listed(sorted(name for _, name in bad))}"
    )
    if not kept:
        raise TrainingError(f"{told}; lower train.lr, set train.max_grad_norm, or train in fp32")
    log({"event": "warning", "text": f"{told}; nothing of them is kept for later stages"})
    return replace(task, train=kept)


def _has_finite_gradient(at: StageState, example: Encoded) -> bool:
    """Whether a plain step on this row alone would be taken."""
    at.optimizer.zero_grad()
    loss = accumulate(nll, at.model, [at.model.batch([example])])
    norm = clip_gradients(at.parameters, math.inf)
    at.optimizer.zero_grad()
    return bool(torch.isfinite(norm + loss))


def _make_early_stopping(
    model: Model, strategy: Strategy, task: Task[Encoded], recipe: Recipe
) -> EarlyStopping | None:
    epoch = math.ceil(len(task.train) / recipe.batch_size)
    return (
        EarlyStopping(model, strategy, list(task.get_split("dev")), epoch, recipe.patience)
        if recipe.patience
        else None
    )


def _make_optimizer(model: Model, groups: list[Any], recipe: Recipe) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "fused": model.layout.device.type in ("cpu", "cuda"),
    }
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, **settings)
    return torch.optim.AdamW(groups, betas=recipe.betas, **settings)


def _make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, total: int
) -> torch.optim.lr_scheduler.LRScheduler:
    from transformers import get_scheduler

    warmup = round(recipe.warmup_ratio * total)
    made: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        SCHEDULES[recipe.schedule], optimizer, warmup, total
    )
    return made


def _iter_step_examples(
    task: Task[Encoded], recipe: Recipe, model: Model, rng: random.Random
) -> Iterator[list[Encoded]]:
    """Epoch after epoch, each a new order; the last step of an epoch may be smaller."""
    examples = task.train
    while True:
        order = _shuffle_indices(task, rng)
        for i in range(0, len(order), recipe.batch_size):
            step = [examples[j] for j in order[i : i + recipe.batch_size]]
            yield (
                [mask_prompt_tokens(e, recipe, model, rng) for e in step]
                if recipe.prompt_mask_prob
                else step
            )


def _shuffle_indices(task: Task[Encoded], rng: random.Random) -> list[int]:
    """The places of the train rows, drawn anew; those of an episode, which are of one task, behind
    one another.
    """
    order = rng.sample(range(len(task.train)), len(task.train))
    if not task.episode_size:
        return order
    by_task: dict[int, list[int]] = {}
    for i in order:
        by_task.setdefault(task.train[i].task_index, []).append(i)
    episodes = [
        of[i : i + task.episode_size]
        for of in by_task.values()
        for i in range(0, len(of), task.episode_size)
    ]
    drawn = sorted(
        rng.sample(episodes, len(episodes)), key=len, reverse=True
    )  # short ones last: they shift the rest
    return [i for episode in drawn for i in episode]


def mask_prompt_tokens(
    example: Encoded, recipe: Recipe, model: Model, rng: random.Random
) -> Encoded:
    """Each prompt token but the special ones is, with the recipe's probability, replaced by a
    random one or dropped.

    The first token of all is never dropped: without one before it, a response token could not be
    learned.
    """
    special = set(model.tokenizer.all_special_ids)
    kept = []
    for token, response in zip(example.ids, example.response_mask, strict=True):
        if response or token in special or rng.random() >= recipe.prompt_mask_prob:
            kept.append((token, response))
        elif recipe.prompt_mask_mode == "replace":
            while (other := rng.randrange(len(model.tokenizer))) in special:
                pass
            kept.append((other, False))
        elif not kept:
            kept.append((token, False))
    ids, response_mask = zip(*kept, strict=True)
    return replace(example, ids=ids, response_mask=response_mask)
