"""What a step leaves alone, and the orthonormal basis of what it must, by brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.models.weights import flatten_weights, gradient, unflatten_weights, weights
from continual.strategy.projection import project_out
from continual.strategy.replay_buffer import sample_task_examples
from strategies.ogd import OGD, add_direction
from tests.support import toy

KEPT = 3


def right_logits(made, e) -> torch.Tensor:
    """The sum of the logits of an example's response, straight from the network; a scalar."""
    logits = made.net(input_ids=torch.tensor([e.ids])).logits[0]
    return sum(logits[t - 1, e.ids[t]] for t in range(1, len(e.ids)) if e.response_mask[t])


def direction(made, e) -> torch.Tensor:
    grads = torch.autograd.grad(right_logits(made, e), list(weights(made).values()))
    return torch.cat([g.flatten() for g in grads])


def learned(*tasks: int):
    """A model and a strategy after these tasks, the raw directions of what it keeps, taken at each
    task's end.
    """
    made, strategy, raw = toy.make_model(torch.float64), OGD(num_examples=KEPT), []
    for i, t in enumerate(tasks, 1):
        toy.train_stages(made, strategy, t, size=6)
        raw += [
            direction(made, e) for e in sample_task_examples(toy.make_task(t, 6), KEPT, f"0/{i}")
        ]
    return made, strategy, torch.stack(raw)


def step(made, strategy, examples) -> torch.Tensor:
    made.net.zero_grad()
    strategy.begin(made, toy.make_task(2))
    strategy.backward(made, made.batch(examples))
    return flatten_weights(gradient(made))


def test_a_step_has_no_part_along_any_kept_logit_s_gradient():
    made, strategy, raw = learned(0, 1)
    made.net.zero_grad()
    toy.mean_loss(made.net, toy.make_examples(2)).backward()
    before, after = flatten_weights(gradient(made)), step(made, strategy, toy.make_examples(2))
    size = raw.norm(dim=1)
    assert (raw @ before / size).abs().max() > 1e-2 * before.norm()
    assert (raw @ after / size).abs().max() < 1e-9 * before.norm()


def test_it_is_the_gradient_less_its_projection_on_the_raw_directions_by_brute_force():
    made, strategy, raw = learned(0, 1)
    made.net.zero_grad()
    toy.mean_loss(made.net, toy.make_examples(2)).backward()
    g = flatten_weights(gradient(made))
    expected = g - raw.T @ torch.linalg.lstsq(raw.T, g[:, None]).solution[:, 0]
    assert torch.allclose(
        step(made, strategy, toy.make_examples(2)), expected, rtol=1e-5, atol=1e-7
    )


def test_a_small_step_along_it_leaves_the_kept_logits_to_second_order():
    made, strategy, _ = learned(0)
    kept = sample_task_examples(toy.make_task(0, 6), KEPT, "0/1")
    g = unflatten_weights(step(made, strategy, toy.make_examples(1)), weights(made))
    drift = []
    with torch.no_grad():
        for size in (1e-3, 5e-4):
            before = torch.stack([right_logits(made, e) for e in kept])
            for n, w in weights(made).items():
                w -= size * g[n]
            drift.append(
                (torch.stack([right_logits(made, e) for e in kept]) - before).abs().max().item()
            )
            for n, w in weights(made).items():
                w += size * g[n]
    assert drift[1] == pytest.approx(drift[0] / 4, rel=0.1)


def test_the_basis_is_orthonormal_and_holds_a_direction_an_example():
    _, strategy, raw = learned(0, 1, 2)
    assert strategy.basis.shape == raw.shape
    assert torch.allclose(
        strategy.basis @ strategy.basis.T, torch.eye(len(raw), dtype=torch.float64), atol=1e-12
    )


def test_it_is_gram_schmidt_by_hand():
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, by_hand = torch.zeros(0, 0), []
    for u in rows:
        basis = add_direction(basis, u)
        for b in by_hand:
            u = u - (u @ b) * b
        by_hand.append(u / u.norm())
    assert torch.allclose(basis, torch.stack(by_hand), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 4))
def test_directions_that_are_known_already_are_not_kept_twice(seed, fresh, known):
    """Float32, and rows that all but coincide: orthonormal nonetheless, and of the rank that there
    is.
    """
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(fresh, 30, generator=rng)
    again = torch.randn(known, fresh, generator=rng) @ rows
    basis = torch.zeros(0, 0)
    for u in [*rows, *again]:
        basis = add_direction(basis, u)
    assert len(basis) == fresh
    assert torch.allclose(basis @ basis.T, torch.eye(fresh), atol=1e-5)
    assert all(project_out(u, basis.T).norm() <= 1e-4 * u.norm() + 1e-6 for u in again)


def test_the_first_task_is_learned_as_if_alone():
    made, strategy = toy.make_model(torch.float64), OGD()
    expected = torch.autograd.grad(
        toy.mean_loss(made.net, toy.make_examples(0)), list(weights(made).values())
    )
    got = step(made, strategy, toy.make_examples(0))
    assert torch.allclose(got, torch.cat([g.flatten() for g in expected]), rtol=1e-5, atol=1e-8)
