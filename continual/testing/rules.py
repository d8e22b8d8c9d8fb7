"""The rules that every strategy keeps to, each tried on a network of a few thousand weights and
random tasks.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from continual.errors import ConfigError, ContinualError, listed
from continual.models.loss import nll
from continual.models.model import Model
from continual.models.weights import gradient, restore, weights, zeros
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from continual.testing import toy
from continual.testing.toy import (
    RECIPE,
    SHORT_TASK_SIZE,
    all_close,
    bitwise_equal,
    copy_gradients,
    copy_parameters,
    train_stages,
)
from continual.training import checkpoint
from continual.training.recipe import Recipe
from continual.training.serialization import serialize_value

CHECKPOINT_STEP = 2  # of the four steps of a short stage


class ContractError(ContinualError, AssertionError):
    """A strategy breaks a rule; the message says which, what was found, what was expected, and the
    fix.
    """


def violation_text(rule: Callable[..., None]) -> str:
    """The rule in words."""
    return f"the rule {rule.__name__.replace('_', ' ')!r} is broken"


def _require(holds: bool, rule: Callable[..., None], found: str, fix: str) -> None:
    """Raise ContractError unless the rule is `kept`."""
    if not holds:
        raise ContractError(f"{violation_text(rule)}: {found}; {fix}")


@dataclass
class StrategyUnderTest:
    """A strategy to be tried: `make` gives a fresh one. What a first stage leaves is learned once
    for all rules.

    With this `recipe` the loss of a task that is learned `falls` by so much at least.
    """

    make_strategy: Callable[[], Strategy]
    weight_setters: Collection[str] = ()
    make_model: Callable[[torch.dtype], Model] = toy.make_model
    recipe: Recipe = RECIPE
    min_loss_drop: float = 0.1
    first_stage_cache: dict[torch.dtype, tuple[Model, Strategy]] = field(default_factory=dict)

    def fresh_model(self) -> Model:
        """What it is tried on in most rules."""
        return self.make_model(torch.float32)

    def zeroed_model(self) -> Model:
        """The same with all that trains at 0, for a checkpoint to fill."""
        made = self.fresh_model()
        restore(made, zeros(made))
        return made

    def after_one_stage(self, dtype: torch.dtype = torch.float32) -> tuple[Model, Strategy]:
        """A model and a strategy that remembers a task, for each caller its own copy."""
        if dtype not in self.first_stage_cache:
            made, strategy = self.make_model(dtype), self.make_strategy()
            train_stages(made, strategy, 0, size=SHORT_TASK_SIZE)
            _check_memory_copied(made, strategy)  # else it cannot be copied
            self.first_stage_cache[dtype] = made, strategy
        return deepcopy(self.first_stage_cache[dtype])


def strategy_is_a_dataclass(s: StrategyUnderTest) -> None:
    """Its annotated fields are dataclass fields, which compositions and checkpoints ask for."""
    bare = [
        kind.__name__
        for kind in type(s.make_strategy()).__mro__
        if vars(kind).get("__annotations__") and "__dataclass_fields__" not in vars(kind)
    ]
    _require(
        not bare,
        strategy_is_a_dataclass,
        f"{listed(bare)} has fields, and no decorator",
        "put @dataclass(kw_only=True) above the class",
    )


def a_stage_lowers_the_loss(s: StrategyUnderTest) -> None:
    """Whatever it does against forgetting, the new task is learned."""
    made, strategy = s.fresh_model(), s.make_strategy()
    before = nll(made, made.batch(toy.make_examples(0))).item()
    train_stages(made, strategy, 0, recipe=s.recipe)
    after = nll(made, made.batch(toy.make_examples(0))).item()
    _require(
        after < before - s.min_loss_drop,
        a_stage_lowers_the_loss,
        f"the loss went from {before:.3f} to {after:.3f}, and "
        f"it should fall by more than {s.min_loss_drop}",
        "see that backward leaves the gradient of what is to be "
        "minimised in .grad, and lower what holds the weights",
    )


def every_moment_calls_super(s: StrategyUnderTest) -> None:
    """Composed with another strategy, it lets that one's begin, loss and end come once each, a loss
    at every step.
    """
    rule = every_moment_calls_super
    try:
        composed: Any = compose(s.make_strategy(), toy.CallCounter())
    except ConfigError as lost:
        _require(False, rule, str(lost), "call super()'s in each method that has one")
    train_stages(s.fresh_model(), composed, 0, size=SHORT_TASK_SIZE)
    seen = composed.calls
    for moment in ("begin", "end"):
        _require(
            seen[moment] == 1,
            rule,
            f"in one stage the {moment} of a strategy composed with it came "
            f"{seen[moment]} times, expected once",
            f"call super().{moment}(model, task) once in its {moment}",
        )
    _require(
        seen["loss"] > 0,
        rule,
        "the loss of a strategy composed with it was never asked for",
        "add to super().loss(model, batch) in loss, and use self.loss or super().backward in "
        "backward",
    )


def memory_holds_values(s: StrategyUnderTest) -> None:
    """No tensor in memory is the network's own or has a graph, so training on leaves memory as it
    is.
    """
    made, strategy = s.after_one_stage()
    before = deepcopy(toy.memory_tensors(strategy))
    restore(made, {n: w + 1 for n, w in weights(made).items()})
    _require(
        bitwise_equal(toy.memory_tensors(strategy), before),
        memory_holds_values,
        "memory changed with the weights",
        COPY_ADVICE,
    )


COPY_ADVICE = "keep copies: continual.models.weights.snapshot(model), or t.detach().clone()"


def _check_memory_copied(made: Model, strategy: Strategy) -> None:
    live = {p.untyped_storage().data_ptr() for p in made.net.parameters()}
    held = toy.memory_tensors(strategy)
    graphs = [path for path, t in held.items() if t.grad_fn is not None]
    owned = [
        path for path, t in held.items() if t.numel() and t.untyped_storage().data_ptr() in live
    ]
    rule = memory_holds_values
    _require(
        not graphs,
        rule,
        f"{listed(graphs, 3)} in memory has a graph, and values were expected",
        COPY_ADVICE,
    )
    _require(
        not owned,
        rule,
        f"{listed(owned, 3)} in memory is the network's own, and a copy was expected",
        COPY_ADVICE,
    )


def the_optimizer_gets_trainable_parameters_only(s: StrategyUnderTest) -> None:
    """`begin` returns all trainable parameters, and what is frozen gets no gradient, no step and no
    place in memory.
    """
    made, strategy, rule = (
        s.fresh_model(),
        s.make_strategy(),
        the_optimizer_gets_trainable_parameters_only,
    )
    made.net.get_input_embeddings().weight.requires_grad_(False)
    made.net.get_decoder().layers[0].requires_grad_(False)
    frozen = {n: p.clone() for n, p in made.net.named_parameters() if not p.requires_grad}
    parts = _parameters(strategy.begin(made, toy.make_task(0)))
    _require(
        {id(p) for p in parts} >= {id(p) for p in weights(made).values()},
        rule,
        "begin left out trainable parameters",
        "return what super().begin(model, task) returned, and your own beside it",
    )
    _require(
        all(p.requires_grad for p in parts),
        rule,
        "begin returned a frozen parameter",
        "take them from continual.models.weights.weights(model)",
    )
    train_stages(made, strategy, 0, size=SHORT_TASK_SIZE)
    now = dict(made.net.named_parameters())
    _require(
        bitwise_equal({n: now[n] for n in frozen}, frozen),
        rule,
        "a frozen parameter moved",
        "leave it alone",
    )
    _require(
        all(now[n].grad is None for n in frozen),
        rule,
        "a frozen parameter has a gradient",
        "take gradients of continual.models.weights.weights(model)",
    )
    kept = [path for path in toy.memory_tensors(strategy) if "layers.0" in path or "embed" in path]
    _require(
        not kept,
        rule,
        f"{listed(kept, 3)} in memory is of a frozen parameter",
        "leave it out: it never changes",
    )


def _parameters(trained: list[Any]) -> list[Tensor]:
    """The parameters among what `begin` returned."""
    return [p for part in trained for p in (part["params"] if isinstance(part, dict) else [part])]


def only_the_optimizer_moves_the_weights(s: StrategyUnderTest) -> None:
    """No moment changes a parameter, but for begin, end and route where they mean to."""
    made, strategy = s.after_one_stage()
    task, batch = (
        toy.make_task(1, SHORT_TASK_SIZE),
        made.batch(toy.make_examples(1, SHORT_TASK_SIZE)[:5]),
    )
    moments: Mapping[str, Callable[[], Any]] = {
        "begin": lambda: strategy.begin(made, task),
        "backward": lambda: strategy.backward(made, batch),
        "loss": lambda: strategy.loss(made, batch),
        "end": lambda: strategy.end(made, task),
        "route": lambda: strategy.route(made, "a"),
    }
    for moment, call in moments.items():
        before = copy_parameters(made)
        call()
        _require(
            moment in s.weight_setters or bitwise_equal(copy_parameters(made), before),
            only_the_optimizer_moves_the_weights,
            f"{moment} changed parameters",
            "put back what it tried out with continual.models.weights.restore, or run the "
            "model at other weights with continual.models.loss.forward(model, batch, at=weights)",
        )


def only_backward_leaves_gradients(s: StrategyUnderTest) -> None:
    """begin, loss and end leave no `.grad`; after backward every parameter has a finite one."""
    made, strategy = s.after_one_stage()
    task, batch, rule = (
        toy.make_task(1, SHORT_TASK_SIZE),
        made.batch(toy.make_examples(1, SHORT_TASK_SIZE)[:5]),
        only_backward_leaves_gradients,
    )
    made.net.zero_grad()
    strategy.begin(made, task)
    strategy.loss(made, batch)
    strategy.end(made, task)
    left = [n for n, g in copy_gradients(made).items() if g is not None]
    _require(
        not left,
        rule,
        f"begin, loss or end left a gradient in {listed(left, 3)}",
        "use torch.autograd.grad there, or set every .grad to None again",
    )
    strategy.backward(made, batch)
    bad = [
        n for n, w in weights(made).items() if w.grad is None or not bool(w.grad.isfinite().all())
    ]
    _require(
        not bad,
        rule,
        f"backward left no finite gradient in {listed(bad, 3)}",
        "begin with super().backward(model, batch), or end with "
        "continual.models.weights.set_gradient",
    )


def micro_batches_do_not_change_the_step(s: StrategyUnderTest) -> None:
    """However few tokens go through the network at a time, a step's gradient is the same."""
    made, strategy = s.after_one_stage(torch.float64)
    found, own = [], []
    for tokens in (1000, 2, 5):
        tried = deepcopy(strategy)
        parts = _parameters(tried.begin(made, toy.make_task(1)))
        made.net.zero_grad()
        small = toy.limit_micro_batch(made, tokens)
        tried.backward(small, small.batch(toy.make_examples(1)[:7]))
        found.append(gradient(made))
        live = {id(p) for p in weights(made).values()}
        own.append(
            {
                str(i): p.grad
                for i, p in enumerate(parts)
                if id(p) not in live and p.grad is not None
            }
        )
    alike = all(all_close(g, found[0]) for g in found[1:]) and all(
        all_close(g, own[0], rtol=1e-5, atol=1e-7) for g in own[1:]
    )  # its own may be float32
    _require(
        alike,
        micro_batches_do_not_change_the_step,
        "parts of another size gave another gradient",
        "divide sums by batch.tokens, once: continual.models.loss.accumulate weighs each part by "
        "its share of the step's tokens; what needs the whole step belongs in backward",
    )


def a_stage_resumes_bit_exactly(s: StrategyUnderTest) -> None:
    """From the checkpoint before it and from one within it, a stage ends in the same weights and
    memory, bit for bit.

    The global generators of Python and NumPy are somewhere else each time.
    """
    made, strategy = s.after_one_stage()
    start, rule = deepcopy((made, strategy)), a_stage_resumes_bit_exactly
    with tempfile.TemporaryDirectory() as place:
        before, within = Path(place, "stage-01"), Path(place, "stage-02-step-2")
        checkpoint.save(before, made, strategy, toy.empty_matrix())

        def keep(step: int, state: Callable[[], dict[str, Any]]) -> None:
            if step == CHECKPOINT_STEP:
                checkpoint.save(within, made, strategy, toy.empty_matrix(), state())

        whole = _train_and_serialize(made, strategy, on_step=keep)
        again, resumed = s.zeroed_model(), s.make_strategy()
        checkpoint.load(before, again, resumed)
        if _train_and_serialize(again, resumed) != whole:
            _require(
                _train_and_serialize(*deepcopy(start)) == _train_and_serialize(*start),
                rule,
                "two stages from the same state ended differently",
                "draw from a generator in a memory() field, seeded by a hyper-parameter: never "
                "from random, numpy.random or the clock",
            )
            _require(
                False,
                rule,
                "from the checkpoint before it a stage ended differently",
                "keep in memory() fields all that a later stage depends on, generators too",
            )
        again, resumed = s.zeroed_model(), s.make_strategy()
        checkpoint.load(before, again, resumed)

        def go_on() -> dict[str, Any]:
            checkpoint.load(within, again, resumed)
            return checkpoint.load_stage_state(within, again)

        _require(
            _train_and_serialize(again, resumed, restore_state=go_on) == whole,
            rule,
            "from a checkpoint within it a stage ended differently",
            "keep in memory() fields all that changes within a stage, and let begin come to the "
            "same whenever it is called at the stage's start",
        )


def _train_and_serialize(made: Model, strategy: Strategy, **more: Any) -> tuple[str, list[bytes]]:
    """What a stage ends in."""
    random.seed()
    np.random.seed(None)
    train_stages(made, strategy, 1, size=SHORT_TASK_SIZE, **more)
    return serialize_state(made, strategy)


def serialize_state(made: Model, strategy: Strategy) -> tuple[str, list[bytes]]:
    """The memory as JSON, and all weights and the memory's tensors as bytes."""
    tensors: dict[str, Tensor] = {}
    told = json.dumps(serialize_value(strategy.state_dict(), "memory", tensors))
    held = [*copy_parameters(made).values(), *tensors.values()]
    return told, [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in held]


def only_the_adapter_trains(s: StrategyUnderTest) -> None:
    """With an adapter on the network, that alone moves."""
    made, rule = s.fresh_model(), only_the_adapter_trains
    if len(weights(made)) == len(copy_parameters(made)):
        made = toy.make_model(lora_rank=12)
    before, live = copy_parameters(made), set(weights(made))
    train_stages(made, s.make_strategy(), 0, 1, size=SHORT_TASK_SIZE)
    moved = {n for n, w in copy_parameters(made).items() if not torch.equal(w, before[n])}
    _require(
        bool(moved),
        rule,
        "nothing moved in two stages",
        "see that the adapter's weights get gradients",
    )
    _require(
        moved <= live,
        rule,
        f"{listed(sorted(moved - live), 3)} of the base moved",
        "take parameters from continual.models.weights.weights(model)",
    )


def each_prompt_is_dispatched_once(s: StrategyUnderTest) -> None:
    """However the prompts of a test are answered, each of them is."""
    made, strategy = s.after_one_stage()
    strategy.route(made, "b")
    turns = [[*turn] for turn in strategy.dispatch(made, [[3, 4], [5], [3, 4]])]
    _require(
        sorted(i for turn in turns for i in turn) == [0, 1, 2],
        each_prompt_is_dispatched_once,
        f"dispatch dealt three prompts into {turns}",
        "let the turns hold each prompt's index once",
    )


def disabled_equals_naive(s: StrategyUnderTest) -> None:
    """With its strength or capacity 0 it is plain fine-tuning, bit for bit: no part of the
    subject's `RULES`.
    """
    off, naive = s.fresh_model(), s.fresh_model()
    train_stages(off, s.make_strategy(), 0, 1, size=SHORT_TASK_SIZE)
    train_stages(naive, Strategy(), 0, 1, size=SHORT_TASK_SIZE)
    _require(
        bitwise_equal(copy_parameters(off), copy_parameters(naive)),
        disabled_equals_naive,
        "after two stages it has other weights than the naive strategy",
        "where it is off, add nothing, draw nothing and round nothing",
    )


RULES = (
    strategy_is_a_dataclass,
    memory_holds_values,
    every_moment_calls_super,
    the_optimizer_gets_trainable_parameters_only,
    only_the_optimizer_moves_the_weights,
    only_backward_leaves_gradients,
    a_stage_resumes_bit_exactly,
    micro_batches_do_not_change_the_step,
    a_stage_lowers_the_loss,
    only_the_adapter_trains,
    each_prompt_is_dispatched_once,
)
