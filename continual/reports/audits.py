"""The audit of a stream's rows, shown: one row of figures a task, one line a finding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.errors import gathered
from continual.io.untrusted import load_json_with_schema
from continual.reports.figures import NONE, count, percent

FILE = "audit.json"
SHOWN = 40  # findings in the terminal
SOLVED = 0.9
HEADS = ("task", "train", "dev", "test", "repeated", "leaked", "conflicting", "empty", "majority")
SIZES = ("task", "train", "dev", "test")
TOKENS = ("tokens", "shortened", "left out")


def load(folder: Path) -> dict[str, Any] | None:
    """The run's audit, None where there is none; raises DataError where it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    return load_json_with_schema(
        path,
        "audit",
        "remove it",
        lambda told: (rows(told), lines(told), caption(told), solved(told, {})),
    )


def rows(told: Mapping[str, Any]) -> list[list[str]]:
    """The heads, and then each task's figures."""
    measured = any(task["tokens"] for task in told["tasks"].values())
    return [
        [*HEADS, *(TOKENS if measured else ())],
        *(
            [
                name,
                *(count(task[head]) for head in HEADS[1:-1]),
                _majority(task["majority"]),
                *(_tokens(task["tokens"]) if measured else ()),
            ]
            for name, task in told["tasks"].items()
        ),
    ]


def _majority(told: Mapping[str, Any] | None) -> str:
    return f"{percent(told['score'])} / {percent(told['own_score'])}" if told else NONE


def _tokens(told: Mapping[str, Any]) -> list[str]:
    return [
        " / ".join(count(told[key]) for key in ("median", "p95", "longest")),
        count(told["shortened"]),
        count(told["left out"]),
    ]


def caption(told: Mapping[str, Any]) -> str:
    """What the figures mean."""
    text = (
        f"leaked: dev and test prompts in training rows. majority: the {told['split']} score of "
        "giving always the commonest training answer / its own commonest"
    )
    if not told["fits"]:
        return f"{text}. Tokens are counted where model= is given."
    fits = told["fits"]
    return (
        f"{text}. tokens of train rows: median / 95 % / longest; {count(fits['limit'])} fit "
        f"(data.max_length={fits['max_length']}, the model's context "
        f"{fits['context'] or 'unbounded'})."
    )


def lines(told: Mapping[str, Any]) -> list[str]:
    """One for each finding."""
    return [
        f"{f['task']}: {f['says']}" + (f", such as {f['example']}" if f["example"] else "")
        for f in told["findings"]
    ]


def solved(told: Mapping[str, Any], scores: Mapping[str, float | None]) -> list[str]:
    """A line for each task that the base already solves, by its scores before any training.

    A task is solved from SOLVED of what is to be gained: all of it, or where one answer is to be
    given always, what that leaves.
    """
    found = []
    for name, task in told["tasks"].items():
        score, least = scores.get(name), (task["majority"] or {}).get("score") or 0.0
        if score is not None and score >= least + SOLVED * (1 - least):
            found.append(
                f"{name}: the base already solves it, with {percent(score)}; there is little "
                "left to learn"
            )
    return found


def show(console: Console, told: Mapping[str, Any]) -> None:
    """Figures and findings in the terminal; what there is none of in any task has no column."""
    heads, *figures = zip(
        *(
            column
            for column in zip(*rows(told), strict=True)
            if column[0] in SIZES or set(column[1:]) - {"0", NONE}
        ),
        strict=True,
    )
    table = Table(
        box=None, padding=(0, 1, 0, 0), title=f"audit of {told['stream']}", title_justify="left"
    )
    for i, head in enumerate(heads):
        table.add_column(
            Text(head), justify="right" if i else "left", overflow="fold", no_wrap=i > 0
        )
    for row in figures:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(caption(told), style="dim"))  # apart, or it would be as narrow as the table
    found = lines(told)
    console.print(
        Text(gathered(found, SHOWN) if found else "nothing found amiss"),
        style="yellow" if found else "",
        soft_wrap=True,
    )
