"""La-MAML's step, as a stage takes it, against autograd through the unrolled inner loop; what its
rates are for.
"""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.errors import TrainingError
from continual.models.loss import nll
from continual.models.weights import flatten_weights, snapshot, unflatten_weights, weights
from continual.training.recipe import Recipe
from strategies.la_maml import LaMAML
from strategies.maml import MAML
from tests.support import toy
from tests.support.meta import functional, looked_ahead, remembering, scattered, step

# One step of a task's twelve examples, and nothing between what the strategy leaves and the
# weights.
ONE = Recipe(optimizer="sgd", lr=1, steps=1, batch_size=12, schedule="constant", max_grad_norm=None)


def looking(*tasks: int, seed: int = 0, **keys):
    """A strategy that remembers these tasks and has rates from -0.3 to 0.7."""
    made, strategy = remembering(LaMAML, *tasks, **keys)
    for part in made.net.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    strategy.rates = flatten_weights(scattered(made, seed)) - 0.3
    return made, strategy


def drawn(made, strategy, chosen: list) -> list:
    """The examples by which a step will be judged."""
    (episode,) = deepcopy(strategy).episodes(made.batch(chosen))
    return list(episode.examples)


def pace(g: torch.Tensor, norm: float | None) -> float:
    """What scales a gradient down to this norm, but for torch's 1e-6."""
    return 1.0 if norm is None else min(1.0, norm / (g.norm().item() + 1e-6))


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("second_order", [False, True])
def test_a_stage_moves_the_rates_and_then_the_weights_as_algorithm_1_does(second_order, clip):
    made, strategy = looking(
        0, 1, inner_steps=5, rates_lr=100 if clip else 5, clip=clip, second_order=second_order
    )
    net, before, rates, seen = deepcopy(made.net), snapshot(made), strategy.rates.clone(), []
    episodes = strategy.episodes
    strategy.episodes = lambda batch: seen.extend(episodes(batch)) or seen
    toy.train_stages(made, strategy, 2, recipe=ONE)

    (judges,) = (list(episode.examples) for episode in seen)
    new, old = judges[:12], judges[12:]
    assert {e.task_index for e in new} == {2}
    assert (len(old), {e.task_index for e in old}) == (12, {0, 1})
    inner = [new[i::5] for i in range(5)]
    found = looked_ahead(
        net, inner, judges, unflatten_weights(rates, before), second_order, lambda g: pace(g, clip)
    )
    of_weights, of_rates = (flatten_weights(g) * pace(flatten_weights(g), clip) for g in found)
    expected = rates - strategy.rates_lr * of_rates
    assert torch.allclose(strategy.rates, expected, 1e-6, 1e-9)
    assert ((expected > 0) != (rates > 0)).any()  # so that it shows which of the two is first
    assert torch.allclose(
        flatten_weights(snapshot(made)),
        flatten_weights(before) - expected.clamp(min=0) * of_weights,
        1e-6,
        1e-9,
    )


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_new_rates_look_ahead_to_a_lower_loss_and_a_weight_whose_rate_is_not_above_0_stands_still(
    seed,
):
    made, strategy = looking(0, seed=seed, inner_steps=1, rates_lr=1e-2, clip=None)
    strategy.begin(made, toy.make_task(1))
    chosen, before = toy.make_examples(1, 6), strategy.rates.detach().clone()
    judges = drawn(made, strategy, chosen)
    got, after = flatten_weights(step(made, strategy, chosen)), strategy.rates.detach()
    live = weights(made)
    slope = torch.autograd.grad(toy.mean_loss(made.net, chosen), list(live.values()))

    def ahead(rates: torch.Tensor) -> float:
        steps = zip(live.items(), unflatten_weights(rates, live).values(), slope, strict=True)
        return functional(made.net, judges, {n: w - r * g for (n, w), r, g in steps}).item()

    assert ahead(after) < ahead(before)
    assert (got[after <= 0] == 0).all()
    assert (got[after > 0] != 0).any()


def test_with_rates_that_are_not_learned_it_is_maml_at_that_rate():
    """The paper's C-MAML."""
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    ours, maml = (
        LaMAML(capacity=0, inner_lr=0.2, rates_lr=0.0, inner_steps=1, clip=None),
        MAML(inner_lr=0.2),
    )
    ours.begin(made, toy.make_task(0))
    maml.split_episode = lambda episode: ([[episode]], episode)
    assert toy.all_close(
        step(made, ours, chosen),
        {n: 0.2 * g for n, g in step(made, maml, chosen).items()},
        rtol=1e-8,
    )


def test_a_step_of_its_rule_is_one_of_its_inner_loop_at_the_same_clip():
    made, strategy = looking(0, clip=0.05)
    before, batch = snapshot(made), made.batch(toy.make_examples(1, 4))
    loss = nll(made, batch)
    grads = torch.autograd.grad(loss, [*weights(made).values()])
    g = torch.cat([t.flatten() for t in grads])
    toy.train_stages(made, strategy.inner_loop(), 1, size=4, recipe=ONE)
    taken = flatten_weights(before) - flatten_weights(snapshot(made))
    torch.testing.assert_close(taken, pace(g, 0.05) * strategy.rates * g, rtol=1e-4, atol=1e-7)


def test_a_step_that_is_passed_over_leaves_the_rates_as_they_were():
    made, strategy = looking(0)
    before = strategy.rates.clone()
    strategy.loss = lambda model, batch: nll(model, batch) * math.nan
    with pytest.raises(TrainingError, match="every step"):
        toy.train_stages(made, strategy, 1, recipe=replace(ONE, on_nonfinite="skip"))
    assert torch.equal(strategy.rates, before)


def test_under_an_optimizer_that_would_undo_the_rates_it_is_refused(cli_error, run_keys, tmp_path):
    told = cli_error("run", *run_keys, "strategy=la_maml", f"out={tmp_path / 'it'}")
    assert told == (
        "strategy=la_maml has a learning rate of its own for each weight, which "
        "train.optimizer=adamw would undo; set train.optimizer=sgd, and train.lr to 1 or what "
        "the strategy's configuration says"
    )
