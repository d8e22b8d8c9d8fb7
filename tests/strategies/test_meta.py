"""ANIL by hand, Meta-SGD against learn2learn."""

from copy import deepcopy

import pytest
import torch

from continual.errors import ConfigError
from continual.models.loading import add_adapter
from continual.models.weights import flatten_weights
from strategies.maml import MAML, head_weights
from tests.support import toy
from tests.support.meta import INNER, halves, looked_ahead, scattered, step

# ANIL


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("second_order", [False, True])
def test_anil_s_inner_loop_changes_the_head_alone_and_all_is_learned(kind, second_order):
    made, chosen = toy.make_model(torch.float64, kind=kind), toy.make_examples(0, 6)
    support, query = halves(chosen)
    rate = {n: torch.full_like(w, INNER) for n, w in head_weights(made).items()}
    expected, _ = looked_ahead(made.net, [support] * 2, query, rate, second_order)
    got = step(
        made,
        MAML(
            capacity=0, inner_lr=INNER, inner_steps=2, inner_scope="head", second_order=second_order
        ),
        chosen,
    )
    assert toy.all_close(got, expected, rtol=1e-8)


def test_the_head_is_the_lm_head_s_own_weight_or_what_is_trained_in_the_last_layer():
    assert list(head_weights(toy.make_model())) == ["lm_head.weight"]
    tied = head_weights(toy.make_model(kind="gpt2"))
    assert len(tied) == 12
    assert all(n.startswith("transformer.h.1.") for n in tied)
    frozen = toy.make_model(kind="gpt2")
    frozen.net.transformer.h[1].requires_grad_(False)
    assert all(n.startswith("transformer.h.0.") for n in head_weights(frozen))


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
def test_under_an_adapter_the_head_is_the_last_layer_s_part_of_it():
    made = toy.make_model()
    made.net = add_adapter(
        made.net, "lora", {"lora": {"r": 2, "target_modules": "all-linear"}}, seq2seq=False
    )
    assert head_weights(made)
    assert all(".layers.1." in n and "lora" in n for n in head_weights(made))


def test_without_a_trained_head_or_layer_anil_is_refused():
    made = toy.make_model()
    made.net.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    with pytest.raises(
        ConfigError, match="inner_scope=head: no weight of the LM head's own and none of a layer"
    ):
        step(made, MAML(capacity=0, inner_scope="head"), toy.make_examples(0, 4))


# Meta-SGD


@pytest.mark.filterwarnings("ignore")  # of learn2learn's own imports
@pytest.mark.parametrize("first_order", [True, False])
def test_meta_sgd_s_gradients_of_weights_and_rates_equal_learn2learn_s(first_order):
    algorithms = pytest.importorskip("learn2learn.algorithms")
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    net, rates = deepcopy(made.net), scattered(made)
    theirs = algorithms.MetaSGD(
        net, lrs=[torch.nn.Parameter(r) for r in rates.values()], first_order=first_order
    )
    learner = theirs.clone()
    with toy.no_fused_attention():
        for _ in range(2):
            learner.adapt(toy.mean_loss(learner, chosen[:3]))
        toy.mean_loss(learner, chosen[3:]).backward()
    ours = MAML(capacity=0, inner_steps=2, inner_optimizer="meta_sgd", second_order=not first_order)
    ours.begin(made, toy.make_task(0))
    ours.rates.data.copy_(flatten_weights(rates))
    assert toy.all_close(
        step(made, ours, chosen), {n: p.grad for n, p in net.named_parameters()}, rtol=1e-8
    )
    assert torch.allclose(
        ours.rates.grad, torch.cat([r.grad.flatten() for r in theirs.lrs]), 1e-8, 1e-10
    )


def test_meta_sgd_begins_as_maml_and_learns_its_rates():
    made, chosen = toy.make_model(torch.float64), toy.make_examples(0, 6)
    ours = MAML(capacity=0, inner_lr=INNER, inner_optimizer="meta_sgd")
    ours.begin(made, toy.make_task(0))
    assert (ours.rates == INNER).all()
    assert toy.all_close(
        step(made, ours, chosen), step(made, MAML(capacity=0, inner_lr=INNER), chosen)
    )
    toy.train_stages(made, ours, 0)
    moved = (ours.rates - INNER).abs()
    assert (moved > 0).float().mean() > 0.5
    learned = ours.rates.detach().clone()
    ours.begin(made, toy.make_task(1))
    assert torch.equal(ours.rates, learned)


@pytest.mark.parametrize(("key", "value"), [("inner_optimizer", "adam"), ("inner_scope", "body")])
def test_an_inner_loop_that_does_not_exist_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"unknown {key} '{value}'"):
        MAML(**{key: value})
