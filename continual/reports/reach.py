"""What an adaptation needs to reach the reference: full fine-tuning of the base on all examples of
the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from continual.reports.figures import NO_VALUE, format_percent
from continual.results.curve import Curve

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BASE_START = "base"
GOAL_SHARE = 0.95  # of the reference's best score is to be reached


@dataclass(frozen=True)
class Reach:
    """One adaptation beside the reference on its task; the scores are means over draws, the steps
    those scored.

    `goal` is 95% of the reference's best score with all examples. `steps` is the first step at
    which the curve with most examples has it, `reference` that of the reference's own curve,
    `budget` the last step of that, `examples` the fewest with which some step has it; None where
    none has.
    """

    curve: Curve
    goal_score: float
    reference_steps: int
    budget_steps: int
    steps: int | None
    num_examples: int | None

    @property
    def share_of_reference(self) -> float | None:
        """The steps as a share of the reference's; None where the goal is not reached, or is where
        the base begins.
        """
        return (
            None
            if self.steps is None or not self.reference_steps
            else self.steps / self.reference_steps
        )

    @property
    def share_of_budget(self) -> float | None:
        """The steps as a share of all that the reference was trained for, also those after it was
        reached.
        """
        return (
            None if self.steps is None or not self.budget_steps else self.steps / self.budget_steps
        )


def compute_reach(curves: Sequence[Curve]) -> list[Reach]:
    """Each curve beside the reference on its task, those left out that have none among them.

    The reference is the curve that starts at the base, of several the one with most examples and
    steps.
    """
    bases: dict[tuple[str, str], Curve] = {}
    for c in sorted(curves, key=lambda c: (c.shots[-1:], c.steps[-1:])):
        if c.start == BASE_START and c.points:
            bases[c.task, c.metric] = c
    return [_curve_reach(c, bases[c.task, c.metric]) for c in curves if (c.task, c.metric) in bases]


def _curve_reach(curve: Curve, base: Curve) -> Reach:
    goal = GOAL_SHARE * max(score for _, score in base.mean_scores(base.shots[-1]))

    def first(told: Curve, shots: int) -> int | None:
        return next((step for step, score in told.mean_scores(shots) if score >= goal), None)

    steps = first(curve, curve.shots[-1]) if curve.points else None
    fewest = next((n for n in curve.shots if first(curve, n) is not None), None)
    return Reach(
        curve,
        goal,
        first(base, base.shots[-1]) or 0,
        base.steps[-1],
        steps,
        0 if steps == 0 else fewest,
    )


def start_labels(curves: Sequence[Curve]) -> list[str]:
    """Where each began; with its folder's name where two of one task began alike."""
    told = [(c.task, c.start_label) for c in curves]
    return [
        c.start_label if told.count(of) == 1 else f"{c.start_label} ({c.path.name})"
        for c, of in zip(curves, told, strict=True)
    ]


def print_reach(console: Console, curves: Sequence[Curve]) -> None:
    """The tables in the terminal: a row for each start, a column for each task."""
    from rich.text import Text

    found = compute_reach(curves)
    if len(curves) < 2 or not found:
        return
    rows: dict[str, dict[str, Reach]] = {}
    for name, one in zip(start_labels([r.curve for r in found]), found, strict=True):
        rows.setdefault(name, {})[one.curve.task] = one
    goals = {one.curve.task: one.goal_score for one in found}
    draws = min(one.curve.num_draws for one in found)
    console.print(
        Text(
            f"optimizer steps to reach {100 * GOAL_SHARE:.0f}% of the best score of the base on all "
            f"examples (of the base's own; means of {draws} draws)",
            style="bold",
        )
    )
    console.print(
        _reach_table(
            rows,
            goals,
            _format_steps,
            {
                "of base's\nsteps": lambda one: one.share_of_reference,
                "of base's\nbudget": lambda one: one.share_of_budget,
            },
        )
    )
    console.print(Text("examples to reach it with", style="bold"))
    console.print(
        _reach_table(
            rows,
            goals,
            lambda one: NO_VALUE if one.num_examples is None else str(one.num_examples),
            {},
        )
    )


def _format_steps(one: Reach) -> str:
    if one.steps is None:
        return NO_VALUE
    return (
        f"{one.steps} ({100 * one.share_of_reference:.0f}%)"
        if one.share_of_reference is not None
        else str(one.steps)
    )


def _format_mean_share(shares: Iterable[float | None]) -> str:
    """Of those reached."""
    known = [share for share in shares if share is not None]
    return f"{100 * fmean(known):.0f}%" if known else NO_VALUE


def _reach_table(
    rows: Mapping[str, Mapping[str, Reach]],
    goals: Mapping[str, float],
    cell: Callable[[Reach], str],
    shares: Mapping[str, Callable[[Reach], float | None]],
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    table.add_column("from", no_wrap=True)
    for task, goal in goals.items():
        table.add_column(Text(f"{task}\n≥ {format_percent(goal)}"), justify="right")
    table.add_column("reached", justify="right")
    for head in shares:
        table.add_column(head, justify="right")
    for name, row in rows.items():
        reached = (
            sum(one.steps is not None for one in row.values())
            if shares
            else sum(one.num_examples is not None for one in row.values())
        )
        cells = [cell(row[task]) if task in row else "" for task in goals]
        table.add_row(
            Text(name),
            *cells,
            f"{reached} of {len(row)}",
            *(_format_mean_share(map(share, row.values())) for share in shares.values()),
        )
    return table
