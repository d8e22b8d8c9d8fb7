"""Merged weights against sums over the stages' own, closed forms, and peft's merging of task
vectors.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from continual.errors import ConfigError
from continual.models.weights import combine, flatten_weights, restore, snapshot
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from continual.training.stage import train_stage
from strategies.ewc import L2
from strategies.merge import EMA, TIES, Average, FisherMerge, TaskArithmetic
from tests.support import toy

SIZE = 40  # numbers of a model that is no network
seeds = st.integers(0, 10_000)


@dataclass(kw_only=True)
class Seen(Strategy):
    """Remembers where every stage began and ended, and each step's beginning."""

    begun: list = field(init=False, default_factory=list)
    ended: list = field(init=False, default_factory=list)
    steps: list = field(init=False, default_factory=list)

    def begin(self, model, task):
        self.begun.append(snapshot(model))
        return super().begin(model, task)

    def backward(self, model, batch):
        self.steps.append(snapshot(model))
        return super().backward(model, batch)

    def end(self, model, task):
        self.ended.append(snapshot(model))
        super().end(model, task)


def watched(kind, *tasks: int, **settings):
    """A model after stages of merging, its strategy, where it first began, and what it was after
    each stage.
    """
    made, strategy = toy.make_model(torch.float64), compose(kind(**settings), Seen())
    base, merged = snapshot(made), []
    for t in tasks:
        toy.train_stages(made, strategy, t, size=6)
        merged.append(snapshot(made))
    return strategy, base, merged


def mean(many):
    return combine(lambda *w: sum(w) / len(w), *many)


class Point(torch.nn.Module):
    """A model that is a few weights."""

    def __init__(self, *shapes: int):
        super().__init__()
        self.parts = torch.nn.ParameterList(torch.zeros(n, dtype=torch.float64) for n in shapes)


def merged(strategy, ends: list[torch.Tensor], *shapes: int) -> torch.Tensor:
    """What is tested after stages that end at these weights, whatever they are trained on."""
    model = SimpleNamespace(net=Point(*(shapes or (len(ends[0]),))))
    names = [*snapshot(model)]
    for end in ends:
        strategy.begin(model, toy.make_task(0))
        restore(model, dict(zip(names, torch.split(end, [*shapes] or len(end)), strict=True)))
        strategy.end(model, toy.make_task(0))
    return flatten_weights(snapshot(model))


def drawn(seed: int, n: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [*torch.randn(n, SIZE, generator=rng, dtype=torch.float64)]


# Where stages begin, and what is tested


@pytest.mark.parametrize("begin_at", ["merged", "own", "base"])
def test_the_mean_of_all_stages_is_tested_after_each_wherever_they_begin(begin_at):
    strategy, base, tested = watched(Average, 0, 1, 2, init_from=begin_at)
    for t in range(3):
        assert toy.all_close(tested[t], mean(strategy.ended[: t + 1]), rtol=1e-10, atol=1e-14)
    begun = {"merged": tested[:2], "own": strategy.ended[:2], "base": [base, base]}[begin_at]
    assert all(toy.bitwise_equal(a, b) for a, b in zip(strategy.begun, [base, *begun], strict=True))


def test_half_blended_the_weights_are_between_the_stage_s_own_and_the_merged_ones():
    strategy, _, tested = watched(Average, 0, 1, interpolation=0.5)
    assert toy.all_close(
        tested[1], mean([strategy.ended[1], mean(strategy.ended)]), rtol=1e-10, atol=1e-14
    )


def test_with_early_stopping_the_best_weights_are_merged():
    made, strategy = toy.make_model(), compose(Average(), Seen())
    task = toy.Task(
        "a",
        tuple(toy.make_examples(0)),
        tuple(toy.make_examples(0, 6, seed=1)),
        task_names=toy.TASK_NAMES,
    )
    recipe = toy.replace(toy.RECIPE, lr=0.1, epochs=6, patience=1)
    train_stage(made, task, strategy, recipe, seed=0, log_event=lambda event: None)
    assert len(strategy.steps) < 18
    assert toy.bitwise_equal(snapshot(made), strategy.ended[0])
    assert not toy.bitwise_equal(strategy.ended[0], strategy.steps[-1])


def test_what_is_listed_after_a_merge_sees_the_stage_s_own_weights_and_what_is_before_it_the_merged():
    for parts, own in (((Average(), L2(), Seen()), True), ((L2(), Average(), Seen()), False)):
        made, strategy = toy.make_model(), compose(*parts)
        toy.train_stages(made, strategy, 0, 1, size=6)
        assert toy.bitwise_equal(strategy.anchor, strategy.ended[1] if own else snapshot(made))
        assert not toy.bitwise_equal(strategy.ended[1], snapshot(made))


@pytest.mark.parametrize("kind", [Average, FisherMerge, EMA, TaskArithmetic, TIES])
def test_memory_does_not_grow_with_the_tasks(kind):
    strategy, made = kind(), toy.make_model()
    toy.train_stages(made, strategy, 0, size=6)
    one = {n: t.shape for n, t in toy.memory_tensors(strategy).items()}
    toy.train_stages(made, strategy, 1, 2, size=6)
    assert {n: t.shape for n, t in toy.memory_tensors(strategy).items()} == one


def test_weights_in_bfloat16_are_merged_in_float32():
    """In bfloat16 a mean of many would stand still."""
    made, strategy = toy.make_model(torch.bfloat16), Average(init_from="own")
    for _ in range(40):
        with torch.no_grad():
            made.net.model.norm.weight += 1 / 16
        strategy.end(made, toy.make_task(0))
        strategy.begin(made, toy.make_task(0))
    kept = strategy.mean["model.norm.weight"]
    assert kept.dtype == torch.float32
    assert kept[0].item() == pytest.approx(1 + 41 / 32, rel=1e-2)


# How they are combined


def test_fisher_merging_leads_to_the_joint_minimum_of_quadratics():
    """Each stage's loss is (w - m) F (w - m) / 2, and it ends at its m; the curvatures have one
    norm.
    """
    ends, curved = drawn(0, 3), [t.square() for t in drawn(1, 3)]
    curved = [f / f.norm() for f in curved]

    @dataclass(kw_only=True)
    class Known(FisherMerge):
        given: list = field(init=False, default_factory=lambda: list(curved))

        def merge_coefficients(self, model, task):
            return {"parts.0": self.given.pop(0)}

    found = merged(Known(init_from="own"), ends).requires_grad_(True)
    (slope,) = torch.autograd.grad(
        sum((f * (found - m).square()).sum() / 2 for f, m in zip(curved, ends, strict=True)), found
    )
    assert torch.allclose(slope, torch.zeros_like(slope), atol=1e-12)


def test_fisher_merging_weighs_each_stage_by_its_fisher_of_norm_one():
    strategy, _, _ = watched(FisherMerge, 0)
    assert flatten_weights(strategy.total).norm().item() == pytest.approx(1)
    made = toy.make_model(torch.float64)
    restore(made, strategy.ended[0])
    again = deepcopy(FisherMerge())
    assert toy.bitwise_equal(again.merge_coefficients(made, toy.make_task(0, 6)), strategy.total)


def test_a_weight_that_matters_to_no_task_is_as_the_last_stage_left_it():
    strategy, _, tested = watched(FisherMerge, 0, 1)
    unused = next(n for n, t in strategy.total.items() if (t == 0).any())
    at = strategy.total[unused] == 0
    assert torch.equal(tested[1][unused][at], strategy.ended[1][unused][at])


def test_the_moving_average_is_that_of_every_step_and_training_knows_nothing_of_it():
    strategy, base, tested = watched(EMA, 0, 1, decay=0.7)
    plain, naive = toy.make_model(torch.float64), compose(Strategy(), Seen())
    toy.train_stages(plain, naive, 0, 1, size=6)
    assert all(toy.bitwise_equal(a, b) for a, b in zip(strategy.steps, naive.steps, strict=True))
    per_stage = len(strategy.steps) // 2
    expected = base
    for t in (0, 1):
        for after in [*strategy.steps[t * per_stage + 1 : (t + 1) * per_stage], strategy.ended[t]]:
            expected = combine(lambda m, w: 0.7 * m + 0.3 * w, expected, after)
        assert toy.all_close(tested[t], expected, rtol=1e-9, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 4), st.sampled_from([0.2, 0.5, 1.0]))
def test_task_arithmetic_is_peft_s(seed, tasks, scale):
    ends = drawn(seed, tasks)
    theirs = merge_utils.task_arithmetic(ends, torch.full((tasks,), scale, dtype=torch.float64))
    assert torch.allclose(merged(TaskArithmetic(scale=scale), ends), theirs, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seeds, st.integers(1, 5), st.sampled_from([0.05, 0.2, 0.5, 0.9]), st.sampled_from([1.0, 0.3])
)
def test_ties_is_peft_s_though_it_keeps_no_vector(seed, tasks, density, scale):
    ends = drawn(seed, tasks)
    theirs = scale * merge_utils.ties(ends, torch.ones(tasks, dtype=torch.float64), density)
    assert torch.allclose(merged(TIES(scale=scale, density=density), ends), theirs, atol=1e-12)


def test_ties_trims_a_vector_as_a_whole_and_not_tensor_by_tensor():
    large, small = 10 + torch.rand(10, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    found = merged(TIES(density=0.25), [torch.cat([large, small])], 10, 30)
    assert torch.equal(found, torch.cat([large, torch.zeros_like(small)]))


def test_task_vectors_begin_where_the_first_stage_did_also_where_stages_follow_one_another():
    strategy, base, tested = watched(TaskArithmetic, 0, 1, init_from="own", scale=0.5)
    expected = combine(lambda o, a, b: o + 0.5 * (a - o) + 0.5 * (b - o), base, *strategy.ended)
    assert toy.all_close(tested[1], expected, rtol=1e-9, atol=1e-13)
    assert toy.bitwise_equal(strategy.begun[1], strategy.ended[0])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Average(init_from="middle"), "unknown init_from 'middle'"),
        (lambda: Average(interpolation=2), "blend 2: expected 0"),
        (lambda: TIES(init_from="merged"), "task vectors with init_from=merged"),
        (lambda: TIES(density=0), "TIES with density 0"),
        (lambda: EMA(decay=1.0), r"with decay 1\.0"),
    ],
)
def test_what_cannot_be_merged_is_refused(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


@pytest.mark.parametrize(
    ("kind", "begin_at", "bytes_a_weight"),
    [
        (Average, "merged", 4),
        (Average, "own", 8),
        (Average, "base", 8),
        (FisherMerge, "merged", 8),
        (FisherMerge, "own", 12),
        (FisherMerge, "base", 12),
        (EMA, "merged", 4),
        (EMA, "own", 8),
        (EMA, "base", 8),
        (TaskArithmetic, "own", 12),
        (TaskArithmetic, "base", 8),
        (TIES, "own", 20),
        (TIES, "base", 16),
    ],
)
def test_it_stores_what_it_says_wherever_stages_begin(kind, begin_at, bytes_a_weight):
    made, strategy = toy.make_model(), kind(init_from=begin_at)
    toy.train_stages(made, strategy, 0, 1, size=4)
    count = sum(w.numel() for w in snapshot(made).values())
    found = sum(t.nbytes for t in toy.memory_tensors(strategy).values()) / count
    assert found == pytest.approx(
        bytes_a_weight, abs=0.1
    )  # an average also keeps a number of each tensor
    assert f"{bytes_a_weight} P" in strategy.stores
