"""ANIL by hand, Meta-SGD against learn2learn, La-MAML's step and stage by hand."""

import random
from copy import deepcopy

import pytest
import torch
import toy
from test_maml import INNER, halves, remembering, step

from continual.errors import ConfigError
from continual.model import adapt_with
from continual.stage import Recipe, learn
from continual.weights import flat, unflat, weights
from strategies.lamaml import LaMAML
from strategies.maml import MAML, head


def functional(net, chosen: list, at: dict) -> torch.Tensor:
    """The mean loss at other weights, by torch's own means."""
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            return toy.mean_loss(self.net, chosen)

    with toy.no_fused_attention():
        return torch.func.functional_call(Loss(), {f"net.{n}": w for n, w in at.items()}, ())


def looked_ahead(net, steps: list[list], query: list, rates: dict, second_order: bool) -> tuple[dict, dict]:
    """The gradients of the query's loss after the steps, with respect to the weights and to the rates, by one graph."""
    start = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    rates, fast = {n: r.detach().clone().requires_grad_() for n, r in rates.items()}, start
    for chosen in steps:
        g = torch.autograd.grad(functional(net, chosen, fast), [fast[n] for n in rates], create_graph=second_order)
        fast = fast | {n: fast[n] - r * d for (n, r), d in zip(rates.items(), g, strict=True)}
    found = torch.autograd.grad(functional(net, query, fast), [*start.values(), *rates.values()])
    return dict(zip(start, found, strict=False)), dict(zip(rates, found[len(start):], strict=True))


def scattered(made, seed: int = 0) -> dict[str, torch.Tensor]:
    """A rate of each weight, between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(w.shape, generator=generator, dtype=w.dtype) for n, w in weights(made).items()}


# ANIL

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("second_order", [False, True])
def test_anil_s_inner_loop_changes_the_head_alone_and_all_is_learned(kind, second_order):
    made, chosen = toy.model(torch.float64, kind=kind), toy.examples(0, 6)
    support, query = halves(chosen)
    rate = {n: torch.full_like(w, INNER) for n, w in head(made).items()}
    expected, _ = looked_ahead(made.net, [support] * 2, query, rate, second_order)
    got = step(made, MAML(capacity=0, inner_lr=INNER, inner_steps=2, adapts="head", second_order=second_order), chosen)
    assert toy.close(got, expected, rtol=1e-8)


def test_the_head_is_the_lm_head_s_own_weight_or_what_is_trained_in_the_last_layer():
    assert list(head(toy.model())) == ["lm_head.weight"]
    tied = head(toy.model(kind="gpt2"))
    assert len(tied) == 12
    assert all(n.startswith("transformer.h.1.") for n in tied)
    frozen = toy.model(kind="gpt2")
    frozen.net.transformer.h[1].requires_grad_(False)
    assert all(n.startswith("transformer.h.0.") for n in head(frozen))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_under_an_adapter_the_head_is_the_last_layer_s_part_of_it():
    made = toy.model()
    made.net = adapt_with(made.net, "lora", {"lora": {"r": 2, "target_modules": "all-linear"}}, seq2seq=False)
    assert head(made)
    assert all(".layers.1." in n and "lora" in n for n in head(made))


def test_without_a_trained_head_or_layer_anil_is_refused():
    made = toy.model()
    made.net.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    with pytest.raises(ConfigError, match="adapts=head: no weight of the LM head's own and none of a layer"):
        step(made, MAML(capacity=0, adapts="head"), toy.examples(0, 4))


# Meta-SGD

@pytest.mark.filterwarnings("ignore")  # of learn2learn's own imports
@pytest.mark.parametrize("first_order", [True, False])
def test_meta_sgd_s_gradients_of_weights_and_rates_equal_learn2learn_s(first_order):
    algorithms = pytest.importorskip("learn2learn.algorithms")
    made, chosen = toy.model(torch.float64), toy.examples(0, 6)
    net, rates = deepcopy(made.net), scattered(made)
    theirs = algorithms.MetaSGD(net, lrs=[torch.nn.Parameter(r) for r in rates.values()], first_order=first_order)
    learner = theirs.clone()
    with toy.no_fused_attention():
        for _ in range(2):
            learner.adapt(toy.mean_loss(learner, chosen[:3]))
        toy.mean_loss(learner, chosen[3:]).backward()
    ours = MAML(capacity=0, inner_steps=2, inner="meta_sgd", second_order=not first_order)
    ours.begin(made, toy.task(0))
    ours.rates.data.copy_(flat(rates))
    assert toy.close(step(made, ours, chosen), {n: p.grad for n, p in net.named_parameters()}, rtol=1e-8)
    assert torch.allclose(ours.rates.grad, torch.cat([r.grad.flatten() for r in theirs.lrs]), 1e-8, 1e-10)


def test_meta_sgd_begins_as_maml_and_learns_its_rates():
    made, chosen = toy.model(torch.float64), toy.examples(0, 6)
    ours = MAML(capacity=0, inner_lr=INNER, inner="meta_sgd")
    ours.begin(made, toy.task(0))
    assert (ours.rates == INNER).all()
    assert toy.close(step(made, ours, chosen), step(made, MAML(capacity=0, inner_lr=INNER), chosen))
    toy.train(made, ours, 0)
    moved = (ours.rates - INNER).abs()
    assert (moved > 0).float().mean() > 0.5
    learned = ours.rates.detach().clone()
    ours.begin(made, toy.task(1))
    assert torch.equal(ours.rates, learned)


@pytest.mark.parametrize(("key", "value"), [("inner", "adam"), ("adapts", "body")])
def test_an_inner_loop_that_does_not_exist_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"unknown {key} '{value}'"):
        MAML(**{key: value})


# La-MAML

@pytest.mark.parametrize("second_order", [False, True])
def test_la_maml_moves_the_rates_first_and_then_leaves_the_step_that_they_give(second_order):
    made, strategy = remembering(LaMAML, 0, 1, share=0.5, inner_steps=3, second_order=second_order,
                                 clip=None)
    strategy.begin(made, toy.task(2))
    rates = {n: r - 0.3 for n, r in scattered(made).items()}  # some are negative
    strategy.rates.data.copy_(flat(rates))
    new = toy.examples(2, 5)
    every = list(deepcopy(strategy).joined(made.batch(new)).examples)
    assert len(every) == 10
    g, slope = looked_ahead(made.net, [new[0::3], new[1::3], new[2::3]], every, rates, second_order)
    got = step(made, strategy, new)
    moved = unflat(strategy.rates.detach(), rates)
    assert toy.close(moved, {n: rates[n] - 0.25 * slope[n] for n in rates}, rtol=1e-4, atol=1e-6)
    assert toy.close(got, {n: moved[n].clamp(min=0) * g[n] for n in g}, rtol=1e-4, atol=1e-6)
    assert any((moved[n] < 0).any() for n in moved)


def test_a_stage_of_la_maml_is_plain_descent_with_the_rates():
    made, strategy, chosen = toy.model(torch.float64), LaMAML(capacity=0, inner_steps=2, clip=None), toy.examples(0)
    net, rates = deepcopy(made.net), {n: torch.full_like(w, 0.1) for n, w in weights(made).items()}
    order = random.Random(0).sample(range(12), 12)
    for batch in ([chosen[i] for i in order[s : s + 4]] for s in (0, 4, 8)):
        g, slope = looked_ahead(net, [batch[0::2], batch[1::2]], batch, rates, second_order=False)
        rates = {n: r - 0.25 * slope[n] for n, r in rates.items()}
        with torch.no_grad():
            for n, w in net.named_parameters():
                w -= rates[n].clamp(min=0) * g[n]
    recipe = Recipe(lr=7.0, epochs=1, batch_size=4, schedule="constant", clip=None, weight_decay=0.5)
    learn(made, toy.task(0), strategy, recipe, seed=0, log=lambda event: None)
    assert toy.close(dict(made.net.named_parameters()), dict(net.named_parameters()), rtol=1e-3, atol=1e-5)


def test_la_maml_clips_the_gradients_before_the_rates_scale_them():
    made, ends = toy.model(torch.float64), {}
    for clip in (0.01, None):
        strategy = LaMAML(capacity=0, rates_lr=1.0, clip=clip)
        strategy.begin(made, toy.task(0))
        got = flat(step(made, strategy, toy.examples(0, 6)))
        ends[clip] = (strategy.rates - 0.1).norm(), (got / strategy.rates.clamp(min=1e-9)).norm()
    assert min(ends[None]) > 0.02
    assert max(ends[0.01]) < 0.01 + 1e-6


def test_la_maml_s_rates_stay_finite_where_a_step_is_skipped():
    made, strategy = toy.model(), LaMAML(capacity=0)
    strategy.begin(made, toy.task(0))
    next(made.net.parameters()).data[:] = torch.nan
    assert not step(made, strategy, toy.examples(0, 4))["lm_head.weight"].isfinite().all()
    assert (strategy.rates == 0.1).all()
