"""Intervals: against closed forms, SciPy and simulation; what is drawn together, and when there is
none.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from continual.errors import ConfigError
from continual.reports import write
from continual.reports.figures import format_interval, format_percent
from continual.reports.versus import comparison_to_dict
from continual.results.matrix import SUMMARIES, Matrix
from continual.results.prediction import Prediction
from continual.results.run_folder import Run, find_runs, group_runs
from continual.results.uncertainty import (
    BOOTSTRAP_AND_T,
    BOOTSTRAP_OVER_EXAMPLES,
    T_OVER_PAIRS,
    T_OVER_RUNS,
    bootstrap_intervals,
    differences_from_baseline,
    interval_over_examples,
    interval_over_runs,
    paired_difference,
)
from tests.support.fake_run import write_fake_run

TASKS = ("a", "b", "c")


@dataclass(frozen=True)
class Known(Run):
    """A run whose answers are in memory: a table of marks (stages, examples) for each task."""

    tables: dict = field(default_factory=dict)
    names: str = "test"

    def load_predictions(self, stage, task):
        row = self.tables[task][self.matrix.stages.index(stage)]
        return [
            Prediction(f"{self.names}/{i}", {"score": float(mark)}, references=("x",))
            for i, mark in enumerate(row)
        ]


def known(marks, names="test", **more):
    """A run of these marks: {task: (stages, examples)}."""
    marks = {task: np.asarray(table, dtype=float) for task, table in marks.items()}
    tasks = tuple(marks)
    stages = {"stages": tasks, "strategy": "naive", "seed": 0, "order": "", **more}
    matrix = Matrix(
        stream="s",
        tasks=tasks,
        metrics=dict.fromkeys(tasks, "m"),
        counts=tuple(t.shape[1] for t in marks.values()),
        scores=tuple(zip(*(t.mean(1).tolist() for t in marks.values()), strict=True)),
        **stages,
    )
    return Known(Path("nowhere"), matrix, marks, names)


def random_run(seed, examples=60, tasks=TASKS, right=0.6, **more):
    rng = np.random.default_rng(seed)
    return known(
        {task: rng.random((len(tasks), examples)) < right for task in tasks}, seed=seed, **more
    )


# Over runs


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_over_runs_is_students_interval_of_the_mean(values):
    told = interval_over_runs(values)
    error = scipy.stats.sem(values)
    low, high = (
        scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        if error > 0
        else (values[0], values[0])
    )
    assert (told.low, told.high) == pytest.approx((low, high), abs=1e-9)
    assert (told.n, told.how) == (len(values), T_OVER_RUNS)


def test_over_runs_of_four_takes_the_tables_t_of_three_degrees_of_freedom():
    told = interval_over_runs([0.1, 0.2, 0.3, 0.4])
    assert (told.high - told.low) / 2 == pytest.approx(3.182446 * 0.12909944 / 2)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, None]])
def test_over_runs_there_is_none_of_fewer_than_two_or_with_one_missing(values):
    assert interval_over_runs(values) is None


# Over examples


def test_an_average_s_interval_is_that_of_its_standard_error():
    run = random_run(0, examples=400)
    told = interval_over_examples(run, draws=4000)
    marks = [run.tables[task][-1] for task in TASKS]
    error = math.sqrt(sum(m.var() / len(m) for m in marks)) / len(marks)
    middle = run.matrix.summary()["average_performance"]
    assert (told.low, told.high) == pytest.approx(
        (middle - 1.96 * error, middle + 1.96 * error), abs=0.15 * error
    )
    assert (told.n, told.how) == (1200, BOOTSTRAP_OVER_EXAMPLES)


def test_one_task_s_interval_is_scipy_s_percentile_bootstrap():
    marks = np.random.default_rng(1).beta(0.3, 1.2, size=80)  # skewed, as F1 and ROUGE-L are
    told = interval_over_examples(known({"a": [marks]}), draws=8000)
    theirs = scipy.stats.bootstrap((marks,), np.mean, n_resamples=8000, method="percentile", rng=2)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert (told.low, told.high) == pytest.approx(
        tuple(theirs.confidence_interval), abs=0.05 * width
    )


def test_examples_are_drawn_within_their_task():
    run = known({"a": np.ones((2, 30)), "b": np.zeros((2, 70))})
    assert (interval_over_examples(run).low, interval_over_examples(run).high) == (0.5, 0.5)


def test_the_same_examples_are_drawn_for_all_stages():
    half = np.arange(50) % 2
    kept = known({"a": [half, half], "b": [half, half]})
    told = bootstrap_intervals(kept)
    assert told["average_performance"].high - told["average_performance"].low > 0.1
    for name in ("forgetting", "backward_transfer"):
        assert (told[name].low, told[name].high) == (0, 0)


def test_of_simulated_test_sets_95_in_100_intervals_hold_the_truth():
    right = {
        "a": (0.9, 0.4),
        "b": (0.2, 0.8),
    }  # after each of two stages; the truth is of ever so many examples
    truth = known({task: np.array(p)[:, None] for task, p in right.items()}).matrix.summary()
    names = ("average_performance", "backward_transfer", "forgetting", "learning_accuracy")
    rng, held, times = np.random.default_rng(3), Counter(), 250
    for _ in range(times):
        run = known({task: rng.random((2, 80)) < np.array(p)[:, None] for task, p in right.items()})
        told = bootstrap_intervals(run, names, draws=200)
        held.update(name for name in names if told[name].low <= truth[name] <= told[name].high)
    for name in names:
        assert 0.90 <= held[name] / times <= 0.985, (
            name
        )  # 0.95, and three standard errors of so many trials


@settings(max_examples=20)
@given(st.integers(0, 2**20), st.randoms())
def test_an_interval_does_not_hang_on_the_order_of_the_examples(seed, random):
    run = random_run(seed, examples=12)
    order = random.sample(range(12), 12)
    turned = known({task: table[:, order] for task, table in run.tables.items()})
    for name in ("average_performance", "forgetting"):
        told = interval_over_examples(run, name, draws=50)
        assert told == interval_over_examples(turned, name, draws=50)
        assert told.low <= told.high


def test_all_summaries_that_a_run_has_get_their_interval_on_a_run_folder(tmp_path):
    run = Run.load(write_fake_run(tmp_path / "r", "ewc"))
    told = bootstrap_intervals(run)
    assert set(told) == set(SUMMARIES)
    for name, value in run.matrix.summary().items():
        assert told[name].low <= value <= told[name].high
    assert interval_over_examples(run, "forgetting_first_minus_last") is not None


def test_a_summary_that_the_run_lacks_has_no_interval(tmp_path):
    run = random_run(0)
    assert set(bootstrap_intervals(run)) == set(SUMMARIES) - {
        "forward_transfer"
    }  # there is no base row
    half = known({task: table[:2] for task, table in run.tables.items()}, stages=TASKS[:2])
    assert bootstrap_intervals(half) == {}
    unfinished = Run.load(write_fake_run(tmp_path / "r", finished=False))
    assert bootstrap_intervals(unfinished) == {}


def test_answers_that_are_not_all_there_or_not_the_matrix_s_give_no_interval(tmp_path):
    folder = write_fake_run(tmp_path / "r", "ewc")
    first = folder / "predictions" / "stage-01" / "reverse.jsonl"
    text = first.read_text()
    first.write_text("".join(text.splitlines(keepends=True)[:-1]))
    assert interval_over_examples(Run.load(folder), "forgetting") is None
    assert (
        interval_over_examples(Run.load(folder), "average_performance") is not None
    )  # it reads the last stage alone
    first.write_text(text)
    matrix = Run.load(folder).matrix
    other = tuple((1 - row[0], *row[1:]) for row in matrix.scores)
    assert interval_over_examples(Run(folder, replace(matrix, scores=other))) is None


def test_a_form_that_there_is_not_is_refused_with_the_nearest():
    for ask in (interval_over_examples, lambda run, name: paired_difference(run, run, name)):
        with pytest.raises(
            ConfigError, match="unknown form of a summary 'forgeting'; did you mean 'forgetting'"
        ):
            ask(random_run(0), "forgeting")


# In pairs


def test_a_run_against_itself_differs_by_nothing():
    told = paired_difference(random_run(0), random_run(0))
    assert (told.difference, told.low, told.high, told.n, told.runs) == (0, 0, 0, 180, 1)


def test_a_difference_is_narrower_in_pairs_where_the_same_examples_are_hard():
    rng = np.random.default_rng(4)
    marks = {task: np.repeat(rng.random((1, 100)) < 0.5, 3, 0) for task in TASKS}
    better = {task: table | (rng.random((1, 100)) < 0.1) for task, table in marks.items()}
    a, b = known(better), known(marks)
    told, alone = paired_difference(a, b), interval_over_examples(a)
    assert told.low > 0
    assert told.difference == pytest.approx(
        a.matrix.summary()["average_performance"] - b.matrix.summary()["average_performance"]
    )
    assert told.high - told.low < (alone.high - alone.low) / 2
    assert paired_difference(b, a).difference == -told.difference
    assert told.how == BOOTSTRAP_OVER_EXAMPLES


def test_with_one_pair_the_interval_is_the_bootstrap_s_of_each_example_s_difference():
    a, b = random_run(5, tasks=("a",), right=0.7), random_run(6, tasks=("a",), right=0.5)
    told = paired_difference(a, b, draws=8000)
    differences = a.tables["a"][-1] - b.tables["a"][-1]
    error = differences.std() / math.sqrt(len(differences))
    middle = differences.mean()
    assert (told.low, told.high) == pytest.approx(
        (middle - 1.96 * error, middle + 1.96 * error), abs=0.15 * error
    )


def flat(seed, score):
    """A run all of whose answers get this mark: other examples would change nothing."""
    return known({task: np.full((3, 40), score) for task in TASKS}, seed=seed)


def test_several_pairs_whose_examples_say_all_alike_have_students_interval():
    ours, theirs = (0.71, 0.74, 0.70, 0.78), (0.60, 0.66, 0.61, 0.60)
    told = paired_difference(
        [flat(i, s) for i, s in enumerate(ours)], [flat(i, s) for i, s in enumerate(theirs)]
    )
    exact = interval_over_runs([x - y for x, y in zip(ours, theirs, strict=True)])
    assert told.difference == pytest.approx(statistics.fmean(ours) - statistics.fmean(theirs))
    assert (told.low, told.high) == pytest.approx((exact.low, exact.high), abs=0.001)
    assert (told.runs, told.n, told.how) == (4, 120, BOOTSTRAP_AND_T)
    two = paired_difference(
        [flat(i, s) for i, s in enumerate(ours[:2])], [flat(i, 0.5) for i in range(2)]
    )
    exact = interval_over_runs([s - 0.5 for s in ours[:2]])
    assert (two.low, two.high) == pytest.approx((exact.low, exact.high), abs=0.01)


def test_several_pairs_are_wider_than_their_runs_or_their_examples_alone_say():
    ours = [random_run(i, right=0.7) for i in range(4)]
    theirs = [
        replace(
            random_run(10 + i, right=0.5),
            matrix=replace(random_run(10 + i, right=0.5).matrix, seed=i),
        )
        for i in range(4)
    ]
    told = paired_difference(ours, theirs, draws=4000)
    runs = interval_over_runs(
        [
            x.matrix.summary()["average_performance"] - y.matrix.summary()["average_performance"]
            for x, y in zip(ours, theirs, strict=True)
        ]
    )
    assert told.high - told.low > runs.high - runs.low


def test_runs_pair_by_seed_and_order_and_what_has_no_partner_is_left_out():
    ours, theirs = [flat(0, 0.7), flat(1, 0.8), flat(2, 0.1)], [flat(1, 0.5), flat(0, 0.5)]
    told = paired_difference(ours, theirs)
    assert (told.runs, told.difference) == (2, pytest.approx(0.25))
    assert paired_difference([flat(0, 0.7)], [flat(5, 0.7)]) is None


def test_pairs_with_test_examples_of_their_own_have_students_interval_alone():
    ours = [replace(flat(i, 0.5 + i / 10), names=f"seed {i}") for i in range(3)]
    theirs = [replace(flat(i, 0.4), names=f"seed {i}") for i in range(3)]
    told, exact = paired_difference(ours, theirs), interval_over_runs([0.1, 0.2, 0.3])
    assert (told.low, told.high, told.how) == (
        pytest.approx(exact.low),
        pytest.approx(exact.high),
        T_OVER_PAIRS,
    )


def test_runs_that_answered_other_examples_are_no_pair():
    assert paired_difference(flat(0, 0.7), replace(flat(0, 0.5), names="others")) is None
    assert (
        paired_difference(
            [flat(0, 0.7), flat(1, 0.7)], [flat(0, 0.5), replace(flat(1, 0.5), names="others")]
        )
        is None
    )
    assert paired_difference(flat(0, 0.7), random_run(0, tasks=("a", "b"))) is None


# In a comparison


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c") / "compare"
    for seed in range(2):
        for strategy in ("naive", "ewc", "replay"):
            write_fake_run(folder / f"{strategy}-{seed}", strategy, seed)
    write_fake_run(folder / "joint-0", "naive", 0, joint=True, settings={"arrangement": "joint"})
    write_fake_run(folder / "maml-0", "maml", finished=False)
    return folder


def test_strategies_are_set_against_naive_and_unfinished_ones_are_left_out(comparison):
    other, told = differences_from_baseline(group_runs(find_runs([comparison])[0]))
    assert other == "naive"
    assert {label: each.runs for label, each in told.items()} == {"joint": 1, "replay": 2, "ewc": 2}
    ewc, naive = (
        [Run.load(comparison / f"{name}-{seed}") for seed in range(2)] for name in ("ewc", "naive")
    )
    assert told["ewc"] == paired_difference(ewc, naive)


def test_without_naive_they_are_set_against_the_best_that_is_not_joint(comparison):
    runs = [Run.load(comparison / name) for name in ("ewc-0", "replay-0", "joint-0")]
    other, told = differences_from_baseline(group_runs(runs))
    assert (other, set(told)) == ("replay", {"ewc", "joint"})
    assert differences_from_baseline(group_runs(runs[2:])) == ("", {})


def test_the_terminal_and_comparison_json_say_how_strategies_differ(comparison):
    told = paired_difference(
        *(
            [Run.load(comparison / f"{name}-{seed}") for seed in range(2)]
            for name in ("ewc", "naive")
        )
    )
    runs = find_runs([comparison])[0]
    said = json.loads(json.dumps(comparison_to_dict(runs, group_runs(runs), comparison)))
    assert said["against"]["strategy"] == "naive"
    assert said["against"]["differences"]["ewc"] == asdict(told)
    group = next(g for g in said["groups"] if g["strategy"] == "ewc")
    span = interval_over_runs(
        Run.load(comparison / f"ewc-{seed}").matrix.summary()["forgetting"] for seed in range(2)
    )
    assert group["interval"]["forgetting"] == [span.low, span.high]
    screen = io.StringIO()
    write.print_tables(Console(file=screen, width=100), comparison)
    line = next(
        line
        for line in screen.getvalue().split("against naive")[1].splitlines()
        if line.startswith(" ewc")
    )
    assert line.split() == [
        "ewc",
        format_percent(told.difference, True),
        *format_interval(told.low, told.high, True).split(),
        "2",
        "120",
    ]


def test_the_terminal_shows_a_run_s_intervals_with_n_or_says_why_there_are_none(tmp_path):
    folder = write_fake_run(tmp_path / "r", "ewc")

    def shown():
        screen = io.StringIO()
        write.print_tables(Console(file=screen, width=120), folder)
        return screen.getvalue()

    told = interval_over_examples(Run.load(folder), "forgetting")
    assert format_interval(told.low, told.high) in shown()
    assert "n = 120 examples of 6 tasks" in shown()
    shutil.rmtree(folder / "predictions")
    assert (
        "no intervals: they need the run's last stage, and in predictions/ every answer" in shown()
    )
