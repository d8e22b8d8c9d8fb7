"""Retained-task matrix (a row per stage, a column per task) and its summaries.

R[0] is the base row, before training; R[i][j] is the score on task j after stage i, 1 <= i, j <=
T. "The stage of task j", R[j], is the row with the name of the task, so columns may be in any
order. A summary is None if a score that its definition needs was not measured or the last stage
is missing; it is never a mean over the available scores. All means over tasks are unweighted. A
joint run has one stage, which has no task's name, so it has only a final row.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from continual.errors import DataError, MissingError, brief, gathered
from continual.io import untrusted
from continual.io.atomic import write_atomically

MATRIX_SCHEMA = 1
BASE_STAGE = "base"
Score = float | None


@dataclass(frozen=True)
class Matrix:
    """Scores in [0, 1] of shape (stages, tasks), None where not measured.

    `stages` names the rows; "base" is first if the model was scored before training. `counts` are
    the numbers of test examples per task, empty if unknown. `cost` holds the resources of the
    run; the last word of each key is the unit. Raises DataError if the parts are inconsistent.
    """

    stream: str
    order: str
    strategy: str
    seed: int | None
    tasks: tuple[str, ...]
    metrics: Mapping[str, str]
    stages: tuple[str, ...]
    scores: tuple[tuple[Score, ...], ...]
    counts: tuple[int, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := _consistency_problems(self):
            raise DataError(gathered(problems))

    @property
    def is_sequential(self) -> bool:
        """Return True if some stage has the name of a task; a joint run is not sequential."""
        return any(stage in self.tasks for stage in self.stages)

    @property
    def is_finished(self) -> bool:
        """Return True if every task had its stage, or the one joint stage is over."""
        return (
            set(self.tasks) <= set(self.stages)
            if self.is_sequential
            else set(self.stages) > {BASE_STAGE}
        )

    @property
    def final_scores(self) -> tuple[Score, ...]:
        """Return R[T], one score per task; all None while the run is unfinished."""
        return self.scores[-1] if self.is_finished else (None,) * len(self.tasks)

    def row_of(self, task: str) -> int | None:
        """Return the index of the row with the name of the task, or None."""
        return self.stages.index(task) if task in self.stages else None

    def score(self, row: int | None, task: str) -> Score:
        """Return the score on `task` in a row; None if `row` is None."""
        return None if row is None else self.scores[row][self.tasks.index(task)]

    def own_stage_score(self, task: str) -> Score:
        """Return R[j][j], the score right after the own stage of the task."""
        return self.score(self.row_of(task), task)

    def with_row(self, stage: str, scores: Sequence[Score]) -> Matrix:
        """Return a matrix with one more stage; `scores` has one entry per task, in task order."""
        return replace(self, stages=(*self.stages, stage), scores=(*self.scores, tuple(scores)))

    def summary(self, reference: Matrix | None = None) -> dict[str, float | None]:
        """Return every summary by name; add `intransigence` if a reference run is given."""
        summary_values = {name: define(self) for name, define in SUMMARIES.items()}
        return (
            summary_values
            if reference is None
            else {**summary_values, "intransigence": intransigence(self, reference)}
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of matrix.json, with the summaries."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {
            "tasks": list(self.tasks),
            "stages": list(self.stages),
            "scores": [list(row) for row in self.scores],
            "counts": list(self.counts),
            "metrics": dict(self.metrics),
            "cost": dict(self.cost),
        }
        return {"schema": MATRIX_SCHEMA, **plain, **lists, "summary": self.summary()}

    @classmethod
    def from_dict(cls, data: Any) -> Matrix:
        """Build a matrix from `to_dict`; the stored summary is ignored. Raises DataError with all
        problems.

        A document without "schema" comes from another program: it needs stream, strategy, tasks,
        metrics, stages and scores, and its other keys are ignored. With "schema", an unknown key
        is an error.
        """
        if problems := _type_problems(data):
            raise DataError(gathered(problems))
        return cls(
            stream=data["stream"],
            order=data.get("order") or "",
            strategy=data["strategy"],
            seed=data.get("seed"),
            tasks=tuple(data["tasks"]),
            metrics=data["metrics"],
            stages=tuple(data["stages"]),
            scores=tuple(map(tuple, data["scores"])),
            counts=tuple(data.get("counts") or ()),
            cost=data.get("cost") or {},
        )

    def save(self, path: Path) -> None:
        """Write matrix.json atomically."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Matrix:
        """Read matrix.json; raise MissingError, or DataError that names the file."""
        if not path.is_file():
            raise MissingError(
                f"{path}: there is no such matrix; give a run folder in which a stage has been "
                "scored"
            )
        data = untrusted.load_json(path)
        try:
            return cls.from_dict(data)
        except DataError as error:
            raise DataError(f"{path}: {error}\nRestore the file, or run again.") from error


def average_performance(matrix: Matrix) -> float | None:
    """Compute mean_j R[T][j].

    Average accuracy A_T (Lopez-Paz & Ranzato 2017, eq. 2); A_k (Chaudhry et al. 2018).
    """
    return mean_or_none(matrix.final_scores)


def average_incremental_performance(matrix: Matrix) -> float | None:
    """Compute mean_i mean_{j<=i} R[i][j].

    Average incremental accuracy (Rebuffi et al. 2017, iCaRL).
    """
    return mean_or_none(performance_by_stage(matrix)) if matrix.is_finished else None


def performance_by_stage(matrix: Matrix) -> list[float | None]:
    """Compute mean_{j<=i} R[i][j] for each stage i, over the tasks learned so far."""
    rows = [row for row, stage in enumerate(matrix.stages) if stage != BASE_STAGE]
    return [
        mean_or_none(
            matrix.score(row, task) for task in matrix.tasks if task in matrix.stages[: row + 1]
        )
        for row in rows
    ]


def learning_accuracy(matrix: Matrix) -> float | None:
    """Compute mean_j R[j][j], the score of each task right after its stage.

    LA (Riemer et al. 2019, MER).
    """
    return mean_or_none(map(matrix.own_stage_score, matrix.tasks))


def backward_transfer(matrix: Matrix) -> float | None:
    """Compute mean_{j<T} (R[T][j] - R[j][j]), over T - 1 tasks. Negative values are forgetting.

    Lopez-Paz & Ranzato 2017, eq. 3.
    """
    return mean_or_none(
        _difference(matrix.score(-1, task), matrix.own_stage_score(task))
        for task in _earlier_tasks(matrix)
    )


def forgetting(matrix: Matrix) -> float | None:
    """Compute mean_{j<T} (max_{j<=i<T} R[i][j] - R[T][j]), over T - 1 tasks.

    F_k (Chaudhry et al. 2018). Positive values are forgetting; never below the negated backward
    transfer. The maximum starts at the own stage of the task, so what the model knew of a task
    before training on it does not count as learned.
    """
    return _mean_forgetting(matrix, len(matrix.stages) - 1, _earlier_tasks(matrix))


def forgetting_by_stage(matrix: Matrix) -> list[float | None]:
    """Compute F_k of the tasks learned so far, per stage; None at the first (Chaudhry et al. 2018)."""
    return [
        _mean_forgetting(
            matrix, row, [task for task in matrix.tasks if task in matrix.stages[:row]]
        )
        for row, stage in enumerate(matrix.stages)
        if stage != BASE_STAGE
    ]


def forward_transfer(matrix: Matrix) -> float | None:
    """Compute mean_{j>1} (R[j-1][j] - R[0][j]), over T - 1 tasks. Needs a base row.

    Lopez-Paz & Ranzato 2017, eq. 4, with the base row for b. Positive: earlier tasks help a task
    that has not been trained yet.
    """
    if matrix.stages[:1] != (BASE_STAGE,):
        return None
    later = [task for task in matrix.tasks if task != "".join(matrix.stages[1:2])]
    before = ((task, matrix.row_of(task)) for task in later)
    return mean_or_none(
        _difference(matrix.score(row - 1, task), matrix.score(0, task)) if row else None
        for task, row in before
    )


def intransigence(matrix: Matrix, reference: Matrix) -> float | None:
    """Compute mean_j (reference_j - R[j][j]), with the final row of the reference run.

    I_k (Chaudhry et al. 2018). Positive: tasks are learned less well than the reference knows
    them. The paper trains one reference for each j, on the tasks up to j; here one serves all,
    usually joint training on all tasks. Raises DataError if the reference lacks a task.
    """
    if missing := [task for task in matrix.tasks if task not in reference.tasks]:
        raise DataError(
            f"the reference run does not score {', '.join(missing)}; give one over the same tasks"
        )
    reference_scores = dict(zip(reference.tasks, reference.final_scores, strict=True))
    return mean_or_none(
        _difference(reference_scores[task], matrix.own_stage_score(task)) for task in matrix.tasks
    )


# The formulas are also in variants.py, for arrays of bootstrap draws. These short scalar versions
# need no numpy and are the readable definition; tests check that both agree on random matrices.
SUMMARIES: dict[str, Callable[[Matrix], float | None]] = {
    define.__name__: define
    for define in (
        average_performance,
        average_incremental_performance,
        learning_accuracy,
        backward_transfer,
        forgetting,
        forward_transfer,
    )
}


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Return the unweighted mean; None for no values, or if one value is None."""
    known = list(values)
    measured = [value for value in known if value is not None]
    return math.fsum(measured) / len(measured) if measured and len(measured) == len(known) else None


def _difference(a: Score, b: Score) -> Score:
    return None if a is None or b is None else a - b


def _earlier_tasks(matrix: Matrix) -> list[str]:
    """Return the tasks j < T: all but the task of the last row; none while unfinished."""
    return (
        [task for task in matrix.tasks if task != matrix.stages[-1]] if matrix.is_finished else []
    )


def _mean_forgetting(matrix: Matrix, row: int, tasks: Sequence[str]) -> float | None:
    """Compute mean_j (max_{j<=i<row} R[i][j] - R[row][j]) over `tasks`."""
    return mean_or_none(
        _difference(_best_score(matrix, task, row), matrix.score(row, task)) for task in tasks
    )


def _best_score(matrix: Matrix, task: str, end: int) -> Score:
    """Compute max_{j<=i<end} R[i][j]; None if a score is missing."""
    row = matrix.row_of(task)
    scores = [] if row is None else [matrix.score(i, task) for i in range(row, end)]
    known = [score for score in scores if score is not None]
    return max(known) if known and len(known) == len(scores) else None


REQUIRED_KEYS: dict[str, tuple[type, ...]] = {
    "stream": (str,),
    "strategy": (str,),
    "tasks": (list,),
    "metrics": (dict,),
    "stages": (list,),
    "scores": (list,),
}
OPTIONAL_KEYS: dict[str, tuple[type, ...]] = {
    "order": (str, type(None)),
    "seed": (int, type(None)),
    "counts": (list,),
    "cost": (dict,),
    "summary": (dict,),
    "schema": (int,),
}


def _type_problems(data: Any) -> list[str]:
    """Return the problems that prevent a JSON value from being a matrix."""
    if not isinstance(data, dict):
        return [
            f"a {type(data).__name__}, where an object with {', '.join(REQUIRED_KEYS)} was expected"
        ]
    if data.get("schema", MATRIX_SCHEMA) != MATRIX_SCHEMA:
        return [
            f"schema {brief(data['schema'])}; this version reads schema {MATRIX_SCHEMA}: use the "
            "version that wrote it"
        ]
    known = {**REQUIRED_KEYS, **OPTIONAL_KEYS}
    return [
        *(f"no {key!r}" for key in REQUIRED_KEYS if key not in data),
        *(
            f"unknown key {brief(key)}; schema {MATRIX_SCHEMA} has {', '.join(known)}"
            for key in data
            if "schema" in data and key not in known
        ),
        *(
            f"{key} is a {type(data[key]).__name__}; expected {kinds[0].__name__}"
            for key, kinds in known.items()
            if key in data and not isinstance(data[key], kinds)
        ),
        *(
            f"row {i} of scores is a {type(row).__name__}; expected a list"
            for i, row in enumerate(_list_or_empty(data.get("scores")))
            if not isinstance(row, list)
        ),
        *(
            f"{key} holds {brief(name)}; expected names"
            for key in ("tasks", "stages")
            for name in _list_or_empty(data.get(key))
            if not isinstance(name, str)
        ),
        *(
            f"a control character in the name {brief(name)}; rename it"
            for name in (
                *(data.get(key) for key in ("stream", "order", "strategy")),
                *_list_or_empty(data.get("tasks")),
                *_list_or_empty(data.get("stages")),
            )
            if isinstance(name, str) and untrusted.CONTROL.search(name)
        ),
        *(
            f"the metric {brief(name)} is no name"
            for name in _dict_or_empty(data.get("metrics")).values()
            if not isinstance(name, str)
        ),
    ]


def _list_or_empty(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict_or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _consistency_problems(m: Matrix) -> list[str]:
    """Return the inconsistencies of a matrix whose values have the right types."""
    num_tasks = len(m.tasks)
    cells = [
        (stage, task, score)
        for stage, row in zip(m.stages, m.scores, strict=False)
        for task, score in zip(m.tasks, row, strict=False)
    ]
    return [
        *([] if m.tasks else ["there are no tasks; a matrix has at least one column"]),
        *(
            f"{kind} {brief(name)} stands twice; names must differ"
            for kind, names in (("task", m.tasks), ("stage", m.stages))
            for name, n in Counter(names).items()
            if n > 1
        ),
        *(
            [f"stage {BASE_STAGE!r} is row {m.stages.index(BASE_STAGE)}; it must be the first"]
            if BASE_STAGE in m.stages[1:]
            else []
        ),
        *(
            [f"task {BASE_STAGE!r}: that name is the first row's; rename the task"]
            if BASE_STAGE in m.tasks
            else []
        ),
        *(
            f"task {task!r} has no metric; add it to metrics"
            for task in m.tasks
            if task not in m.metrics
        ),
        *(
            []
            if len(m.scores) == len(m.stages)
            else [
                f"{len(m.scores)} rows of scores for {len(m.stages)} stages; expected one a stage"
            ]
        ),
        *(
            f"row {i} has {len(row)} scores; expected {num_tasks}, one a task"
            for i, row in enumerate(m.scores)
            if len(row) != num_tasks
        ),
        *(
            f"the score {brief(score)} on {task!r} after {stage!r} is no number in [0, 1]"
            for stage, task, score in cells
            if score is not None and not untrusted.is_number(score, 0, 1)
        ),
        *(
            []
            if len(m.counts) in (0, num_tasks)
            else [f"{len(m.counts)} counts; expected {num_tasks}, one a task, or none"]
        ),
        *(
            f"the count {brief(count)} is no number of examples"
            for count in m.counts
            if not isinstance(count, int) or not untrusted.is_number(count, 0)
        ),
        *(
            f"the cost {brief(key)} is {brief(value)}; expected a finite number"
            for key, value in m.cost.items()
            if not untrusted.is_number(value, -1e18, 1e18)
        ),
    ]
