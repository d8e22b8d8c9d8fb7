"""Find test examples whose answer changed from correct to wrong, and when it was regained.

An answer is correct if its score is at least CORRECT_THRESHOLD: exact for exact match, a
threshold for graded metrics (rougeL, token_f1). All stages count, the base row included, because
knowledge of the base model can be lost too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from continual.results.run_folder import Run

CORRECT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Flip:
    """One change of an example from correct to wrong.

    `last_correct_stage` is the stage after which it was last correct, with `answer_before`.
    `lost_stage` is the next stage that scored it, as wrong, with `answer_after`. `regained_stage`
    is the stage after which it was correct again, or None.
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
    """Return every flip of a run, by task, stage and example.

    Stages without stored predictions are skipped. Raises DataError for predictions that cannot be
    read.
    """
    return [flip for task in run.matrix.tasks for flip in _find_task_flips(run, task)]


def _find_task_flips(run: Run, task: str) -> list[Flip]:
    correct: dict[
        str, tuple[str, str | None]
    ] = {}  # of what is correct now: after which stage, and the answer
    lost: dict[str, int] = {}  # of what was correct and is wrong now: its flip
    flips: list[Flip] = []
    for stage in run.matrix.stages:
        for example_id, prediction in {p.id: p for p in run.load_predictions(stage, task)}.items():
            if prediction.score >= CORRECT_THRESHOLD:
                correct[example_id] = (stage, prediction.answer)
                if (index := lost.pop(example_id, None)) is not None:
                    flips[index] = replace(flips[index], regained_stage=stage)
            elif example_id in correct:
                learned, before = correct.pop(example_id)
                lost[example_id] = len(flips)
                flips.append(
                    Flip(
                        task,
                        str(example_id),
                        learned,
                        stage,
                        prediction.prompt,
                        before,
                        prediction.answer,
                        tuple(map(str, prediction.references)),
                    )
                )
    return flips


def count_flips(flips: Sequence[Flip]) -> dict[tuple[str, str], tuple[int, int]]:
    """Count lost and regained examples by (task, stage)."""
    lost, back = (
        Counter((f.task, f.lost_stage) for f in flips),
        Counter((f.task, f.regained_stage) for f in flips if f.regained_stage),
    )
    return {place: (lost[place], back[place]) for place in {**lost, **back}}
