"""Tables for the terminal (rich)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.reports import measures
from continual.reports.figures import (
    NO_VALUE,
    SUMMARY_INFO,
    format_interval,
    format_mean_std,
    format_percent,
    format_seconds,
)
from continual.reports.flips import print_flips as show_flips
from continual.reports.pages import run_notices
from continual.reports.probed import load_probes, print_probes
from continual.reports.versus import available_summaries
from continual.results.curve import Curve
from continual.results.flips import find_flips
from continual.results.matrix import BASE_STAGE, Matrix, Score
from continual.results.run_folder import Run, RunGroup
from continual.results.uncertainty import (
    CONFIDENCE_LEVEL,
    bootstrap_intervals,
    differences_from_baseline,
)

HEAT_LOW, HEAT_HIGH = (
    (70, 76, 84),
    (0, 114, 178),
)  # the heat map's ends: white figures are readable on both


def print_run(console: Console, run: Run) -> None:
    """The matrix as a heat map with figures, and every summary with its interval and its meaning."""
    matrix = run.matrix
    console.print(
        Text(
            f"{matrix.strategy} on {matrix.stream}: score in percent after each stage", style="bold"
        )
    )
    console.print(_matrix_table(matrix, console.width))
    console.print(_summary_table(run))
    show_flips(console, matrix, find_flips(run))
    measures.print_measures(console, run)
    for notice in run_notices(run):
        console.print(Text(notice, style="yellow"))
    if probes := load_probes(run.path):
        print_probes(console, probes)


def _matrix_table(matrix: Matrix, width: int) -> Table:
    """Tasks are named where the names fit the terminal; else columns bear their numbers, told by
    the rows or below.
    """
    names = [task.replace(" ", "\u00a0") for task in matrix.tasks]
    room = (width - 4 - max(map(len, matrix.stages), default=0)) // len(names) - 1
    fits = room >= max(5, *map(len, names))
    rows_tell = fits or matrix.tasks == tuple(
        stage for stage in matrix.stages if stage != BASE_STAGE
    )
    caption = (
        None if rows_tell else "  ".join(f"{i}\u00a0{name}" for i, name in enumerate(names, 1))
    )
    table = Table(box=None, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("stage", no_wrap=True)
    for i, task in enumerate(matrix.tasks, 1):
        table.add_column(Text(task if fits else str(i)), justify="right", no_wrap=True)
    for number, (stage, scores) in enumerate(
        zip(matrix.stages, matrix.scores, strict=True), BASE_STAGE not in matrix.stages
    ):
        cells = [
            _score_text(score, task == stage, room)
            for task, score in zip(matrix.tasks, scores, strict=True)
        ]
        table.add_row(Text(f"{number:2d} {stage}"), *cells)
    return table


def _score_text(score: Score, is_own_stage: bool, width: int) -> Text:
    """The figure on its colour, without the decimal where the room is small; bold and underlined in
    its own stage.
    """
    if score is None:
        return Text(NO_VALUE, style="dim")
    back = ",".join(
        str(round(low + (high - low) * score))
        for low, high in zip(HEAT_LOW, HEAT_HIGH, strict=True)
    )
    text = format_percent(score) if width >= 5 else f"{100 * score:.0f}"
    return Text(text, style=f"{'bold underline ' if is_own_stage else ''}white on rgb({back})")


def _summary_table(run: Run) -> Table:
    """Each summary with its 95% interval, which stands in brackets, and what it tells."""
    found = bootstrap_intervals(run)
    one = next(iter(found.values()), None)
    caption = (
        f"[..]: {CONFIDENCE_LEVEL:.0%} interval, {one.how}; n = {one.n:,} examples of "
        f"{len(run.matrix.tasks)} tasks"
        if one
        else "no intervals: they need the run's last stage, and in predictions/ every answer of "
        "each stage"
    )
    table = Table(
        box=None, show_header=False, padding=(0, 1), caption=Text(caption), caption_justify="left"
    )
    for name, value in run.matrix.summary().items():
        meaning, span = SUMMARY_INFO[name], found.get(name)
        table.add_row(
            Text(meaning.title, style="bold"),
            Text(format_percent(value, meaning.signed), justify="right"),
            Text(format_interval(span.low, span.high, meaning.signed) if span else "", style="dim"),
            meaning.arrow,
            Text(meaning.description, style="dim"),
        )
    return table


def print_comparison(
    console: Console,
    groups: Sequence[RunGroup],
    pending: Sequence[str],
    unfinished: Sequence[str] = (),
) -> None:
    """One row a group: mean and spread over its finished runs; what is unfinished or has no room is
    told below.
    """
    n = {sum(run.matrix.counts) for group in groups for run in group.runs} - {0}
    examples = (
        f", each over {' or '.join(f'{x:,}' for x in sorted(n))} test examples"
        if 0 < len(n) < 4
        else ""
    )
    console.print(
        Text(
            f"percent, mean ± standard deviation over seeds and orders (runs){examples}",
            style="dim",
        ),
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 1))
    names = available_summaries(groups)
    room = max(1, (console.width - max(len(group.label) for group in groups) - 25) // 14)
    for head in ["strategy", "runs", *map(_column_title, names[:room]), "time"]:
        table.add_column(
            head,
            justify="left" if head == "strategy" else "right",
            no_wrap=head in ("strategy", "time"),
        )
    for group in groups:
        figures = [
            format_mean_std(group.mean(name), group.std(name), SUMMARY_INFO[name].signed)
            for name in names[:room]
        ]
        table.add_row(
            Text(group.label, style="dim italic" if group.is_joint else "bold"),
            f"{group.num_finished}"
            + (f" of {len(group.runs)}" if group.num_finished < len(group.runs) else ""),
            *figures,
            format_seconds(group.mean("seconds")),
        )
    console.print(table)
    for name in names[:room]:
        console.print(
            Text(f"{SUMMARY_INFO[name].title}: {SUMMARY_INFO[name].description}", style="dim"),
            soft_wrap=True,
        )
    _print_differences(console, groups)
    half = [run.path.name for group in groups for run in group.runs if not run.matrix.is_finished]
    for what, told in (
        ("no room here for", [SUMMARY_INFO[name].title.lower() for name in names[room:]]),
        ("unfinished, and in no mean", half),
        ("nothing scored yet", list(pending)),
    ):
        if told:
            console.print(Text(f"{what}: {', '.join(told)}", style="yellow"))
    for text in unfinished:
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _print_differences(console: Console, groups: Sequence[RunGroup]) -> None:
    """How each strategy's average performance differs from another's; bold where the interval
    leaves 0 out.
    """
    other, found = differences_from_baseline(groups)
    if not found:
        return
    how = "; ".join(dict.fromkeys(told.how for told in found.values()))
    title = SUMMARY_INFO["average_performance"].title
    console.print(
        Text(
            f"\n{title} against {other}, in percentage points, on the same test examples; [..]: "
            f"{CONFIDENCE_LEVEL:.0%} interval ({how})",
            style="dim",
        ),
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 1))
    for head in ("strategy", "difference", "interval", "runs", "examples"):
        table.add_column(head, justify="left" if head == "strategy" else "right", no_wrap=True)
    for label, told in found.items():
        clear = "bold" if told.low > 0 or told.high < 0 else ""
        table.add_row(
            Text(label),
            Text(format_percent(told.difference, True), style=clear),
            Text(format_interval(told.low, told.high, True)),
            str(told.runs),
            f"{told.n:,}",
        )
    console.print(table)


def _column_title(name: str) -> str:
    """A summary's name on two lines, with its arrow."""
    first, _, second = SUMMARY_INFO[name].title.lower().partition(" ")
    return (
        f"{first}\n{second} {SUMMARY_INFO[name].arrow}"
        if second
        else f"{first} {SUMMARY_INFO[name].arrow}"
    )


def print_curve(console: Console, curve: Curve) -> None:
    """Scores of an adaptation: a row for each number of shots, a column for each step."""
    console.print(
        Text(
            f"adapting to {curve.task} from {curve.start}: {curve.metric} in percent, mean of "
            f"{curve.num_draws} draws",
            style="bold",
        )
    )
    table = Table(box=None, padding=(0, 1))
    table.add_column("shots \\ step", justify="right")
    for step in curve.steps:
        table.add_column(str(step), justify="right")
    for shots in curve.shots:
        scores = dict(curve.mean_scores(shots))
        table.add_row(
            str(shots), *(_score_text(scores.get(step), False, 5) for step in curve.steps)
        )
    console.print(table)
