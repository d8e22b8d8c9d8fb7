"""A stage of sparse fine-tuning trains the chosen weights and leaves all others bit for bit."""

import pytest
import torch

from continual.errors import ConfigError
from continual.models.importance import fisher
from continual.models.weights import flatten_weights, snapshot, weights
from strategies.sparse import Sparse
from tests.support import toy

DECAYING = toy.replace(toy.RECIPE, weight_decay=0.1)


def moved(made, strategy, task: int, recipe=DECAYING) -> torch.Tensor:
    """(P,) which weights a stage has changed."""
    before = snapshot(made)
    toy.train_stages(made, strategy, task, recipe=recipe)
    return flatten_weights(snapshot(made)) != flatten_weights(before)


def largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """(P,) by sorting."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.sort(descending=True).indices[:k]] = True
    return chosen


def test_only_the_weights_with_the_largest_fisher_information_move_under_momentum_and_weight_decay():
    made, strategy = toy.make_model(torch.float64), Sparse(fraction=0.02)
    for t in (0, 1):  # and each task has weights of its own
        f = flatten_weights(fisher(made, toy.make_examples(t)))
        expected = largest(f, int(0.02 * len(f)))
        assert torch.equal(moved(made, strategy, t), expected)


def test_the_masks_of_different_tasks_differ():
    made, strategy = toy.make_model(torch.float64), Sparse(fraction=0.02)
    assert not torch.equal(moved(made, strategy, 0), moved(made, strategy, 1))


def test_what_matters_most_to_earlier_tasks_can_be_avoided():
    made, strategy = toy.make_model(torch.float64), Sparse(fraction=0.05, protected_fraction=0.3)
    moved(made, strategy, 0)
    needed = flatten_weights(fisher(made, toy.make_examples(0)))
    spared = largest(needed, int(0.3 * len(needed)))
    free = flatten_weights(fisher(made, toy.make_examples(1))).masked_fill(spared, -1)
    found = moved(made, strategy, 1)
    assert torch.equal(found, largest(free, int(0.05 * len(free))))
    needed += flatten_weights(fisher(made, toy.make_examples(1)))
    assert torch.allclose(flatten_weights(strategy.needed), needed, rtol=1e-9)


def test_a_frozen_weight_stays_in_every_step_s_forward_pass():
    """Not only at the stage's end: what weight decay takes is back before the next gradient."""
    seen = []

    class Looking(Sparse):
        def loss(self, model, batch):
            seen.append(flatten_weights(weights(model)).detach().clone())
            return super().loss(model, batch)

    made, strategy = toy.make_model(), Looking(fraction=0.02)
    frozen = ~moved(made, strategy, 0)
    assert len(seen) > 3
    assert all(torch.equal(w[frozen], seen[0][frozen]) for w in seen)


def test_the_mask_is_of_the_model_without_dropout_and_leaves_its_mode_alone():
    made, strategy = toy.make_model(torch.float64), Sparse(fraction=0.02)
    for layer in made.net.model.layers:
        layer.self_attn.attention_dropout = 0.9
    made.net.train()
    strategy.begin(made, toy.make_task(0))
    assert made.net.training
    made.net.eval()
    f = flatten_weights(fisher(made, toy.make_examples(0)))
    assert torch.equal(flatten_weights(strategy.mask), largest(f, int(0.02 * len(f))))


def test_after_a_stage_only_what_later_ones_avoid_is_kept():
    for avoid, kept in ((0.0, set()), (0.2, {"needed"})):
        made, strategy = toy.make_model(), Sparse(fraction=0.1, protected_fraction=avoid)
        toy.train_stages(made, strategy, 0, size=6)
        assert {path.split("/")[1] for path in toy.memory_tensors(strategy)} == kept


@pytest.mark.parametrize(("fraction", "avoid"), [(0.0, 0.0), (1.5, 0.0), (0.5, 0.6), (0.5, -0.1)])
def test_fractions_that_leave_nothing_to_train_are_refused(fraction, avoid):
    with pytest.raises(
        ConfigError, match="expected a fraction above 0 and both together at most 1"
    ):
        Sparse(fraction=fraction, protected_fraction=avoid)
