"""Published variants of each summary, by name: papers divide by other numbers, or start the maximum
elsewhere.

Every variant is a function of the same scores, so one matrix has all of them, and so has every
bootstrap draw: a `ScoreArray` holds one matrix, or many of the same shape. The variant with the
name of a summary equals `Matrix.summary`. As there, a missing score that a definition needs gives
no figure (NaN), not a mean over fewer scores. The formulas of the summaries are also in
matrix.py, as scalar functions with None for missing scores; tests check that both agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from continual.results.matrix import BASE_STAGE, Matrix

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreArray:
    """Scores (..., stages, tasks), NaN where not measured; names, counts and stages are in
    `matrix`.
    """

    matrix: Matrix
    scores: Array

    @classmethod
    def from_matrix(cls, matrix: Matrix) -> ScoreArray:
        """Build the array of one matrix, of shape (stages, tasks)."""
        scores = np.array(matrix.scores, dtype=np.float64)  # None becomes NaN
        return cls(matrix, scores.reshape(len(matrix.stages), len(matrix.tasks)))

    @cached_property
    def task_rows(self) -> NDArray[np.int64]:
        """Return (tasks,) the row of each task's own stage; -1 if there is none."""
        rows = [self.matrix.row_of(task) for task in self.matrix.tasks]
        return np.array([-1 if row is None else row for row in rows])

    @cached_property
    def stage_rows(self) -> NDArray[np.int64]:
        """Return (stages, 1) the row numbers of the stages, without the base row."""
        return np.arange(self.first_stage_row, len(self.matrix.stages))[:, None]

    @property
    def first_stage_row(self) -> int:
        """Return the row of the first stage: 1 after a base row, else 0."""
        return int(self.matrix.stages[:1] == (BASE_STAGE,))

    @property
    def stage_scores(self) -> Array:
        """Return (..., stages, tasks) the scores without the base row."""
        return self.scores[..., self.first_stage_row :, :]

    @property
    def final_scores(self) -> Array:
        """Return (..., tasks) R[T]; all NaN while the run is unfinished."""
        nothing = np.full(self.scores.shape[:-2] + self.scores.shape[-1:], np.nan)
        return self.scores[..., -1, :] if self.matrix.is_finished else nothing

    def own_stage_scores(self, offset: int = 0) -> Array:
        """Return (..., tasks) the scores `offset` rows from each task's own stage; NaN outside."""
        rows = self.task_rows + offset
        is_inside = (self.task_rows >= 0) & (rows >= 0)
        if not is_inside.any():
            return np.full(self.scores.shape[:-2] + self.scores.shape[-1:], np.nan)
        return np.where(is_inside, self.scores[..., rows * is_inside, np.arange(len(rows))], np.nan)

    @property
    def earlier_mask(self) -> NDArray[np.bool_]:
        """Return (tasks,) the mask of tasks j < T: all but the task of the last row.

        All False while the run is unfinished.
        """
        last = self.matrix.stages[-1] if self.matrix.is_finished else None
        return np.array([last not in (None, task) for task in self.matrix.tasks])

    @property
    def later_mask(self) -> NDArray[np.bool_]:
        """Return (tasks,) the mask of tasks j > 1: all but the task of the first stage."""
        return np.array(
            [
                (task,) != self.matrix.stages[self.first_stage_row : self.first_stage_row + 1]
                for task in self.matrix.tasks
            ]
        )


def _masked_mean(values: Array, mask: NDArray[np.bool_]) -> Array:
    """Return (...) the mean over the entries (..., n) that `mask` (n,) selects; NaN if none."""
    n = int(mask.sum())
    return values[..., mask].sum(-1) / n if n else np.full(values.shape[:-1], np.nan)


def _mean_over_tasks(values: Array) -> Array:
    return _masked_mean(values, np.ones(values.shape[-1], dtype=bool))


def _mean_over_cells(values: Array, mask: NDArray[np.bool_], array: ScoreArray) -> Array:
    """Return (...) the mean over the selected cells (..., stages, tasks); NaN while unfinished."""
    flat = values.reshape(*values.shape[:-2], mask.size)
    return _masked_mean(
        flat, mask.ravel() & array.matrix.is_finished & bool((array.task_rows >= 0).all())
    )


def _mean_over_examples(array: ScoreArray) -> Array:
    counts = np.array(array.matrix.counts, dtype=np.float64)
    total = counts.sum()
    return (
        (array.final_scores * counts).sum(-1) / total
        if total
        else np.full(array.scores.shape[:-2], np.nan)
    )


def _average_incremental(array: ScoreArray) -> Array:
    known = (array.task_rows <= array.stage_rows) & (array.task_rows >= 0)
    n = known.sum(1)
    if not n.all() or not array.matrix.is_finished:
        return np.full(array.scores.shape[:-2], np.nan)
    return _mean_over_tasks(np.where(known, array.stage_scores, 0.0).sum(-1) / n)


def _mean_forgetting(array: ScoreArray, since_own_stage: bool, include_last: bool) -> Array:
    """Return (...) the mean fall from the best score of each earlier task.

    The maximum starts at the own stage of the task if `since_own_stage`, and includes the last
    row if `include_last`.
    """
    rows = array.stage_rows[: None if include_last else -1]
    chosen = (
        (rows >= (array.task_rows if since_own_stage else 0)) & (array.task_rows >= 0) & (rows >= 0)
    )
    if not chosen[:, array.earlier_mask].any(0).all():
        return np.full(array.scores.shape[:-2], np.nan)
    best = np.where(chosen, array.stage_scores[..., : len(rows), :], -np.inf).max(
        -2, initial=-np.inf
    )
    return _masked_mean(best - array.final_scores, array.earlier_mask)


def _zero_shot_score(array: ScoreArray, over_base: bool) -> Array:
    """Return (...) the mean score right before a task's own stage, minus the base row if
    `over_base`.
    """
    if not over_base:
        return _masked_mean(array.own_stage_scores(-1), array.later_mask)
    if not array.first_stage_row:
        return np.full(array.scores.shape[:-2], np.nan)
    return _masked_mean(array.own_stage_scores(-1) - array.scores[..., 0, :], array.later_mask)


@dataclass(frozen=True)
class Variant:
    """One published variant of `summary`: short title, formula and source.

    `compute` maps scores (..., stages, tasks) to figures (...). `final_row_only`: it reads only
    the last row. `takes_maximum`: it takes the maximum over stages, which is biased upwards.
    """

    name: str
    summary: str
    title: str
    formula: str
    source: str
    compute: Callable[[ScoreArray], Array]
    final_row_only: bool = False
    takes_maximum: bool = False


GEM, RWALK = "Lopez-Paz & Ranzato 2017 (GEM)", "Chaudhry et al. 2018 (RWalk)"
DIAZ_RODRIGUEZ = "Díaz-Rodríguez et al. 2018 (Don't forget, there is more than forgetting)"

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
            lambda c: _mean_over_tasks(c.final_scores),
            final_row_only=True,
        ),
        Variant(
            "average_performance_pooled",
            "average_performance",
            "over examples",
            "sum_j n_j R[T][j] / sum_j n_j",
            "O-LoRA's logs (Wang et al. 2023): one score over the tests of all tasks",
            _mean_over_examples,
            final_row_only=True,
        ),
        Variant(
            "average_incremental_performance",
            "average_incremental_performance",
            "over stages",
            "1/T sum_i 1/i sum_{j<=i} R[i][j]",
            "Rebuffi et al. 2017 (iCaRL)",
            _average_incremental,
        ),
        Variant(
            "average_incremental_performance_cells",
            "average_incremental_performance",
            "over cells",
            "2/(T(T+1)) sum_{j<=i} R[i][j]",
            f"{DIAZ_RODRIGUEZ}, A",
            lambda c: _mean_over_cells(c.stage_scores, c.stage_rows >= c.task_rows, c),
        ),
        Variant(
            "learning_accuracy",
            "learning_accuracy",
            "over tasks",
            "1/T sum_j R[j][j]",
            "Riemer et al. 2019 (MER), LA",
            lambda c: _mean_over_tasks(c.own_stage_scores()),
        ),
        Variant(
            "backward_transfer",
            "backward_transfer",
            "over T-1",
            "1/(T-1) sum_{j<T} (R[T][j] - R[j][j])",
            f"{GEM}, eq. 3",
            lambda c: _masked_mean(c.final_scores - c.own_stage_scores(), c.earlier_mask),
        ),
        Variant(
            "backward_transfer_over_all",
            "backward_transfer",
            "over T",
            "1/T sum_j (R[T][j] - R[j][j])",
            "Wang et al. 2023 (TRACE)",
            lambda c: _mean_over_tasks(c.final_scores - c.own_stage_scores()),
        ),
        Variant(
            "backward_transfer_cells",
            "backward_transfer",
            "over cells",
            "2/(T(T-1)) sum_{j<i} (R[i][j] - R[j][j])",
            f"{DIAZ_RODRIGUEZ}, BWT",
            lambda c: _mean_over_cells(
                c.stage_scores - c.own_stage_scores()[..., None, :], c.stage_rows > c.task_rows, c
            ),
        ),
        Variant(
            "forgetting",
            "forgetting",
            "from the best since",
            "1/(T-1) sum_{j<T} (max_{j<=i<T} R[i][j] - R[T][j])",
            f"{RWALK}, F_k, the maximum from the task's own stage on",
            lambda c: _mean_forgetting(c, since_own_stage=True, include_last=False),
            takes_maximum=True,
        ),
        Variant(
            "forgetting_any_stage",
            "forgetting",
            "from the best ever",
            "1/(T-1) sum_{j<T} (max_{1<=i<T} R[i][j] - R[T][j])",
            f"{RWALK}, F_k as printed",
            lambda c: _mean_forgetting(c, since_own_stage=False, include_last=False),
            takes_maximum=True,
        ),
        Variant(
            "forgetting_never_negative",
            "forgetting",
            "the end counts too",
            "1/(T-1) sum_{j<T} (max_{j<=i<=T} R[i][j] - R[T][j])",
            "Buzzega et al. 2020, the library Mammoth, whose rows hold the tasks seen so far",
            lambda c: _mean_forgetting(c, since_own_stage=True, include_last=True),
            takes_maximum=True,
        ),
        Variant(
            "forgetting_first_minus_last",
            "forgetting",
            "first minus last",
            "1/(T-1) sum_{j<T} (R[j][j] - R[T][j])",
            "Lomonaco et al. 2021, the library Avalanche",
            lambda c: _masked_mean(c.own_stage_scores() - c.final_scores, c.earlier_mask),
        ),
        Variant(
            "forward_transfer",
            "forward_transfer",
            "over the base row",
            "1/(T-1) sum_{j>1} (R[j-1][j] - R[0][j])",
            f"{GEM}, eq. 4, the base row for b",
            lambda c: _zero_shot_score(c, over_base=True),
        ),
        Variant(
            "forward_transfer_zero_shot",
            "forward_transfer",
            "zero-shot",
            "1/(T-1) sum_{j>1} R[j-1][j]",
            "Zhang et al. 2023 (CITB), FWT",
            lambda c: _zero_shot_score(c, over_base=False),
        ),
        Variant(
            "forward_transfer_cells",
            "forward_transfer",
            "over cells",
            "2/(T(T-1)) sum_{j>i} R[i][j]",
            f"{DIAZ_RODRIGUEZ}, FWT",
            lambda c: _mean_over_cells(c.stage_scores, c.stage_rows < c.task_rows, c),
        ),
    )
}


def compute_variants(matrix: Matrix) -> dict[str, float | None]:
    """Compute every variant of every summary, by name; None if the matrix lacks a score it needs."""
    array = ScoreArray.from_matrix(matrix)
    values = {
        name: float(variant.compute(array)) if matrix.stages else np.nan
        for name, variant in VARIANTS.items()
    }
    return {name: None if np.isnan(value) else value for name, value in values.items()}
