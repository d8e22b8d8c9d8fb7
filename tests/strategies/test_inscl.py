"""Replay by instruction: the Wasserstein distance, what counts as an instruction, how much of each
task is drawn.
"""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance, wasserstein_distance_nd

from continual.data.types import Task
from continual.strategy.instructions import extract_instructions
from strategies.inscl import InsCL, instruction_distance, optimal_transport_cost
from tests.support import toy
from tests.support.models import make_encoded


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6))
def test_the_distance_is_scipy_s_in_one_and_in_several_dimensions(seed, i, j):
    rng = np.random.default_rng(seed)
    u, v, a, b = (
        rng.normal(size=i),
        rng.normal(size=j),
        rng.integers(1, 9, i),
        rng.integers(1, 9, j),
    )
    cost = torch.tensor(abs(u[:, None] - v))
    assert optimal_transport_cost(cost, a, b) == pytest.approx(
        wasserstein_distance(u, v, a, b), abs=1e-9
    )
    x, y = rng.normal(size=(i, 3)), rng.normal(size=(j, 3))
    cost = torch.cdist(torch.tensor(x), torch.tensor(y))
    assert optimal_transport_cost(cost, a, b) == pytest.approx(
        wasserstein_distance_nd(x, y, a, b), abs=1e-7
    )


@pytest.mark.parametrize("seed", range(5))
def test_with_equal_weights_it_is_the_best_assignment(seed):
    cost = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows, columns = linear_sum_assignment(cost.numpy())
    assert optimal_transport_cost(cost, [1] * 7, [1] * 7) == pytest.approx(
        cost[rows, columns].mean().item(), abs=1e-12
    )


def test_between_single_instructions_it_is_the_cosine_distance_of_their_mean_embeddings():
    made = toy.make_model(torch.float64)
    words = made.net.get_input_embeddings().weight
    a, b = words[[2, 3, 4]].mean(0), words[[5, 6]].mean(0)
    found = instruction_distance(made, [([2, 3, 4], 7)], [([5, 6], 2)])
    assert found == pytest.approx(1 - F.cosine_similarity(a, b, 0).item(), rel=1e-9)
    assert instruction_distance(
        made, [([2, 3], 1), ([5], 3)], [([5], 6), ([2, 3], 2)]
    ) == pytest.approx(0, abs=1e-12)


def rows(task: int, opening: list[int], n: int = 40):
    return [
        make_encoded([*opening, 20 + i, 30 + (7 * i) % 29], [9], id=f"{task}/{i}", task=task)
        for i in range(n)
    ]


def test_what_prompts_have_in_common_is_the_instruction():
    assert extract_instructions(rows(0, [*range(2, 12)])) == [([*range(2, 12)], 40)]
    two = [*rows(0, [*range(2, 12)], 30), *rows(0, [*range(12, 20), 60, 61], 20)]
    assert sorted(extract_instructions(two)) == [
        ([*range(2, 12)], 30),
        ([*range(12, 20), 60, 61], 20),
    ]


def test_a_prompt_that_shares_nothing_is_its_own_instruction():
    alone = [make_encoded([2 + i, 20], [9], id=str(i)) for i in range(5)]
    assert sorted(extract_instructions(alone)) == [([2 + i, 20], 1) for i in range(5)]


def test_of_many_examples_some_from_everywhere_are_looked_at():
    assert sum(count for _, count in extract_instructions(rows(0, [*range(2, 12)], 1000))) in range(
        100, 129
    )


def prepared():
    made, strategy = toy.make_model(), InsCL(capacity=30, share=0.5)
    for t, opening in enumerate(([*range(2, 12)], [*range(2, 11), 50], [*range(40, 50)])):
        strategy.end(
            made, Task(toy.TASK_NAMES[t], tuple(rows(t, opening)), task_names=toy.TASK_NAMES)
        )
    new = Task("d", tuple(rows(3, [*range(2, 11), 51])), task_names=toy.TASK_NAMES)
    strategy.begin(made, new)
    return made, strategy, new


def test_a_task_s_share_is_its_distance_by_the_sum_of_all():
    made, strategy, new = prepared()
    far = [
        instruction_distance(made, strategy.instructions[t], extract_instructions(new.train))
        for t in range(3)
    ]
    assert strategy.task_shares == pytest.approx({t: d / sum(far) for t, d in enumerate(far)})
    assert strategy.task_shares[2] > 2 * max(strategy.task_shares[0], strategy.task_shares[1])
    assert strategy.notes["share/c"] == strategy.task_shares[2]


def test_steps_take_of_each_task_what_its_share_says():
    made, strategy, new = prepared()
    drawn = Counter(
        e.task_index
        for _ in range(300)
        for e in strategy.add_replay_examples(made.batch(new.train[:10])).examples[10:]
    )
    assert sum(drawn.values()) == 3000
    for t, share in strategy.task_shares.items():
        assert abs(drawn[t] - 3000 * share) < 4.5 * (3000 * share) ** 0.5


def test_tasks_with_the_new_one_s_own_instruction_are_all_alike():
    made, strategy = toy.make_model(), InsCL(capacity=30)
    for t in (0, 1):
        strategy.end(
            made,
            Task(toy.TASK_NAMES[t], tuple(rows(t, [*range(2, 12)])), task_names=toy.TASK_NAMES),
        )
    strategy.begin(made, Task("c", tuple(rows(2, [*range(2, 12)])), task_names=toy.TASK_NAMES))
    assert strategy.task_shares == pytest.approx({0: 0.5, 1: 0.5})
