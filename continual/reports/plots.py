"""curves.png for a README or a talk, by matplotlib, which is imported only when a picture is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from continual.reports.figures import percent
from continual.reports.reach import labels
from continual.reports.sections import curve, span
from continual.results.curve import Curve
from continual.results.matrix import BASE, Matrix, incremental, mean
from continual.results.run_folder import Group

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a5c3e",
)  # Okabe and Ito (2008)
TALLEST = 60  # inches: no picture may have 2^16 pixels
LONGEST = 40  # characters of a name
CELLS = 2500  # of a heat map whose figures can be read
INK, SOFT, LINE = "#16202c", "#5d6875", "#dfe3e8"


def run(matrix: Matrix) -> bytes:
    """A PNG: the matrix as a heat map, and each task's score over the stages."""
    figure, (left, right) = _figure(
        13, min(TALLEST, max(4.2, 1.6 + 0.42 * len(matrix.stages))), [1.15, 1]
    )
    _heat(left, matrix)
    for i, task in enumerate(matrix.tasks):
        points = curve(matrix, task)
        right.plot(
            *_columns(points),
            marker="o",
            markersize=3,
            linewidth=1.8,
            label=_name(task),
            **_look(i),
        )
        row = matrix.stage_of(task)
        if row is not None and (score := matrix.at(row, task)) is not None:
            right.plot(
                row + (BASE not in matrix.stages),
                score,
                "o",
                markersize=9,
                fillstyle="none",
                markeredgewidth=2,
                color=_look(i)["color"],
            )
    _scores(right, "Each task through the stages (%; ring: its own)", "stage", span(matrix))
    right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return _png(figure)


def comparison(groups: Sequence[Group]) -> bytes:
    """A PNG: the average over the tasks learned so far, a line a group, and final average beside
    forgetting.
    """
    figure, (left, right) = _figure(13, 4.6, [1.5, 1])
    arms = [group for group in groups if not group.joint]
    looks = {group.label: _look(i) for i, group in enumerate(arms)}
    last = 1
    for group in arms:
        lines = [incremental(r.matrix) for r in group.runs]
        means = [
            mean(line[i] for line in lines if i < len(line)) for i in range(max(map(len, lines)))
        ]
        points = [(i + 1.0, value) for i, value in enumerate(means) if value is not None]
        last = max(last, len(points))
        left.plot(
            *_columns(points),
            marker="o",
            markersize=4,
            linewidth=2.2,
            label=_name(group.label),
            **looks[group.label],
        )
    for group in groups:
        top = group.mean("average_performance")
        if group.joint and top is not None:
            left.axhline(
                top, color=SOFT, linestyle=(0, (6, 4)), linewidth=1.6, label=_name(group.label)
            )
    _scores(left, "Average over the tasks learned so far (%)", "stage", (1, last))
    if left.get_lines():
        left.legend(frameon=False, fontsize=10, loc="best", ncols=2)
    _bars(right, groups, looks)
    return _png(figure)


def adaptation(curves: Sequence[Curve]) -> bytes:
    """A PNG: score against steps, a panel a task, a line for each start, shaded from the lowest to
    the highest draw.

    Of one start alone there is a line for each number of shots, of several that with most.
    """
    tasks, names = list(dict.fromkeys(c.task for c in curves)), labels(curves)
    figure, panels = _figure(min(TALLEST, max(9, 4.4 * len(tasks))), 4.6, [1] * max(1, len(tasks)))
    lines: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=False):
        told = [(name, c) for name, c in zip(names, curves, strict=True) if c.task == task]
        for name, c in told:
            for shots in c.shots[-1:] if len(told) > 1 else c.shots:
                label = name if len(told) > 1 else f"{name}, {shots} shots"
                look = _look(list(lines).index(label) if label in lines else len(lines))
                (line,) = axes.plot(
                    *_columns(c.of(shots)),
                    marker="o",
                    markersize=3,
                    linewidth=1.8,
                    label=_name(label),
                    **look,
                )
                lines.setdefault(label, line)
                band = c.band(shots)
                axes.fill_between(
                    [s for s, _, _ in band],
                    [low for _, low, _ in band],
                    [high for *_, high in band],
                    color=look["color"],
                    alpha=0.12,
                    linewidth=0,
                )
        last = max((step for _, c in told for step in c.steps), default=1)
        _scores(axes, f"Adapting to {_name(task)} (%)", "optimizer step", (0, last))
    panels[-1].legend(
        handles=[*lines.values()],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=9,
    )
    return _png(figure)


def _name(told: str) -> str:
    """A name as it stands beside a line: of a length that leaves room for the lines, and not read
    as mathematics.
    """
    return (told if len(told) <= LONGEST else f"{told[:LONGEST]}…").replace("$", r"\$")


def _look(i: int) -> dict[str, str]:
    """The i-th line's colour; after the last colour they begin anew, dashed."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": "--" if i // len(COLOURS) % 2 else "-"}


def _heat(axes: Any, matrix: Matrix) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    blues = LinearSegmentedColormap.from_list("heat", ["#f3f7fb", "#08519c"])
    values = [[float("nan") if s is None else s for s in row] for row in matrix.scores]
    axes.imshow(values, cmap=blues, vmin=0, vmax=1, aspect="auto")
    small = 9 if len(matrix.tasks) <= 9 else 6.5
    for i, row in enumerate(
        matrix.scores if len(matrix.stages) * len(matrix.tasks) <= CELLS else ()
    ):
        for j, score in enumerate(row):
            axes.text(
                j,
                i,
                percent(score),
                ha="center",
                va="center",
                fontsize=small,
                color="white" if score is not None and score > 0.55 else INK,
            )
            if matrix.tasks[j] == matrix.stages[i]:
                axes.add_patch(_frame(j, i))
    axes.set_xticks(
        range(len(matrix.tasks)),
        [*map(_name, matrix.tasks)],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(matrix.stages)), [*map(_name, matrix.stages)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{matrix.strategy} on {matrix.stream}: score (%) after each stage")


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor="#e69f00", linewidth=2
    )


def _bars(axes: Any, groups: Sequence[Group], looks: dict[str, dict[str, str]]) -> None:
    """Final average (wide) and forgetting (thin, hatched) of each group, best on top."""
    for y, group in enumerate(reversed(groups)):
        end, fall = group.mean("average_performance"), group.mean("forgetting")
        colour = looks[group.label]["color"] if group.label in looks else SOFT
        if end is not None:
            axes.barh(
                y + 0.14,
                end,
                0.42,
                color=colour,
                xerr=group.spread("average_performance"),
                ecolor=INK,
            )
            axes.text(
                end + 0.02 + (group.spread("average_performance") or 0),
                y + 0.14,
                percent(end),
                va="center",
                fontsize=9,
                color=INK,
            )
        if fall is not None:
            axes.barh(
                y - 0.24, max(fall, 0), 0.2, facecolor="none", edgecolor=colour, hatch="/////"
            )
            axes.text(
                max(fall, 0) + 0.02, y - 0.24, percent(fall), va="center", fontsize=8, color=SOFT
            )
    axes.set_yticks(range(len(groups)), [_name(group.label) for group in reversed(groups)])
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.tick_params(length=0)
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_title("Final average (solid), forgetting (hatched), %")


def _figure(width: float, height: float, ratios: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure that belongs to no global state, and its axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    return figure, list(axes)


def _scores(axes: Any, title: str, below: str, x: tuple[float, float]) -> None:
    axes.set_title(title)
    axes.set_xlabel(below, color=SOFT)
    axes.set_ylim(-0.02, 1.04)
    margin = (x[1] - x[0] or 1) * 0.03
    axes.set_xlim(x[0] - margin, x[1] + margin)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=LINE)
    axes.tick_params(length=0, colors=SOFT)
    axes.spines[:].set_visible(False)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _png(figure: Any) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()
