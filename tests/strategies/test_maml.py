"""The meta-gradient against finite differences, by hand and against learn2learn; Reptile's walk by
hand.
"""

from copy import deepcopy

import pytest
import torch

from continual.data.types import Task
from continual.errors import ConfigError
from continual.models.weights import snapshot, unflatten_weights, weights
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from strategies.maml import MAML, Reptile, head_weights
from tests.support import toy
from tests.support.meta import INNER, halves, remembering, step


def walked(net, chosen: list, steps: int, lr: float):
    """A copy of the network after SGD on these examples."""
    fast = deepcopy(net)
    sgd = torch.optim.SGD([p for p in fast.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        sgd.zero_grad()
        toy.mean_loss(fast, chosen).backward()
        sgd.step()
    return fast


def tokens(chosen: list) -> int:
    return sum(sum(e.response_mask) for e in chosen)


def meta_objective(net, episodes: list[list], steps: int) -> float:
    """What MAML minimises: the query losses at the fast weights, by their episodes' shares of the
    tokens.
    """
    total, every = 0.0, sum(map(tokens, episodes))
    for episode in episodes:
        support, query = halves(episode)
        total += (
            toy.mean_loss(walked(net, support, steps, INNER), query).item()
            * tokens(episode)
            / every
        )
    return total


@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_maml_follows_the_meta_objective(steps):
    """Central differences along random directions, of a meta-objective that knows nothing of our
    code.
    """
    made, chosen = (
        toy.make_model(torch.float64, kind="gpt2"),
        [*toy.make_examples(0, 4), *toy.make_examples(1, 4)],
    )
    got = step(made, MAML(capacity=0, inner_lr=INNER, inner_steps=steps, second_order=True), chosen)
    episodes, eps, generator = [chosen[:4], chosen[4:]], 1e-6, torch.Generator().manual_seed(0)
    for _ in range(2):
        direction = {
            n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in got.items()
        }
        ends = []
        for sign in (1, -1):
            net = deepcopy(made.net)
            with torch.no_grad():
                for n, p in net.named_parameters():
                    p += sign * eps * direction[n]
            ends.append(meta_objective(net, episodes, steps))
        slope = sum((got[n] * d).sum() for n, d in direction.items()).item()
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_maml_is_the_gradient_at_the_fast_weights(steps):
    made, chosen = (
        toy.make_model(torch.float64),
        [*toy.make_examples(0, 5), *toy.make_examples(1, 4)],
    )
    expected = {n: torch.zeros_like(w) for n, w in snapshot(made).items()}
    for episode in (chosen[:5], chosen[5:]):
        support, query = halves(episode)
        fast = walked(made.net, support, steps, INNER)
        fast.zero_grad()
        (toy.mean_loss(fast, query) * tokens(episode) / tokens(chosen)).backward()
        for n, p in fast.named_parameters():
            expected[n] += p.grad
    assert toy.all_close(
        step(made, MAML(capacity=0, inner_lr=INNER, inner_steps=steps), chosen), expected, rtol=1e-8
    )


def test_first_and_second_order_differ():
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    first, second = (
        step(made, MAML(capacity=0, inner_lr=INNER, second_order=order), chosen) for order in (0, 1)
    )
    assert not toy.all_close(first, second, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("second_order", [False, True])
def test_without_an_inner_learning_rate_it_is_the_query_s_gradient(second_order):
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    got = step(made, MAML(capacity=0, inner_lr=0.0, second_order=second_order), chosen)
    assert toy.all_close(got, step(made, Strategy(), chosen[3:]), rtol=1e-8)


def test_an_episode_of_one_example_is_support_and_query():
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 1)
    fast = walked(made.net, chosen, 1, INNER)
    fast.zero_grad()
    toy.mean_loss(fast, chosen).backward()
    expected = {n: p.grad for n, p in fast.named_parameters()}
    assert toy.all_close(step(made, MAML(capacity=0, inner_lr=INNER), chosen), expected, rtol=1e-8)


# The inner loop as a rule to learn by


def followed(made, strategy, chosen: list, steps: int) -> dict[str, torch.Tensor]:
    """The weights after so many steps of the strategy's rule on these very examples."""
    train_stage(
        made,
        Task("new", chosen),
        strategy.inner_loop(),
        Recipe(
            lr=1.0,
            steps=steps,
            batch_size=len(chosen),
            schedule="constant",
            optimizer="sgd",
            max_grad_norm=None,
        ),
        seed=0,
        log_event=lambda event: None,
    )
    return snapshot(made)


@pytest.mark.parametrize("kind", [MAML, Reptile])
def test_the_rule_leads_to_the_fast_weights(kind):
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    fast = {n: p.detach() for n, p in walked(made.net, chosen, 3, INNER).named_parameters()}
    assert toy.all_close(
        followed(made, kind(capacity=0, inner_lr=INNER), chosen, 3), fast, rtol=1e-8
    )


def test_the_rule_of_anil_changes_the_head_alone():
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    before, expected = snapshot(made), walked(made.net, chosen, 1, INNER)
    after = followed(made, MAML(capacity=0, inner_lr=INNER, inner_scope="head"), chosen, 1)
    assert {n for n in after if not torch.equal(after[n], before[n])} == set(head_weights(made))
    for n in head_weights(made):
        assert torch.allclose(after[n], expected.get_parameter(n), rtol=1e-8)


def test_the_rule_of_meta_sgd_has_the_learned_rates():
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    strategy = MAML(capacity=0, inner_optimizer="meta_sgd")
    strategy.begin(made, toy.make_task(0))
    strategy.rates.data.uniform_(0, INNER)
    rates = unflatten_weights(strategy.rates.detach(), weights(made))
    before, slope = snapshot(made), step(made, Strategy(), chosen)
    after = followed(made, strategy, chosen, 1)
    assert toy.all_close(after, {n: w - rates[n] * slope[n] for n, w in before.items()}, rtol=1e-8)


def test_without_inner_steps_there_is_no_rule():
    for strategy in (Strategy(), MAML(inner_steps=0)):
        with pytest.raises(ConfigError, match="has no inner loop"):
            strategy.inner_loop()


def test_frozen_parameters_stay_put_in_the_inner_loop_too():
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    made.net.model.layers[0].requires_grad_(False)
    fast = walked(made.net, chosen[:3], 2, INNER)
    fast.zero_grad()
    toy.mean_loss(fast, chosen[3:]).backward()
    expected = {n: p.grad for n, p in fast.named_parameters() if p.requires_grad}
    assert toy.all_close(
        step(made, MAML(capacity=0, inner_lr=INNER, inner_steps=2), chosen), expected, rtol=1e-8
    )


@pytest.mark.filterwarnings("ignore")  # of learn2learn's own imports
@pytest.mark.parametrize("first_order", [True, False])
def test_it_equals_learn2learn_s_maml(first_order):
    algorithms = pytest.importorskip("learn2learn.algorithms")
    made, chosen, steps = toy.make_model(torch.float64), toy.make_examples(0, 6), 2
    net = deepcopy(made.net)
    learner = algorithms.MAML(net, lr=INNER, first_order=first_order).clone()
    with toy.no_fused_attention():
        for _ in range(steps):
            learner.adapt(toy.mean_loss(learner, chosen[:3]))
        toy.mean_loss(learner, chosen[3:]).backward()
    expected = {n: p.grad for n, p in net.named_parameters()}
    ours = MAML(capacity=0, inner_lr=INNER, inner_steps=steps, second_order=not first_order)
    assert toy.all_close(step(made, ours, chosen), expected, rtol=1e-8)


@pytest.mark.parametrize("kind", [MAML, Reptile])
@pytest.mark.parametrize("buffer_kind", ["balanced", "reservoir"])
def test_a_step_is_one_episode_of_the_new_task_and_one_of_a_remembered_one(kind, buffer_kind):
    made, strategy = remembering(kind, 0, 1, 2, share=0.5, buffer_kind=buffer_kind)
    old = set()
    for _ in range(12):
        remembered, new = strategy.episodes(made.batch(toy.make_examples(3, 4)))
        assert new.examples == tuple(toy.make_examples(3, 4))
        assert len(remembered.examples) == 4
        (task,) = {e.task_index for e in remembered.examples}
        old.add(task)
    assert old == {0, 1, 2}


def reptile_by_hand(made, episodes: list[list], steps: int) -> dict[str, torch.Tensor]:
    """(w - fast) / inner_lr, averaged over the episodes by their tokens; examples are dealt to the
    inner steps.
    """
    start, every = snapshot(made), sum(map(tokens, episodes))
    total = {n: torch.zeros_like(w) for n, w in start.items()}
    for episode in episodes:
        fast = made.net
        for i in range(min(steps, len(episode))):
            fast = walked(fast, episode[i::steps], 1, INNER)
        for n, p in fast.named_parameters():
            total[n] += (start[n] - p.detach()) / INNER * tokens(episode) / every
    return total


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_reptile_points_to_where_sgd_leads_from_here(steps):
    made, strategy = remembering(Reptile, 0, share=0.5, inner_lr=INNER, inner_steps=steps)
    drawn = deepcopy(strategy).episodes(made.batch(toy.make_examples(1, 4)))
    expected = reptile_by_hand(made, [list(e.examples) for e in drawn], steps)
    assert len(drawn) == 2
    assert toy.all_close(step(made, strategy, toy.make_examples(1, 4)), expected, rtol=1e-8)


def test_reptile_of_one_inner_step_is_the_plain_gradient():
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    got = step(made, Reptile(capacity=0, inner_lr=INNER, inner_steps=1), chosen)
    assert toy.all_close(got, step(made, Strategy(), chosen), rtol=1e-8)


def test_reptile_gives_the_weights_back_exactly():
    made, chosen = toy.make_model(), toy.make_examples(0, 6)
    before = toy.copy_parameters(made)
    live = {n: id(p) for n, p in weights(made).items()}
    step(made, Reptile(capacity=0, inner_lr=0.1, inner_steps=3), chosen)
    assert toy.bitwise_equal(toy.copy_parameters(made), before)
    assert {n: id(p) for n, p in weights(made).items()} == live


@pytest.mark.parametrize("kind", [MAML, Reptile])
def test_the_loss_that_is_reported_is_finite_and_near_the_plain_one(kind):
    made, chosen = toy.make_model(), toy.make_examples(0, 6)
    plain = Strategy().backward(made, made.batch(chosen)).item()
    assert kind(capacity=0, inner_lr=0.01).backward(
        made, made.batch(chosen)
    ).item() == pytest.approx(plain, rel=0.1)


KINDS = {
    "first order": (MAML, {}),
    "second order": (MAML, {"second_order": True}),
    "reptile": (Reptile, {}),
}
every = pytest.mark.parametrize(("kind", "keys"), KINDS.values(), ids=KINDS)


@every
def test_an_episode_in_parts_has_the_gradient_of_the_whole_episode(kind, keys):
    made, strategy = remembering(kind, 0, share=0.5, inner_lr=INNER, inner_steps=3, **keys)
    whole = step(made, deepcopy(strategy), toy.make_examples(1, 8))
    for budget in (1, 8, 20):
        small = toy.limit_micro_batch(made, budget)
        assert toy.all_close(step(small, deepcopy(strategy), toy.make_examples(1, 8)), whole)


@every
def test_no_forward_pass_reads_more_tokens_than_the_budget(kind, keys):
    made = toy.make_model(tokens_per_microbatch=12)
    read = []
    made.net.register_forward_pre_hook(
        lambda _, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    step(made, kind(capacity=0, inner_steps=2, **keys), toy.make_examples(0, 12))
    assert len(read) > 8
    assert max(read) <= 12


def test_the_way_back_drops_out_what_the_way_there_did():
    made, dropped = toy.make_model(kind="gpt2", tokens_per_microbatch=1), []
    made.net.train()
    made.net.transformer.h[0].mlp.dropout.register_forward_hook(
        lambda _, args, out: dropped.append(out == 0)
    )
    step(made, MAML(capacity=0, inner_steps=2, second_order=True), toy.make_examples(0, 2))
    first, second, _, second_again, first_again = dropped
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)


@every
def test_out_of_memory_within_an_episode_leaves_the_stage_as_if_it_had_not_been(kind, keys):
    ends = []
    for fail in (False, True):
        made, calls = toy.make_model(torch.float64), []

        def tight(_, args, made=made, calls=calls, fail=fail):
            calls.append(1)
            if fail and len(calls) == 3:
                raise torch.OutOfMemoryError

        made.net.register_forward_pre_hook(tight)
        toy.train_stages(made, kind(capacity=0, inner_steps=3, **keys), 0)
        ends.append(toy.copy_parameters(made))
    assert toy.all_close(*ends, rtol=1e-6, atol=1e-8)
