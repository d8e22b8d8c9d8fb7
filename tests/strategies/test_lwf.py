"""Distillation: the divergence in closed form and by torch, whom it is measured from, and what it
leaves alone.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.errors import ConfigError
from continual.models.loss import capture_logits, forward
from continual.models.weights import gradient, restore, snapshot
from strategies.lwf import LwF
from tests.support import toy


def moved(made, by: float = 0.05) -> None:
    """Other weights than the teacher's."""
    draw = torch.Generator().manual_seed(0)
    restore(
        made,
        {
            n: w + by * torch.randn(w.shape, generator=draw, dtype=w.dtype)
            for n, w in snapshot(made).items()
        },
    )


def taught(**settings):
    """A model that has moved on from what the strategy took down in `begin`, and the teacher's
    weights.
    """
    made, strategy = toy.make_model(torch.float64), LwF(**settings)
    strategy.begin(made, toy.make_task(0))
    before = snapshot(made)
    moved(made)
    return made, strategy, before


def term(made, strategy, batch):
    return strategy.divergence(batch, forward(made, batch))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_term_is_torch_s_kl_div_from_the_teacher_to_the_model(temperature):
    made, strategy, before = taught(temperature=temperature, top_logits=toy.VOCAB_SIZE)
    batch = made.batch(toy.make_examples(0))
    p, q = (forward(made, batch, at).div(temperature).log_softmax(-1) for at in (before, None))
    expected = F.kl_div(
        q, p, reduction="batchmean", log_target=True
    )  # kl_div(input=q, target=p) is KL(p || q)
    assert term(made, strategy, batch).item() == pytest.approx(expected.item(), rel=1e-9)
    other_way = F.kl_div(p, q, reduction="batchmean", log_target=True)
    assert abs(other_way.item() / expected.item() - 1) > 1e-3


def test_the_divergence_has_its_closed_form_on_two_tokens():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p || q) = log 2 - H(p) = 0.1308 nats; the other way it is
    0.1438.
    """
    strategy, made = LwF(temperature=1.0, top_logits=2), toy.make_model()
    e = replace(toy.make_examples(0)[0], ids=(2, 3), response_mask=(False, True))
    strategy.teacher_outputs[e.task_index, e.id] = strategy.soften_logits(
        torch.tensor([[3.0, 1.0]]).log()
    )
    found = strategy.divergence(made.batch([e]), torch.zeros(1, 2))
    assert found.item() == pytest.approx(0.130812, abs=1e-6)


@pytest.mark.parametrize("top", [1, 5, 1024])
def test_at_the_teacher_itself_the_term_and_its_gradient_are_nothing(top):
    made, strategy = toy.make_model(torch.float64), LwF(top_logits=top)
    strategy.begin(made, toy.make_task(0))
    made.net.zero_grad()
    found = term(made, strategy, made.batch(toy.make_examples(0)))
    found.backward()
    assert abs(found.item()) < 1e-12
    assert all(g.abs().max() < 1e-9 for g in gradient(made).values())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(1, 11), min_size=2, max_size=4, unique=True))
def test_telling_fewer_tokens_apart_never_makes_the_divergence_greater(seed, tops):
    draw = torch.Generator().manual_seed(seed)
    p, q = (3 * torch.randn(4, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    made = toy.make_model()
    e = replace(
        toy.make_examples(0)[0], ids=(2, 3, 4, 5, 6), response_mask=(False, True, True, True, True)
    )
    found = []
    for top in [*sorted(tops), 12]:
        strategy = LwF(top_logits=top)
        strategy.teacher_outputs[e.task_index, e.id] = strategy.soften_logits(p)
        found.append(strategy.divergence(made.batch([e]), q).item())
    assert all(0 <= a <= b + 1e-12 for a, b in pairwise(found))


def test_the_loss_is_the_task_s_and_strength_times_the_term():
    made, strategy, _ = taught(strength=0.7)
    batch = made.batch(toy.make_examples(0)[:5])
    expected = toy.mean_loss(made.net, toy.make_examples(0)[:5]) + 0.7 * term(made, strategy, batch)
    assert strategy.loss(made, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_previous_teacher_is_the_model_before_the_stage_and_base_the_one_before_the_first():
    made, previous, base = toy.make_model(torch.float64), LwF(), LwF(teacher="base")
    base.begin(made, toy.make_task(0))
    moved(made)
    batch = made.batch(toy.make_examples(1))
    for strategy in (previous, base):
        strategy.begin(made, toy.make_task(1))
    assert abs(term(made, previous, batch).item()) < 1e-12
    assert term(made, base, batch).item() > 1e-4
    assert previous.base == {}


def test_examples_that_the_teacher_was_not_asked_of_have_no_term():
    made, strategy, _ = taught()
    new, other = toy.make_examples(0)[:4], toy.make_examples(1)[:4]
    batch = made.batch(new)
    alone = term(made, strategy, batch) * batch.supervised_tokens
    both = made.batch([*other, *new])
    assert (term(made, strategy, both) * both.supervised_tokens).item() == pytest.approx(
        alone.item(), rel=1e-9
    )
    assert term(made, strategy, made.batch(other)).item() == 0


def test_prompt_tokens_that_have_a_weight_have_no_term():
    made, strategy, _ = taught()
    alone = made.batch(toy.make_examples(0)[:4])
    dual = replace(made, layout=replace(made.layout, instruction_weight=0.5)).batch(
        toy.make_examples(0)[:4]
    )
    assert dual.supervised_tokens > alone.supervised_tokens
    assert (term(made, strategy, dual) * dual.supervised_tokens).item() == pytest.approx(
        (term(made, strategy, alone) * alone.supervised_tokens).item(), rel=1e-9
    )


def test_the_term_needs_no_forward_pass_of_its_own():
    made, strategy, _ = taught()
    passes = []
    handle = made.net.register_forward_hook(lambda *_: passes.append(1))
    strategy.loss(made, made.batch(toy.make_examples(0)))
    handle.remove()
    assert len(passes) == 1


def test_logits_that_no_pass_gave_are_computed():
    made = toy.make_model()
    batch, other = made.batch(toy.make_examples(0)), made.batch(toy.make_examples(1))
    with capture_logits(made, batch) as logits:
        forward(made, other)
    assert torch.allclose(logits(), forward(made, batch))


def test_a_stronger_term_stays_nearer_to_what_the_teacher_says():
    found = []
    for strength in (0.0, 1.0, 10.0):
        made, watch = toy.make_model(), LwF()
        watch.begin(made, toy.make_task(0))
        toy.train_stages(made, LwF(strength=strength), 0)
        found.append(term(made, watch, made.batch(toy.make_examples(0))).item())
    assert found[2] < found[1] < found[0]


def by_hand(made, strategy, before, examples):
    """ASFT as its authors compute it, from the logits at every response position."""
    batch = made.batch(examples)
    q, p = (forward(made, batch, at).log_softmax(-1) for at in (None, before))
    loss = F.cross_entropy(q, batch.targets, reduction="none")
    weight = q.exp().gather(1, batch.targets[:, None])[:, 0].detach()
    return (
        weight * loss + strategy.strength * F.kl_div(q, p.exp(), reduction="none").sum(-1)
    ).mean()


def test_asft_is_its_authors_loss_and_gradient():
    """DFT's weights, each token's own probability, and the forward divergence from the base (Zhu et
    al. 2025).
    """
    made, strategy, before = taught(
        strength=0.3,
        temperature=1.0,
        teacher="base",
        weight_by_probability=True,
        top_logits=toy.VOCAB_SIZE,
    )
    found = []
    for loss in (
        strategy.loss(made, made.batch(toy.make_examples(0))),
        by_hand(made, strategy, before, toy.make_examples(0)),
    ):
        made.net.zero_grad()
        loss.backward()
        found.append((loss.item(), gradient(made)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert toy.all_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)


def test_dynamic_fine_tuning_needs_no_teacher():
    made, strategy = toy.make_model(torch.float64), LwF(strength=0.0, weight_by_probability=True)
    strategy.begin(made, toy.make_task(0))
    assert strategy.teacher_outputs == {}
    assert strategy.loss(made, made.batch(toy.make_examples(0))).item() == pytest.approx(
        by_hand(made, strategy, None, toy.make_examples(0)).item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"teacher": "bases"}, "did you mean 'base'"),
        ({"strength": -1}, "LwF with"),
        ({"temperature": 0}, "LwF with"),
        ({"top_logits": 0}, "LwF with"),
    ],
)
def test_what_cannot_work_is_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        LwF(**wrong)
