"""Scored answers to test examples, as a run keeps them in predictions/stage-NN/TASK.jsonl.

Each line is a JSON object: "id", "prompt", "answer" (none under perplexity), "references", "level"
(of the instruction), "score" in [0, 1], and the further results of the metric, such as "strict",
"loose", "met", "lost", "grades", "cut" or "perplexity".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from continual.errors import DataError, gathered
from continual.io.untrusted import is_number, iter_lines, parse_json

FIELDS = ("id", "prompt", "answer", "references", "level")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One scored answer to a test example.

    `result` holds the "score" and what else the metric says of the answer. `answer` is None for a
    metric that scores the reference itself. A file that was edited may hold references which are not
    texts.
    """

    id: str
    result: Mapping[str, Any]
    prompt: str | None = None
    answer: str | None = None
    references: tuple[str, ...] = ()
    level: str | None = None

    @property
    def score(self) -> float:
        """Return the score in [0, 1]."""
        return float(self.result["score"])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the prediction's line."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            **({} if self.answer is None else {"answer": self.answer}),
            "references": list(self.references),
            "level": self.level,
            **self.result,
        }

    @classmethod
    def from_dict(cls, row: Any) -> Prediction:
        """Read a line's JSON object; keep what this version does not know in `result`.

        Raises ValueError for an object that is not a prediction.
        """
        is_scored = (
            isinstance(row, dict)
            and isinstance(row.get("id"), str | int)
            and is_number(row.get("score"))
        )
        if not is_scored or not isinstance(row.get("references"), list | None):
            raise ValueError("not a prediction")
        if not all(isinstance(row.get(key), str | None) for key in ("prompt", "answer")):
            raise ValueError("not a prediction")

        level = row.get("level")
        return cls(
            id=str(row["id"]),
            result={key: value for key, value in row.items() if key not in FIELDS},
            prompt=row.get("prompt"),
            answer=row.get("answer"),
            references=tuple(row.get("references") or ()),
            level=level if isinstance(level, str) else None,
        )


def format_predictions(predictions: Sequence[Prediction]) -> str:
    """Return the text of a predictions file, one JSON object per line."""
    lines = [json.dumps(p.to_dict(), ensure_ascii=False) for p in predictions]
    return "".join(f"{line}\n" for line in lines)


def load_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file; raise DataError that names each line which is not a prediction."""
    predictions = []
    problems = []
    for number, line in iter_lines(path):
        location = f"{path}:{number}"
        try:
            predictions.append(Prediction.from_dict(parse_json(line, location, line=True)))
        except DataError as error:
            problems.append(str(error))
        except ValueError:
            problems.append(
                f"{location}: found no prediction, expected an id and a score, a prompt, an answer "
                "and a list of references"
            )
    if problems:
        raise DataError(gathered(problems) + "\nRemove the file, or score the run again.")
    return predictions
