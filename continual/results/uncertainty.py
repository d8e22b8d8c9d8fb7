"""How far a figure would be off with other test examples, seeds or orders: 95% intervals, and
differences in pairs.

Over runs: Student's t. Over test examples: the percentile bootstrap (Efron & Tibshirani 1993, ch.
13), which draws as many examples as a task has, with replacement, within each task. The same draw
serves every stage, so that forgetting keeps what a task's own stage and the last one have in
common; and it serves both sides of a pair, so that a difference between strategies is not blurred
by examples that are hard for both.

The best of several stages is too high by chance, and a draw's best is so once more: forms that take
one have the basic bootstrap's limits (Davison & Hinkley 1997, eq. 5.6), which turn the draws around
the figure and so lean the other way. They do not lean far enough where a score stays level over
many stages: of a task that truly falls by nothing they hold that in 93 of 100 cases over 4 stages,
in 80 over 8 and in 40 over 15, more examples or fewer. Backward transfer takes no best, and has no
such trouble.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from continual.errors import ConfigError, unknown
from continual.results.matrix import SUMMARIES
from continual.results.run_folder import Run, RunGroup
from continual.results.variants import VARIANTS, Array, ScoreArray

CONFIDENCE_LEVEL = 0.95
BOOTSTRAP_DRAWS = 1000
MEAN_TOLERANCE = 1e-6  # what the mean of marks may be off by rounding
T_OVER_RUNS = "Student's t over runs"
BOOTSTRAP_OVER_EXAMPLES = "bootstrap over test examples"
T_OVER_PAIRS = "Student's t over pairs of runs"
BOOTSTRAP_AND_T = f"{BOOTSTRAP_OVER_EXAMPLES}, {T_OVER_PAIRS}"
BASELINE = "naive"  # what others are measured against, where it is there


@dataclass(frozen=True)
class Interval:
    """The 95% interval of a figure, in its own unit; `n` runs or test examples, `how` says which
    and by what.
    """

    low: float
    high: float
    n: int
    how: str


@dataclass(frozen=True)
class PairedDifference:
    """How much higher `name` is in one strategy than in another, with its 95% interval, in [-1, 1].

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
    """Of a mean over runs: mean +- t(0.975, n - 1) s / sqrt(n); None of fewer than two, or where
    one is missing.
    """
    told = list(values)
    known = [value for value in told if value is not None]
    if len(known) < 2 or len(known) < len(told):
        return None
    middle, half = (
        statistics.fmean(known),
        _t_quantile(len(known)) * statistics.stdev(known) / math.sqrt(len(known)),
    )
    return Interval(middle - half, middle + half, len(known), T_OVER_RUNS)


def _t_quantile(n: int) -> float:
    """Student's t at 0.975 for n values."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + CONFIDENCE_LEVEL) / 2))


def _draw_student_t(n: int, draws: int, seed: int) -> Array:
    """(draws,) values of Student's t for n runs: evenly spread, in random order, as its tails are
    heavy.
    """
    from scipy.special import stdtrit

    even = (np.random.default_rng([seed, n]).permutation(draws) + 0.5) / draws
    return np.asarray(stdtrit(n - 1, even))


def interval_over_examples(
    run: Run, name: str = "average_performance", draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> Interval | None:
    """The interval over one run's test examples of a summary, or of any of its published forms; see
    `intervals`.
    """
    return bootstrap_intervals(run, [name], draws, seed).get(name)


def bootstrap_intervals(
    run: Run, names: Sequence[str] = tuple(SUMMARIES), draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """The intervals over test examples of these summaries, of those that the run has.

    None of them where the answers that they need are not all in predictions/, or are not those of
    the matrix. Where all examples of a task are marked alike, its part of an interval has no width.
    Raises DataError for a broken file, ConfigError for a form that there is not.
    """
    drawn = _bootstrap([run], names, draws, seed) if run.matrix.is_finished else None
    if drawn is None:
        return {}
    return {
        name: Interval(
            *_interval_limits(name, values[:, 0], float(drawn.point_estimates[name][0])),
            drawn.n,
            BOOTSTRAP_OVER_EXAMPLES,
        )
        for name, values in drawn.values.items()
        if not np.isnan(values).any()
    }


def paired_difference(
    a: Run | Sequence[Run],
    b: Run | Sequence[Run],
    name: str = "average_performance",
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> PairedDifference | None:
    """How much higher `name` is in `a` than in `b`, over examples that both answered.

    Of several runs those of the same seed and order make a pair. The bootstrap draws the same
    examples for both sides (Efron & Tibshirani 1993, ch. 8) and for all pairs, and to each draw's
    mean adds t(pairs - 1) s / sqrt(pairs), s the standard deviation over pairs: so with many
    examples the interval is Student's, and with one pair the bootstrap's. Where pairs have test
    examples of their own, s holds those too, and the interval is Student's alone. None where there
    are no such pairs, or where the two of a pair did not answer the same examples. Raises as
    `intervals` does.
    """
    pairs = _match_runs(a, b)
    drawn = (
        _bootstrap([run for pair in pairs for run in pair], [name], draws, seed) if pairs else None
    )
    if drawn is None or not (
        drawn.same_examples
        or all(
            (alone := _bootstrap(pair, [name], 1, seed)) and alone.same_examples for pair in pairs
        )
    ):
        return None
    differences = [float(x - y) for x, y in drawn.point_estimates[name].reshape(-1, 2)]
    if any(math.isnan(difference) for difference in differences):
        return None
    middle, runs, spread = (
        statistics.fmean(differences),
        len(pairs),
        interval_over_runs(differences),
    )
    if spread and not drawn.same_examples:
        return PairedDifference(name, middle, spread.low, spread.high, drawn.n, runs, T_OVER_PAIRS)
    values = (drawn.values[name][:, 0::2] - drawn.values[name][:, 1::2]).mean(1)
    if spread:
        error = statistics.stdev(differences) / math.sqrt(runs)
        values = values + error * _draw_student_t(runs, draws, seed)
    return PairedDifference(
        name,
        middle,
        *_interval_limits(name, values, middle),
        drawn.n,
        runs,
        BOOTSTRAP_AND_T if spread else BOOTSTRAP_OVER_EXAMPLES,
    )


def differences_from_baseline(
    groups: Sequence[RunGroup], name: str = "average_performance"
) -> tuple[str, dict[str, PairedDifference]]:
    """How each group differs from naive, or where that is not there from the best but joint
    training; by label.

    Groups that have no pair with it are left out; the label of that one is empty where there is
    none.
    """
    done = [group for group in groups if group.mean(name) is not None]
    other = next(
        (g for g in done if g.label == BASELINE), next((g for g in done if not g.is_joint), None)
    )
    if other is None:
        return "", {}
    told = {
        group.label: paired_difference(group.runs, other.runs, name)
        for group in done
        if group is not other
    }
    return other.label, {label: each for label, each in told.items() if each}


def _interval_limits(name: str, values: Array, point: float) -> tuple[float, float]:
    """The limits of a form by its draws."""
    low, high = np.quantile(
        values, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2]
    ).tolist()
    return (2 * point - high, 2 * point - low) if VARIANTS[name].takes_maximum else (low, high)


def _match_runs(a: Run | Sequence[Run], b: Run | Sequence[Run]) -> list[tuple[Run, Run]]:
    """Finished runs of the same seed and order; two single runs whatever their seed."""
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
    """Figures of some runs: `points` (runs,) as they are and `values` (draws, runs) by draw, under
    their names.

    `n` test examples were answered; `shared` says that all runs answered the very same ones: only
    then are the values drawn.
    """

    values: dict[str, Array]
    point_estimates: dict[str, Array]
    n: int
    same_examples: bool


def _bootstrap(
    runs: Sequence[Run], names: Sequence[str], draws: int, seed: int
) -> _BootstrapDraws | None:
    """The named figures of all runs under the same draws of examples; None of missing answers or
    other tasks.
    """
    if strange := [name for name in names if name not in VARIANTS]:
        raise ConfigError(unknown("form of a summary", strange[0], VARIANTS))
    if len({frozenset(run.matrix.tasks) for run in runs}) > 1:
        return None
    rng = np.random.default_rng(seed)
    known = [ScoreArray.from_matrix(run.matrix) for run in runs]
    scores = [np.repeat(cells.scores[None], draws, 0) for cells in known]
    final = all(VARIANTS[name].final_row_only for name in names)
    n, shared = 0, True
    for task in sorted(runs[0].matrix.tasks):
        found = [told for run in runs if (told := _task_scores(run, task, final))]
        if len(found) < len(runs):
            return None
        n += found[0][2].shape[1]
        shared &= len({names for names, _, _ in found}) == 1
        if shared:
            means = _resample_means(np.concatenate([marks for _, _, marks in found]), draws, rng)
            ends = np.cumsum([len(rows) for _, rows, _ in found])
            for run, each, (_, rows, _), mine in zip(
                runs, scores, found, np.split(means, ends[:-1], 1), strict=True
            ):
                each[:, rows, run.matrix.tasks.index(task)] = mine
    drawn = [replace(cells, scores=each) for cells, each in zip(known, scores, strict=True)]
    define = {name: VARIANTS[name].compute for name in names}
    return _BootstrapDraws(
        {name: np.stack([f(cells) for cells in drawn], 1) for name, f in define.items()},
        {name: np.stack([f(cells) for cells in known]) for name, f in define.items()},
        n,
        shared,
    )


def _task_scores(run: Run, task: str, final_row_only: bool) -> tuple[str, list[int], Array] | None:
    """Which examples the task has, the rows of the matrix that are measured, and the marks (rows,
    examples).

    None where an answer is missing, or where a row's mean is not what the matrix says. `final`: the
    last row only.
    """
    matrix, stages = run.matrix, len(run.matrix.stages)
    rows = [
        i
        for i in range(stages - 1 if final_row_only else 0, stages)
        if matrix.score(i, task) is not None
    ]
    told = [example_scores(run, matrix.stages[row], task) for row in rows]
    if len({names for names, _ in told}) != 1 or not told[0][1]:
        return None
    marks = np.array([each for _, each in told])
    off = np.abs(
        marks.mean(1) - np.array([matrix.scores[row][matrix.tasks.index(task)] for row in rows])
    )
    return (told[0][0], rows, marks) if off.max() < MEAN_TOLERANCE else None


def example_scores(run: Run, stage: str, task: str) -> tuple[str, tuple[float, ...]]:
    """Which examples the task's test has, as a digest of their ids and references, and the mark of
    each answer.

    A file is read once for a run, whatever asks: the run keeps these as it keeps its cached
    properties.
    """
    kept: dict[tuple[str, str], tuple[str, tuple[float, ...]]] = run.__dict__.setdefault(
        "marked", {}
    )
    if (stage, task) not in kept:
        told = run.load_predictions(stage, task)
        names = repr([(p.id, p.references) for p in told]).encode("utf-8", "surrogatepass")
        kept[stage, task] = (
            blake2b(names, digest_size=16).hexdigest(),
            tuple(p.score for p in told),
        )
    return kept[stage, task]


def _resample_means(scores: Array, draws: int, rng: np.random.Generator) -> Array:
    """(draws, rows) the means over as many examples as there are, drawn with replacement; marks are
    (rows, examples).

    Examples that are marked alike in all rows are counted as one kind: how often each kind is drawn
    is multinomial.
    """
    kinds, counts = np.unique(scores, axis=1, return_counts=True)
    n = scores.shape[1]
    return np.asarray(rng.multinomial(n, counts / n, size=draws) @ kinds.T / n)
