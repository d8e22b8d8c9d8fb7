"""Train one stage: masked supervised fine-tuning on one task under one strategy."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
GetState = Callable[[], dict[str, Any]]


def train_stage(
    model: Model,
    task: Task[Encoded],
    strategy: Strategy,
    recipe: Recipe,
    *,
    seed: int,
    log_event: LogEvent,
    on_step: Callable[[int, GetState], float | None] | None = None,
    restore_state: GetState | None = None,
) -> dict[str, float]:
    """Train `model` on `task` under `strategy`; return the stage's costs.

    The costs are the number of steps, supervised tokens, training seconds and skipped steps. All
    randomness follows from `seed` and the strategy's own saved generators.

    - `log_event` receives a "step" event every `recipe.log_every_steps` steps, and at the end one
      "stage" event.
    - `on_step(step, get_state)` is called after each step. `get_state()` returns everything that
      the next step depends on, except the weights and the strategy's memory. The return value is
      the number of seconds that were not spent on training, or None.
    - `restore_state()` is called after `strategy.begin`. It restores weights and strategy memory,
      and returns what `get_state` returned; the stage continues from there.

    Raises DataError for a task without train rows, and TrainingError if a loss or gradient is not
    finite, or if memory runs out twice.
    """
    if not task.train:
        raise DataError(
            f"task {task.name!r} has no train rows, and a stage needs some; add rows or leave it "
            "out"
        )
    torch.manual_seed(seed)
    model.net.train()
    stage = _begin_stage(model, task, strategy, recipe, log_event)
    state = stage.state
    early_stopping = state.early_stopping

    started = time.perf_counter()
    if restore_state:
        state.load_state_dict(restore_state())
        started -= state.seconds

    for step, examples in _iter_remaining_steps(stage, seed):
        # Before the step, which also advances the scheduler.
        learning_rate = float(state.scheduler.get_last_lr()[0])
        loss = _optimizer_step(stage, step, examples)
        state.seconds = time.perf_counter() - started
        if step % recipe.log_every_steps == 0 or step == stage.total_steps:
            _log_step(stage, loss, learning_rate)
        if early_stopping:
            early_stopping.check_step(step)
        if on_step:
            started += on_step(step, state.state_dict) or 0.0
        if early_stopping and early_stopping.should_stop:
            break

    _restore_best(stage)
    check_equal_on_all([p for p in state.parameters if not is_sharded(p)])
    strategy.end(model, _drop_nonfinite_rows(stage))

    costs = {
        "steps": state.step,
        "tokens": state.supervised_tokens,
        "train_seconds": time.perf_counter() - started,
        "skipped_steps": state.skipped_steps,
    }
    log_event({"event": "stage", "task": task.name, "seconds": costs["train_seconds"], **costs})
    return costs


@dataclass
class _Stage:
    """A stage in progress: what its steps work with, and how far they are."""

    model: Model
    task: Task[Encoded]
    strategy: Strategy
    recipe: Recipe
    log_event: LogEvent
    total_steps: int
    token_budget: int  # tokens in one forward pass when the stage began
    state: StageState


def _begin_stage(
    model: Model, task: Task[Encoded], strategy: Strategy, recipe: Recipe, log_event: LogEvent
) -> _Stage:
    """Let the strategy choose the parameters, and make what trains them."""
    optimizer = _make_optimizer(model, strategy.begin(model, task), recipe)
    total_steps = recipe.total_steps(len(task.train))
    token_budget = model.layout.tokens_per_microbatch
    early_stopping = _make_early_stopping(model, strategy, task, recipe)
    scheduler = _make_scheduler(optimizer, recipe, total_steps)
    state = StageState(model, optimizer, scheduler, early_stopping)
    model.trained = state.parameters
    return _Stage(model, task, strategy, recipe, log_event, total_steps, token_budget, state)


def _iter_remaining_steps(stage: _Stage, seed: int) -> Iterator[tuple[int, list[Encoded]]]:
    """Yield the number and the examples of each step that is still to be taken."""
    state = stage.state
    is_over = state.early_stopping is not None and state.early_stopping.should_stop
    last_step = state.step if is_over else stage.total_steps  # it may resume at its end
    examples = _iter_step_examples(stage.task, stage.recipe, stage.model, random.Random(seed))
    return enumerate(islice(examples, state.step, last_step), state.step + 1)


def _optimizer_step(stage: _Stage, step: int, examples: Sequence[Encoded]) -> torch.Tensor:
    """Take one optimizer step, unless it must be skipped; return the loss before it."""
    state = stage.state
    batch, loss = _backward_or_halve(stage, examples)
    if not _clip_and_check_finite(stage, loss, step, examples):
        state.optimizer.zero_grad()  # the optimizer leaves parameters without a gradient alone
        state.skipped_steps += 1
        state.suspect_ids |= {e.id for e in examples}
    state.optimizer.step()
    state.scheduler.step()
    state.step = step
    state.supervised_tokens += batch.supervised_tokens
    return loss


def _backward_or_halve(stage: _Stage, examples: Sequence[Encoded]) -> tuple[Batch, torch.Tensor]:
    """Run the backward pass; return the batch and its loss, with the gradient in the parameters.

    If memory runs out, halve the token budget and try once more.
    """
    while True:
        stage.state.optimizer.zero_grad()
        batch = stage.model.batch(examples)
        try:
            return batch, stage.strategy.backward(stage.model, batch)
        except torch.OutOfMemoryError:
            _halve_token_budget(stage)


def _halve_token_budget(stage: _Stage) -> None:
    """Halve the tokens of a forward pass from now on.

    Raises TrainingError if the stage's budget was halved before.
    """
    layout = stage.model.layout
    if layout.tokens_per_microbatch < stage.token_budget:
        raise TrainingError(
            "out of memory again with train.tokens_per_microbatch="
            f"{layout.tokens_per_microbatch}; set it lower, lower data.max_length, or choose an "
            "adapter (model.adapter=lora)"
        )
    half = stage.token_budget // 2
    stage.model.layout = replace(layout, tokens_per_microbatch=half)
    stage.log_event(
        {
            "event": "warning",
            "text": f"out of memory: from now on train.tokens_per_microbatch={half}",
        }
    )


def _clip_and_check_finite(
    stage: _Stage, loss: torch.Tensor, step: int, examples: Sequence[Encoded]
) -> bool:
    """Clip the gradient; return True if its norm and the loss are finite.

    Raises TrainingError if they are not and train.on_nonfinite=stop.
    """
    recipe = stage.recipe
    norm = clip_gradients(stage.state.parameters, recipe.max_grad_norm or math.inf)
    # The only synchronization with the device in a step. It must come before the optimizer's step:
    # weights that are not finite cannot be repaired.
    if torch.isfinite(norm + loss):
        return True

    if not torch.isfinite(loss):
        found = f"the loss is {loss.item()}"
    else:
        found = f"the gradient's norm is {norm.item()}"
    ids = ", ".join(e.id for e in examples)
    message = f"{found} at step {step} of task {stage.task.name!r}, on the examples {ids}"
    if recipe.on_nonfinite == "stop":
        raise TrainingError(
            f"{message}; the last checkpoint is kept. Lower train.lr, set train.max_grad_norm, "
            "train in fp32, or set train.on_nonfinite=skip"
        )
    stage.log_event({"event": "warning", "text": f"skipped: {message}"})
    return False


def _log_step(stage: _Stage, loss: torch.Tensor, learning_rate: float) -> None:
    """Log the "step" event of the step just taken."""
    state = stage.state
    stage.log_event(
        {
            "event": "step",
            "task": stage.task.name,
            "step": state.step,
            "steps": stage.total_steps,
            "loss": _finite_or_none(loss),
            "lr": learning_rate,
            "tokens": state.supervised_tokens,
            "seconds": state.seconds,
            "notes": dict(stage.strategy.notes),
        }
    )


def _finite_or_none(loss: torch.Tensor) -> float | None:
    """Return the loss as a number for the log, which is JSON and has no NaN."""
    value = loss.item()
    return value if math.isfinite(value) else None


def _restore_best(stage: _Stage) -> None:
    """Restore the weights and memory that early stopping kept, if any; switch to eval mode.

    Raises TrainingError if every step was skipped.
    """
    state = stage.state
    if state.skipped_steps == state.step:
        raise TrainingError(
            f"every step of task {stage.task.name!r} had a loss or gradient that is not finite; "
            "lower train.lr, set train.max_grad_norm, or train in fp32"
        )
    if state.early_stopping:
        state.early_stopping.restore_best()
    stage.model.net.eval()


def _drop_nonfinite_rows(stage: _Stage) -> Task[Encoded]:
    """Return the task without the rows that caused skipped steps, so that no strategy uses them.

    Raises TrainingError if no row is left.
    """
    task = stage.task
    suspects = [e for e in task.train if e.id in stage.state.suspect_ids]
    bad = {(e.task_index, e.id) for e in suspects if not _has_finite_gradient(stage.state, e)}
    if not bad:
        return task

    kept = tuple(e for e in task.train if (e.task_index, e.id) not in bad)
    message = (
        f"the loss or gradient of {len(task.train) - len(kept)} of the {len(task.train)} rows of "
        f"task {task.name!r} is not finite: {listed(sorted(name for _, name in bad))}"
    )
    if not kept:
        raise TrainingError(f"{message}; lower train.lr, set train.max_grad_norm, or train in fp32")
    stage.log_event(
        {"event": "warning", "text": f"{message}; nothing of them is kept for later stages"}
    )
    return replace(task, train=kept)


def _has_finite_gradient(state: StageState, example: Encoded) -> bool:
    """Return True if the loss and gradient of a naive step on this row alone are finite."""
    state.optimizer.zero_grad()
    loss = accumulate(nll, state.model, [state.model.batch([example])])
    norm = clip_gradients(state.parameters, math.inf)
    state.optimizer.zero_grad()
    return bool(torch.isfinite(norm + loss))


def _make_early_stopping(
    model: Model, strategy: Strategy, task: Task[Encoded], recipe: Recipe
) -> EarlyStopping | None:
    if not recipe.patience:
        return None
    steps_per_epoch = math.ceil(len(task.train) / recipe.batch_size)
    dev_examples = list(task.get_split("dev"))
    return EarlyStopping(model, strategy, dev_examples, steps_per_epoch, recipe.patience)


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
    optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    from transformers import get_scheduler

    warmup_steps = round(recipe.warmup_ratio * total_steps)
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        SCHEDULES[recipe.schedule], optimizer, warmup_steps, total_steps
    )
    return scheduler


def _iter_step_examples(
    task: Task[Encoded], recipe: Recipe, model: Model, rng: random.Random
) -> Iterator[list[Encoded]]:
    """Yield the examples of one step after another, in a new order each epoch, without end.

    The last step of an epoch may be smaller than the others.
    """
    while True:
        order = _shuffle_indices(task, rng)
        for start in range(0, len(order), recipe.batch_size):
            examples = [task.train[i] for i in order[start : start + recipe.batch_size]]
            if recipe.prompt_mask_prob:
                examples = [mask_prompt_tokens(e, recipe, model, rng) for e in examples]
            yield examples


def _shuffle_indices(task: Task[Encoded], rng: random.Random) -> list[int]:
    """Return the indices of the train rows in random order.

    With `task.episode_size`, rows are grouped into episodes: each has rows of one task only, and
    they stand next to each other.
    """
    order = rng.sample(range(len(task.train)), len(task.train))
    if not task.episode_size:
        return order

    by_task: dict[int, list[int]] = {}
    for i in order:
        by_task.setdefault(task.train[i].task_index, []).append(i)
    episodes = [
        indices[start : start + task.episode_size]
        for indices in by_task.values()
        for start in range(0, len(indices), task.episode_size)
    ]
    # Episodes that are too short come last: earlier, they would shift all that follow.
    shuffled = sorted(rng.sample(episodes, len(episodes)), key=len, reverse=True)
    return [i for episode in shuffled for i in episode]


def mask_prompt_tokens(
    example: Encoded, recipe: Recipe, model: Model, rng: random.Random
) -> Encoded:
    """Replace or drop each prompt token with probability `recipe.prompt_mask_prob`.

    Special tokens stay. The example's first token is never dropped: a response token is predicted
    from the one before it.
    """
    special = set(model.tokenizer.all_special_ids)
    kept: list[tuple[int, bool]] = []
    for token, is_response in zip(example.ids, example.response_mask, strict=True):
        if is_response or token in special or rng.random() >= recipe.prompt_mask_prob:
            kept.append((token, is_response))
        elif recipe.prompt_mask_mode == "replace":
            kept.append((_random_token(len(model.tokenizer), special, rng), False))
        elif not kept:
            kept.append((token, False))
    ids, response_mask = zip(*kept, strict=True)
    return replace(example, ids=ids, response_mask=response_mask)


def _random_token(vocab_size: int, special: set[int], rng: random.Random) -> int:
    """Return the id of a random token that is not special."""
    while True:
        token = rng.randrange(vocab_size)
        if token not in special:
            return token
