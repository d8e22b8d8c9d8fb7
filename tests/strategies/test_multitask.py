"""What each task weighs in a step: fixed, by size, by temperature in the draws, or learned."""

import random
from collections import Counter
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual.errors import ConfigError
from continual.models.weights import flatten_weights, gradient
from continual.strategy.interface import Strategy
from continual.training import checkpoint
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from strategies.multitask import MultiTask, project_conflicts
from tests.support import toy

SIZES = {0: 4, 1: 12, 2: 8}


def remembering(dtype=torch.float64, share: float = 0.5, **keys):
    """A model, and a strategy that remembers all of tasks 0 and 1 and has begun task 2."""
    made, strategy = toy.make_model(dtype), MultiTask(capacity=0.99, share=share, **keys)
    for t in (0, 1):
        strategy.begin(made, toy.make_task(t, SIZES[t]))
        strategy.end(made, toy.make_task(t, SIZES[t]))
    strategy.begin(made, toy.make_task(2, SIZES[2]))
    return made, strategy


def parts(made, strategy, n: int = 8) -> dict[int, list]:
    """A step's examples by task."""
    batch = strategy.add_replay_examples(made.batch(toy.make_examples(2, n)))
    return {t: list(part.examples) for t, part in batch.split_by_task().items()}


def by_hand(made, step: dict[int, list], weight: dict[int, float]) -> torch.Tensor:
    """The weights' mean of the tasks' mean losses."""
    return sum(weight[t] * toy.mean_loss(made.net, chosen) for t, chosen in step.items()) / sum(
        weight[t] for t in step
    )


def both(made, strategy, weight: dict[int, float]):
    """The loss and gradient of a step, ours and by hand."""
    batch = strategy.add_replay_examples(made.batch(toy.make_examples(2, 8)))
    step = {t: list(part.examples) for t, part in batch.split_by_task().items()}
    assert set(step) == {0, 1, 2}
    found = []
    for loss in (strategy.loss(made, batch), by_hand(made, step, weight)):
        made.net.zero_grad()
        loss.backward()
        found.append((loss.item(), gradient(made)))
    return found


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"weights": {"a": 2.0, "c": 0.5}}, {0: 2.0, 1: 1.0, 2: 0.5}),
        ({}, {0: 1.0, 1: 1.0, 2: 1.0}),
        ({"weights": {"b": 0.0}}, {0: 1.0, 1: 0.0, 2: 1.0}),
        ({"weighting": "size"}, SIZES),
    ],
    ids=["fixed", "equal", "left out", "size"],
)
def test_the_loss_is_the_weighted_mean_of_the_tasks_mean_losses(keys, weight):
    (ours, gradient_of_ours), (expected, gradient_by_hand) = both(*remembering(**keys), weight)
    assert ours == pytest.approx(expected, rel=1e-6)
    assert toy.all_close(gradient_of_ours, gradient_by_hand, rtol=1e-5, atol=1e-7)


def test_the_weights_of_a_step_are_in_its_notes_by_task():
    made, strategy = remembering(weights={"a": 2.0})
    parts(made, strategy)
    assert strategy.notes == pytest.approx({"weight/a": 0.5, "weight/b": 0.25, "weight/c": 0.25})


def test_a_stage_reports_the_weights_over_time():
    made, strategy = (
        toy.make_model(),
        MultiTask(capacity=8, weighting="uncertainty", uncertainty_lr=0.1),
    )
    told = []
    for t in (0, 1):
        train_stage(
            made,
            toy.make_task(t),
            strategy,
            Recipe(lr=1e-3, epochs=3, batch_size=6, log_every_steps=1),
            seed=t,
            log_event=told.append,
        )
    first = [e["notes"] for e in told if e["event"] == "step" and e["task"] == "a"]
    assert first[0] == {"weight/a": 1.0}
    assert len({n["weight/a"] for n in first}) == len(first) == 6
    later = [e["notes"] for e in told if e["event"] == "step" and e["task"] == "b"]
    assert all(set(n) == {"weight/a", "weight/b"} for n in later)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e6])
def test_remembered_tasks_are_drawn_in_proportion_to_a_root_of_their_size(temperature):
    _, strategy = remembering(weighting="temperature", temperature=temperature)
    draws = 4000
    drawn = Counter(e.task_index for e in strategy.draw_replay_examples(draws))
    odds = {t: SIZES[t] ** (1 / temperature) for t in (0, 1)}
    expected = draws * odds[0] / sum(odds.values())
    deviation = (expected * (1 - expected / draws)) ** 0.5
    assert set(drawn) == {0, 1}
    assert abs(drawn[0] - expected) < 4 * deviation


def test_with_a_temperature_all_tokens_weigh_the_same():
    made, strategy = remembering(weighting="temperature")
    batch = strategy.add_replay_examples(made.batch(toy.make_examples(2, 8)))
    expected = toy.mean_loss(made.net, list(batch.examples))
    assert strategy.loss(made, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_learned_weights_are_kendall_s_uncertainties():
    """mean_t exp(-s_t) L_t + s_t / 2 (Kendall et al. 2018, eq. 10), and its gradient in s."""
    made, strategy = remembering(weighting="uncertainty")
    s = [0.3, -0.5, 1.2]
    with torch.no_grad():
        strategy.log_variance[:3] = torch.tensor(s)
    batch = strategy.add_replay_examples(made.batch(toy.make_examples(2, 8)))
    means = {t: toy.mean_loss(made.net, list(p.examples)) for t, p in batch.split_by_task().items()}
    expected = sum((torch.tensor(-s[t]).exp() * means[t] + s[t] / 2) / 3 for t in range(3))
    loss = strategy.loss(made, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    slope = [float((-torch.tensor(-s[t]).exp() * means[t].detach() + 0.5) / 3) for t in range(3)]
    assert strategy.log_variance.grad.tolist() == pytest.approx([*slope, 0.0], rel=1e-5)


def test_learned_weights_change_the_model_s_gradient_by_their_factors():
    made, strategy = remembering(weighting="uncertainty")
    with torch.no_grad():
        strategy.log_variance[:3] = torch.tensor([0.3, -0.5, 1.2])
    factor = {t: float(torch.exp(-strategy.log_variance.detach()[t])) for t in range(3)}
    (_, ours), (_, expected) = both(made, strategy, factor)
    total = sum(factor.values()) / 3  # by hand the weights sum to 1
    assert toy.all_close(ours, {n: g * total for n, g in expected.items()}, rtol=1e-5, atol=1e-7)


def test_the_harder_task_comes_to_weigh_less():
    """exp(-s) tends to 1 / (2 L): the log variance of a loss of 4 rises, its factor falls below 1."""
    made, strategy = toy.make_model(), MultiTask(weighting="uncertainty", uncertainty_lr=0.05)
    toy.train_stages(made, strategy, 0)
    moved, *rest = strategy.log_variance.tolist()
    assert moved > 0.1
    assert rest == [0.0, 0.0, 0.0]
    assert strategy.notes["weight/a"] < 1


def test_log_variances_are_in_the_checkpoint_and_learned_on(tmp_path):
    made, strategy = toy.make_model(), MultiTask(weighting="uncertainty", capacity=8)
    toy.train_stages(made, strategy, 0)
    checkpoint.save(tmp_path / "one", made, strategy, toy.empty_matrix())
    again = MultiTask(weighting="uncertainty", capacity=8)
    checkpoint.load(tmp_path / "one", made, again)
    assert torch.equal(again.log_variance, strategy.log_variance.detach())
    toy.train_stages(made, again, 1)
    assert again.log_variance[1] != 0
    assert again.log_variance[0] != strategy.log_variance[0]


# Conflicts


def gave_way(gradients: torch.Tensor, order: list[list[int]]) -> torch.Tensor:
    """Algorithm 1 of Yu et al. (2020), the others of each task in a given order."""
    found = []
    for i, others in enumerate(order):
        g = gradients[i].clone()
        for j in others:
            if torch.dot(g, gradients[j]) < 0:
                g = (
                    g
                    - torch.dot(g, gradients[j])
                    / torch.dot(gradients[j], gradients[j])
                    * gradients[j]
                )
        found.append(g)
    return torch.stack(found)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_surgery_is_the_paper_s_algorithm(tasks):
    rows = torch.randn(
        tasks, 20, generator=torch.Generator().manual_seed(tasks), dtype=torch.float64
    )
    rng = random.Random(0)
    order = [[j for j in rng.sample(range(tasks), tasks) if j != i] for i in range(tasks)]
    assert torch.allclose(project_conflicts(rows, random.Random(0)), gave_way(rows, order))


@given(st.integers(0, 999))
def test_of_two_tasks_neither_opposes_the_other_s_gradient_any_more(seed):
    rows = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    freed = project_conflicts(rows, random.Random(0))
    assert (freed @ rows.T > -1e-12).all()
    if rows[0] @ rows[1] >= 0:
        assert torch.equal(freed, rows)


def test_a_step_with_conflicts_projected_is_the_sum_of_the_tasks_gradients_after_surgery():
    made, strategy = remembering(weights={"a": 2.0}, conflicts="project")
    toy.train_stages(
        made, Strategy(), 0, 1, recipe=Recipe(lr=5e-3, epochs=20, batch_size=8)
    )  # and the third opposes them
    plain, batch = deepcopy(strategy), made.batch(toy.make_examples(2, 8))
    step = {
        t: list(p.examples)
        for t, p in deepcopy(strategy).add_replay_examples(batch).split_by_task().items()
    }
    each, share = [], {0: 0.5, 1: 0.25, 2: 0.25}
    for t, chosen in step.items():
        made.net.zero_grad()
        (share[t] * toy.mean_loss(made.net, chosen)).backward()
        each.append(flatten_weights(gradient(made)))
    found = []
    for conflicts in ("project", "keep"):
        own = deepcopy(plain)
        own.conflicts = conflicts
        made.net.zero_grad()
        own.backward(made, batch)
        found.append(flatten_weights(gradient(made)))
    rng = deepcopy(plain)
    rng.add_replay_examples(batch)
    expected = project_conflicts(torch.stack(each), rng.buffer.rng).sum(0)
    assert torch.allclose(found[0], expected, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found[1], sum(each), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-7), (
        "no tasks oppose each other here"
    )


def test_learned_weights_have_their_own_gradient_whether_or_not_conflicts_are_projected():
    found = []
    for conflicts in ("keep", "project"):
        made, strategy = remembering(weighting="uncertainty", conflicts=conflicts)
        strategy.backward(made, made.batch(toy.make_examples(2, 8)))
        found.append(strategy.log_variance.grad.tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert any(found[0])


def test_tasks_of_weight_zero_are_left_out_of_training():
    made, strategy = toy.make_model(), MultiTask(weights={"a": 0.0})
    before = toy.copy_parameters(made)
    toy.train_stages(made, strategy, 0, recipe=Recipe(lr=1e-2))
    assert toy.bitwise_equal(toy.copy_parameters(made), before)


def test_a_weight_for_a_task_that_the_stream_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"unknown task in strategy\.multitask\.weights 'zebra'"):
        MultiTask(weights={"zebra": 1.0}).begin(toy.make_model(), toy.make_task(0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weighting": "sizes"}, "did you mean 'size'"),
        ({"conflicts": "projects"}, "did you mean 'project'"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"weights": {"a": -1}}, "no weight below it"),
    ],
)
def test_what_cannot_be_a_weighting_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        MultiTask(**keys)
