"""Metrics that mark an answer by its whole row: what the row asks for, not only the answers that it
accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from continual.data.types import Constraint, Example
from continual.errors import DataError, gathered
from continual.evaluation.constraints import keeps, keeps_loosely
from continual.evaluation.demands import demands
from continual.evaluation.fidelity import elements, fidelity

Marks = dict[str, Any]  # "score" in [0, 1], and what it is made of


@dataclass(frozen=True)
class Measure:
    """How an answer is marked, and what `each` row of a task must have for it, or one of them at
    least.
    """

    mark: Callable[[str, Example], Marks]
    has: Callable[[Example], bool]
    needs: str
    mend: str
    each: bool = False


def adherence(answer: str, constraints: Sequence[Constraint]) -> Marks:
    """Which constraints the answer keeps to, strictly and loosely (Zhou et al. 2023, equations 1
    and 2).
    """
    return {
        "strict": [keeps(answer, c) for c in constraints],
        "loose": [keeps_loosely(answer, c) for c in constraints],
    }


def constraint_check(answer: str, example: Example) -> Marks:
    """1 where it keeps strictly to every constraint of the row: the mean is IFEval's prompt-level
    strict accuracy.
    """
    told = adherence(answer, example.constraints)
    return {"score": float(all(told["strict"])), **told}


def constraint_check_loose(answer: str, example: Example) -> Marks:
    """1 where it keeps loosely to every constraint: the mean is IFEval's prompt-level loose
    accuracy.
    """
    told = adherence(answer, example.constraints)
    return {"score": float(all(told["loose"])), **told}


def constraint_share(answer: str, example: Example) -> Marks:
    """The share of the row's constraints that it keeps to strictly.

    IFEval's instruction-level accuracy pools the constraints of all rows; the mean of these shares
    weighs each row alike. `accuracies` has the pooled one.
    """
    told = adherence(answer, example.constraints)
    return {"score": sum(told["strict"]) / len(told["strict"]), **told}


def constraint_share_loose(answer: str, example: Example) -> Marks:
    """The share of the row's constraints that it keeps to loosely."""
    told = adherence(answer, example.constraints)
    return {"score": sum(told["loose"]) / len(told["loose"]), **told}


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The four accuracies of IFEval (Zhou et al. 2023) of predictions that say `strict` and
    `loose`.

    By prompt: the share of the rows that keep to all of their constraints; by instruction: the
    share of all constraints of all rows that are kept to.
    """
    found = {}
    for how in ("strict", "loose"):
        told = [row[how] for row in rows]
        found[f"prompt, {how}"] = sum(map(all, told)) / len(told)
        found[f"instruction, {how}"] = sum(map(sum, told)) / sum(map(len, told))
    return found


def kept(answer: str, example: Example) -> Marks:
    """Instruction fidelity: the share of the instruction's concrete elements that it preserves
    (continual.evaluation.fidelity).
    """
    score, lost = fidelity(answer, example.user_request)
    return {"score": score, "lost": lost}


def checkable(example: Example) -> tuple[Constraint, ...]:
    """The row's constraints; of a row without any those that its instruction asks for in its own
    words.
    """
    return example.constraints or tuple(
        c for d in demands(example.user_request) for c in d.constraints
    )


def relevance_checked(answer: str, example: Example) -> Marks:
    """Instruction relevance without a judge: the share of the checkable requirements that it meets,
    strictly.

    The ratio of requirements followed of InFoBench (DRFR, Qin et al. 2024), of those that need no
    judge: `checkable`. Where there are none, 1 for an answer that is not blank.
    """
    told = [keeps(answer, c) for c in checkable(example)]
    return {"score": sum(told) / len(told) if told else float(bool(answer.strip())), "met": told}


CONSTRAINED = (
    lambda e: bool(e.constraints),
    "constraints",
    'write them as "constraints": [{"id": ..., "kwargs": ...}], or choose another metric',
    True,
)
MEASURES: Mapping[str, Measure] = {
    "constraint_check": Measure(constraint_check, *CONSTRAINED),
    "constraint_check_loose": Measure(constraint_check_loose, *CONSTRAINED),
    "constraint_share": Measure(constraint_share, *CONSTRAINED),
    "constraint_share_loose": Measure(constraint_share_loose, *CONSTRAINED),
    "fidelity": Measure(
        kept,
        lambda e: bool(elements(e.user_request)),
        "numbers, quotes, names or words of form in its instruction",
        "choose another metric",
    ),
    "relevance_checked": Measure(
        relevance_checked,
        lambda e: bool(checkable(e)),
        "requirements that can be checked",
        "choose another metric, such as relevance_judged",
    ),
}


def refuse(metric: str, task: str, rows: Sequence[Example]) -> None:
    """Raise DataError for rows that lack what the measure of this name marks by."""
    measure = MEASURES[metric]
    without = [e for e in rows if not measure.has(e)]
    if measure.each and without:
        raise DataError(
            gathered(
                [
                    f"{e.location}: found no {measure.needs}, expected them for the metric {metric}; "
                    f"{measure.mend}"
                    for e in without
                ]
            )
        )
    if len(without) == len(rows):
        raise DataError(
            f"task {task!r}: found no {measure.needs} in any of its {len(rows)} rows, expected "
            f"them for the metric {metric}; {measure.mend}"
        )


def unread(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is to be said of a judge's grades that could not be read and of answers cut for it, if
    there are any.
    """
    grades = [g for row in rows for g in row.get("grades", ())]
    none, cut = sum(g is None for g in grades), sum(bool(row.get("cut")) for row in rows)
    told = (
        (none, f"{none} of {len(grades)} grades of the judge could not be read and count as 0"),
        (cut, f"{cut} of {len(rows)} answers were cut to fit the judge"),
    )
    return "; ".join(text for n, text in told if n)
