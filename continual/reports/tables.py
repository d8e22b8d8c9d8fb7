"""Tables for the terminal (rich)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.reports import measures
from continual.reports.figures import MEANINGS, NONE, interval, percent, seconds, with_spread
from continual.reports.flips import show as show_flips
from continual.reports.pages import notices
from continual.reports.probed import load, show
from continual.reports.versus import columns
from continual.results.curve import Curve
from continual.results.flips import flips
from continual.results.matrix import BASE, Matrix, Score
from continual.results.run_folder import Group, Run
from continual.results.uncertainty import LEVEL, against, intervals

LOW, HIGH = (70, 76, 84), (0, 114, 178)  # the heat map's ends: white figures are readable on both


def run(console: Console, told: Run) -> None:
    """The matrix as a heat map with figures, and every summary with its interval and its meaning."""
    matrix = told.matrix
    console.print(
        Text(
            f"{matrix.strategy} on {matrix.stream}: score in percent after each stage", style="bold"
        )
    )
    console.print(_matrix(matrix, console.width))
    console.print(_summary(told))
    show_flips(console, matrix, flips(told))
    measures.show(console, told)
    for notice in notices(told):
        console.print(Text(notice, style="yellow"))
    if probes := load(told.path):
        show(console, probes)


def _matrix(matrix: Matrix, width: int) -> Table:
    """Tasks are named where the names fit the terminal; else columns bear their numbers, told by
    the rows or below.
    """
    names = [task.replace(" ", "\u00a0") for task in matrix.tasks]
    room = (width - 4 - max(map(len, matrix.stages), default=0)) // len(names) - 1
    fits = room >= max(5, *map(len, names))
    rows_tell = fits or matrix.tasks == tuple(stage for stage in matrix.stages if stage != BASE)
    caption = (
        None if rows_tell else "  ".join(f"{i}\u00a0{name}" for i, name in enumerate(names, 1))
    )
    table = Table(box=None, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("stage", no_wrap=True)
    for i, task in enumerate(matrix.tasks, 1):
        table.add_column(Text(task if fits else str(i)), justify="right", no_wrap=True)
    for number, (stage, scores) in enumerate(
        zip(matrix.stages, matrix.scores, strict=True), BASE not in matrix.stages
    ):
        cells = [
            _cell(score, task == stage, room)
            for task, score in zip(matrix.tasks, scores, strict=True)
        ]
        table.add_row(Text(f"{number:2d} {stage}"), *cells)
    return table


def _cell(score: Score, own: bool, room: int) -> Text:
    """The figure on its colour, without the decimal where the room is small; bold and underlined in
    its own stage.
    """
    if score is None:
        return Text(NONE, style="dim")
    back = ",".join(
        str(round(low + (high - low) * score)) for low, high in zip(LOW, HIGH, strict=True)
    )
    text = percent(score) if room >= 5 else f"{100 * score:.0f}"
    return Text(text, style=f"{'bold underline ' if own else ''}white on rgb({back})")


def _summary(told: Run) -> Table:
    """Each summary with its 95% interval, which stands in brackets, and what it tells."""
    found = intervals(told)
    one = next(iter(found.values()), None)
    caption = (
        f"[..]: {LEVEL:.0%} interval, {one.how}; n = {one.n:,} examples of "
        f"{len(told.matrix.tasks)} tasks"
        if one
        else "no intervals: they need the run's last stage, and in predictions/ every answer of "
        "each stage"
    )
    table = Table(
        box=None, show_header=False, padding=(0, 1), caption=Text(caption), caption_justify="left"
    )
    for name, value in told.matrix.summary().items():
        meaning, span = MEANINGS[name], found.get(name)
        table.add_row(
            Text(meaning.title, style="bold"),
            Text(percent(value, meaning.signed), justify="right"),
            Text(interval(span.low, span.high, meaning.signed) if span else "", style="dim"),
            meaning.arrow,
            Text(meaning.says, style="dim"),
        )
    return table


def comparison(
    console: Console, groups: Sequence[Group], waiting: Sequence[str], left: Sequence[str] = ()
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
    names = columns(groups)
    room = max(1, (console.width - max(len(group.label) for group in groups) - 25) // 14)
    for head in ["strategy", "runs", *map(_head, names[:room]), "time"]:
        table.add_column(
            head,
            justify="left" if head == "strategy" else "right",
            no_wrap=head in ("strategy", "time"),
        )
    for group in groups:
        figures = [
            with_spread(group.mean(name), group.spread(name), MEANINGS[name].signed)
            for name in names[:room]
        ]
        table.add_row(
            Text(group.label, style="dim italic" if group.joint else "bold"),
            f"{group.done}" + (f" of {len(group.runs)}" if group.done < len(group.runs) else ""),
            *figures,
            seconds(group.mean("seconds")),
        )
    console.print(table)
    for name in names[:room]:
        console.print(
            Text(f"{MEANINGS[name].title}: {MEANINGS[name].says}", style="dim"), soft_wrap=True
        )
    _against(console, groups)
    half = [run.path.name for group in groups for run in group.runs if not run.matrix.finished]
    for what, told in (
        ("no room here for", [MEANINGS[name].title.lower() for name in names[room:]]),
        ("unfinished, and in no mean", half),
        ("nothing scored yet", list(waiting)),
    ):
        if told:
            console.print(Text(f"{what}: {', '.join(told)}", style="yellow"))
    for text in left:
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _against(console: Console, groups: Sequence[Group]) -> None:
    """How each strategy's average performance differs from another's; bold where the interval
    leaves 0 out.
    """
    other, found = against(groups)
    if not found:
        return
    how = "; ".join(dict.fromkeys(told.how for told in found.values()))
    title = MEANINGS["average_performance"].title
    console.print(
        Text(
            f"\n{title} against {other}, in percentage points, on the same test examples; [..]: "
            f"{LEVEL:.0%} interval ({how})",
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
            Text(percent(told.difference, True), style=clear),
            Text(interval(told.low, told.high, True)),
            str(told.runs),
            f"{told.n:,}",
        )
    console.print(table)


def _head(name: str) -> str:
    """A summary's name on two lines, with its arrow."""
    first, _, second = MEANINGS[name].title.lower().partition(" ")
    return (
        f"{first}\n{second} {MEANINGS[name].arrow}" if second else f"{first} {MEANINGS[name].arrow}"
    )


def curve(console: Console, told: Curve) -> None:
    """Scores of an adaptation: a row for each number of shots, a column for each step."""
    console.print(
        Text(
            f"adapting to {told.task} from {told.start}: {told.metric} in percent, mean of "
            f"{told.draws} draws",
            style="bold",
        )
    )
    table = Table(box=None, padding=(0, 1))
    table.add_column("shots \\ step", justify="right")
    for step in told.steps:
        table.add_column(str(step), justify="right")
    for shots in told.shots:
        scores = dict(told.of(shots))
        table.add_row(str(shots), *(_cell(scores.get(step), False, 5) for step in told.steps))
    console.print(table)
