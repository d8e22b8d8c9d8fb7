"""Show which examples were lost and regained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.errors import brief
from continual.results.flips import CORRECT_THRESHOLD, Flip, count_flips
from continual.results.matrix import BASE_STAGE, Matrix

MAX_PRINTED_FLIPS = 3  # in the terminal


def print_flips(console: Console, matrix: Matrix, flips: Sequence[Flip]) -> None:
    """How many flipped, task by stage, and a few of them, in the terminal; nothing where there is
    one stage only.
    """
    if len(matrix.stages) < 2:
        return
    console.print(
        Text(
            f"answers lost (−) and regained (+) at each stage; right is a mark of at least {CORRECT_THRESHOLD}",
            style="bold",
        )
    )
    if not flips:
        console.print("none was lost")
        return
    told, first = count_flips(flips), int(BASE_STAGE not in matrix.stages)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for number in range(first + 1, first + len(matrix.stages)):
        table.add_column(str(number), justify="right", no_wrap=True)
    for task in matrix.tasks:
        table.add_row(
            Text(task),
            *(_flip_count_text(*told.get((task, stage), (0, 0))) for stage in matrix.stages[1:]),
        )
    console.print(table)
    for line in _example_lines(flips):
        console.print(Text(line, style="dim"), soft_wrap=True)


def format_flip_counts(lost: int, back: int) -> str:
    """How many were lost (−) and regained (+); empty where none was."""
    return " ".join([f"−{lost}"] * bool(lost) + [f"+{back}"] * bool(back))


def _flip_count_text(lost: int, back: int) -> Text:
    both = format_flip_counts(lost, back)
    return Text(both or "·", style="" if both else "dim")


def _example_lines(flips: Sequence[Flip]) -> Iterator[str]:
    """Of some tasks the last loss that was for good; ids and answers may hold what a terminal
    obeys.
    """
    last = {
        f.task: f
        for f in flips
        if f.regained_stage is None and f.answer_before is not None and f.answer_after is not None
    }
    for f in [*last.values()][:MAX_PRINTED_FLIPS]:
        yield f"{brief(f.id)[1:-1]}: {brief(f.answer_before, 60)} after {f.last_correct_stage}, {brief(f.answer_after, 60)} after {f.lost_stage}"
