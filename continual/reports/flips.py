"""Show which examples were lost and regained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.errors import brief
from continual.results.flips import RIGHT, Flip, counts
from continual.results.matrix import BASE, Matrix

SHOWN = 3  # in the terminal


def show(console: Console, matrix: Matrix, found: Sequence[Flip]) -> None:
    """How many flipped, task by stage, and a few of them, in the terminal; nothing where there is
    one stage only.
    """
    if len(matrix.stages) < 2:
        return
    console.print(
        Text(
            f"answers lost (−) and regained (+) at each stage; right is a mark of at least {RIGHT}",
            style="bold",
        )
    )
    if not found:
        console.print("none was lost")
        return
    told, first = counts(found), int(BASE not in matrix.stages)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for number in range(first + 1, first + len(matrix.stages)):
        table.add_column(str(number), justify="right", no_wrap=True)
    for task in matrix.tasks:
        table.add_row(
            Text(task), *(_cell(*told.get((task, stage), (0, 0))) for stage in matrix.stages[1:])
        )
    console.print(table)
    for line in _examples(found):
        console.print(Text(line, style="dim"), soft_wrap=True)


def signed(lost: int, back: int) -> str:
    """How many were lost (−) and regained (+); empty where none was."""
    return " ".join([f"−{lost}"] * bool(lost) + [f"+{back}"] * bool(back))


def _cell(lost: int, back: int) -> Text:
    both = signed(lost, back)
    return Text(both or "·", style="" if both else "dim")


def _examples(found: Sequence[Flip]) -> Iterator[str]:
    """Of some tasks the last loss that was for good; ids and answers may hold what a terminal
    obeys.
    """
    last = {
        f.task: f for f in found if f.back is None and f.before is not None and f.after is not None
    }
    for f in [*last.values()][:SHOWN]:
        yield f"{brief(f.id)[1:-1]}: {brief(f.before, 60)} after {f.learned}, {brief(f.after, 60)} after {f.lost}"
