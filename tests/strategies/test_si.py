"""Path integrals by hand, by the loss that they must add up to, and by a direct transcription of
the equations.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from continual.models.importance import fisher
from continual.models.weights import snapshot, weights
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from strategies import si
from strategies.merge import TaskArithmetic
from strategies.si import SI, RWalk
from tests.support import toy


class Bowl(Strategy):
    """The loss is the mean of a (w - m)^2 / 2 over the batch's examples (a, m)."""

    def loss(self, model, batch):
        return (
            torch.stack([a * (model.net.w - m).square() / 2 for a, m in batch.examples])
            .mean(0)
            .sum()
        )


@dataclass(kw_only=True)
class BowlSI(SI, Bowl):
    """SI on bowls."""


@dataclass(kw_only=True)
class BowlRWalk(RWalk, Bowl):
    """RWalk on bowls."""


class Point(torch.nn.Module):
    """A model that is a few weights."""

    def __init__(self, *values: float):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def bowls(*examples):
    batch = SimpleNamespace(
        examples=examples,
        supervised_tokens=1.0,
        num_tokens=1,
        layout=SimpleNamespace(device=torch.device("cpu")),
    )
    batch.micro_batches = lambda: [batch]
    return batch


def descend(model, strategy, batches, lr: float) -> list[torch.Tensor]:
    """A stage of plain gradient descent; the weights before each step and at the end."""
    task, walked = SimpleNamespace(train=()), []
    strategy.begin(model, task)
    for batch in batches:
        walked.append(model.net.w.detach().clone())
        model.net.zero_grad()
        strategy.backward(model, batch)
        with torch.no_grad():
            model.net.w -= lr * model.net.w.grad
    walked.append(model.net.w.detach().clone())
    strategy.end(model, task)
    return walked


def test_two_tasks_of_two_steps_by_hand():
    """From 0 to 1 to 1.5 under (w - 2)^2 / 2, then to 0.75 and 1.125 under w^2 / 2 and the pull (w
    - 1.5)^2.
    """
    model, strategy = (
        SimpleNamespace(net=Point(0.0), trained=(), sharded=False),
        BowlSI(strength=2.0, damping=0.25),
    )
    descend(model, strategy, [bowls((1.0, 2.0))] * 2, lr=0.5)
    assert strategy.importance["w"].item() == pytest.approx(
        (2 * 1 + 1 * 0.5) / (1.5**2 + 0.25)
    )  # = 1
    assert strategy.anchor["w"].item() == pytest.approx(1.5)
    descend(model, strategy, [bowls((1.0, 0.0))] * 2, lr=0.5)
    omega = -1.5 * -0.75 - 0.75 * 0.375  # of w^2 / 2 alone
    assert strategy.importance["w"].item() == pytest.approx(1 + omega / (0.375**2 + 0.25))
    assert strategy.anchor["w"].item() == pytest.approx(1.125)


def test_a_weight_that_went_uphill_is_not_pushed_away():
    model, strategy = SimpleNamespace(net=Point(1.0), trained=(), sharded=False), BowlSI()
    descend(model, strategy, [bowls((1.0, 0.0))] * 3, lr=-0.5)
    assert strategy.importance["w"].item() == 0.0


def test_a_step_that_was_skipped_for_its_gradient_adds_nothing():
    model, strategy = SimpleNamespace(net=Point(0.0, 1.0), trained=(), sharded=False), BowlSI()
    task = SimpleNamespace(train=())
    strategy.begin(model, task)
    strategy.backward(model, bowls((float("nan"), 0.0)))
    strategy.add_path_integral(model)
    assert strategy.omega["w"].tolist() == [0.0, 0.0]


@dataclass(kw_only=True)
class Recording(SI):
    """Remembers the sum over weights of every task's path integral."""

    totals: list = field(init=False, default_factory=list)

    def compute_path_importance(self, model):
        self.totals.append(sum(o.sum().item() for o in self.omega.values()))
        return super().compute_path_importance(model)


def test_the_path_integrals_of_all_weights_add_up_to_the_fall_of_the_task_s_own_loss():
    """Zenke et al. 2017, eq. 3, for small steps; in the second task beside a pull that holds it
    back.
    """
    made, strategy = toy.make_model(torch.float64), Recording(strength=50.0, damping=1e-3)
    small = Recipe(lr=2e-4, epochs=40, batch_size=12, schedule="constant", max_grad_norm=0.01)
    for t in (0, 1):
        before = toy.mean_loss(made.net, toy.make_examples(t)).item()
        toy.train_stages(made, strategy, t, recipe=small)
        fall = before - toy.mean_loss(made.net, toy.make_examples(t)).item()
        assert fall > 0.01
        assert strategy.totals[t] == pytest.approx(fall, rel=0.05)


@dataclass(kw_only=True)
class Exact(SI):
    """Adds its path up in float64 too, and says how far apart both sums are, as a share."""

    exact: dict = field(init=False, default_factory=dict)
    off: float = field(init=False, default=0.0)

    def add_path_integral(self, model):
        for n, g in self.slope.items():
            step = weights(model)[n].detach().double() - self.before[n].double()
            self.exact[n] = self.exact.get(n, 0) - g.double() * step
        super().add_path_integral(model)

    def compute_path_importance(self, model):
        whole = torch.cat([e.flatten() for e in self.exact.values()])
        ours = torch.cat([self.omega[n].flatten() for n in self.exact])
        self.off = float((ours - whole).norm() / whole.norm())
        return super().compute_path_importance(model)


def test_of_weights_in_bfloat16_the_path_is_added_up_in_float32():
    strategy = Exact()
    toy.train_stages(
        toy.make_model(torch.bfloat16), strategy, 0, recipe=Recipe(lr=1e-3, steps=60, batch_size=4)
    )
    assert 0 < strategy.off < 1e-3


def test_no_part_of_a_finished_path_is_kept():
    made, strategy = toy.make_model(), RWalk()
    toy.train_stages(made, strategy, 0, size=6)
    assert not any(
        (strategy.omega, strategy.start, strategy.before, strategy.slope, strategy.score)
    )


def transcribed(tasks, walks, every, alpha, damping):
    """Chaudhry et al. 2018, eq. 6-8, of the weights at every step of every task; the importance
    after each.
    """
    running, scores, found = None, None, []
    for batches, walk in zip(tasks, walks, strict=True):
        score, t = torch.zeros_like(walk[0]), 0
        while t < len(batches):
            squares = torch.stack(
                [(a * (walk[t] - m)).square() for a, m in batches[t].examples]
            ).mean(0)
            running = squares if running is None else alpha * squares + (1 - alpha) * running
            end, won = min(t + every, len(batches)), torch.zeros_like(score)
            for i in range(t, end):
                slope = torch.stack([a * (walk[i] - m) for a, m in batches[i].examples]).mean(0)
                won -= slope * (walk[i + 1] - walk[i])
            score += torch.relu(won / (0.5 * running * (walk[end] - walk[t]) ** 2 + damping))
            t = end
        scores = score if scores is None else (scores + score) / 2
        found.append(running / running.max() + scores / scores.max())
    return found


def test_rwalk_is_its_equations_on_a_quadratic(monkeypatch):
    def of_bowls(model, examples):
        return {
            "w": torch.stack([(a * (model.net.w.detach() - m)).square() for a, m in examples]).mean(
                0
            )
        }

    monkeypatch.setattr(si, "fisher", of_bowls)
    first, second = torch.tensor([1.0, 3.0]).double(), torch.tensor([0.5, 2.0]).double()
    tasks = [
        [bowls((first, 1.0 + 0.1 * i), (second, -0.5)) for i in range(7)],
        [bowls((second, 2.0), (first, 0.3 * i)) for i in range(5)],
    ]
    model = SimpleNamespace(net=Point(0.2, -1.0), trained=(), sharded=False)
    strategy = BowlRWalk(strength=0.7, damping=0.01, alpha=0.8, every_steps=3)
    walks, found = [], []
    for batches in tasks:
        walks.append(descend(model, strategy, batches, lr=0.2))
        found.append(strategy.importance["w"])
    expected = transcribed(tasks, walks, every=3, alpha=0.8, damping=0.01)
    assert torch.allclose(found[0], expected[0], rtol=1e-9)
    assert torch.allclose(found[1], expected[1], rtol=1e-9)
    assert torch.equal(strategy.anchor["w"], walks[1][-1])


def test_rwalk_measures_the_fisher_of_the_step_s_own_examples_one_by_one():
    made, strategy = toy.make_model(torch.float64), RWalk(every_steps=2)
    strategy.begin(made, toy.make_task(0))
    strategy.backward(made, made.batch(toy.make_examples(0, 5)))
    assert toy.all_close(strategy.running, fisher(made, toy.make_examples(0, 5)))
    strategy.backward(made, made.batch(toy.make_examples(1, 5)))
    assert toy.all_close(strategy.running, fisher(made, toy.make_examples(0, 5)))


def test_rwalk_s_importance_lies_between_0_and_2():
    made, strategy = toy.make_model(), RWalk(every_steps=2)
    toy.train_stages(made, strategy, 0, 1, size=6)
    values = torch.cat([i.flatten() for i in strategy.importance.values()])
    assert values.min() >= 0
    assert values.max() <= 2
    assert strategy.importance.keys() == weights(made).keys()


@pytest.mark.parametrize("kind", [SI, RWalk])
def test_a_merge_that_is_listed_behind_is_no_step_of_the_path_and_its_outcome_is_the_anchor(kind):
    alone, merged = kind(), compose(kind(), TaskArithmetic())
    for strategy in (alone, merged):
        made = toy.make_model(torch.float64)
        toy.train_stages(made, strategy, 0)
    assert toy.bitwise_equal(merged.importance, alone.importance)
    assert toy.all_close(merged.anchor, snapshot(made))
    assert not toy.all_close(merged.anchor, alone.anchor)
