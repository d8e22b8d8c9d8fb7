"""Flips: which test examples went from right to wrong, at which stage, and which of them came back.

An answer is right from a mark of RIGHT on: for exact match that is the whole of it, for a graded
metric (rougeL, token_f1) a threshold. All stages count, the base model's row among them: what it
knew may be lost as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from continual.results.run_folder import Run

CORRECT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Flip:
    """One example's fall from right to wrong.

    `learned` is the stage after which it was last right, with the answer `before`; `lost` the next
    one at which it was marked, and wrong, with the answer `after`; `back` the stage after which it
    was right again, None if it never was.
    """

    task: str
    id: str
    last_correct_stage: str
    lost_stage: str
    prompt: str | None
    answer_before: str | None
    answer_after: str | None
    references: tuple[str, ...]
    regained_stage: str | None = None


def find_flips(run: Run) -> list[Flip]:
    """Every fall of every example, by task, stage and example; a stage whose answers are not there
    is passed over.

    Raises DataError for predictions that cannot be read.
    """
    return [flip for task in run.matrix.tasks for flip in _find_task_flips(run, task)]


def _find_task_flips(run: Run, task: str) -> list[Flip]:
    right: dict[
        str, tuple[str, str | None]
    ] = {}  # of what is right now: after which stage, and the answer
    lost: dict[str, int] = {}  # of what was right and is wrong now: its flip
    found: list[Flip] = []
    for stage in run.matrix.stages:
        for key, prediction in {p.id: p for p in run.load_predictions(stage, task)}.items():
            if prediction.score >= CORRECT_THRESHOLD:
                right[key] = (stage, prediction.answer)
                if (at := lost.pop(key, None)) is not None:
                    found[at] = replace(found[at], regained_stage=stage)
            elif key in right:
                learned, before = right.pop(key)
                lost[key] = len(found)
                found.append(
                    Flip(
                        task,
                        str(key),
                        learned,
                        stage,
                        prediction.prompt,
                        before,
                        prediction.answer,
                        tuple(map(str, prediction.references)),
                    )
                )
    return found


def count_flips(flips: Sequence[Flip]) -> dict[tuple[str, str], tuple[int, int]]:
    """By task and stage: how many examples were lost there, and how many lost ones came back."""
    lost, back = (
        Counter((f.task, f.lost_stage) for f in flips),
        Counter((f.task, f.regained_stage) for f in flips if f.regained_stage),
    )
    return {place: (lost[place], back[place]) for place in {**lost, **back}}
