"""A row that no step can be taken on: it is skipped and named, and nothing that a strategy keeps is
of it.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from continual.data.types import Task
from continual.errors import TrainingError
from continual.models.importance import (
    fisher,
    fisher_per_example,
    per_example_gradients,
    sensitivity,
)
from continual.models.weights import restore, snapshot
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from strategies.der import DER
from strategies.ewc import EWC, MAS
from strategies.gem import GEM
from strategies.merge import FisherMerge
from strategies.ogd import OGD
from strategies.replay import Replay
from strategies.si import SI, RWalk
from tests.support import toy

BROKEN = 63  # a token whose embedding is infinite
SKIP = Recipe(lr=3e-3, epochs=3, batch_size=2, on_nonfinite="skip")
KEEPING = [
    SI(),
    EWC(),
    MAS(),
    RWalk(every_steps=3),
    DER(minibatch_size=4),
    GEM(capacity=12),
    OGD(num_examples=12),
    FisherMerge(num_examples=12),
    Replay(capacity=12),
]


def rows(index: int, bad: tuple[int, ...] = ()) -> Task:
    """The task without the broken token, but in the rows `bad`."""
    whole = [
        replace(e, ids=tuple(5 if i == BROKEN else i for i in e.ids))
        for e in toy.make_examples(index)
    ]
    return Task(
        toy.TASK_NAMES[index],
        tuple(replace(e, ids=(BROKEN, *e.ids[1:])) if n in bad else e for n, e in enumerate(whole)),
        task_names=toy.TASK_NAMES,
    )


def model():
    made = toy.make_model()
    words = made.net.get_input_embeddings().weight.requires_grad_(False)
    words[BROKEN] = torch.inf
    return made


def stage(made, strategy, task, recipe=SKIP, **more) -> list[dict]:
    """The events of a stage."""
    told = []
    train_stage(made, task, strategy, recipe, seed=0, log_event=told.append, **more)
    return told


def warned(told) -> list[str]:
    return [e["text"] for e in told if e["event"] == "warning"]


@pytest.mark.parametrize("strategy", KEEPING, ids=lambda s: type(s).__name__)
def test_nothing_of_it_is_kept_and_no_later_step_is_skipped(strategy):
    made, strategy = model(), deepcopy(strategy)
    first, second = (stage(made, strategy, rows(t, bad)) for t, bad in ((0, (3,)), (1, ())))
    assert (first[-1]["skipped_steps"], second[-1]["skipped_steps"]) == (3, 0)
    assert warned(first)[-1] == (
        "the loss or gradient of 1 of the 12 rows of task 'a' is not finite: a/3; nothing of "
        "them is kept for later stages"
    )
    assert all(t.isfinite().all() for t in toy.memory_tensors(strategy).values())


@pytest.mark.parametrize(
    "strategy",
    [EWC(), MAS(), FisherMerge(num_examples=12), OGD(num_examples=12)],
    ids=lambda s: type(s).__name__,
)
def test_what_is_measured_is_of_the_other_rows(strategy):
    """As if the task had never had the row."""
    kept = []
    for train in (rows(0, (3,)).train, rows(0).train[:3] + rows(0).train[4:]):
        own, again = deepcopy(strategy), model()
        own.begin(again, Task("a", train, task_names=toy.TASK_NAMES))
        stage(again, own, Task("a", train, task_names=toy.TASK_NAMES), replace(SKIP, lr=0.0))
        kept.append(toy.memory_tensors(own))
    assert toy.bitwise_equal(*kept)


def test_a_row_of_another_task_with_the_same_id_is_kept():
    """Ids are unique within a task, and a joint stage has several."""
    made, strategy = model(), Replay(capacity=24)
    both = [replace(e, id=e.id[2:]) for t, bad in ((0, (3,)), (1, ())) for e in rows(t, bad).train]
    told = stage(made, strategy, Task("all", tuple(both), task_names=toy.TASK_NAMES))
    assert {(e.task_index, e.id) for e in both} - {
        (e.task_index, e.id) for e in strategy.buffer.examples
    } == {(0, "3")}
    assert "of 1 of the 24 rows" in warned(told)[-1]


class Steep(torch.autograd.Function):
    """The same values, and where the mask is true a gradient without bounds."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        return g.masked_fill(mask, torch.inf), None


def test_der_keeps_no_row_whose_loss_is_finite_and_whose_gradient_is_not():
    """It takes rows in before the stage has seen the gradient."""
    made, strategy = toy.make_model(), DER(minibatch_size=4)
    words = made.net.get_input_embeddings()
    words.register_forward_hook(
        lambda _, args, out: Steep.apply(out, (args[0] == BROKEN)[..., None])
    )
    told = [
        stage(made, strategy, rows(t, bad))[-1]["skipped_steps"] for t, bad in ((0, (3,)), (1, ()))
    ]
    assert told == [3, 0]
    assert "a/3" not in {r["example"].id for r in strategy.kept}


def test_the_good_rows_of_a_skipped_step_are_kept():
    made, strategy = model(), GEM(capacity=12)
    stage(made, strategy, rows(0, (3, 5)), replace(SKIP, batch_size=4))
    assert {e.id for e in strategy.buffer.examples} == {f"a/{i}" for i in range(12)} - {
        "a/3",
        "a/5",
    }


def test_a_stage_that_goes_on_still_knows_the_rows_of_the_steps_that_were_skipped():
    made, again, kept = model(), model(), {}

    def after(step, state):
        if step == 17:
            kept.update(deepcopy({"state": state(), "weights": snapshot(made)}))

    def progress():
        restore(again, kept["weights"])
        return kept["state"]

    whole = stage(made, Strategy(), rows(0, (3,)), on_step=after)
    resumed = stage(again, Strategy(), rows(0, (3,)), restore_state=progress)
    assert warned(resumed)[-1] == warned(whole)[-1]
    assert "a/3; nothing of them is kept" in warned(whole)[-1]


def test_where_no_row_is_left_the_stage_is_an_error():
    made = model()

    @torch.no_grad()
    def after(step, _):
        made.net.get_input_embeddings().weight[BROKEN] = 0.0  # so that the second step is taken
        made.net.get_output_embeddings().weight.fill_({1: 0.1, 2: torch.nan}[step])

    with pytest.raises(
        TrainingError,
        match=r"of 12 of the 12 rows of task 'a' is not finite: a/0, a/1, a/10.*; lower",
    ):
        stage(made, EWC(), rows(0, (3,)), replace(SKIP, batch_size=12, epochs=2), on_step=after)


@pytest.mark.parametrize(
    "measure",
    [
        fisher,
        fisher_per_example,
        sensitivity,
        lambda made, chosen: [*per_example_gradients(made, chosen, lambda z, _: z.sum())],
    ],
    ids=["fisher", "one by one", "sensitivity", "gradients"],
)
def test_an_importance_that_is_not_finite_is_an_error_that_names_the_examples(measure):
    with pytest.raises(
        TrainingError, match=r"for the examples a/3, a/5 is not finite; lower train.lr"
    ):
        measure(model(), rows(0, (3, 5)).train)


def test_a_row_that_no_step_has_met_ends_the_stage_where_it_is_to_be_measured():
    made, task = model(), rows(0, (3,))
    with pytest.raises(TrainingError, match="for the examples a/3 is not finite"):
        EWC().end(made, task)
