"""Dark experience replay: the objective of DER and DER++, what the buffer keeps, and Avalanche's
own step.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from continual.errors import ConfigError
from continual.models.loss import response_logits
from continual.models.model import Model
from continual.models.weights import gradient, snapshot
from continual.packing.batch import Layout
from continual.training.recipe import Recipe
from strategies import der
from strategies.der import DER, logit_distance
from tests.support import toy
from tests.support.models import make_encoded

WHOLE = {"capacity": 40, "minibatch_size": 4}


def prepared(**settings):
    """A model, and a strategy that remembers a stage."""
    made, strategy = toy.make_model(torch.float64), DER(**{**WHOLE, **settings})
    toy.train_stages(made, strategy, 0)
    return made, strategy


def logits_by_hand(made, e):
    """(S, V) straight from the network, one example at a time."""
    out = made.net(input_ids=torch.tensor([e.ids])).logits[0]
    return torch.stack([out[t - 1] for t in range(1, len(e.ids)) if e.response_mask[t]])


def drawn(strategy):
    """The records that the next step will draw for its two terms."""
    rng, state = strategy.rng, strategy.rng.getstate()
    found = strategy.draw_records(), strategy.draw_records()
    rng.setstate(state)
    return found


def test_a_step_s_loss_and_gradient_are_those_of_equation_6():
    made, strategy = prepared(alpha=0.3, beta=0.7)
    held, again = drawn(strategy)
    new = toy.make_examples(1)[:5]
    made.net.zero_grad()
    loss, got = strategy.backward(made, made.batch(new)), gradient(made)
    apart = torch.cat([(logits_by_hand(made, r["example"]) - r["logits"]).square() for r in held])
    by_hand = (
        toy.mean_loss(made.net, new)
        + 0.3 * apart.mean()
        + 0.7 * toy.mean_loss(made.net, [r["example"] for r in again])
    )
    made.net.zero_grad()
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)  # the log's sum is float32
    assert toy.all_close(got, gradient(made), rtol=1e-7, atol=1e-9)


def test_without_beta_a_step_draws_once_and_is_equation_5():
    made, strategy = prepared(alpha=0.3, beta=0.0)
    held, _ = drawn(strategy)
    new = toy.make_examples(1)[:5]
    made.net.zero_grad()
    strategy.backward(made, made.batch(new))
    got = gradient(made)
    made.net.zero_grad()
    (
        toy.mean_loss(made.net, new)
        + 0.3
        * torch.cat(
            [(logits_by_hand(made, r["example"]) - r["logits"]).square() for r in held]
        ).mean()
    ).backward()
    assert toy.all_close(got, gradient(made), rtol=1e-7, atol=1e-9)


def test_a_step_that_is_tried_again_with_less_memory_offers_its_examples_once(monkeypatch):
    tried = []

    def once(model, examples, at=None):
        tried.append(len(examples))
        if len(tried) == 3:
            raise torch.OutOfMemoryError("once")
        return response_logits(model, examples, at)

    whole, again = DER(**WHOLE), DER(**WHOLE)
    toy.train_stages(toy.make_model(), whole, 0)
    monkeypatch.setattr(der, "response_logits", once)
    toy.train_stages(toy.make_model(), again, 0)
    assert tried[3] == tried[2] > 0
    assert (again.seen, [r["example"] for r in again.kept]) == (
        whole.seen,
        [r["example"] for r in whole.kept],
    )
    assert all("logits" in r for r in again.kept)


def test_logits_are_kept_as_they_were_to_half_precision_when_the_example_came():
    made, strategy = toy.make_model(torch.float64), DER(**WHOLE)
    new = toy.make_examples(0)[:6]
    strategy.backward(made, made.batch(new))
    assert [r["example"] for r in strategy.kept] == new
    for r in strategy.kept:
        exact = logits_by_hand(made, r["example"])
        assert r["logits"].dtype == torch.float16
        assert r["columns"] is None
        assert ((r["logits"] - exact).abs() <= 2**-11 * exact.abs() + 1e-7).all()


def test_with_fewer_than_all_logits_the_greatest_are_kept_and_compared():
    made, strategy = prepared(top_logits=5)
    records = strategy.kept[:4]
    apart = []
    for r in records:
        ours = logits_by_hand(made, r["example"])
        assert r["logits"].shape == r["columns"].shape == (len(ours), 5)
        apart.append((ours.gather(1, r["columns"].long()) - r["logits"]).square())
    batch = made.batch([replace(r["example"], id=str(i)) for i, r in enumerate(records)])
    assert logit_distance(made, batch, records).item() == pytest.approx(
        torch.cat(apart).mean().item(), rel=1e-9
    )
    new = logits_by_hand(made, e := toy.make_examples(2)[0])
    strategy.kept.clear()
    strategy.seen = 0
    strategy.store_logits(made, made.batch([e]))
    assert torch.equal(strategy.kept[0]["columns"].long().sort(1)[0], new.topk(5)[1].sort(1)[0])


def test_as_many_logits_as_the_vocabulary_has_are_all_of_them():
    (whole, all_of_them), (cut, _) = prepared(top_logits=toy.VOCAB_SIZE), prepared(top_logits=1024)
    assert toy.bitwise_equal(snapshot(whole), snapshot(cut))
    assert all(r["columns"] is None for r in all_of_them.kept)


def test_the_distance_is_nothing_where_the_model_is_as_it_was():
    made, strategy = toy.make_model(), DER(**WHOLE)
    strategy.store_logits(made, made.batch(toy.make_examples(0)[:4]))
    batch = made.batch([replace(e, id=str(i)) for i, e in enumerate(toy.make_examples(0)[:4])])
    assert logit_distance(made, batch, strategy.kept).item() < 1e-6


def test_an_example_that_comes_in_every_epoch_is_kept_as_it_was_at_several_times():
    made, strategy = toy.make_model(torch.float64), DER(capacity=100)
    toy.train_stages(made, strategy, 0, size=4, recipe=Recipe(lr=3e-3, epochs=3, batch_size=4))
    assert Counter(r["example"].id for r in strategy.kept) == {f"a/{i}": 3 for i in range(4)}
    times = [r["logits"] for r in strategy.kept if r["example"].id == "a/0"]
    assert not torch.equal(times[0], times[1])


def test_the_buffer_never_holds_more_than_its_capacity():
    made, strategy = toy.make_model(), DER(capacity=7)
    toy.train_stages(made, strategy, 0, 1, recipe=Recipe(lr=1e-3, epochs=3, batch_size=5))
    assert (len(strategy.kept), strategy.seen) == (7, 72)


def test_kept_logits_are_those_without_dropout_and_leave_the_model_as_it_was():
    made = toy.make_model()
    made.net.train()
    first = {i: z for i, _, z in response_logits(made, toy.make_examples(0))}
    assert made.net.training
    assert all(
        torch.allclose(first[i], logits_by_hand(made, e), atol=1e-5)
        for i, e in enumerate(toy.make_examples(0))
    )


@pytest.mark.parametrize(
    "wrong",
    [{"capacity": -1}, {"alpha": -0.1}, {"beta": -1}, {"minibatch_size": 0}, {"top_logits": 0}],
)
def test_numbers_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match="DER with"):
        DER(**wrong)


class Bigrams(torch.nn.Module):
    """Each token's logits follow from the one before it: a language model and a classifier alike."""

    def __init__(self):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=self.head(self.words(input_ids)))


@pytest.mark.filterwarnings("ignore")  # Avalanche's own imports
def test_a_step_is_avalanche_s_where_both_terms_have_the_same_examples(monkeypatch):
    avalanche = pytest.importorskip(
        "avalanche.training.supervised.der", reason="the extra avalanche-lib"
    )
    torch.manual_seed(0)
    ours = Model(Bigrams(), None, Layout(pad_token_id=1, device=torch.device("cpu")))
    theirs = torch.nn.Sequential(ours.net.words, ours.net.head)
    rows = [make_encoded([x], [y], id=str(x)) for x, y in ((2, 3), (4, 8), (5, 2), (6, 6), (7, 3))]
    strategy = DER(alpha=0.3, beta=0.7, minibatch_size=2, capacity=2)
    strategy.store_logits(ours, ours.batch(rows[:2]))
    with torch.no_grad():
        ours.net.head.weight += torch.randn(9, 4)
    held = [*strategy.kept]
    monkeypatch.setattr(strategy, "draw_records", lambda: held)
    ours.net.zero_grad()
    strategy.backward(ours, ours.batch(rows[2:]))
    got = gradient(ours)
    before = snapshot(ours)

    made = avalanche.DER(
        model=theirs,
        optimizer=torch.optim.SGD(theirs.parameters(), lr=1.0),
        alpha=0.3,
        beta=0.7,
        batch_size_mem=2,
        evaluator=None,
    )
    x, y = (torch.tensor([e.ids[i] for e in rows]) for i in (0, 1))
    kept = torch.cat([r["logits"].float() for r in held])
    made.dataloader = [[x[2:], y[2:], torch.zeros(3)]]
    made.replay_loader = iter([[x[:2], y[:2], torch.zeros(2), kept]])
    made.training_epoch()
    assert toy.all_close(
        got, {n: before[n] - w for n, w in snapshot(ours).items()}, rtol=1e-4, atol=1e-6
    )
