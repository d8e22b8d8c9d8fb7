"""What pages are made of: sections with charts and tables, heat maps, and how a matrix becomes
lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from continual.reports.charts import Axis, Chart, Dots, Point, Series
from continual.reports.figures import percent
from continual.results.matrix import BASE, Matrix, mean
from continual.results.run_folder import Run

LONGEST = 1_000  # characters of a prompt or answer shown
POINTS = 300  # of a training curve


@dataclass(frozen=True)
class Cell:
    """One figure of a table: its text, what it is sorted by, whether it is the best of its column,
    and a link.
    """

    text: str
    sort: float | str | None = None
    best: bool = False
    href: str = ""


@dataclass(frozen=True)
class Head:
    """A column's name, and what it means, shown on hovering."""

    text: str
    says: str = ""


@dataclass(frozen=True)
class Row:
    """Cells; `group` and `task` are those of the page's that it is about, `look` the group's
    colour, and `found` the text that a reader may look for it by.
    """

    cells: Sequence[Cell | str]
    group: str = ""
    task: str = ""
    look: int | str | None = None
    found: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under heads, sorted by a click; `name` stands for it in a link."""

    name: str
    heads: Sequence[Head]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, one line on it, charts, a table, and a `body` that the template of
    `kind` shows.
    """

    title: str
    lead: str = ""
    charts: Sequence[Chart | Dots] = ()
    table: Table | None = None
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

    def values(self) -> dict[str, Any]:
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
                        "task": self.task(chart.task),
                        "keys": chart.keys,
                        "free": chart.free,
                    }
                )
                self.charts.append(chart.to_json())
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

    def task(self, name: str) -> str:
        """The class of what is about that task: it is not shown where the reader leaves the task
        out.
        """
        return f"t{self.tasks.index(name)}" if name in self.tasks else ""

    def group(self, name: str) -> str:
        """The class of what is about that group."""
        names = [group for group, _, _ in self.groups]
        return f"g{names.index(name)}" if name in names else ""


def heat(matrix: Matrix, label: str = "") -> dict[str, Any]:
    """Rows of cells: the figure, the score, and whether the task is being learned, or has not been
    yet.
    """
    rows = []
    for number, (stage, scores) in enumerate(
        zip(matrix.stages, matrix.scores, strict=True), BASE not in matrix.stages
    ):
        seen = matrix.stages[: number + (BASE in matrix.stages)]
        cells = [
            {
                "text": percent(score),
                "value": score,
                "learned": task == stage,
                "task": task,
                "ahead": matrix.sequential and task not in seen,
            }
            for task, score in zip(matrix.tasks, scores, strict=True)
        ]
        rows.append({"number": number, "stage": stage, "cells": cells})
    return {"tasks": matrix.tasks, "rows": rows, "label": label}


def curve(matrix: Matrix, task: str) -> list[Point]:
    """(stage number, score) of a task, where measured; 0 is before training."""
    first = int(BASE not in matrix.stages)
    scores = (
        (x, matrix.at(row, task)) for row, x in enumerate(range(first, len(matrix.stages) + first))
    )
    return [(float(x), score) for x, score in scores if score is not None]


def stage_at(matrix: Matrix, x: float) -> str:
    """The stage of that number."""
    return matrix.stages[int(x) - (BASE not in matrix.stages)]


def span(matrix: Matrix) -> Point:
    """From the first stage to the last that there will be."""
    last = len(matrix.tasks) if matrix.sequential or not matrix.finished else 1
    return (float(BASE not in matrix.stages), float(last))


def stages(names: Sequence[str], across: Point) -> Axis:
    """The axis of stage numbers; 0 is before training."""
    first = BASE not in names
    return Axis("stage", "count", across, dict(enumerate(names, int(first))))


def rings(matrix: Matrix, task: str) -> list[Point]:
    """Where a task was learned."""
    return [(x, y) for x, y in curve(matrix, task) if stage_at(matrix, x) == task]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most POINTS points: the means of as many equal runs of them."""
    size = -(-len(points) // POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


def mean_matrix(runs: Sequence[Run]) -> Matrix:
    """The cell by cell mean over runs of the same tasks and stages."""
    first = runs[0].matrix
    cells = tuple(
        tuple(mean(run.matrix.scores[i][j] for run in runs) for j in range(len(first.tasks)))
        for i in range(len(first.stages))
    )
    return replace(first, seed=None, scores=cells, counts=(), cost={})


def table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain texts."""
    return Table(name, [Head(head) for head in heads], [Row(list(row)) for row in rows])


def cut(text: Any) -> str | None:
    """A text, and how much of it is left out where it is long."""
    if text is None:
        return None
    told = str(text)
    return (
        told
        if len(told) <= LONGEST
        else f"{told[:LONGEST]} … ({len(told) - LONGEST:,} more characters)"
    )


def lines(named: Mapping[str, Sequence[Point]], dots: bool = True) -> list[Series]:
    """A series each, coloured in turn."""
    return [Series(name, points, i, dots=dots) for i, (name, points) in enumerate(named.items())]
