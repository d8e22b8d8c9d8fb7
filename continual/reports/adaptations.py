"""What a page shows of adaptations: score by steps and shots, from one start or several, and what
each start needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from continual.io import untrusted
from continual.reports.charts import Axis, Chart, Series
from continual.reports.figures import NO_VALUE, format_percent
from continual.reports.pages import STEP_TITLE, config_section
from continual.reports.reach import GOAL_SHARE, compute_reach, start_labels
from continual.reports.sections import Cell, ColumnHead, Page, PageTable, Row, Section
from continual.results.curve import Curve


def build_adaptation_page(curves: Sequence[Curve]) -> Page:
    """One or several adaptations, their curves over one another."""
    tasks = ", ".join(dict.fromkeys(c.task for c in curves))
    return Page(
        f"Adapting to {tasks}",
        "Adaptation",
        list(dict.fromkeys(c.metric for c in curves)),
        [],
        adaptation_sections(curves),
    )


def adaptation_sections(curves: Sequence[Curve]) -> list[Section | None]:
    """A chart a task, a line for each start, or for each number of shots of one start; and a table
    an adaptation.
    """
    named, charts = list(zip(curves, start_labels(curves), strict=True)), []
    for task in dict.fromkeys(c.task for c in curves):
        mine = [(c, name) for c, name in named if c.task == task]
        lines = [
            (f"{name}, {shots} shots", c, shots)
            for c, name in mine
            for shots in (c.shots[-1:] if len(mine) > 1 else c.shots)
        ]
        last = float(max((step for _, c, _ in lines for step in c.steps), default=1))
        series = [
            Series(
                name,
                [(float(x), y) for x, y in c.mean_scores(shots)],
                i,
                c.band(shots) if c.num_draws > 1 else (),
            )
            for i, (name, c, shots) in enumerate(lines)
        ]
        charts.append(Chart(f"Adapting to {task}", series, Axis(STEP_TITLE, "count", (0.0, last))))
    lead = "Percent, by optimizer steps, with so many training examples (shots)."
    more = (
        " A line is the mean over draws of the examples, its band from the lowest to the highest."
    )
    return [
        Section(
            "Score by optimizer steps",
            lead + (more if any(c.num_draws > 1 for c in curves) else ""),
            charts,
        ),
        _reach_section(curves),
        *(section for i, (c, name) in enumerate(named) for section in _curve_sections(c, name, i)),
    ]


def _reach_section(curves: Sequence[Curve]) -> Section | None:
    """What each needs to reach the base that is fine-tuned on all examples; None where there is
    nothing beside it.
    """
    found = compute_reach(curves)
    if len(curves) < 2 or not found:
        return None
    rows = [
        Row(
            [
                name,
                r.curve.task,
                _number_cell(r.goal_score, format_percent(r.goal_score)),
                _number_cell(r.steps),
                _number_cell(r.share_of_reference, format_percent(r.share_of_reference)),
                _number_cell(r.share_of_budget, format_percent(r.share_of_budget)),
                _number_cell(r.num_examples),
            ]
        )
        for name, r in zip(start_labels([r.curve for r in found]), found, strict=True)
    ]
    heads = [
        ColumnHead("From"),
        ColumnHead("Task"),
        ColumnHead("Goal", f"{100 * GOAL_SHARE:.0f}% of the base's best score"),
        ColumnHead(
            "Steps",
            "the first step at which the curve with most examples reaches the goal; – where none "
            "does",
        ),
        ColumnHead("% of the base's", "of the steps that the base needs"),
        ColumnHead("% of its budget", "of all steps that the base was trained for"),
        ColumnHead("Examples", "the fewest with which some step reaches the goal"),
    ]
    return Section(
        "What it takes to reach the base",
        "The base is fine-tuned on all examples of the task; the goal is "
        f"{100 * GOAL_SHARE:.0f}% of its best score.",
        table=PageTable("needed", heads, rows),
    )


def _number_cell(value: float | None, text: str = "") -> Cell:
    return Cell(NO_VALUE if value is None else text or str(value), value)


def _curve_sections(c: Curve, name: str, i: int) -> list[Section | None]:
    rows = []
    for shots in c.shots:
        scores = dict(c.mean_scores(shots))
        rows.append(
            Row(
                [
                    Cell(str(shots), shots),
                    *(Cell(format_percent(scores.get(step)), scores.get(step)) for step in c.steps),
                ]
            )
        )
    table = PageTable(
        f"adapt{i}",
        [ColumnHead("shots \\ step"), *(ColumnHead(str(step)) for step in c.steps)],
        rows,
    )
    return [
        Section(
            f"{c.task}, from {name}",
            f"Start: {c.start}. Rows: shots; columns: optimizer steps.",
            table=table,
        ),
        config_section(
            untrusted.read_text(c.path / "config.yaml"), f"Configuration of {c.task}, from {name}"
        ),
    ]
