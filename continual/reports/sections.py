"""What pages are made of: sections with charts and tables, heat maps, and how a matrix becomes
lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from continual.reports.charts import Axis, Chart, Point, ScatterChart, Series
from continual.reports.figures import format_percent
from continual.results.matrix import BASE_STAGE, Matrix, mean_or_none
from continual.results.run_folder import Run

MAX_TEXT_LENGTH = 1_000  # characters of a prompt or answer shown
MAX_CURVE_POINTS = 300  # of a training curve


@dataclass(frozen=True)
class Cell:
    """One figure of a table: its text, what it is sorted by, whether it is the best of its column,
    and a link.
    """

    text: str
    sort_key: float | str | None = None
    is_best: bool = False
    href: str = ""


@dataclass(frozen=True)
class ColumnHead:
    """A column's name, and what it means, shown on hovering."""

    text: str
    description: str = ""


@dataclass(frozen=True)
class Row:
    """Cells; `group` and `task` are those of the page's that it is about, `look` the group's
    colour, and `found` the text that a reader may look for it by.
    """

    cells: Sequence[Cell | str]
    group: str = ""
    task: str = ""
    style: int | str | None = None
    search_text: str = ""


@dataclass(frozen=True)
class PageTable:
    """Rows under heads, sorted by a click; `name` stands for it in a link."""

    name: str
    heads: Sequence[ColumnHead]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, one line on it, charts, a table, and a `body` that the template of
    `kind` shows.
    """

    title: str
    lead: str = ""
    charts: Sequence[Chart | ScatterChart] = ()
    table: PageTable | None = None
    kind: str = ""
    body: Any = None


@dataclass
class Page:
    """The values of page.html.j2; `groups` (name, look, text to find it by) and `tasks` are what a
    reader chooses from.
    """

    title: str
    kicker: str
    facts: Sequence[str]
    notices: Sequence[str]
    sections: Sequence[Section | None]
    groups: Sequence[tuple[str, int | str, str]] = ()
    tasks: Sequence[str] = ()
    charts: list[dict[str, Any]] = field(default_factory=list)

    def template_values(self) -> dict[str, Any]:
        """What the template reads, and as `data` what the page's script does."""
        shown = [section for section in self.sections if section is not None]
        numbered = []
        for section in shown:
            charts = []
            for chart in section.charts:
                charts.append(
                    {
                        "at": len(self.charts),
                        "title": chart.title,
                        "small": chart.small,
                        "says": chart.says,
                        "task": self.task_class(chart.task),
                        "keys": chart.keys,
                        "free": chart.free,
                    }
                )
                self.charts.append(chart.to_dict())
            numbered.append((section, charts))
        data = {
            "charts": self.charts,
            "groups": [{"name": n, "look": k, "text": text} for n, k, text in self.groups],
            "tasks": list(self.tasks),
        }
        return {
            "title": self.title,
            "kicker": self.kicker,
            "facts": self.facts,
            "notices": self.notices,
            "sections": numbered,
            "groups": self.groups,
            "tasks": self.tasks,
            "data": data,
            "page": self,
        }

    def task_class(self, name: str) -> str:
        """The class of what is about that task: it is not shown where the reader leaves the task
        out.
        """
        return f"t{self.tasks.index(name)}" if name in self.tasks else ""

    def group_class(self, name: str) -> str:
        """The class of what is about that group."""
        names = [group for group, _, _ in self.groups]
        return f"g{names.index(name)}" if name in names else ""


def heat_map(matrix: Matrix, label: str = "") -> dict[str, Any]:
    """Rows of cells: the figure, the score, and whether the task is being learned, or has not been
    yet.
    """
    rows = []
    for number, (stage, scores) in enumerate(
        zip(matrix.stages, matrix.scores, strict=True), BASE_STAGE not in matrix.stages
    ):
        seen = matrix.stages[: number + (BASE_STAGE in matrix.stages)]
        cells = [
            {
                "text": format_percent(score),
                "value": score,
                "learned": task == stage,
                "task": task,
                "ahead": matrix.is_sequential and task not in seen,
            }
            for task, score in zip(matrix.tasks, scores, strict=True)
        ]
        rows.append({"number": number, "stage": stage, "cells": cells})
    return {"tasks": matrix.tasks, "rows": rows, "label": label}


def task_points(matrix: Matrix, task: str) -> list[Point]:
    """(stage number, score) of a task, where measured; 0 is before training."""
    first = int(BASE_STAGE not in matrix.stages)
    scores = (
        (x, matrix.score(row, task))
        for row, x in enumerate(range(first, len(matrix.stages) + first))
    )
    return [(float(x), score) for x, score in scores if score is not None]


def stage_name_at(matrix: Matrix, x: float) -> str:
    """The stage of that number."""
    return matrix.stages[int(x) - (BASE_STAGE not in matrix.stages)]


def stage_span(matrix: Matrix) -> Point:
    """From the first stage to the last that there will be."""
    last = len(matrix.tasks) if matrix.is_sequential or not matrix.is_finished else 1
    return (float(BASE_STAGE not in matrix.stages), float(last))


def stage_axis(names: Sequence[str], stage_range: Point) -> Axis:
    """The axis of stage numbers; 0 is before training."""
    first = BASE_STAGE not in names
    return Axis("stage", "count", stage_range, dict(enumerate(names, int(first))))


def learned_points(matrix: Matrix, task: str) -> list[Point]:
    """Where a task was learned."""
    return [(x, y) for x, y in task_points(matrix, task) if stage_name_at(matrix, x) == task]


def downsample(points: Sequence[Point]) -> list[Point]:
    """At most POINTS points: the means of as many equal runs of them."""
    size = -(-len(points) // MAX_CURVE_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


def mean_matrix(runs: Sequence[Run]) -> Matrix:
    """The cell by cell mean over runs of the same tasks and stages."""
    first = runs[0].matrix
    cells = tuple(
        tuple(
            mean_or_none(run.matrix.scores[i][j] for run in runs) for j in range(len(first.tasks))
        )
        for i in range(len(first.stages))
    )
    return replace(first, seed=None, scores=cells, counts=(), cost={})


def text_table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> PageTable:
    """A table of plain texts."""
    return PageTable(name, [ColumnHead(head) for head in heads], [Row(list(row)) for row in rows])


def truncate(text: Any) -> str | None:
    """A text, and how much of it is left out where it is long."""
    if text is None:
        return None
    told = str(text)
    return (
        told
        if len(told) <= MAX_TEXT_LENGTH
        else f"{told[:MAX_TEXT_LENGTH]} … ({len(told) - MAX_TEXT_LENGTH:,} more characters)"
    )


def to_series(named: Mapping[str, Sequence[Point]], markers: bool = True) -> list[Series]:
    """A series each, coloured in turn."""
    return [Series(name, points, i, dots=markers) for i, (name, points) in enumerate(named.items())]
