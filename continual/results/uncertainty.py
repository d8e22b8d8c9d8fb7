"""Estimate how much a figure depends on test examples, seeds and orders: 95% intervals and paired
differences.

Over runs: Student's t. Over test examples: the percentile bootstrap (Efron & Tibshirani 1993, ch.
13), which draws as many examples as a task has, with replacement, within each task. All stages
use the same draw, so that forgetting keeps the correlation between the own stage of a task and
the last one. Both sides of a pair use the same draw, so that examples that are hard for both
strategies do not blur their difference.

The maximum over several stages is biased upwards, and the maximum of a bootstrap draw is biased
once more. Variants that take a maximum therefore use the limits of the basic bootstrap (Davison &
Hinkley 1997, eq. 5.6), which reflect the draws at the figure. This corrects too little if a score
stays level over many stages: for a task whose true forgetting is zero, the interval contains zero
in 93 of 100 cases over 4 stages, in 80 over 8 and in 40 over 15, whatever the number of examples.
Backward transfer takes no maximum and is not affected.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from continual.errors import ConfigError, unknown
from continual.results.matrix import SUMMARIES
from continual.results.run_folder import Run, RunGroup
from continual.results.variants import VARIANTS, Array, ScoreArray

CONFIDENCE_LEVEL = 0.95
BOOTSTRAP_DRAWS = 1000
MEAN_TOLERANCE = 1e-6  # largest rounding error of a mean of scores
T_OVER_RUNS = "Student's t over runs"
BOOTSTRAP_OVER_EXAMPLES = "bootstrap over test examples"
T_OVER_PAIRS = "Student's t over pairs of runs"
BOOTSTRAP_AND_T = f"{BOOTSTRAP_OVER_EXAMPLES}, {T_OVER_PAIRS}"
BASELINE = "naive"  # label of the strategy that others are compared with, if present


@dataclass(frozen=True)
class Interval:
    """95% interval of a figure, in the unit of the figure.

    `n` is the number of runs or test examples; `how` names which, and the method.
    """

    low: float
    high: float
    n: int
    how: str


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a summary between two strategies, with its 95% interval, in [-1, 1].

    `n` test examples were answered by both, in each of `runs` pairs of runs.
    """

    name: str
    difference: float
    low: float
    high: float
    n: int
    runs: int
    how: str


def interval_over_runs(values: Iterable[float | None]) -> Interval | None:
    """Compute mean +- t(0.975, n - 1) s / sqrt(n) over runs.

    None for fewer than two values, or if one is missing.
    """
    given = list(values)
    measured = [value for value in given if value is not None]
    if len(measured) < 2 or len(measured) < len(given):
        return None
    middle = statistics.fmean(measured)
    standard_error = statistics.stdev(measured) / math.sqrt(len(measured))
    half = _t_quantile(len(measured)) * standard_error
    return Interval(middle - half, middle + half, len(measured), T_OVER_RUNS)


def _t_quantile(n: int) -> float:
    """Return the 0.975 quantile of Student's t for n values."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + CONFIDENCE_LEVEL) / 2))


def _draw_student_t(n: int, draws: int, seed: int) -> Array:
    """Return (draws,) values of Student's t for n runs.

    Even quantiles in random order, because the tails are heavy.
    """
    from scipy.special import stdtrit

    even = (np.random.default_rng([seed, n]).permutation(draws) + 0.5) / draws
    return np.asarray(stdtrit(n - 1, even))


def interval_over_examples(
    run: Run, name: str = "average_performance", draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> Interval | None:
    """Compute the bootstrap interval of one summary or variant of a run; see `bootstrap_intervals`."""
    return bootstrap_intervals(run, [name], draws, seed).get(name)


def bootstrap_intervals(
    run: Run, names: Sequence[str] = tuple(SUMMARIES), draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Compute intervals over test examples for the named summaries that the run has.

    Empty if predictions/ lacks answers, or they disagree with the matrix. If all examples of a
    task have the same score, its part of an interval has no width. Raises DataError for a broken
    file, ConfigError for an unknown variant.
    """
    bootstrap = _bootstrap([run], names, draws, seed) if run.matrix.is_finished else None
    if bootstrap is None:
        return {}
    return {
        name: Interval(
            *_interval_limits(name, values[:, 0], float(bootstrap.point_estimates[name][0])),
            bootstrap.n,
            BOOTSTRAP_OVER_EXAMPLES,
        )
        for name, values in bootstrap.values.items()
        if not np.isnan(values).any()
    }


def paired_difference(
    a: Run | Sequence[Run],
    b: Run | Sequence[Run],
    name: str = "average_performance",
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> PairedDifference | None:
    """Compute `name` of `a` minus that of `b`, over examples that both answered.

    Runs of the same seed and order are paired. The bootstrap draws the same
    examples for both sides (Efron & Tibshirani 1993, ch. 8) and for all pairs, and to each draw's
    mean adds t(pairs - 1) s / sqrt(pairs), s the standard deviation over pairs: so with many
    examples the interval is Student's, and with one pair the bootstrap's. Where pairs have test
    examples of their own, s holds those too, and the interval is Student's alone. None where there
    are no such pairs, or where the two of a pair did not answer the same examples. Raises as
    `bootstrap_intervals` does.
    """
    pairs = _match_runs(a, b)
    draws_of_runs = (
        _bootstrap([run for pair in pairs for run in pair], [name], draws, seed) if pairs else None
    )
    if draws_of_runs is None or not (
        draws_of_runs.same_examples
        or all(
            (pair_draws := _bootstrap(pair, [name], 1, seed)) and pair_draws.same_examples
            for pair in pairs
        )
    ):
        return None
    differences = [float(x - y) for x, y in draws_of_runs.point_estimates[name].reshape(-1, 2)]
    if any(math.isnan(difference) for difference in differences):
        return None
    mean, runs, spread = (
        statistics.fmean(differences),
        len(pairs),
        interval_over_runs(differences),
    )
    if spread and not draws_of_runs.same_examples:
        return PairedDifference(
            name, mean, spread.low, spread.high, draws_of_runs.n, runs, T_OVER_PAIRS
        )
    values = (draws_of_runs.values[name][:, 0::2] - draws_of_runs.values[name][:, 1::2]).mean(1)
    if spread:
        error = statistics.stdev(differences) / math.sqrt(runs)
        values = values + error * _draw_student_t(runs, draws, seed)
    return PairedDifference(
        name,
        mean,
        *_interval_limits(name, values, mean),
        draws_of_runs.n,
        runs,
        BOOTSTRAP_AND_T if spread else BOOTSTRAP_OVER_EXAMPLES,
    )


def differences_from_baseline(
    groups: Sequence[RunGroup], name: str = "average_performance"
) -> tuple[str, dict[str, PairedDifference]]:
    """Compare difference group with naive, or else with the best group that is not joint; by label.

    Groups without a pair are left out. The label of the baseline is empty if there is none.
    """
    measured_groups = [group for group in groups if group.mean(name) is not None]
    other = next(
        (g for g in measured_groups if g.label == BASELINE),
        next((g for g in measured_groups if not g.is_joint), None),
    )
    if other is None:
        return "", {}
    differences = {
        group.label: paired_difference(group.runs, other.runs, name)
        for group in measured_groups
        if group is not other
    }
    return other.label, {
        label: difference for label, difference in differences.items() if difference
    }


def _interval_limits(name: str, values: Array, point: float) -> tuple[float, float]:
    """Return the limits of a variant from its draws."""
    low, high = np.quantile(
        values, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2]
    ).tolist()
    return (2 * point - high, 2 * point - low) if VARIANTS[name].takes_maximum else (low, high)


def _match_runs(a: Run | Sequence[Run], b: Run | Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pair finished runs of the same seed and order; two single runs whatever their seed."""
    if isinstance(a, Run) and isinstance(b, Run):
        both = [(a, b)]
    else:
        first, second = ([x] if isinstance(x, Run) else list(x) for x in (a, b))
        others = {(run.matrix.seed, run.matrix.order): run for run in second}
        both = [
            (run, others[key])
            for run in first
            if (key := (run.matrix.seed, run.matrix.order)) in others
        ]
    return [(x, y) for x, y in both if x.matrix.is_finished and y.matrix.is_finished]


@dataclass(frozen=True)
class _BootstrapDraws:
    """Figures of several runs, by name: point estimates (runs,) and values (draws, runs).

    `n` is the number of test examples; `same_examples` says that all runs answered the same ones:
    only then are values drawn.
    """

    values: dict[str, Array]
    point_estimates: dict[str, Array]
    n: int
    same_examples: bool


def _bootstrap(
    runs: Sequence[Run], names: Sequence[str], draws: int, seed: int
) -> _BootstrapDraws | None:
    """Compute the named figures of all runs under the same draws of examples.

    None if answers are missing or the tasks differ.
    """
    if unknown_names := [name for name in names if name not in VARIANTS]:
        raise ConfigError(unknown("form of a summary", unknown_names[0], VARIANTS))
    if len({frozenset(run.matrix.tasks) for run in runs}) > 1:
        return None
    rng = np.random.default_rng(seed)
    arrays = [ScoreArray.from_matrix(run.matrix) for run in runs]
    scores = [np.repeat(cells.scores[None], draws, 0) for cells in arrays]
    final = all(VARIANTS[name].final_row_only for name in names)
    n, same_examples = 0, True
    for task in sorted(runs[0].matrix.tasks):
        task_scores = [loaded for run in runs if (loaded := _task_scores(run, task, final))]
        if len(task_scores) < len(runs):
            return None
        n += task_scores[0][2].shape[1]
        same_examples &= len({names for names, _, _ in task_scores}) == 1
        if same_examples:
            means = _resample_means(
                np.concatenate([row_scores for _, _, row_scores in task_scores]), draws, rng
            )
            ends = np.cumsum([len(rows) for _, rows, _ in task_scores])
            for run, each, (_, rows, _), run_means in zip(
                runs, scores, task_scores, np.split(means, ends[:-1], 1), strict=True
            ):
                each[:, rows, run.matrix.tasks.index(task)] = run_means
    drawn = [replace(cells, scores=each) for cells, each in zip(arrays, scores, strict=True)]
    formulas = {name: VARIANTS[name].compute for name in names}
    return _BootstrapDraws(
        {name: np.stack([f(cells) for cells in drawn], 1) for name, f in formulas.items()},
        {name: np.stack([f(cells) for cells in arrays]) for name, f in formulas.items()},
        n,
        same_examples,
    )


def _task_scores(run: Run, task: str, final_row_only: bool) -> tuple[str, list[int], Array] | None:
    """Return a digest of the examples, the measured rows, and the scores (rows, examples).

    None if an answer is missing, or the mean of a row disagrees with the matrix.
    """
    matrix, stages = run.matrix, len(run.matrix.stages)
    rows = [
        i
        for i in range(stages - 1 if final_row_only else 0, stages)
        if matrix.score(i, task) is not None
    ]
    digests_and_scores = [run.example_scores(matrix.stages[row], task) for row in rows]
    if len({names for names, _ in digests_and_scores}) != 1 or not digests_and_scores[0][1]:
        return None
    scores = np.array([each for _, each in digests_and_scores])
    errors = np.abs(
        scores.mean(1) - np.array([matrix.scores[row][matrix.tasks.index(task)] for row in rows])
    )
    return (digests_and_scores[0][0], rows, scores) if errors.max() < MEAN_TOLERANCE else None


def _resample_means(scores: Array, draws: int, rng: np.random.Generator) -> Array:
    """Return the (draws, rows) means of resampled examples; `scores` is (rows, examples).

    Examples with equal scores in all rows are one kind; the count of each kind in a draw is
    multinomial.
    """
    kinds, counts = np.unique(scores, axis=1, return_counts=True)
    n = scores.shape[1]
    return np.asarray(rng.multinomial(n, counts / n, size=draws) @ kinds.T / n)
