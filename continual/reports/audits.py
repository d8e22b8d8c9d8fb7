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
from continual.reports.figures import NO_VALUE, format_count, format_percent

AUDIT_FILE = "audit.json"
MAX_PRINTED_FINDINGS = 40  # findings in the terminal
SOLVED_SHARE = 0.9
AUDIT_COLUMNS = (
    "task",
    "train",
    "dev",
    "test",
    "repeated",
    "leaked",
    "conflicting",
    "empty",
    "majority",
)
FIXED_COLUMNS = ("task", "train", "dev", "test")
TOKEN_COLUMNS = ("tokens", "shortened", "left out")


def load_audit(folder: Path) -> dict[str, Any] | None:
    """The run's audit, None where there is none; raises DataError where it is damaged."""
    path = folder / AUDIT_FILE
    if not path.is_file():
        return None
    return load_json_with_schema(
        path,
        "audit",
        "remove it",
        lambda told: (
            audit_table_rows(told),
            finding_lines(told),
            audit_caption(told),
            solved_task_lines(told, {}),
        ),
    )


def audit_table_rows(audit: Mapping[str, Any]) -> list[list[str]]:
    """The heads, and then each task's figures."""
    measured = any(task["tokens"] for task in audit["tasks"].values())
    return [
        [*AUDIT_COLUMNS, *(TOKEN_COLUMNS if measured else ())],
        *(
            [
                name,
                *(format_count(task[head]) for head in AUDIT_COLUMNS[1:-1]),
                _format_majority(task["majority"]),
                *(_format_tokens(task["tokens"]) if measured else ()),
            ]
            for name, task in audit["tasks"].items()
        ),
    ]


def _format_majority(majority: Mapping[str, Any] | None) -> str:
    return (
        f"{format_percent(majority['score'])} / {format_percent(majority['own_score'])}"
        if majority
        else NO_VALUE
    )


def _format_tokens(lengths: Mapping[str, Any]) -> list[str]:
    return [
        " / ".join(format_count(lengths[key]) for key in ("median", "p95", "longest")),
        format_count(lengths["shortened"]),
        format_count(lengths["left out"]),
    ]


def audit_caption(audit: Mapping[str, Any]) -> str:
    """What the figures mean."""
    text = (
        f"leaked: dev and test prompts in training rows. majority: the {audit['split']} score of "
        "giving always the commonest training answer / its own commonest"
    )
    if not audit["fits"]:
        return f"{text}. Tokens are counted where model= is given."
    fits = audit["fits"]
    return (
        f"{text}. tokens of train rows: median / 95 % / longest; {format_count(fits['limit'])} fit "
        f"(data.max_length={fits['max_length']}, the model's context "
        f"{fits['context'] or 'unbounded'})."
    )


def finding_lines(audit: Mapping[str, Any]) -> list[str]:
    """One for each finding."""
    return [
        f"{f['task']}: {f['says']}" + (f", such as {f['example']}" if f["example"] else "")
        for f in audit["findings"]
    ]


def solved_task_lines(audit: Mapping[str, Any], scores: Mapping[str, float | None]) -> list[str]:
    """A line for each task that the base already solves, by its scores before any training.

    A task is solved from SOLVED of what is to be gained: all of it, or where one answer is to be
    given always, what that leaves.
    """
    found = []
    for name, task in audit["tasks"].items():
        score, least = scores.get(name), (task["majority"] or {}).get("score") or 0.0
        if score is not None and score >= least + SOLVED_SHARE * (1 - least):
            found.append(
                f"{name}: the base already solves it, with {format_percent(score)}; there is little "
                "left to learn"
            )
    return found


def print_audit_table(console: Console, audit: Mapping[str, Any]) -> None:
    """Figures and findings in the terminal; what there is none of in any task has no column."""
    heads, *figures = zip(
        *(
            column
            for column in zip(*audit_table_rows(audit), strict=True)
            if column[0] in FIXED_COLUMNS or set(column[1:]) - {"0", NO_VALUE}
        ),
        strict=True,
    )
    table = Table(
        box=None, padding=(0, 1, 0, 0), title=f"audit of {audit['stream']}", title_justify="left"
    )
    for i, head in enumerate(heads):
        table.add_column(
            Text(head), justify="right" if i else "left", overflow="fold", no_wrap=i > 0
        )
    for row in figures:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(
        Text(audit_caption(audit), style="dim")
    )  # apart, or it would be as narrow as the table
    found = finding_lines(audit)
    console.print(
        Text(gathered(found, MAX_PRINTED_FINDINGS) if found else "no problems found"),
        style="yellow" if found else "",
        soft_wrap=True,
    )
