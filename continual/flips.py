"""Flips: which test examples went from right to wrong, at which stage, and which of them came back.

An answer is right from a mark of RIGHT on: for exact match that is the whole of it, for a graded metric (rougeL,
token_f1) a threshold. All stages count, the base model's row among them: what it knew may be lost as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.errors import brief
from continual.matrix import BASE, Matrix
from continual.reports.runs import Run

RIGHT = 0.5
SHOWN = 3  # in the terminal


@dataclass(frozen=True)
class Flip:
    """One example's fall from right to wrong.

    `learned` is the stage after which it was last right, with the answer `before`; `lost` the next one at which it was
    marked, and wrong, with the answer `after`; `back` the stage after which it was right again, None if it never was.
    """

    task: str
    id: str
    learned: str
    lost: str
    prompt: str | None
    before: str | None
    after: str | None
    references: tuple[str, ...]
    back: str | None = None


def flips(run: Run) -> list[Flip]:
    """Every fall of every example, by task, stage and example; a stage whose answers are not there is passed over.

    Raises DataError for predictions that cannot be read.
    """
    return [flip for task in run.matrix.tasks for flip in _of(run, task)]


def _of(run: Run, task: str) -> list[Flip]:
    right: dict[Any, tuple[str, str | None]] = {}  # of what is right now: after which stage, and the answer
    lost: dict[Any, int] = {}  # of what was right and is wrong now: its flip
    found: list[Flip] = []
    for stage in run.matrix.stages:
        for key, row in {row["id"]: row for row in run.predictions(stage, task)}.items():
            if row["score"] >= RIGHT:
                right[key] = (stage, row.get("answer"))
                if (at := lost.pop(key, None)) is not None:
                    found[at] = replace(found[at], back=stage)
            elif key in right:
                learned, before = right.pop(key)
                lost[key] = len(found)
                found.append(Flip(task, str(key), learned, stage, row.get("prompt"), before, row.get("answer"),
                                  tuple(map(str, row.get("references") or ()))))
    return found


def counts(found: Sequence[Flip]) -> dict[tuple[str, str], tuple[int, int]]:
    """By task and stage: how many examples were lost there, and how many lost ones came back."""
    lost, back = Counter((f.task, f.lost) for f in found), Counter((f.task, f.back) for f in found if f.back)
    return {place: (lost[place], back[place]) for place in {**lost, **back}}


def show(console: Console, matrix: Matrix, found: Sequence[Flip]) -> None:
    """How many flipped, task by stage, and a few of them, in the terminal; nothing where there is one stage only."""
    if len(matrix.stages) < 2:
        return
    console.print(Text(f"answers lost (−) and regained (+) at each stage; right is a mark of at least {RIGHT}",
                       style="bold"))
    if not found:
        console.print("none was lost")
        return
    told, first = counts(found), int(BASE not in matrix.stages)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for number in range(first + 1, first + len(matrix.stages)):
        table.add_column(str(number), justify="right", no_wrap=True)
    for task in matrix.tasks:
        table.add_row(Text(task), *(_cell(*told.get((task, stage), (0, 0))) for stage in matrix.stages[1:]))
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
    """Of some tasks the last loss that was for good; ids and answers may hold what a terminal obeys."""
    last = {f.task: f for f in found if f.back is None and f.before is not None and f.after is not None}
    for f in [*last.values()][:SHOWN]:
        yield f"{brief(f.id)[1:-1]}: {brief(f.before, 60)} after {f.learned}, {brief(f.after, 60)} after {f.lost}"
