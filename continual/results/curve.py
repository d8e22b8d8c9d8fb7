"""Load and store the score of an adaptation by optimizer step, number of examples and draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from continual.errors import DataError, brief
from continual.io import untrusted

CURVE_FILE = "curve.json"


@dataclass(frozen=True)
class Curve:
    """Scores in [0, 1] on one new task, as stored in curve.json of an adapt folder.

    `points` are sorted tuples (shots, draw, step, score): the number of training examples, the
    index of the support set and training order of that size, and the number of optimizer steps.
    `rule` names the update rule (conf/adapt.yaml).
    """

    path: Path
    task: str
    metric: str
    start: str
    points: tuple[tuple[int, int, int, float], ...]
    rule: str = "train"  # adapt.update_rule

    @classmethod
    def load(cls, folder: Path, file_name: str = CURVE_FILE) -> Curve:
        """Load the curve of a folder; raise DataError if it is not of schema 1."""
        file = folder / file_name
        document = untrusted.load_json(file)
        try:
            if document["schema"] != 1:
                raise ValueError(f"schema {brief(document['schema'])}; this version reads schema 1")
            texts = {key: document[key] for key in ("task", "metric", "start")} | {
                "rule": document.get("rule", "train")
            }
            if invalid_keys := [
                key
                for key, text in texts.items()
                if not isinstance(text, str) or untrusted.CONTROL.search(text)
            ]:
                raise ValueError(
                    f"{', '.join(invalid_keys)} should be text without control characters"
                )
            points = [(p["shots"], p["step"], p["score"]) for p in document["points"]]
            if invalid := [
                p
                for p in points
                if not all(map(untrusted.is_number, p, (0, 0, 0), (1e12, 1e12, 1)))
            ]:
                raise ValueError(f"these are no shots, step and score in [0, 1]: {brief(invalid)}")
            draws = [p.get("draw", 0) for p in document["points"]]
            if invalid := [d for d in draws if not untrusted.is_number(d, 0, 1e12)]:
                raise ValueError(f"these are no draws: {brief(invalid)}")
            sorted_points = sorted(
                (int(shots), int(draw), int(step), float(score))
                for (shots, step, score), draw in zip(points, draws, strict=True)
            )
            return cls(folder, points=tuple(sorted_points), **texts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: no curve of schema 1 ({error!r}); adapt again") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the content of curve.json."""
        points = [
            {"shots": n, "draw": draw, "step": step, "score": score}
            for n, draw, step, score in self.points
        ]
        return {
            "schema": 1,
            "task": self.task,
            "metric": self.metric,
            "start": self.start,
            "rule": self.rule,
            "points": points,
        }

    @property
    def start_label(self) -> str:
        """Return a short name of the start: "base", or the run and stage of the checkpoint.

        Starts adapted by their own inner loop say so.
        """
        label = " ".join([part for part in Path(self.start).parts if part != "checkpoints"][-2:])
        return f"{label}, inner loop" if self.rule == "inner" else label

    @property
    def shots(self) -> list[int]:
        """Return the numbers of training examples, ascending."""
        return sorted({point[0] for point in self.points})

    @property
    def num_draws(self) -> int:
        """Return the largest number of support sets of one size."""
        return len({point[1] for point in self.points})

    @property
    def steps(self) -> list[int]:
        """Return the optimizer steps that were scored, ascending."""
        return sorted({point[2] for point in self.points})

    def mean_scores(self, shots: int) -> list[tuple[int, float]]:
        """Return (step, mean score over draws) for one number of training examples."""
        return [(step, fmean(scores)) for step, scores in self._scores_by_step(shots)]

    def band(self, shots: int) -> list[tuple[int, float, float]]:
        """Return (step, lowest, highest score over draws) for one number of training examples."""
        return [(step, min(scores), max(scores)) for step, scores in self._scores_by_step(shots)]

    def _scores_by_step(self, shots: int) -> list[tuple[int, list[float]]]:
        """Return each step with its scores over draws."""
        scores_by_step: dict[int, list[float]] = {}
        for n, _, step, score in self.points:
            if n == shots:
                scores_by_step.setdefault(step, []).append(score)
        return sorted(scores_by_step.items())
