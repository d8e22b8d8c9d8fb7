"""Strategies on the factors of a LoRA: blocks that stay as they are, a penalty by brute force, a
closed form.
"""

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.types import Task
from continual.errors import ConfigError
from continual.models.loading import add_adapter
from continual.models.lora import factors
from continual.models.weights import gradient, restore, snapshot, weights
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from strategies.incremental_lora import IncrementalLoRA
from strategies.olora import OLoRA
from strategies.slao import SLAO, orthonormal_basis
from tests.support import toy

RANK, ROOM = 2, 8
RECIPE = toy.replace(toy.RECIPE, weight_decay=0.1, warmup_ratio=0.1)


def block(name: str, w: torch.Tensor, i: int) -> torch.Tensor:
    """A task's block of a factor, by its name."""
    return w[i * RANK : (i + 1) * RANK] if "lora_A" in name else w[:, i * RANK : (i + 1) * RANK]


@pytest.mark.parametrize("kind", ["incremental", "olora"])
def test_earlier_and_later_blocks_stay_bit_for_bit_as_they_are(kind):
    strategy = {
        "incremental": IncrementalLoRA(rank=RANK),
        "olora": OLoRA(rank=RANK, lambda_2=0.01),
    }[kind]
    made = toy.make_model(lora_rank=ROOM)
    states = [snapshot(made)]
    for i in (0, 1, 2):
        toy.train_stages(made, strategy, i, recipe=RECIPE)
        states.append(snapshot(made))
    for i, (before, after) in enumerate(pairwise(states)):
        for n, w in after.items():
            for k in range(ROOM // RANK):
                assert torch.equal(block(n, w, k), block(n, before[n], k)) == (k != i), (n, k)


def merged(made, lora: int):
    """A network whose base has the LoRA of `made` in its weights, with a new LoRA of this rank at
    the same scale.
    """
    net = made.net.merge_and_unload()
    return toy.replace(
        made,
        net=add_adapter(
            net,
            "lora",
            {"lora": {"r": lora, "lora_alpha": 16 * lora, "target_modules": "all-linear"}},
            seq2seq=False,
        ),
    )


def test_a_task_is_learned_as_by_a_new_lora_of_its_rank_upon_the_merged_earlier_ones():
    """Up to rounding: weights, and what the network says."""
    made, strategy = toy.make_model(torch.float64, lora_rank=ROOM), IncrementalLoRA(rank=RANK)
    toy.train_stages(made, strategy, 0)
    fresh = {n: block(n, w, 1).clone() for n, w in snapshot(made).items()}
    other = toy.make_model(torch.float64, lora_rank=ROOM)
    restore(other, snapshot(made))
    other = merged(other, RANK)
    restore(other, fresh)
    toy.train_stages(made, strategy, 1)
    toy.train_stages(other, Strategy(), 1)
    assert toy.all_close(
        snapshot(other), {n: block(n, w, 1) for n, w in snapshot(made).items()}, 1e-6, 1e-8
    )
    for e in toy.make_examples(1):
        assert torch.allclose(
            toy.log_likelihood(made.net, e), toy.log_likelihood(other.net, e), rtol=1e-6
        )


def test_without_its_terms_o_lora_is_incremental_lora_bit_for_bit():
    found = []
    for strategy in (OLoRA(rank=RANK, lambda_1=0, lambda_2=0), IncrementalLoRA(rank=RANK)):
        made = toy.make_model(lora_rank=ROOM)
        toy.train_stages(made, strategy, 0, 1)
        found.append(snapshot(made))
    assert toy.bitwise_equal(*found)


@cache
def any_lora():
    return toy.make_model(torch.float64, lora_rank=ROOM)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(0, 3), st.floats(0, 3), st.floats(0, 3))
def test_the_terms_are_those_of_a_loop_over_tasks_modules_and_entries(seed, at, one, two):
    made, strategy = any_lora(), OLoRA(rank=RANK, lambda_1=one, lambda_2=two)
    rng = torch.Generator().manual_seed(seed)
    restore(
        made,
        {n: torch.randn(w.shape, generator=rng, dtype=w.dtype) for n, w in weights(made).items()},
    )
    strategy.first_row = at * RANK
    expected = 0.0
    for n, w in snapshot(made).items():
        if "lora_A" in n:
            new = block(n, w, at)
            expected += one * sum(
                abs(float(torch.dot(x, y))) for i in range(at) for x in block(n, w, i) for y in new
            )
        expected += two * float(block(n, w, at).square().sum().sqrt())
    with torch.no_grad():
        found = float(sum(strategy.penalty_terms(made), torch.zeros(())))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_step_s_direction_is_that_of_loss_and_terms_by_finite_differences():
    made, strategy = toy.make_model(torch.float64, lora_rank=ROOM), OLoRA(rank=RANK, lambda_2=0.3)
    toy.train_stages(made, strategy, 0)
    strategy.begin(made, toy.make_task(1))
    made.net.zero_grad()
    strategy.backward(made, made.batch(toy.make_examples(1)))
    found, live, name = (
        gradient(made),
        weights(made),
        next(n for n in weights(made) if "lora_A" in n),
    )
    values = []
    with torch.no_grad():
        for shift in (1e-6, -2e-6):
            live[name][RANK, 3] += shift
            terms = sum(strategy.penalty_terms(made))
            values.append(float(terms + toy.mean_loss(made.net, toy.make_examples(1))))
    assert float(found[name][RANK, 3]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_the_penalty_keeps_the_tasks_apart():
    overlap = {}
    for strength in (0.0, 5.0):
        made = toy.make_model(lora_rank=ROOM)
        toy.train_stages(made, OLoRA(rank=RANK, lambda_1=strength), 0, 1)
        overlap[strength] = sum(
            (a[:RANK] @ a[RANK : 2 * RANK].T).abs().sum().item() for a, _ in factors(made)
        )
    assert overlap[5.0] < 0.9 * overlap[0.0]


@pytest.mark.parametrize("kind", [IncrementalLoRA, OLoRA, SLAO])
def test_without_a_lora_there_is_nothing_to_work_on(kind):
    with pytest.raises(
        ConfigError,
        match=r"works on the factors of a LoRA, but these weights train: lm_head.* and \d+ more",
    ):
        kind().begin(toy.make_model(), toy.make_task(0))


def test_a_lora_without_room_for_the_stream_is_refused_at_its_first_task():
    with pytest.raises(
        ConfigError,
        match=r"has room for 3 more tasks of rank 2, expected 4; set "
        r"model.adapters.lora.r=8 or more",
    ):
        IncrementalLoRA(rank=2).begin(toy.make_model(lora_rank=7), toy.make_task(0))
    mixed = Task(
        "all",
        tuple(e for t in range(4) for e in toy.make_examples(t, 2)),
        task_names=toy.TASK_NAMES,
    )
    IncrementalLoRA(rank=2).begin(
        toy.make_model(lora_rank=3), mixed
    )  # the only stage of a joint stream


def test_a_lora_whose_blocks_are_all_in_use_has_no_room_for_another_task():
    made, strategy = toy.make_model(lora_rank=8), IncrementalLoRA(rank=2)
    toy.train_stages(made, strategy, 0, 1, 2, 3, size=4)
    with pytest.raises(
        ConfigError, match=r"has room for 0 more tasks of rank 2, expected 1; .*lora.r=10 or more"
    ):
        strategy.begin(made, toy.make_task(0))


def test_a_new_strategy_goes_on_behind_the_blocks_that_are_in_use():
    """As `adapt` does, which has the weights of a checkpoint and no memory."""
    made = toy.make_model(lora_rank=8)
    toy.train_stages(made, IncrementalLoRA(rank=2), 0, 1)
    again = IncrementalLoRA(rank=2)
    again.begin(made, toy.make_task(2))
    assert again.block == slice(4, 6)


def test_a_rank_below_0_is_refused():
    with pytest.raises(ConfigError, match="found -1 as the rank"):
        OLoRA(rank=-1)


def test_a_strategy_that_steps_past_it_is_refused_and_one_behind_it_is_not():
    class Past(Strategy):
        def backward(self, model, batch):
            loss = super().backward(model, batch)
            for w in weights(model).values():
                w.grad += 1
            return loss

    toy.train_stages(
        toy.make_model(lora_rank=8), compose(IncrementalLoRA(rank=2), Past()), 0, size=4
    )
    with pytest.raises(
        ConfigError, match="moved other blocks than the task's, for its steps do not end here; list"
    ):
        toy.train_stages(
            toy.make_model(lora_rank=8), compose(Past(), IncrementalLoRA(rank=2)), 0, size=4
        )
    made = toy.make_model(lora_rank=8)
    toy.train_stages(made, IncrementalLoRA(rank=2), 0, 1, 2, size=4)
    with pytest.raises(
        ConfigError, match="moved other blocks than the task's"
    ):  # there are only earlier ones
        toy.train_stages(made, compose(Past(), IncrementalLoRA(rank=2)), 3, size=4)


# SLAO


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(5, 9))
def test_the_basis_is_orthonormal_spans_the_rows_and_points_as_they_do(seed, rank, inputs):
    a = torch.randn(
        rank, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    q = orthonormal_basis(a)
    assert torch.allclose(q @ q.T, torch.eye(rank, dtype=a.dtype), atol=1e-10)
    assert torch.allclose(a @ q.T @ q, a, atol=1e-8)
    by_hand = []
    for row in a:  # Gram-Schmidt
        left = row - sum(((row @ u) * u for u in by_hand), torch.zeros_like(row))
        by_hand.append(left / left.norm())
    assert torch.allclose(q, torch.stack(by_hand), atol=1e-6)


def test_an_orthonormal_a_is_its_own_basis():
    q = orthonormal_basis(torch.randn(3, 7, dtype=torch.float64))
    assert torch.allclose(orthonormal_basis(q), q, atol=1e-12)


def alone(power: float):
    """What SLAO does, written as a loop over plain stages; the merged factors after each."""
    made, start, found = toy.make_model(torch.float64, lora_rank=4), None, []
    before = None
    for i in (0, 1, 2):
        if start:
            restore(
                made, {n: orthonormal_basis(w) if "lora_A" in n else w for n, w in start.items()}
            )
        toy.train_stages(made, Strategy(), i)
        start = snapshot(made)
        step = (i + 1) ** -power
        before = {
            n: w if "lora_A" in n or not i else (1 - step) * before[n] + step * w
            for n, w in start.items()
        }
        found.append(before)
    return found


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_after_each_task_the_lora_is_the_merge_in_closed_form(power):
    made, strategy = toy.make_model(torch.float64, lora_rank=4), SLAO(power=power)
    for i, expected in enumerate(alone(power)):
        toy.train_stages(made, strategy, i)
        assert toy.all_close(snapshot(made), expected, rtol=1e-6, atol=1e-9)


def test_with_power_1_b_is_the_mean_of_all_tasks_own():
    made, strategy, own = toy.make_model(torch.float64, lora_rank=4), SLAO(power=1), []
    for i in (0, 1, 2):
        toy.train_stages(made, strategy, i)
        own.append([b for _, b in strategy.tuned])
    for k, (_, b) in enumerate(factors(made)):
        assert torch.allclose(b, torch.stack([task[k] for task in own]).mean(0))


def test_a_lora_of_a_rank_above_its_inputs_has_no_basis():
    with pytest.raises(
        ConfigError, match=r"a LoRA of rank 40 on 32 inputs has no orthonormal basis; set"
    ):
        SLAO().begin(toy.make_model(lora_rank=40), toy.make_task(0))
