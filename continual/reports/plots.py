"""curves.png for a README or a talk, by matplotlib, which is imported only when a picture is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from continual.reports.figures import format_percent
from continual.reports.reach import start_labels
from continual.reports.sections import stage_span, task_points
from continual.results.curve import Curve
from continual.results.matrix import BASE_STAGE, Matrix, mean_or_none, performance_by_stage
from continual.results.run_folder import RunGroup

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a5c3e",
)  # Okabe and Ito (2008)
MAX_INCHES = 60  # inches: no picture may have 2^16 pixels
MAX_NAME_LENGTH = 40  # characters of a name
MAX_LABELLED_CELLS = 2500  # of a heat map whose figures can be read
TEXT_COLOUR, MUTED_COLOUR, GRID_COLOUR = "#16202c", "#5d6875", "#dfe3e8"


def plot_run(matrix: Matrix) -> bytes:
    """A PNG: the matrix as a heat map, and each task's score over the stages."""
    figure, (left, right) = _new_figure(
        13, min(MAX_INCHES, max(4.2, 1.6 + 0.42 * len(matrix.stages))), [1.15, 1]
    )
    _draw_heat_map(left, matrix)
    for i, task in enumerate(matrix.tasks):
        points = task_points(matrix, task)
        right.plot(
            *_split_xy(points),
            marker="o",
            markersize=3,
            linewidth=1.8,
            label=_shorten_name(task),
            **_line_style(i),
        )
        row = matrix.row_of(task)
        if row is not None and (score := matrix.score(row, task)) is not None:
            right.plot(
                row + (BASE_STAGE not in matrix.stages),
                score,
                "o",
                markersize=9,
                fillstyle="none",
                markeredgewidth=2,
                color=_line_style(i)["color"],
            )
    _style_score_axes(
        right, "Each task through the stages (%; ring: its own)", "stage", stage_span(matrix)
    )
    right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return _to_png(figure)


def plot_comparison(groups: Sequence[RunGroup]) -> bytes:
    """A PNG: the average over the tasks learned so far, a line a group, and final average beside
    forgetting.
    """
    figure, (left, right) = _new_figure(13, 4.6, [1.5, 1])
    arms = [group for group in groups if not group.is_joint]
    looks = {group.label: _line_style(i) for i, group in enumerate(arms)}
    last = 1
    for group in arms:
        lines = [performance_by_stage(r.matrix) for r in group.runs]
        means = [
            mean_or_none(line[i] for line in lines if i < len(line))
            for i in range(max(map(len, lines)))
        ]
        points = [(i + 1.0, value) for i, value in enumerate(means) if value is not None]
        last = max(last, len(points))
        left.plot(
            *_split_xy(points),
            marker="o",
            markersize=4,
            linewidth=2.2,
            label=_shorten_name(group.label),
            **looks[group.label],
        )
    for group in groups:
        top = group.mean("average_performance")
        if group.is_joint and top is not None:
            left.axhline(
                top,
                color=MUTED_COLOUR,
                linestyle=(0, (6, 4)),
                linewidth=1.6,
                label=_shorten_name(group.label),
            )
    _style_score_axes(left, "Average over the tasks learned so far (%)", "stage", (1, last))
    if left.get_lines():
        left.legend(frameon=False, fontsize=10, loc="best", ncols=2)
    _draw_bars(right, groups, looks)
    return _to_png(figure)


def plot_adaptations(curves: Sequence[Curve]) -> bytes:
    """A PNG: score against steps, a panel a task, a line for each start, shaded from the lowest to
    the highest draw.

    Of one start alone there is a line for each number of shots, of several that with most.
    """
    tasks, names = list(dict.fromkeys(c.task for c in curves)), start_labels(curves)
    figure, panels = _new_figure(
        min(MAX_INCHES, max(9, 4.4 * len(tasks))), 4.6, [1] * max(1, len(tasks))
    )
    lines: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=False):
        told = [(name, c) for name, c in zip(names, curves, strict=True) if c.task == task]
        for name, c in told:
            for shots in c.shots[-1:] if len(told) > 1 else c.shots:
                label = name if len(told) > 1 else f"{name}, {shots} shots"
                look = _line_style(list(lines).index(label) if label in lines else len(lines))
                (line,) = axes.plot(
                    *_split_xy(c.mean_scores(shots)),
                    marker="o",
                    markersize=3,
                    linewidth=1.8,
                    label=_shorten_name(label),
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
        _style_score_axes(
            axes, f"Adapting to {_shorten_name(task)} (%)", "optimizer step", (0, last)
        )
    panels[-1].legend(
        handles=[*lines.values()],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=9,
    )
    return _to_png(figure)


def _shorten_name(told: str) -> str:
    """A name as it stands beside a line: of a length that leaves room for the lines, and not read
    as mathematics.
    """
    return (told if len(told) <= MAX_NAME_LENGTH else f"{told[:MAX_NAME_LENGTH]}…").replace(
        "$", r"\$"
    )


def _line_style(i: int) -> dict[str, str]:
    """The i-th line's colour; after the last colour they begin anew, dashed."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": "--" if i // len(COLOURS) % 2 else "-"}


def _draw_heat_map(axes: Any, matrix: Matrix) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    blues = LinearSegmentedColormap.from_list("heat", ["#f3f7fb", "#08519c"])
    values = [[float("nan") if s is None else s for s in row] for row in matrix.scores]
    axes.imshow(values, cmap=blues, vmin=0, vmax=1, aspect="auto")
    small = 9 if len(matrix.tasks) <= 9 else 6.5
    for i, row in enumerate(
        matrix.scores if len(matrix.stages) * len(matrix.tasks) <= MAX_LABELLED_CELLS else ()
    ):
        for j, score in enumerate(row):
            axes.text(
                j,
                i,
                format_percent(score),
                ha="center",
                va="center",
                fontsize=small,
                color="white" if score is not None and score > 0.55 else TEXT_COLOUR,
            )
            if matrix.tasks[j] == matrix.stages[i]:
                axes.add_patch(_own_stage_frame(j, i))
    axes.set_xticks(
        range(len(matrix.tasks)),
        [*map(_shorten_name, matrix.tasks)],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(matrix.stages)), [*map(_shorten_name, matrix.stages)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{matrix.strategy} on {matrix.stream}: score (%) after each stage")


def _own_stage_frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor="#e69f00", linewidth=2
    )


def _draw_bars(axes: Any, groups: Sequence[RunGroup], styles: dict[str, dict[str, str]]) -> None:
    """Final average (wide) and forgetting (thin, hatched) of each group, best on top."""
    for y, group in enumerate(reversed(groups)):
        end, fall = group.mean("average_performance"), group.mean("forgetting")
        colour = styles[group.label]["color"] if group.label in styles else MUTED_COLOUR
        if end is not None:
            axes.barh(
                y + 0.14,
                end,
                0.42,
                color=colour,
                xerr=group.std("average_performance"),
                ecolor=TEXT_COLOUR,
            )
            axes.text(
                end + 0.02 + (group.std("average_performance") or 0),
                y + 0.14,
                format_percent(end),
                va="center",
                fontsize=9,
                color=TEXT_COLOUR,
            )
        if fall is not None:
            axes.barh(
                y - 0.24, max(fall, 0), 0.2, facecolor="none", edgecolor=colour, hatch="/////"
            )
            axes.text(
                max(fall, 0) + 0.02,
                y - 0.24,
                format_percent(fall),
                va="center",
                fontsize=8,
                color=MUTED_COLOUR,
            )
    axes.set_yticks(range(len(groups)), [_shorten_name(group.label) for group in reversed(groups)])
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_title("Final average (solid), forgetting (hatched), %")


def _new_figure(width: float, height: float, ratios: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure that belongs to no global state, and its axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    return figure, list(axes)


def _style_score_axes(axes: Any, title: str, x_label: str, x: tuple[float, float]) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label, color=MUTED_COLOUR)
    axes.set_ylim(-0.02, 1.04)
    margin = (x[1] - x[0] or 1) * 0.03
    axes.set_xlim(x[0] - margin, x[1] + margin)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=GRID_COLOUR)
    axes.tick_params(length=0, colors=MUTED_COLOUR)
    axes.spines[:].set_visible(False)


def _split_xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _to_png(figure: Any) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()
