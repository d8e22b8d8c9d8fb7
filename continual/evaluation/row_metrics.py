"""Metrics that mark an answer by its whole row: what the row asks for, not only the answers that it
accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from continual.data.types import Constraint, Example
from continual.errors import DataError, gathered
from continual.evaluation.constraints import satisfies, satisfies_loosely
from continual.evaluation.fidelity import find_elements, score_fidelity
from continual.evaluation.instruction_parser import find_demands

AnswerScore = dict[str, Any]  # "score" in [0, 1], and what it is made of


@dataclass(frozen=True)
class RowMetric:
    """How an answer is marked, and what `each` row of a task must have for it, or one of them at
    least.
    """

    score_answer: Callable[[str, Example], AnswerScore]
    is_measurable: Callable[[Example], bool]
    missing_text: str
    fix: str
    every_row: bool = False


def adherence(answer: str, constraints: Sequence[Constraint]) -> AnswerScore:
    """Which constraints the answer keeps to, strictly and loosely (Zhou et al. 2023, equations 1
    and 2).
    """
    return {
        "strict": [satisfies(answer, c) for c in constraints],
        "loose": [satisfies_loosely(answer, c) for c in constraints],
    }


def constraint_check(answer: str, example: Example) -> AnswerScore:
    """1 where it keeps strictly to every constraint of the row: the mean is IFEval's prompt-level
    strict accuracy.
    """
    told = adherence(answer, example.constraints)
    return {"score": float(all(told["strict"])), **told}


def constraint_check_loose(answer: str, example: Example) -> AnswerScore:
    """1 where it keeps loosely to every constraint: the mean is IFEval's prompt-level loose
    accuracy.
    """
    told = adherence(answer, example.constraints)
    return {"score": float(all(told["loose"])), **told}


def constraint_share(answer: str, example: Example) -> AnswerScore:
    """The share of the row's constraints that it keeps to strictly.

    IFEval's instruction-level accuracy pools the constraints of all rows; the mean of these shares
    weighs each row alike. `accuracies` has the pooled one.
    """
    told = adherence(answer, example.constraints)
    return {"score": sum(told["strict"]) / len(told["strict"]), **told}


def constraint_share_loose(answer: str, example: Example) -> AnswerScore:
    """The share of the row's constraints that it keeps to loosely."""
    told = adherence(answer, example.constraints)
    return {"score": sum(told["loose"]) / len(told["loose"]), **told}


def ifeval_accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
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


def instruction_fidelity(answer: str, example: Example) -> AnswerScore:
    """Instruction fidelity: the share of the instruction's concrete elements that it preserves
    (continual.evaluation.fidelity).
    """
    score, lost = score_fidelity(answer, example.user_request)
    return {"score": score, "lost": lost}


def checkable_constraints(example: Example) -> tuple[Constraint, ...]:
    """The row's constraints; of a row without any those that its instruction asks for in its own
    words.
    """
    return example.constraints or tuple(
        c for d in find_demands(example.user_request) for c in d.constraints
    )


def relevance_checked(answer: str, example: Example) -> AnswerScore:
    """Instruction relevance without a judge: the share of the checkable requirements that it meets,
    strictly.

    The ratio of requirements followed of InFoBench (DRFR, Qin et al. 2024), of those that need no
    judge: `checkable`. Where there are none, 1 for an answer that is not blank.
    """
    told = [satisfies(answer, c) for c in checkable_constraints(example)]
    return {"score": sum(told) / len(told) if told else float(bool(answer.strip())), "met": told}


NEEDS_CONSTRAINTS = (
    lambda e: bool(e.constraints),
    "constraints",
    'write them as "constraints": [{"id": ..., "kwargs": ...}], or choose another metric',
    True,
)
ROW_METRICS: Mapping[str, RowMetric] = {
    "constraint_check": RowMetric(constraint_check, *NEEDS_CONSTRAINTS),
    "constraint_check_loose": RowMetric(constraint_check_loose, *NEEDS_CONSTRAINTS),
    "constraint_share": RowMetric(constraint_share, *NEEDS_CONSTRAINTS),
    "constraint_share_loose": RowMetric(constraint_share_loose, *NEEDS_CONSTRAINTS),
    "fidelity": RowMetric(
        instruction_fidelity,
        lambda e: bool(find_elements(e.user_request)),
        "numbers, quotes, names or words of form in its instruction",
        "choose another metric",
    ),
    "relevance_checked": RowMetric(
        relevance_checked,
        lambda e: bool(checkable_constraints(e)),
        "requirements that can be checked",
        "choose another metric, such as relevance_judged",
    ),
}


def check_metric_rows(metric: str, task: str, rows: Sequence[Example]) -> None:
    """Raise DataError for rows that lack what the measure of this name marks by."""
    measure = ROW_METRICS[metric]
    without = [e for e in rows if not measure.is_measurable(e)]
    if measure.every_row and without:
        raise DataError(
            gathered(
                [
                    f"{e.location}: found no {measure.missing_text}, expected them for the metric {metric}; "
                    f"{measure.fix}"
                    for e in without
                ]
            )
        )
    if len(without) == len(rows):
        raise DataError(
            f"task {task!r}: found no {measure.missing_text} in any of its {len(rows)} rows, expected "
            f"them for the metric {metric}; {measure.fix}"
        )


def judge_warnings(rows: Sequence[Mapping[str, Any]]) -> str:
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
