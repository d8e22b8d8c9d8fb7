"""The strongest singular directions of every matrix stay, whatever the optimizer; gradients are
those of peft's OSF.
"""

from copy import deepcopy
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual.errors import ConfigError
from continual.models.loading import add_adapter
from continual.models.loss import nll
from continual.models.weights import snapshot, weights
from strategies.osf import OSF, project_off_subspaces, top_singular_vectors, trained_matrices
from tests.support import toy


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
def test_a_step_s_gradient_is_that_of_pefts_osf_for_each_of_its_factors():
    made = toy.make_model(torch.float64)
    config = peft.OSFConfig(task_type="CAUSAL_LM", effective_rank=0.5, target_modules="all-linear")
    theirs = replace(made, net=peft.get_peft_model(deepcopy(made.net), config), last_layer=None)
    batch, strategy = made.batch(toy.make_examples(0)), OSF()
    strategy.begin(made, toy.make_task(0))
    strategy.backward(made, batch)
    nll(theirs, batch).backward()
    layers = {n: m for n, m in theirs.net.named_modules() if hasattr(m, "osf_svd_params")}
    assert {f"{n.removeprefix('base_model.model.')}.weight" for n in layers} == set(
        strategy.frozen_subspaces
    )
    for name, layer in layers.items():
        g = made.net.get_parameter(f"{name.removeprefix('base_model.model.')}.weight").grad
        f = layer.osf_svd_params["default"]
        u, s, v = f["U_low"].detach(), f["S_low"].detach(), f["V_low"].detach()
        # The chain rule for W = ... + U_low S_low V_low, of a gradient that was projected as a
        # whole. peft's decomposition is in float32.
        for ours, own in (
            (g @ v.T * s, f["U_low"]),
            ((u.T @ g @ v.T).diagonal(), f["S_low"]),
            (s[:, None] * (u.T @ g), f["V_low"]),
        ):
            torch.testing.assert_close(ours, own.grad, rtol=1e-4, atol=1e-6)


def test_after_a_stage_of_adamw_the_kept_directions_are_as_they_were():
    made, strategy = toy.make_model(torch.float64), OSF()
    start = snapshot(made)
    toy.train_stages(made, strategy, 0, recipe=replace(toy.RECIPE, weight_decay=0.1))
    for n, w in trained_matrices(made).items():
        u, v = top_singular_vectors(start[n], 0.5)
        moved = w.detach() - start[n]
        assert moved.norm() > 1e-3
        assert (u.T @ moved).abs().max() < 1e-12
        assert (moved @ v).abs().max() < 1e-12
        torch.testing.assert_close(
            u.T @ w @ v, torch.diag(torch.linalg.svdvals(start[n])[: u.shape[1]])
        )


def test_without_the_correction_adamw_would_leave_them():
    made, strategy = toy.make_model(torch.float64), OSF()
    strategy.restore_frozen = lambda model: None
    start = snapshot(made)
    toy.train_stages(made, strategy, 0)
    assert (
        max(
            float((top_singular_vectors(start[n], 0.5)[0].T @ (w.detach() - start[n])).abs().max())
            for n, w in trained_matrices(made).items()
        )
        > 1e-3
    )


def test_each_stage_decomposes_the_weights_as_it_finds_them():
    made, strategy = toy.make_model(), OSF()
    toy.train_stages(made, strategy, 0)
    assert not strategy.frozen_subspaces
    strategy.begin(made, toy.make_task(1))
    assert all(torch.equal(start, w) for w, start, *_ in strategy.frozen_with_weights(made))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ("norm", "embed", "lm_head")),
        ("gpt2", ("wte", "wpe", "ln_", "bias")),
        ("t5", ("norm", "shared", "lm_head", "relative_attention_bias")),
    ],
)
def test_embeddings_and_vectors_train_freely(kind, names):
    made = toy.make_model(kind=kind)
    free = set(weights(made)) - set(trained_matrices(made))
    assert free == {n for n in weights(made) if any(name in n for name in names)}


def test_of_a_new_adapter_the_factor_at_zero_trains_freely():
    made, strategy = toy.make_model(), OSF()
    made.net = add_adapter(
        made.net, "lora", {"lora": {"r": 4, "target_modules": "all-linear"}}, seq2seq=False
    )
    strategy.begin(made, toy.make_task(0))
    assert {
        (int(u.any(0).sum()), "lora_A" in n) for n, (_, u, _) in strategy.frozen_subspaces.items()
    } == {
        (2, True),
        (0, False),
    }


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_the_projection_keeps_what_is_orthogonal_and_nothing_else(m, n, share, seed):
    generator = torch.Generator().manual_seed(seed)
    w, d = (torch.randn(m, n, dtype=torch.float64, generator=generator) for _ in "wd")
    u, v = top_singular_vectors(w, share)
    p = project_off_subspaces(d, u, v)
    assert u.shape == (m, int(min(m, n) * share))
    torch.testing.assert_close(
        u.T @ p, torch.zeros(u.shape[1], n, dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(project_off_subspaces(p, u, v), p, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        ((d - p) * p).sum().abs(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_what_is_no_share_is_refused():
    with pytest.raises(ConfigError, match=r"osf with keep 1.5: expected a share"):
        OSF(rank_share=1.5)
