"""Curves of adaptations on disk: the score on one new task by optimizer steps, examples and draws."""

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
    """curve.json of an adapt folder: scores in [0, 1] on one new task.

    `points` are (shots, draw, step, score), rising: the number of training examples, which support
    set of that size and order of training it was, and after how many optimizer steps. `rule` says
    what took them, as in conf/adapt.yaml.
    """

    path: Path
    task: str
    metric: str
    start: str
    points: tuple[tuple[int, int, int, float], ...]
    rule: str = "train"  # adapt.update_rule

    @classmethod
    def load(cls, folder: Path, file_name: str = CURVE_FILE) -> Curve:
        """The curve in the folder `path`; raises DataError where it is not of schema 1."""
        file = folder / file_name
        told = untrusted.load_json(file)
        try:
            if told["schema"] != 1:
                raise ValueError(f"schema {brief(told['schema'])}; this version reads schema 1")
            texts = {key: told[key] for key in ("task", "metric", "start")} | {
                "rule": told.get("rule", "train")
            }
            if strange := [
                key
                for key, text in texts.items()
                if not isinstance(text, str) or untrusted.CONTROL.search(text)
            ]:
                raise ValueError(f"{', '.join(strange)} should be text without control characters")
            points = [(p["shots"], p["step"], p["score"]) for p in told["points"]]
            if wrong := [
                p
                for p in points
                if not all(map(untrusted.is_number, p, (0, 0, 0), (1e12, 1e12, 1)))
            ]:
                raise ValueError(f"these are no shots, step and score in [0, 1]: {brief(wrong)}")
            draws = [p.get("draw", 0) for p in told["points"]]
            if wrong := [d for d in draws if not untrusted.is_number(d, 0, 1e12)]:
                raise ValueError(f"these are no draws: {brief(wrong)}")
            found = sorted(
                (int(shots), int(draw), int(step), float(score))
                for (shots, step, score), draw in zip(points, draws, strict=True)
            )
            return cls(folder, points=tuple(found), **texts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: no curve of schema 1 ({error!r}); adapt again") from error

    def to_dict(self) -> dict[str, Any]:
        """What `read` reads."""
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
        """Where it began, in few words: "base", or the checkpoint's run and stage; and if by its
        own inner loop.
        """
        began = " ".join([part for part in Path(self.start).parts if part != "checkpoints"][-2:])
        return f"{began}, inner loop" if self.rule == "inner" else began

    @property
    def shots(self) -> list[int]:
        """The numbers of training examples tried, rising."""
        return sorted({point[0] for point in self.points})

    @property
    def num_draws(self) -> int:
        """How many support sets of each size were tried at most."""
        return len({point[1] for point in self.points})

    @property
    def steps(self) -> list[int]:
        """The optimizer steps at which it was scored, rising."""
        return sorted({point[2] for point in self.points})

    def mean_scores(self, shots: int) -> list[tuple[int, float]]:
        """The (step, score) pairs with that many training examples, each score the mean over draws."""
        return [(step, fmean(scores)) for step, scores in self._scores_by_step(shots)]

    def band(self, shots: int) -> list[tuple[int, float, float]]:
        """The (step, lowest, highest score over draws) with that many training examples."""
        return [(step, min(scores), max(scores)) for step, scores in self._scores_by_step(shots)]

    def _scores_by_step(self, shots: int) -> list[tuple[int, list[float]]]:
        """Each step's scores over draws."""
        found: dict[int, list[float]] = {}
        for n, _, step, score in self.points:
            if n == shots:
                found.setdefault(step, []).append(score)
        return sorted(found.items())
