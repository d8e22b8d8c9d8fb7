"""GainLoRA: gates against a loop over examples and merged weights, and earlier tasks' prompts for
which they stay 0.
"""

import math
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual.errors import ConfigError
from continual.evaluation.likelihood import label_log_likelihoods
from continual.models.generation import generate_ids
from continual.models.lora import factors
from continual.models.loss import forward, nll
from continual.models.model import Model
from continual.models.weights import snapshot
from continual.strategy.compose import compose
from continual.strategy.interface import Strategy
from continual.strategy.projection import project_out
from continual.training.stage import train_stage
from strategies.gain_lora import (
    GainLoRA,
    extend_basis,
    gate_layer_inputs,
    mean_prompt_embeddings,
)
from strategies.gem import AGEM
from strategies.multitask import MultiTask
from strategies.per_task import PerTask
from strategies.replay import Replay
from tests.support import toy
from tests.support.models import make_encoded, run_in_process

RANK, ROOM, FEW = 2, 8, 8  # so few examples a task that three tasks leave room in 32 dimensions
RECIPE = replace(toy.RECIPE, lr=0.02, weight_decay=0.1)
EXACT = {"rank": RANK, "threshold": 1.0, "hidden_size": 30}


def trained(
    *indices: int, kind: str = "gpt2", recipe=RECIPE, strategy: Strategy | None = None, **layout
):
    """A model in float64 and the strategy after a stage of each of these tasks."""
    made = toy.make_model(torch.float64, kind=kind, lora_rank=ROOM, **layout)
    for part in made.net.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    strategy = GainLoRA(**EXACT) if strategy is None else strategy
    toy.train_stages(made, strategy, *indices, size=FEW, recipe=recipe)
    return made, strategy


def by_hand(strategy: GainLoRA, made: Model, prompt) -> dict[int, float]:
    """The gate of each branch for a prompt, by numbers alone."""
    words = made.net.get_input_embeddings().weight.tolist()
    p = [sum(column) / len(prompt) for column in zip(*(words[i] for i in prompt), strict=True)]
    found = {}
    for row, (*front, key) in strategy.gates.items():
        q = p
        for g in front:
            told = [math.fsum(w * x for w, x in zip(line, q, strict=True)) for line in g.tolist()]
            q = [x / (1 + math.exp(-x)) for x in told]
        (k,) = key.tolist()
        cosine = (
            math.fsum(a * b for a, b in zip(k, q, strict=True)) / math.hypot(*k) / math.hypot(*q)
        )
        found[row] = abs(2 / (1 + math.exp(-4 * cosine)) - 1)
    return found


def merged(strategy: GainLoRA, made: Model, prompt) -> Model:
    """A network of the weights W + sum_k g_k B_k A_k for this prompt, without a LoRA or a hook."""
    alone, gates = deepcopy(made), by_hand(strategy, made, prompt)
    with torch.no_grad():
        for _, b in factors(alone):
            for row, g in gates.items():
                b[:, row : row + RANK] *= g
    fresh = toy.make_model(torch.float64, kind="gpt2")
    return replace(fresh, net=alone.net.merge_and_unload())


def prompt(e):
    return e.ids[: e.response_mask.index(True)]


# One pass


def test_each_example_s_logits_are_those_of_weights_merged_by_its_gates():
    made, strategy = trained(0, 1, 2)
    batch = made.batch(
        [*toy.make_examples(0, 4), *toy.make_examples(1, 4, seed=5), *toy.make_examples(3, 3)]
    )
    found, lowest, highest = forward(made, batch), 1.0, 0.0
    for i, e in enumerate(batch.examples):
        alone = merged(strategy, made, prompt(e))
        logits = alone.net(input_ids=torch.tensor([e.ids])).logits[0]
        expected = logits[[t - 1 for t, said in enumerate(e.response_mask) if said]]
        torch.testing.assert_close(found[batch.example_index == i], expected, rtol=1e-9, atol=1e-10)
        gates = by_hand(strategy, made, prompt(e)).values()
        lowest, highest = min(lowest, *gates), max(highest, *gates)
    assert lowest < 0.01 < 0.5 < highest


def test_prompts_are_answered_together_as_each_is_by_its_merged_weights():
    made, strategy = trained(0, 1)
    asked = [
        replace(e, ids=prompt(e), response_mask=(False,) * len(prompt(e)))
        for e in (*toy.make_examples(0, 5), *toy.make_examples(1, 5), *toy.make_examples(2, 3))
    ]
    made = replace(
        toy.make_model(torch.float64, kind="gpt2", lora_rank=ROOM), net=made.net
    )  # as it is when it is built again
    assert made.layout.packed
    (turn,) = strategy.dispatch(made, [e.ids for e in asked])
    assert [*turn] == [*range(13)]
    said = generate_ids(made, asked, 4, 6, 0)
    assert said == [generate_ids(merged(strategy, made, e.ids), [e], 4, 1, 0)[0] for e in asked]
    labels = [(5, 6, 7), (8,)]
    alone = torch.cat(
        [label_log_likelihoods(merged(strategy, made, e.ids), [e], labels, 1) for e in asked]
    )
    torch.testing.assert_close(
        label_log_likelihoods(made, asked, labels, 6), alone, rtol=1e-8, atol=1e-9
    )


def test_an_encoder_s_gates_hold_for_its_decoder():
    made, strategy = trained(0, 1, kind="t5", decoder_start_token_id=1)
    (e,) = toy.make_examples(1, 1)
    apart = [forward(made, made.batch([x])) for x in (e, *toy.make_examples(0, 3))]
    together = made.batch([e, *toy.make_examples(0, 3)])
    found = forward(made, together)
    for i, expected in enumerate(apart):
        torch.testing.assert_close(
            found[together.example_index == i], expected, rtol=1e-9, atol=1e-10
        )
    strategy.gates = {
        row: [g * 0 for g in gate] for row, gate in strategy.gates.items()
    }  # all shut
    base = toy.make_model(torch.float64, kind="t5", decoder_start_token_id=1)
    torch.testing.assert_close(
        forward(made, made.batch([e])), forward(base, base.batch([e])), rtol=1e-9, atol=1e-10
    )


def test_before_the_first_stage_the_base_answers():
    made, strategy = trained()
    [*strategy.dispatch(made, [(3, 4)])]
    base = toy.make_model(torch.float64, kind="gpt2")
    torch.testing.assert_close(
        forward(made, made.batch(toy.make_examples(0))),
        forward(base, base.batch(toy.make_examples(0))),
    )


# Earlier tasks


@pytest.mark.parametrize(
    "recipe", [RECIPE, replace(RECIPE, optimizer="sgd", lr=0.5)], ids=["adamw", "sgd"]
)
def test_with_a_threshold_of_1_nothing_is_said_otherwise_for_a_prompt_of_an_earlier_task(recipe):
    made, strategy = trained(0, recipe=recipe)
    old = toy.make_examples(0, FEW)
    before, seen = forward(made, made.batch(old)).detach(), [snapshot(made)]
    for i in (1, 2):
        toy.train_stages(made, strategy, i, size=FEW, recipe=recipe)
        seen.append(snapshot(made))
        torch.testing.assert_close(
            forward(made, made.batch(old)).detach(), before, rtol=1e-9, atol=1e-9
        )
        assert strategy.gate_values(made, old)[:, i * RANK].abs().max() < 1e-10
        assert strategy.gate_values(made, toy.make_examples(i, FEW))[:, i * RANK].mean() > 0.2
    assert all(not toy.bitwise_equal(a, b) for a, b in pairwise(seen))


def test_a_new_gate_is_shut_for_earlier_prompts_at_first_and_at_every_step_in_every_layer():
    made, strategy = trained(0)
    old, told = toy.make_examples(0, FEW), []
    said = mean_prompt_embeddings(made, old)
    layers = gate_layer_inputs(strategy.gates[0], said)

    @torch.no_grad()
    def look(step, state):
        gate = strategy.current_gates()[RANK]
        moved = [float((g - g0).norm()) for g, g0 in zip(gate, strategy.gates[RANK], strict=True)]
        told.append((moved, strategy.gate_values(made, old)[:, RANK].abs().max().item()))
        for now, then in zip(gate_layer_inputs(gate, said), layers, strict=True):
            torch.testing.assert_close(now, then, rtol=1e-10, atol=1e-12)

    strategy.begin(made, toy.make_task(1, FEW))
    look(0, None)
    del strategy.gates[RANK]
    toy.train_stages(made, strategy, 1, size=FEW, recipe=RECIPE, on_step=look)
    assert max(shut for _, shut in told) < 1e-11
    assert told[0][0] == [0, 0, 0]
    assert min(told[-1][0]) > 1e-3, "each layer has learned"


def test_an_earlier_gate_and_branch_stay_bit_for_bit():
    made, strategy = trained(0)
    gate, branch = [g.clone() for g in strategy.gates[0]], snapshot(made)
    toy.train_stages(made, strategy, 1, size=FEW, recipe=RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(strategy.gates[0], gate, strict=True))
    for n, w in snapshot(made).items():
        rows, columns = (RANK, None) if "lora_A" in n else (None, RANK)
        assert torch.equal(w[:rows, :columns], branch[n][:rows, :columns])


def test_below_1_the_threshold_leaves_a_gate_a_little_open_and_room_for_more_tasks():
    some, strategy = trained(0, 1, strategy=GainLoRA(rank=RANK, threshold=0.9))
    _, exact = trained(0, 1)
    assert strategy.known[0].shape[1] < exact.known[0].shape[1] == 2 * FEW
    assert 0 < strategy.gate_values(some, toy.make_examples(0, FEW))[:, RANK].mean() < 0.5


@given(st.integers(0, 99), st.integers(1, 6), st.integers(0, 3), st.floats(0.3, 0.999))
def test_what_is_known_grows_by_the_fewest_directions_that_hold_the_share(
    seed, rows, already, threshold
):
    rng = torch.Generator().manual_seed(seed)
    known = torch.linalg.qr(torch.randn(7, already, generator=rng, dtype=torch.float64))[0]
    x = torch.randn(rows, 7, generator=rng, dtype=torch.float64)
    found = extend_basis(known, x, threshold)
    assert torch.equal(found[:, :already], known)
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1], dtype=x.dtype))
    total, left = float(x.square().sum()), x - x @ known @ known.T
    assert float(project_out(x, found).square().sum()) <= (1 - threshold) * total + 1e-9
    new = found.shape[1] - already
    if new:  # the best that one direction less could do, by the singular values
        assert (
            float(torch.linalg.svdvals(left)[new - 1 :].square().sum())
            > (1 - threshold) * total - 1e-9
        )


def test_a_threshold_of_1_keeps_no_direction_of_rounding():
    x = torch.randn(3, 7, dtype=torch.float64)
    known = extend_basis(torch.zeros(7, 0, dtype=torch.float64), x, 1.0)
    assert known.shape == (7, 3)
    assert extend_basis(known, 2 * x, 1.0).shape == (7, 3)


# The step


def test_the_step_s_direction_for_the_gate_is_that_of_the_loss_by_finite_differences():
    made, strategy = trained(0)
    toy.train_stages(
        made, strategy, 1, size=FEW, recipe=replace(RECIPE, steps=2, lr=1e-3)
    )  # B is not zero, nor is the change
    task = toy.make_task(2, FEW)
    strategy.begin(made, task)
    with torch.no_grad():
        for _, b in factors(made):
            b[:, strategy.block].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    strategy.backward(made, made.batch(task.train))
    found = strategy.change.grad.clone()
    sizes = [g.numel() for g in strategy.gates[strategy.first_row]]
    for at in (7, sizes[0] + 11, sum(sizes[:2]) + 3):  # of each layer
        values = []
        with torch.no_grad():
            for shift in (1e-5, -2e-5):
                strategy.change[at] += shift
                values.append(nll(made, made.batch(task.train)).item())
            strategy.change[at] += 1e-5
        assert found[at].item() == pytest.approx(
            (values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-10
        )
        assert found[at] != 0


def test_the_best_epoch_s_gate_comes_back_with_its_weights():
    made, strategy = trained(0)
    task, seen = replace(toy.make_task(1, FEW), dev=tuple(toy.make_examples(1, 5, seed=1))), []

    def dev():
        with torch.no_grad():
            return nll(made, made.batch(task.dev)).item()

    recipe = replace(RECIPE, lr=0.1, epochs=30, patience=2, schedule="constant")
    train_stage(
        made,
        task,
        strategy,
        recipe,
        seed=0,
        log_event=lambda event: None,
        on_step=lambda step, _: seen.append(dev()) if step % 2 == 0 else None,
    )
    assert len(seen) == seen.index(min(seen)) + 1 + 2 < 30
    assert dev() == pytest.approx(min(seen), abs=1e-9)


def test_replayed_prompts_have_their_own_gates():
    strategy = compose(Replay(capacity=4, share=0.5), GainLoRA(**EXACT))
    made, _ = trained(0, 1, strategy=strategy)
    mixed = strategy.add_replay_examples(made.batch(toy.make_examples(2, 4)))
    assert {e.task_index for e in mixed.examples} > {2}
    for e, gates in zip(mixed.examples, strategy.gate_values(made, mixed.examples), strict=True):
        for row, g in by_hand(strategy, made, prompt(e)).items():
            assert gates[row].item() == pytest.approx(g, abs=1e-12)


@pytest.mark.parametrize(
    ("other", "plain"),
    [
        (AGEM(capacity=4), Strategy()),
        (MultiTask(capacity=4, conflicts="project"), MultiTask(capacity=4)),
    ],
)
def test_beside_a_strategy_that_projects_the_weights_gradient_the_gate_keeps_its_own(other, plain):
    """Neither the gradients of what is remembered nor each task's alone are added to it."""
    found = []
    for beside_it in (other, plain):
        made, strategy = trained(
            0, strategy=compose(GainLoRA(**{**EXACT, "threshold": 0.5}), beside_it)
        )
        strategy.begin(made, toy.make_task(1, FEW))
        with torch.no_grad():
            for _, b in factors(made):
                b[:, strategy.block].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        strategy.backward(made, made.batch(toy.make_examples(1, 4)))
        found.append(strategy.change.grad)
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_a_prompt_without_a_response_is_read_to_its_end():
    made = toy.make_model()
    found = mean_prompt_embeddings(made, [make_encoded([4, 5], [6]), make_encoded([4, 5], [])])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(
        found[0], made.net.get_input_embeddings().weight[[4, 5]].mean(0).detach()
    )


# What is refused


def test_prompts_that_no_gate_could_tell_apart_are_refused():
    made, strategy = trained(0)
    again = replace(toy.make_task(1, FEW), train=tuple(toy.make_examples(0, FEW)))
    with pytest.raises(
        ConfigError,
        match=r"the prompts of 'b' lie within what gates have read of earlier tasks.*lower "
        r"strategy.gain_lora.threshold=1.0",
    ):
        strategy.begin(made, again)


def test_a_strategy_that_takes_a_branch_back_is_refused():
    with pytest.raises(
        ConfigError, match=r"has the gate of an earlier stage, .*leave that strategy out"
    ):
        trained(0, 1, strategy=compose(GainLoRA(**EXACT), PerTask()))


@pytest.mark.parametrize("wrong", [{"hidden_size": 0}, {"threshold": 0.0}, {"threshold": 1.1}])
def test_a_gate_of_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match="for gain_lora; expected at least 1 unit, and a share"):
        GainLoRA(**wrong)


def test_a_layer_that_does_not_see_a_row_for_each_example_is_refused():
    with pytest.raises(
        ConfigError, match=r"a LoRA on what is \(\d+, 8\) for \d examples, expected a row for"
    ):
        trained(0, kind="opt")


# In a run

KEYS = (
    "strategy=gain_lora",
    "strategy.gain_lora.rank=2",
    "strategy.gain_lora.hidden_size=8",
    "model.adapter=lora",
)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's own
def test_a_run_s_weights_alone_are_neither_adapted_nor_exported(cli_error, run_keys, tmp_path):
    run_in_process(tmp_path / "run", run_keys, *KEYS, "train.steps=2")
    told = cli_error(
        "adapt",
        *run_keys,
        f"adapt.init_from={tmp_path / 'run'}",
        "task=loud",
        f"out={tmp_path / 'new'}",
    )
    assert (
        "the strategy gain_lora keeps a part of the model in its memory, so its weights alone are "
        "not the model that was scored"
    ) in told
    assert "chooses other weights for each prompt, which no one model holds" in cli_error(
        "export", tmp_path / "run"
    )
