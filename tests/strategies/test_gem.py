"""The projection against a general solver, its optimality conditions and Avalanche; what steps it
is applied to.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from continual.models.weights import flatten_weights, gradient, weights
from strategies.gem import AGEM, GEM, project_gradient
from tests.support import toy

WIDE = 12  # numbers in a gradient of the tests that need no model
seeds = st.integers(0, 10_000)


def gradients(seed: int, tasks: int, opposed: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A step's gradient and those of the remembered tasks, most of which it opposes."""
    rng = torch.Generator().manual_seed(seed)
    g = torch.randn(WIDE, generator=rng, dtype=torch.float64)
    others = torch.randn(tasks, WIDE, generator=rng, dtype=torch.float64)
    return g, others - 0.5 * g if opposed else others


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_nearest_vector_that_opposes_no_other_by_a_general_solver(seed):
    """The primal, eq. 8-9 of Lopez-Paz & Ranzato (2017), which knows nothing of the dual."""
    g, others = gradients(seed, tasks=1 + seed % 5)
    start, rows = g.numpy(), others.numpy()
    unopposed = {"type": "ineq", "fun": lambda z: rows @ z, "jac": lambda z: rows}
    solved = minimize(
        lambda z: 0.5 * ((z - start) ** 2).sum(),
        start,
        jac=lambda z: z - start,
        constraints=unopposed,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solved.success
    assert np.allclose(project_gradient(g, others), solved.x, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 6), st.booleans())
def test_the_optimality_conditions_hold(seed, tasks, opposed):
    """What is added lies in the cone of the others, and is orthogonal to the result, which opposes
    none of them.
    """
    g, others = gradients(seed, tasks, opposed)
    z = project_gradient(g, others)
    v = torch.linalg.lstsq(others.T, (z - g)[:, None]).solution[:, 0]
    assert (others @ z > -1e-9).all()
    assert (v > -1e-9).all()
    assert abs((z - g) @ z) < 1e-9


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 6))
def test_a_second_projection_changes_nothing(seed, tasks):
    g, others = gradients(seed, tasks)
    once = project_gradient(g, others)
    assert torch.allclose(project_gradient(once, others), once, atol=1e-9)


def test_a_gradient_that_opposes_none_is_left_as_it_is_bit_for_bit_whatever_the_margin():
    g, others = gradients(0, tasks=3, opposed=False)
    others *= torch.sign(others @ g)[:, None]
    assert project_gradient(g, others, margin=0.5) is g


@pytest.mark.parametrize("rows", [[0, 0, 0], [0, 1, 0, 1]])
def test_tasks_that_ask_for_the_same_need_no_other_care(rows):
    g, others = gradients(3, tasks=2)
    assert torch.allclose(
        project_gradient(g, others[rows]), project_gradient(g, others[sorted(set(rows))]), atol=1e-9
    )


def test_a_task_that_asks_for_nothing_is_passed_over():
    g, others = gradients(3, tasks=2)
    assert torch.allclose(
        project_gradient(g, torch.cat([others, torch.zeros(1, WIDE)])),
        project_gradient(g, others),
        atol=1e-9,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_for_the_stage_to_see(bad):
    g, others = gradients(0, tasks=2)
    others[1, 3] = bad
    assert not project_gradient(g, others).isfinite().all()


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_avalanche_s(seed, margin):
    """Which adds 1e-3 to the diagonal of the programme: hence large gradients."""
    GEMPlugin = pytest.importorskip("avalanche.training.plugins").GEMPlugin
    g, others = (100 * t for t in gradients(seed, tasks=3))
    plugin = GEMPlugin(1, margin)
    plugin.G = others
    theirs = plugin.solve_quadprog(g).double()
    assert torch.allclose(project_gradient(g, others, margin), theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_with_one_other_it_is_avalanche_s_a_gem(seed):
    """Eq. 11 of Chaudhry et al. (2019)."""
    AGEMPlugin = pytest.importorskip("avalanche.training.plugins").AGEMPlugin
    g, others = gradients(seed, tasks=1, opposed=seed % 2 == 0)
    layer = torch.nn.Linear(WIDE, 1, bias=False, dtype=torch.float64)
    layer.weight.grad = g.clone()[None]
    plugin = AGEMPlugin(1, 1)
    plugin.buffers, plugin.reference_gradients = [None], others[0]
    plugin.after_backward(SimpleNamespace(model=layer, device="cpu"))
    assert torch.allclose(project_gradient(g, others), layer.weight.grad[0], atol=1e-12)


# In a stage


def remembering(kind, dtype=torch.float64, **more):
    """A model and a strategy that remember two tasks, and the batch of a third."""
    made, strategy = toy.make_model(dtype), kind(capacity=8, **more)
    toy.train_stages(made, strategy, 0, 1, size=8)
    strategy.begin(made, toy.make_task(2))
    return made, strategy, made.batch(toy.make_examples(2, 6))


def step(made, strategy, batch) -> torch.Tensor:
    made.net.zero_grad()
    strategy.backward(made, batch)
    return flatten_weights(gradient(made))


def gradient_of(made, chosen) -> torch.Tensor:
    """The gradient of the mean loss, straight from the network."""
    live = weights(made)
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(toy.mean_loss(made.net, chosen), list(live.values()))
        ]
    )


def test_gem_holds_each_remembered_task_to_its_mean_loss():
    made, strategy, batch = remembering(GEM, margin=0.0)
    others = torch.stack([gradient_of(made, strategy.buffer.tasks[name]) for name in ("a", "b")])
    g = gradient_of(made, batch.examples)
    assert (others @ g < 0).any()
    got = step(made, strategy, batch)
    assert torch.allclose(got, project_gradient(g, others), rtol=1e-5, atol=1e-7)
    assert (others @ got > -1e-6 * others.norm(dim=1) * got.norm()).all()


def test_gem_s_margin_turns_the_step_towards_earlier_tasks():
    kept = []
    for margin in (0.0, 1.0):
        made, strategy, batch = remembering(GEM, margin=margin)
        got = step(made, strategy, batch)
        kept.append(gradient_of(made, strategy.buffer.examples) @ got)
    assert kept[1] > kept[0]


def test_a_gem_holds_the_mean_over_all_it_remembers():
    made, strategy, _ = remembering(AGEM, sample_size=None)
    r, products = gradient_of(made, strategy.buffer.examples), []
    for e in toy.make_examples(2):
        g = gradient_of(made, [e])
        products.append(g @ r)
        expected = g - min(g @ r, 0) / (r @ r) * r
        assert torch.allclose(step(made, strategy, made.batch([e])), expected, rtol=1e-5, atol=1e-7)
    assert min(products) < 0 < max(products)


@pytest.mark.parametrize("kind", [GEM, AGEM])
def test_steps_of_weights_in_bfloat16_are_projected_as_well(kind):
    made, strategy, _ = remembering(kind, torch.bfloat16)
    others = torch.stack([gradient_of(made, pool).float() for pool in strategy.reference_pools()])
    before, after = [], []
    for e in toy.make_examples(2):
        for found, g in (
            (before, gradient_of(made, [e])),
            (after, step(made, strategy, made.batch([e]))),
        ):
            found.append(F.cosine_similarity(others, g.float()).min())
    assert min(before) < -0.02
    assert min(after) > -0.005


@pytest.mark.parametrize(("kind", "sizes"), [(GEM, [3, 3]), (AGEM, [3])])
def test_a_step_s_sample_is_drawn_anew_of_each_pool(kind, sizes):
    _, strategy, _ = remembering(kind, sample_size=3)
    drawn = [strategy.draw_reference_examples() for _ in range(6)]
    assert all([len(d) for d in one] == sizes for one in drawn)
    assert len({tuple(e.id for d in one for e in d) for one in drawn}) > 1
    if kind is GEM:
        assert all({e.task_index for e in d} == {t} for one in drawn for t, d in enumerate(one))


def test_a_sample_larger_than_what_is_remembered_is_all_of_it():
    _, strategy, _ = remembering(AGEM, sample_size=100)
    assert {e.id for e in strategy.draw_reference_examples()[0]} == {
        e.id for e in strategy.buffer.examples
    }


@pytest.mark.parametrize("kind", [GEM, AGEM])
def test_the_first_task_is_learned_as_if_alone(kind):
    made = toy.make_model()
    strategy = kind(capacity=8)
    strategy.begin(made, toy.make_task(0))
    batch = made.batch(toy.make_examples(0))
    assert torch.allclose(
        step(made, strategy, batch), gradient_of(made, batch.examples), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", [GEM, AGEM])
def test_a_share_is_replayed_as_well(kind):
    _, strategy, batch = remembering(kind, share=0.5)
    assert len(strategy.add_replay_examples(batch).examples) == 2 * len(batch.examples)
