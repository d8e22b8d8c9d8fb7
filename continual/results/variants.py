"""The published forms of each summary, by name: papers divide by other numbers, or begin the
maximum elsewhere.

All are functions of the same cells, so one matrix has all of them side by side, and so has every
draw of a bootstrap: `Cells` holds one matrix, or many of the same shape. A form that bears a
summary's own name is `Matrix.summary`'s. As there, a cell that is needed and was not measured
leaves no figure, rather than one over fewer cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from continual.results.matrix import BASE, Matrix

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """Scores (..., stages, tasks) with the names, counts and stages of `matrix`; NaN where not
    measured.
    """

    matrix: Matrix
    scores: Array

    @classmethod
    def of(cls, matrix: Matrix) -> Cells:
        """The cells of one matrix: scores (stages, tasks)."""
        scores = np.array(matrix.scores, dtype=np.float64)  # None becomes NaN
        return cls(matrix, scores.reshape(len(matrix.stages), len(matrix.tasks)))

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """(tasks,) the row that bears each task's name; -1 where there is none."""
        rows = [self.matrix.stage_of(task) for task in self.matrix.tasks]
        return np.array([-1 if row is None else row for row in rows])

    @cached_property
    def stage(self) -> NDArray[np.int64]:
        """(stages, 1) each row's number, to compare with `rows`; what stands before training is no
        stage.
        """
        return np.arange(self.first, len(self.matrix.stages))[:, None]

    @property
    def first(self) -> int:
        """The row of the first stage: 1 behind a base row."""
        return int(self.matrix.stages[:1] == (BASE,))

    @property
    def learned(self) -> Array:
        """(..., stages, tasks) the scores without the base row."""
        return self.scores[..., self.first :, :]

    @property
    def last(self) -> Array:
        """(..., tasks) R[T], all NaN while the run is unfinished."""
        nothing = np.full(self.scores.shape[:-2] + self.scores.shape[-1:], np.nan)
        return self.scores[..., -1, :] if self.matrix.finished else nothing

    def beside(self, offset: int = 0) -> Array:
        """(..., tasks) each task's score in the row of its own stage, or so many rows from it; NaN
        where none is.
        """
        rows = self.rows + offset
        there = (self.rows >= 0) & (rows >= 0)
        if not there.any():
            return np.full(self.scores.shape[:-2] + self.scores.shape[-1:], np.nan)
        return np.where(there, self.scores[..., rows * there, np.arange(len(rows))], np.nan)

    @property
    def earlier(self) -> NDArray[np.bool_]:
        """(tasks,) the tasks j < T: all but the one that the last row bears the name of; none while
        unfinished.
        """
        last = self.matrix.stages[-1] if self.matrix.finished else None
        return np.array([last not in (None, task) for task in self.matrix.tasks])

    @property
    def later(self) -> NDArray[np.bool_]:
        """(tasks,) the tasks j > 1: all but the one that the first stage bears the name of."""
        return np.array(
            [
                (task,) != self.matrix.stages[self.first : self.first + 1]
                for task in self.matrix.tasks
            ]
        )


def _mean(values: Array, over: NDArray[np.bool_]) -> Array:
    """(...) the mean over the entries (..., n) that `over` (n,) chooses; NaN of none."""
    n = int(over.sum())
    return values[..., over].sum(-1) / n if n else np.full(values.shape[:-1], np.nan)


def _all(values: Array) -> Array:
    return _mean(values, np.ones(values.shape[-1], dtype=bool))


def _cells(values: Array, chosen: NDArray[np.bool_], cells: Cells) -> Array:
    """(...) the mean over the chosen of the cells (..., stages, tasks); NaN while unfinished."""
    flat = values.reshape(*values.shape[:-2], chosen.size)
    return _mean(flat, chosen.ravel() & cells.matrix.finished & bool((cells.rows >= 0).all()))


def _pooled(cells: Cells) -> Array:
    counts = np.array(cells.matrix.counts, dtype=np.float64)
    whole = counts.sum()
    return (
        (cells.last * counts).sum(-1) / whole if whole else np.full(cells.scores.shape[:-2], np.nan)
    )


def _incremental(cells: Cells) -> Array:
    known = (cells.rows <= cells.stage) & (cells.rows >= 0)
    n = known.sum(1)
    if not n.all() or not cells.matrix.finished:
        return np.full(cells.scores.shape[:-2], np.nan)
    return _all(np.where(known, cells.learned, 0.0).sum(-1) / n)


def _fall(cells: Cells, own: bool, last: bool) -> Array:
    """(...) the mean fall from the best score, from the task's `own` stage on or any; the `last`
    may count too.
    """
    rows = cells.stage[: None if last else -1]
    chosen = (rows >= (cells.rows if own else 0)) & (cells.rows >= 0) & (rows >= 0)
    if not chosen[:, cells.earlier].any(0).all():
        return np.full(cells.scores.shape[:-2], np.nan)
    best = np.where(chosen, cells.learned[..., : len(rows), :], -np.inf).max(-2, initial=-np.inf)
    return _mean(best - cells.last, cells.earlier)


def _before(cells: Cells, gain: bool) -> Array:
    """(...) the mean score right before a task's own stage, or its `gain` over the base row."""
    if not gain:
        return _mean(cells.beside(-1), cells.later)
    if not cells.first:
        return np.full(cells.scores.shape[:-2], np.nan)
    return _mean(cells.beside(-1) - cells.scores[..., 0, :], cells.later)


@dataclass(frozen=True)
class Variant:
    """One published form of a summary: `of` which, its short name beside the others, its formula
    and who has it so.

    `define` maps cells (..., stages, tasks) to figures (...). `final` says that it reads the last
    row alone, `best` that it takes the best of several stages, which is too high by chance.
    """

    name: str
    of: str
    title: str
    formula: str
    source: str
    define: Callable[[Cells], Array]
    final: bool = False
    best: bool = False


GEM, RWALK = "Lopez-Paz & Ranzato 2017 (GEM)", "Chaudhry et al. 2018 (RWalk)"
MORE = "Díaz-Rodríguez et al. 2018 (Don't forget, there is more than forgetting)"

# R[0] is the base row, R[i][j] the score on task j after stage i, T the number of tasks, n_j the
# test examples of j.
VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            "average_performance",
            "average_performance",
            "over tasks",
            "1/T sum_j R[T][j]",
            f"{GEM}, eq. 2",
            lambda c: _all(c.last),
            final=True,
        ),
        Variant(
            "average_performance_pooled",
            "average_performance",
            "over examples",
            "sum_j n_j R[T][j] / sum_j n_j",
            "O-LoRA's logs (Wang et al. 2023): one score over the tests of all tasks",
            _pooled,
            final=True,
        ),
        Variant(
            "average_incremental_performance",
            "average_incremental_performance",
            "over stages",
            "1/T sum_i 1/i sum_{j<=i} R[i][j]",
            "Rebuffi et al. 2017 (iCaRL)",
            _incremental,
        ),
        Variant(
            "average_incremental_performance_cells",
            "average_incremental_performance",
            "over cells",
            "2/(T(T+1)) sum_{j<=i} R[i][j]",
            f"{MORE}, A",
            lambda c: _cells(c.learned, c.stage >= c.rows, c),
        ),
        Variant(
            "learning_accuracy",
            "learning_accuracy",
            "over tasks",
            "1/T sum_j R[j][j]",
            "Riemer et al. 2019 (MER), LA",
            lambda c: _all(c.beside()),
        ),
        Variant(
            "backward_transfer",
            "backward_transfer",
            "over T-1",
            "1/(T-1) sum_{j<T} (R[T][j] - R[j][j])",
            f"{GEM}, eq. 3",
            lambda c: _mean(c.last - c.beside(), c.earlier),
        ),
        Variant(
            "backward_transfer_over_all",
            "backward_transfer",
            "over T",
            "1/T sum_j (R[T][j] - R[j][j])",
            "Wang et al. 2023 (TRACE)",
            lambda c: _all(c.last - c.beside()),
        ),
        Variant(
            "backward_transfer_cells",
            "backward_transfer",
            "over cells",
            "2/(T(T-1)) sum_{j<i} (R[i][j] - R[j][j])",
            f"{MORE}, BWT",
            lambda c: _cells(c.learned - c.beside()[..., None, :], c.stage > c.rows, c),
        ),
        Variant(
            "forgetting",
            "forgetting",
            "from the best since",
            "1/(T-1) sum_{j<T} (max_{j<=i<T} R[i][j] - R[T][j])",
            f"{RWALK}, F_k, the maximum from the task's own stage on",
            lambda c: _fall(c, own=True, last=False),
            best=True,
        ),
        Variant(
            "forgetting_any_stage",
            "forgetting",
            "from the best ever",
            "1/(T-1) sum_{j<T} (max_{1<=i<T} R[i][j] - R[T][j])",
            f"{RWALK}, F_k as printed",
            lambda c: _fall(c, own=False, last=False),
            best=True,
        ),
        Variant(
            "forgetting_never_negative",
            "forgetting",
            "the end counts too",
            "1/(T-1) sum_{j<T} (max_{j<=i<=T} R[i][j] - R[T][j])",
            "Buzzega et al. 2020, the library Mammoth, whose rows hold the tasks seen so far",
            lambda c: _fall(c, own=True, last=True),
            best=True,
        ),
        Variant(
            "forgetting_first_minus_last",
            "forgetting",
            "first minus last",
            "1/(T-1) sum_{j<T} (R[j][j] - R[T][j])",
            "Lomonaco et al. 2021, the library Avalanche",
            lambda c: _mean(c.beside() - c.last, c.earlier),
        ),
        Variant(
            "forward_transfer",
            "forward_transfer",
            "over the base row",
            "1/(T-1) sum_{j>1} (R[j-1][j] - R[0][j])",
            f"{GEM}, eq. 4, the base row for b",
            lambda c: _before(c, gain=True),
        ),
        Variant(
            "forward_transfer_zero_shot",
            "forward_transfer",
            "zero-shot",
            "1/(T-1) sum_{j>1} R[j-1][j]",
            "Zhang et al. 2023 (CITB), FWT",
            lambda c: _before(c, gain=False),
        ),
        Variant(
            "forward_transfer_cells",
            "forward_transfer",
            "over cells",
            "2/(T(T-1)) sum_{j>i} R[i][j]",
            f"{MORE}, FWT",
            lambda c: _cells(c.learned, c.stage < c.rows, c),
        ),
    )
}


def forms(matrix: Matrix) -> dict[str, float | None]:
    """Every form of every summary by name, None where the matrix lacks what it needs."""
    cells = Cells.of(matrix)
    told = {
        name: float(variant.define(cells)) if matrix.stages else np.nan
        for name, variant in VARIANTS.items()
    }
    return {name: None if np.isnan(value) else value for name, value in told.items()}
