"""The published forms of the summaries: by hand, against Matrix.summary, and by what holds between
them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.results.matrix import SUMMARIES
from continual.results.variants import VARIANTS, ScoreArray, compute_variants
from tests.support.matrices import JOINT, THREE, made, matrices, published

# What the 15 test sets of O-LoRA's long sequence hold; its logs also state one exact match over all
# of them.
LONG = dict.fromkeys(
    ("yelp", "amazon", "MNLI", "QQP", "IMDB", "dbpedia", "agnews", "yahoo"), 7600
) | {"CB": 56, "COPA": 100, "RTE": 277, "SST-2": 872, "MultiRC": 4848, "BoolQA": 3270, "WiC": 638}


def test_every_summary_has_its_form_and_every_form_its_definition():
    assert set(SUMMARIES) <= set(VARIANTS)
    for name, variant in VARIANTS.items():
        assert variant.summary in SUMMARIES
        assert all((variant.title, variant.formula, variant.source)), name
    for summary in SUMMARIES:
        titles = [v.title for v in VARIANTS.values() if v.summary == summary]
        assert len(set(titles)) == len(titles)


def test_forms_of_a_three_by_three_matrix_are_those_computed_by_hand():
    told = compute_variants(replace(THREE, counts=(10, 20, 70)))
    assert told == pytest.approx(
        {
            **THREE.summary(),
            "average_performance_pooled": (10 * 0.5 + 20 * 0.4 + 70 * 1.0) / 100,
            "average_incremental_performance_cells": (0.8 + 0.9 + 0.7 + 0.5 + 0.4 + 1.0) / 6,
            "backward_transfer_over_all": ((0.5 - 0.8) + (0.4 - 0.7) + 0) / 3,
            "backward_transfer_cells": ((0.9 - 0.8) + (0.5 - 0.8) + (0.4 - 0.7)) / 3,
            "forgetting_any_stage": ((0.9 - 0.5) + (0.7 - 0.4)) / 2,
            "forgetting_never_negative": ((0.9 - 0.5) + (0.7 - 0.4)) / 2,
            "forgetting_first_minus_last": ((0.8 - 0.5) + (0.7 - 0.4)) / 2,
            "forward_transfer_zero_shot": (0.3 + 0.25) / 2,
            "forward_transfer_cells": (0.3 + 0.1 + 0.25) / 3,
        }
    )


def test_forgetting_from_the_best_ever_counts_what_was_known_before_a_task_was_taught():
    known = made(((0.9, 0.8), (0.9, 0.8), (0.7, 0.9)), tasks=("a", "b"), stages=("base", "a", "b"))
    early = made(((0.2, 0.9, 0.0), (0.2, 0.8, 0.0), (0.2, 0.6, 0.0), (0.2, 0.3, 0.0)))
    assert compute_variants(known)["forgetting_any_stage"] == pytest.approx(0.2)
    assert compute_variants(early)["forgetting"] == pytest.approx(0.3 / 2)
    assert compute_variants(early)["forgetting_any_stage"] == pytest.approx(
        0.5 / 2
    )  # from 0.8; the base row's 0.9 is no stage


@given(matrices())
def test_mammoth_s_forgetting_is_that_of_rows_without_the_tasks_ahead(matrix):
    seen = np.tril(
        np.array(matrix.scores, dtype=float)[1:]
    )  # as its results are, with 0 for what is not there
    expected = (seen.max(0) - seen[-1])[:-1].mean()
    assert compute_variants(matrix)["forgetting_never_negative"] == pytest.approx(
        expected, abs=1e-12
    )


def test_forgetting_that_is_never_negative_counts_nothing_that_was_known_before_a_task_was_taught():
    known = made(
        ((0.9, 0.1, 0.8, 0.1), (0.8, 0.9, 0.1, 0.1), (0.7, 0.8, 0.5, 0.1), (0.6, 0.7, 0.4, 0.9)),
        tasks=("a", "b", "c", "d"),
        stages=("a", "b", "c", "d"),
    )
    assert compute_variants(known)["forgetting_never_negative"] == pytest.approx(
        (0.3 + 0.2 + 0.1) / 3
    )


@settings(max_examples=50)
@given(
    matrices(holes=True) | matrices(holes=True, base=False) | matrices(),
    st.randoms(),
    st.integers(0, 5),
)
def test_a_form_with_a_summary_s_name_is_that_summary_whatever_is_missing(matrix, random, rows):
    order = random.sample(range(len(matrix.tasks)), len(matrix.tasks))
    matrix = replace(
        matrix,
        tasks=tuple(matrix.tasks[i] for i in order),
        scores=tuple(tuple(row[i] for i in order) for row in matrix.scores),
    )
    for some in (matrix, replace(matrix, stages=matrix.stages[:rows], scores=matrix.scores[:rows])):
        told = compute_variants(some)
        for name, value in some.summary().items():
            assert told[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name


def test_a_joint_run_has_only_the_forms_that_read_its_last_row():
    told = compute_variants(JOINT)
    assert {name for name, value in told.items() if value is not None} == {
        "average_performance",
        "average_performance_pooled",
    }


@given(matrices())
def test_forms_stand_to_one_another_as_their_formulas_say(matrix):
    told, size = compute_variants(matrix), len(matrix.tasks)
    near = 1e-9
    assert told["forgetting_first_minus_last"] == pytest.approx(
        -told["backward_transfer"], abs=near
    )
    assert size * told["backward_transfer_over_all"] == pytest.approx(
        (size - 1) * told["backward_transfer"], abs=near
    )
    assert told["forgetting_first_minus_last"] <= told["forgetting"] + near
    assert told["forgetting"] <= told["forgetting_any_stage"] + near
    assert told["forgetting"] <= told["forgetting_never_negative"] + near
    assert told["forgetting_never_negative"] >= -near
    assert told["average_performance_pooled"] == pytest.approx(
        told["average_performance"]
    )  # of equal counts


@settings(max_examples=30)
@given(matrices(holes=True), st.integers(1, 4))
def test_many_draws_at_once_have_the_figures_of_each(matrix, draws):
    cells = ScoreArray.from_matrix(matrix)
    many = replace(cells, scores=np.repeat(cells.scores[None], draws, 0))
    for variant in VARIANTS.values():
        assert variant.compute(many) == pytest.approx(
            np.repeat(variant.compute(cells), draws), nan_ok=True
        )


def test_no_counts_leave_the_pooled_average_out():
    assert compute_variants(replace(THREE, counts=()))["average_performance_pooled"] is None
    assert compute_variants(replace(THREE, counts=(0, 0, 0)))["average_performance_pooled"] is None


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("olora_long_seqlora", 32.4297),
        ("olora_long_icrlora", 58.492),
        ("olora_long_olora", 73.8813),
        ("olora_order1_olora", 78.3651),
    ],
)
def test_the_score_over_all_examples_that_o_lora_s_logs_state_is_the_pooled_average(name, stated):
    matrix = published(name)
    counted = replace(matrix, counts=tuple(LONG[task] for task in matrix.tasks))
    assert 100 * compute_variants(counted)["average_performance_pooled"] == pytest.approx(
        stated, abs=1e-4
    )
