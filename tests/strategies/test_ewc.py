"""The quadratic pull: L2, EWC as the sum of all tasks' penalties, online EWC's recursion."""

from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch

from continual.errors import ConfigError
from continual.models.importance import fisher
from continual.models.weights import combine, gradient, snapshot, weights
from strategies.ewc import EWC, L2, OnlineEWC
from tests.support import toy


@dataclass(kw_only=True)
class Recording:
    """Remembers the weights and the importance of every task."""

    parts: list = field(init=False, default_factory=list)

    def consolidate(self, here, measured):
        self.parts.append((deepcopy(here), deepcopy(measured)))
        super().consolidate(here, measured)


@dataclass(kw_only=True)
class RecordingEWC(Recording, EWC):
    """EWC that also keeps every task's own penalty."""


@dataclass(kw_only=True)
class RecordingOnlineEWC(Recording, OnlineEWC):
    """Online EWC that also keeps every task's own Fisher."""


def penalty_by_hand(made, parts, strength: float) -> torch.Tensor:
    live = weights(made)
    return sum(
        strength / 2 * (f[n] * (live[n] - here[n]) ** 2).sum() for here, f in parts for n in live
    )


def trained(strategy, *tasks: int):
    made = toy.make_model(torch.float64)
    toy.train_stages(made, strategy, *tasks, size=6)
    return made


def gradient_of(made, scalar: torch.Tensor) -> dict[str, torch.Tensor]:
    made.net.zero_grad()
    scalar.backward()
    return gradient(made)


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_ewc_is_the_sum_of_all_tasks_penalties_in_value_and_gradient(tasks):
    strategy = RecordingEWC(strength=50.0, num_examples=4)
    made = trained(strategy, *range(tasks))
    with torch.no_grad():
        for w in weights(made).values():
            w += 0.1 * torch.randn(
                w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype
            )
    assert len(strategy.parts) == tasks
    ours, sum_of_all = strategy.penalty(made), penalty_by_hand(made, strategy.parts, 50.0)
    assert ours.item() > 1e-3
    assert ours.item() == pytest.approx(sum_of_all.item(), rel=1e-10)
    assert toy.all_close(
        gradient_of(made, ours), gradient_of(made, sum_of_all), rtol=1e-8, atol=1e-12
    )


def test_ewc_s_loss_is_the_task_s_and_the_penalty():
    strategy = EWC(strength=1e4, num_examples=4)
    made = trained(strategy, 0)
    toy.train_stages(made, strategy, 1, size=6)
    batch = made.batch(toy.make_examples(2))
    expected = toy.mean_loss(made.net, toy.make_examples(2)) + strategy.penalty(made)
    assert strategy.penalty(made).item() > 0
    assert strategy.loss(made, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_ewc_measures_the_fisher_at_the_end_of_the_stage_on_all_its_examples_if_asked():
    strategy = EWC(num_examples=1000)
    made = trained(strategy, 0)
    assert toy.bitwise_equal(strategy.anchor, snapshot(made))
    assert toy.all_close(
        strategy.importance, fisher(made, toy.make_examples(0, 6)), rtol=1e-8, atol=1e-14
    )


def test_ewc_s_memory_does_not_grow_with_the_tasks():
    strategy = EWC(num_examples=4)
    made = trained(strategy, 0)
    one = {n: t.shape for n, t in toy.memory_tensors(strategy).items()}
    toy.train_stages(made, strategy, 1, 2, size=6)
    assert {n: t.shape for n, t in toy.memory_tensors(strategy).items()} == one


def test_of_weights_in_bfloat16_importances_and_anchors_are_added_up_in_float32():
    made, strategy = toy.make_model(torch.bfloat16), RecordingEWC(num_examples=4)
    for t in range(20):
        strategy.end(made, toy.make_task(t % 4))
    measured = [{n: f.double() for n, f in f.items()} for _, f in strategy.parts]
    total = {n: sum(f[n] for f in measured) for n in measured[0]}
    assert toy.all_close(
        {n: i.double() for n, i in strategy.importance.items()}, total, rtol=1e-5, atol=1e-12
    )
    assert {t.dtype for t in toy.memory_tensors(strategy).values()} == {torch.float32}
    strategy.loss(made, made.batch(toy.make_examples(0))).backward()
    assert all(w.grad.dtype == torch.bfloat16 for w in weights(made).values())


def test_no_stage_is_penalised_before_there_is_an_anchor():
    for strategy in (L2(strength=1e9), EWC(strength=1e9), OnlineEWC(strength=1e9)):
        made = toy.make_model(torch.float64)
        batch = made.batch(toy.make_examples(0))
        assert strategy.loss(made, batch).item() == pytest.approx(
            toy.mean_loss(made.net, toy.make_examples(0)).item(), rel=1e-6
        )


def test_online_ewc_decays_the_running_fisher_and_anchors_the_last_weights():
    """F*_t = g F*_(t-1) + F_t, and the penalty is strength/2 g F*_t (w - w_t)^2 (Schwarz et al.
    2018).
    """
    strategy = RecordingOnlineEWC(strength=50.0, decay=0.6, num_examples=4)
    made = trained(strategy, 0, 1, 2)
    (_, f1), (_, f2), (last, f3) = strategy.parts
    running = combine(lambda a, b, c: 0.36 * a + 0.6 * b + c, f1, f2, f3)
    expected = combine(lambda f: 0.6 * f, running)
    assert toy.all_close(strategy.importance, expected, rtol=1e-10, atol=1e-16)
    assert toy.bitwise_equal(strategy.anchor, last)
    with torch.no_grad():
        for w in weights(made).values():
            w += 0.1
    assert strategy.penalty(made).item() == pytest.approx(
        penalty_by_hand(made, [(last, expected)], 50.0).item(), rel=1e-10
    )


def test_online_ewc_with_no_decay_keeps_every_fisher_whole():
    strategy = RecordingOnlineEWC(decay=1.0, num_examples=4)
    trained(strategy, 0, 1)
    (_, f1), (_, f2) = strategy.parts
    assert toy.all_close(strategy.importance, combine(torch.add, f1, f2), rtol=1e-10, atol=1e-16)


def test_l2_pulls_every_trainable_weight_alike_to_the_last_task_s_end():
    strategy = L2(strength=3.0)
    made = trained(strategy, 0, 1)
    with torch.no_grad():
        for w in weights(made).values():
            w += 0.5
    count = sum(w.numel() for w in weights(made).values())
    penalty = strategy.penalty(made)
    assert penalty.item() == pytest.approx(3.0 / 2 * 0.25 * count)
    assert all(
        torch.allclose(g, torch.full_like(g, 1.5)) for g in gradient_of(made, penalty).values()
    )


def moved(strategy) -> float:
    """How far a second stage goes from where the first one ended."""
    made = toy.make_model()
    toy.train_stages(made, strategy, 0, size=6)
    start = snapshot(made)
    toy.train_stages(made, strategy, 1, size=6)
    return sum((w - start[n]).square().sum().item() for n, w in snapshot(made).items())


@pytest.mark.parametrize("kind", [L2, EWC, OnlineEWC])
def test_a_stronger_pull_stays_nearer(kind):
    scale = 1.0 if kind is L2 else 1e3
    far, nearer, near = (moved(kind(strength=s * scale)) for s in (0, 1, 100))
    assert near < nearer < far


def test_the_same_seed_gives_the_same_fisher_examples_and_another_seed_others():
    one, two, other = (EWC(num_examples=3, labels="sampled", seed=s) for s in (0, 0, 1))
    for strategy in (one, two, other):
        trained(strategy, 0)
    assert toy.bitwise_equal(one.importance, two.importance)
    assert not toy.bitwise_equal(one.importance, other.importance)


def test_unknown_labels_are_refused():
    with pytest.raises(ConfigError, match="unknown Fisher labels 'true'"):
        trained(EWC(labels="true"), 0)


def test_a_pull_that_pushes_away_is_refused():
    with pytest.raises(ConfigError, match=r"found -5\.0 as the strength of the pull"):
        EWC(strength=-5.0)
