"""Self-distillation: the divergence by hand, the teacher's weights, and a demonstration that is
learned from alone.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from continual.errors import ConfigError, DataError
from continual.models.loss import forward, number_examples
from continual.models.model import Model
from continual.models.weights import gradient, restore, snapshot
from continual.packing.batch import Layout
from continual.packing.layout import response_start
from strategies import sdft
from strategies.sdft import SDFT, prepend_demonstration
from tests.support import toy
from tests.support.models import make_encoded


def begun(dtype=torch.float64, **settings):
    """A model and its strategy, before the first step of a stage."""
    made, strategy = toy.make_model(dtype), SDFT(**settings)
    strategy.begin(made, toy.make_task(0))
    return made, strategy


def logits_behind(net, prompt, answer) -> torch.Tensor:
    """Straight from the network: (tokens of the answer, V) what predicts them."""
    return net(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]


def test_the_term_is_the_reverse_divergence_from_the_model_that_saw_the_answer_on_the_model_s_own_answers():
    made, strategy = begun()
    rows = toy.make_examples(0, 5)
    own = strategy.sample_answers(made, rows)
    shown = [prepend_demonstration(e, y) for e, y in zip(rows, own, strict=True)]
    found = strategy.divergence(made, number_examples(made, own), shown)
    parts = []
    for e, y in zip(rows, own, strict=True):
        prompt, answer = y.ids[: response_start(y)], y.ids[response_start(y) :]
        q = logits_behind(made.net, prompt, answer).log_softmax(-1)
        p = logits_behind(made.net, (*e.ids, *prompt), answer).log_softmax(-1)
        parts.append(
            F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
        )  # kl_div(p, q) is KL(q || p)
    assert found.item() == pytest.approx(torch.cat(parts).mean().item(), rel=1e-9)


def test_a_step_s_gradient_is_that_of_both_shares_and_none_goes_through_the_teacher():
    made, strategy = begun(strength=0.3, ema_rate=0.0)
    rows = toy.make_examples(0, 5)
    own = strategy.sample_answers(made, rows)
    strategy.generator.seed(strategy.seed)  # as it was, for the same answers
    made.net.zero_grad()
    loss = strategy.backward(made, made.batch(rows))
    found = gradient(made)
    made.net.zero_grad()
    shown = [prepend_demonstration(e, y) for e, y in zip(rows, own, strict=True)]
    batch = number_examples(made, own)
    told = forward(made, number_examples(made, shown)).detach().log_softmax(-1)
    q = forward(made, batch).log_softmax(-1)
    expected = 0.7 * toy.mean_loss(made.net, rows) + 0.3 * F.kl_div(
        told, q, reduction="batchmean", log_target=True
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert toy.all_close(found, gradient(made), rtol=1e-6, atol=1e-9)


def test_answers_are_the_model_s_own_and_drawn_anew_by_the_seed():
    made, strategy = begun()
    rows = toy.make_examples(0)
    first, second, again, other = (
        s.sample_answers(made, rows) for s in (strategy, strategy, SDFT(), SDFT(seed=1))
    )
    assert first == again
    assert first != second
    assert first != other
    for e, y in zip(rows, first, strict=True):
        assert y.ids[: response_start(y)] == e.ids[: response_start(e)]
        assert 1 <= len(y.ids) - response_start(y) <= 4
        assert (y.id, y.task_index) == (e.id, e.task_index)


def test_the_teacher_s_weights_are_a_moving_average_that_begins_with_the_stage():
    made, strategy = begun(ema_rate=0.1)
    expected = snapshot(made)
    for _ in range(3):
        restore(made, {n: w + 1 for n, w in snapshot(made).items()})
        strategy.backward(made, made.batch(toy.make_examples(0, 2)))
        expected = {
            n: 0.9 * t + 0.1 * w
            for (n, t), w in zip(expected.items(), snapshot(made).values(), strict=True)
        }
    assert toy.all_close(strategy.teacher, expected)
    strategy.end(made, toy.make_task(0))
    assert strategy.teacher == {}
    strategy.begin(made, toy.make_task(1))
    assert toy.bitwise_equal(strategy.teacher, snapshot(made))


def test_the_teacher_of_weights_in_bfloat16_comes_after_them():
    """In whose digits a hundredth of a small step is nothing."""
    made, strategy = begun(torch.bfloat16)
    start = snapshot(made)
    restore(made, {n: 1.05 * w for n, w in start.items()})
    moved = {n: w.float() - start[n].float() for n, w in snapshot(made).items()}
    for _ in range(5):
        made.net.zero_grad()
        strategy.backward(made, made.batch(toy.make_examples(0, 1)))
    assert toy.all_close(
        strategy.teacher,
        {n: w.float() + (1 - 0.99**5) * moved[n] for n, w in start.items()},
        1e-4,
        1e-6,
    )


# A model that learns in context

WIDE = 12


class Inductive(torch.nn.Module):
    """It says what its table says of the last token, and strongly what stood behind that token
    before, if it stood.
    """

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2 * WIDE, WIDE, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([torch.zeros(WIDE, WIDE), 6 * torch.eye(WIDE)], 1))

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        before = torch.zeros(*input_ids.shape, WIDE)
        for row, ids in enumerate(input_ids.tolist()):
            for t, i in enumerate(ids):
                if i in ids[:t]:
                    before[row, t, ids[ids.index(i) + 1]] = 1
        return SimpleNamespace(
            logits=self.head(torch.cat([F.one_hot(input_ids, WIDE).float(), before], -1))
        )


def one_token(model, prompts, room, together, end, pick):
    logits = torch.cat([model.net(torch.tensor([p.ids])).logits[:, -1] for p in prompts])
    return [[t] for t in pick(logits.detach(), range(len(prompts)), 0).tolist()]


def test_a_model_that_learns_in_context_learns_the_answers_without_being_trained_on_them(
    monkeypatch,
):
    """At strength 1 there is no other loss; without a demonstration in the prompt, nothing is
    learned.
    """
    monkeypatch.setattr(sdft, "generate_ids", one_token)
    rows = [make_encoded([a], [(a + 5) % 9 + 1], str(a)) for a in range(2, 10)]
    found = []
    for demonstrated in (True, False):
        made = Model(
            Inductive(),
            SimpleNamespace(eos_token_id=0),
            Layout(pad_token_id=0, device=torch.device("cpu")),
        )
        strategy = SDFT(strength=1.0)
        strategy.begin(made, replace(toy.make_task(0), train=tuple(rows)))
        if not demonstrated:
            monkeypatch.setattr(sdft, "prepend_demonstration", lambda example, own: own)
        optimizer = torch.optim.Adam(made.net.parameters(), lr=0.1)
        for _ in range(40):
            optimizer.zero_grad()
            strategy.backward(made, made.batch(rows))
            optimizer.step()
        greedy = made.net(torch.tensor([e.ids[:1] for e in rows])).logits[:, -1].argmax(-1).tolist()
        found.append([e.ids[1] for e in rows] == greedy)
    assert found == [True, False]


# What is refused


def test_an_example_that_does_not_fit_behind_its_demonstration_is_refused():
    long = make_encoded([*range(2, 20)], [3], "long")
    with pytest.raises(
        DataError, match=r"behind its demonstration takes 38 tokens, and the model has 32; .*=16"
    ):
        SDFT().begin(toy.make_model(), replace(toy.make_task(0), train=(long,)))


@pytest.mark.parametrize("wrong", [{"strength": 1.5}, {"ema_rate": -0.1}])
def test_shares_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="SDFT with strength"):
        SDFT(**wrong)
