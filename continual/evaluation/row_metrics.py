"""Metrics that score an answer by what its row asks for, not by the accepted answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from continual.data.types import Constraint, Example
from continual.errors import DataError, gathered
from continual.evaluation.constraints import satisfies, satisfies_loosely
from continual.evaluation.fidelity import find_elements, score_fidelity
from continual.evaluation.instruction_parser import find_demands

AnswerScore = dict[str, Any]  # "score" in [0, 1], and the details that it is computed from


@dataclass(frozen=True)
class RowMetric:
    """A function that scores an answer, and what a task's rows must have for it.

    With `every_row` all rows must be measurable, otherwise at least one. `missing_text` names what
    rows lack and `fix` says what to do, both for the error message.
    """

    score_answer: Callable[[str, Example], AnswerScore]
    is_measurable: Callable[[Example], bool]
    missing_text: str
    fix: str
    every_row: bool = False


def adherence(answer: str, constraints: Sequence[Constraint]) -> AnswerScore:
    """Check each constraint strictly and loosely (Zhou et al. 2023, equations 1 and 2)."""
    return {
        "strict": [satisfies(answer, c) for c in constraints],
        "loose": [satisfies_loosely(answer, c) for c in constraints],
    }


def constraint_check(answer: str, example: Example) -> AnswerScore:
    """Score 1 if the answer satisfies every constraint strictly, else 0.

    The mean is IFEval's prompt-level strict accuracy.
    """
    details = adherence(answer, example.constraints)
    return {"score": float(all(details["strict"])), **details}


def constraint_check_loose(answer: str, example: Example) -> AnswerScore:
    """Score 1 if the answer satisfies every constraint loosely, else 0.

    The mean is IFEval's prompt-level loose accuracy.
    """
    details = adherence(answer, example.constraints)
    return {"score": float(all(details["loose"])), **details}


def constraint_share(answer: str, example: Example) -> AnswerScore:
    """Score the share of the row's constraints that the answer satisfies strictly.

    The mean of these shares weighs each row equally. IFEval's instruction-level accuracy pools the
    constraints of all rows instead; `ifeval_accuracies` computes it.
    """
    details = adherence(answer, example.constraints)
    return {"score": sum(details["strict"]) / len(details["strict"]), **details}


def constraint_share_loose(answer: str, example: Example) -> AnswerScore:
    """Score the share of the row's constraints that the answer satisfies loosely."""
    details = adherence(answer, example.constraints)
    return {"score": sum(details["loose"]) / len(details["loose"]), **details}


def ifeval_accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute IFEval's four accuracies (Zhou et al. 2023) from rows with `strict` and `loose`.

    By prompt: the share of rows that satisfy all of their constraints. By instruction: the share of
    satisfied constraints among those of all rows.
    """
    accuracies = {}
    for variant in ("strict", "loose"):
        flags = [row[variant] for row in rows]
        accuracies[f"prompt, {variant}"] = sum(map(all, flags)) / len(flags)
        accuracies[f"instruction, {variant}"] = sum(map(sum, flags)) / sum(map(len, flags))
    return accuracies


def instruction_fidelity(answer: str, example: Example) -> AnswerScore:
    """Score the share of the instruction's concrete elements that the answer preserves.

    See `continual.evaluation.fidelity`.
    """
    score, lost = score_fidelity(answer, example.user_request)
    return {"score": score, "lost": lost}


def checkable_constraints(example: Example) -> tuple[Constraint, ...]:
    """Return the row's constraints, or else those found in the words of its instruction."""
    return example.constraints or tuple(
        c for d in find_demands(example.user_request) for c in d.constraints
    )


def relevance_checked(answer: str, example: Example) -> AnswerScore:
    """Score the share of the checkable constraints that the answer satisfies strictly.

    This is instruction relevance without a judge: the ratio of requirements followed of InFoBench
    (DRFR, Qin et al. 2024), over the requirements that need no judge. If there are none, the score
    is 1 for an answer that is not blank.
    """
    met = [satisfies(answer, c) for c in checkable_constraints(example)]
    return {"score": sum(met) / len(met) if met else float(bool(answer.strip())), "met": met}


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
    """Raise DataError for rows that lack what this row metric needs."""
    row_metric = ROW_METRICS[metric]
    unmeasurable = [e for e in rows if not row_metric.is_measurable(e)]
    advice = f"expected them for the metric {metric}; {row_metric.fix}"
    if row_metric.every_row and unmeasurable:
        problems = [
            f"{e.location}: found no {row_metric.missing_text}, {advice}" for e in unmeasurable
        ]
        raise DataError(gathered(problems))
    if len(unmeasurable) == len(rows):
        raise DataError(
            f"task {task!r}: found no {row_metric.missing_text} in any of its {len(rows)} rows, "
            f"{advice}"
        )


def judge_warnings(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe a judge's unreadable grades and truncated answers; "" if there are none."""
    grades = [grade for row in rows for grade in row.get("grades", ())]
    num_unreadable = sum(grade is None for grade in grades)
    num_truncated = sum(bool(row.get("cut")) for row in rows)
    warnings = []
    if num_unreadable:
        warnings.append(
            f"{num_unreadable} of {len(grades)} grades of the judge could not be read and count as "
            "0"
        )
    if num_truncated:
        warnings.append(f"{num_truncated} of {len(rows)} answers were truncated to fit the judge")
    return "; ".join(warnings)
