"""Run folders on disk, read for people: one run, an adaptation's curve, and runs grouped for
comparison.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from continual.config.run_config import flatten_keys
from continual.errors import DataError, MissingError
from continual.io import untrusted
from continual.io.atomic import task_file_name
from continual.results import comparison
from continual.results.matrix import BASE_STAGE, Matrix, mean_or_none
from continual.results.prediction import Prediction, load_predictions

# Keys that may differ between the runs of a group, which are repetitions of one experiment.
REPETITION_KEYS = {"seed", "order", "out", "track"}
LONG_FRACTION = re.compile(r"-?\d+\.\d{4,}")
EXPECTED_FOLDERS = (
    "a run folder (matrix.json), an adapt folder (curve.json) or a comparison folder (run "
    "folders inside it); give the out= of continual run, adapt or compare"
)


def folder_kind(folder: Path) -> str:
    """Return `run`, `adapt` or `comparison`, by the files of a folder; raise MissingError for any
    other.
    """
    if not folder.is_dir():
        raise MissingError(f"{folder}: there is no such folder; expected {EXPECTED_FOLDERS}")
    untrusted.check_links_inside(folder)
    if (folder / "curve.json").is_file():
        return "adapt"
    if (folder / "matrix.json").is_file():
        return "run"
    if any(_child_run_folders(folder)):
        return "comparison"
    if (folder / "config.yaml").is_file():
        raise MissingError(
            f"{folder}: a run that has scored nothing yet (no matrix.json); wait for its first "
            "row, or start it again with the same out="
        )
    if left := comparison.describe_unfinished(folder):
        raise MissingError(f"{folder}: nothing is scored yet; {' '.join(left)}")
    raise MissingError(
        f"{folder}: no run in it ({_describe_content(folder)}); expected {EXPECTED_FOLDERS}"
    )


def _child_run_folders(folder: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(folder.glob("*/matrix.json")))


def _describe_content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return (
        "it holds "
        + ", ".join(names[:5])
        + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        if names
        else "it is empty"
    )


@dataclass(frozen=True)
class Run:
    """One run folder; everything except the matrix is loaded on first use."""

    path: Path
    matrix: Matrix

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Load a run folder.

        Raises MissingError or DataError, as Matrix.load does, and DataError if no stage has been
        scored.
        """
        matrix = Matrix.load(folder / "matrix.json")
        if not matrix.stages:
            raise DataError(
                f"{folder / 'matrix.json'}: no stage has been scored; start the run again with the "
                "same out="
            )
        return cls(folder, matrix)

    @cached_property
    def config_text(self) -> str:
        """Return the text of config.yaml, empty if there is none."""
        return untrusted.read_text(self.path / "config.yaml")

    @cached_property
    def settings(self) -> dict[str, str]:
        """Return every dotted key of config.yaml, without the keys in which repetitions differ."""
        flat = {
            key: value if isinstance(value, str) else json.dumps(value, default=str)
            for key, value in flatten_keys(
                untrusted.load_yaml_mapping(self.path / "config.yaml")
            ).items()
        }
        return {
            key: value
            for key, value in flat.items()
            if not REPETITION_KEYS & {key.rpartition(".")[2]}
        }

    @cached_property
    def parsed_log(self) -> tuple[list[dict[str, Any]], int]:
        """Return the events of events.jsonl and the number of broken lines.

        A killed run may leave half a line.
        """
        return load_events(self.path)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind.

        If a stage and step has several, the last is kept, because a resumed run logs them again.
        """
        matching = (e for e in self.parsed_log[0] if e["event"] == kind)
        return list(
            {
                tuple(e.get(key) for key in ("stage", "task", "split", "step")): e for e in matching
            }.values()
        )

    def stage_number(self, stage: str) -> int:
        """Return the number NN of a stage in predictions/stage-NN; 0 is before training."""
        return self.matrix.stages.index(stage) + (BASE_STAGE not in self.matrix.stages)

    def load_predictions(self, stage: str, task: str) -> list[Prediction]:
        """Return the scored answers to a task's test prompts after a stage; each file is read once.

        Empty if none were written. Raises DataError for lines that are not predictions.
        """
        if (stage, task) not in self._predictions:
            folder = self.path / "predictions" / f"stage-{self.stage_number(stage):02d}"
            path = folder / f"{task_file_name(task)}.jsonl"
            loaded = load_predictions(path) if path.is_file() else []
            self._predictions[stage, task] = [self._share_texts(p) for p in loaded]
        return self._predictions[stage, task]

    @cached_property
    def _predictions(self) -> dict[tuple[str, str], list[Prediction]]:
        """Cache of the loaded predictions, by (stage, task)."""
        return {}

    @cached_property
    def _shared_texts(self) -> dict[Any, Any]:
        """Each id and prompt that was read, once."""
        return {}

    @cached_property
    def _shared_references(self) -> dict[str, tuple[str, ...]]:
        """Each tuple of references that was read, once, by its representation."""
        return {}

    def _share_texts(self, prediction: Prediction) -> Prediction:
        """Use one object for texts that every stage repeats, as all predictions stay in memory."""
        share = self._shared_texts.setdefault
        return replace(
            prediction,
            id=share(prediction.id, prediction.id),
            prompt=share(prediction.prompt, prediction.prompt),
            references=self._shared_references.setdefault(
                repr(prediction.references), prediction.references
            ),
        )

    def example_scores(self, stage: str, task: str) -> tuple[str, tuple[float, ...]]:
        """Return a digest of the ids and references of a task's test examples, and their scores.

        Computed once per stage and task.
        """
        if (stage, task) not in self._example_scores:
            predictions = self.load_predictions(stage, task)
            identity = repr([(p.id, p.references) for p in predictions])
            digest = blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            self._example_scores[stage, task] = digest, tuple(p.score for p in predictions)
        return self._example_scores[stage, task]

    @cached_property
    def _example_scores(self) -> dict[tuple[str, str], tuple[str, tuple[float, ...]]]:
        """Cache of `example_scores`, by (stage, task)."""
        return {}

    @property
    def is_joint(self) -> bool:
        """Return True if the run learned all tasks in one stage, by its matrix, not its strategy
        name.
        """
        return self.matrix.is_finished and not self.matrix.is_sequential


@dataclass(frozen=True)
class RunGroup:
    """Repetitions of one experiment, over seeds and orders."""

    label: str
    runs: tuple[Run, ...]
    summaries: tuple[dict[str, float | None], ...]

    @property
    def num_finished(self) -> int:
        """Return the number of finished runs; only these count in the mean."""
        return sum(run.matrix.is_finished for run in self.runs)

    @property
    def is_joint(self) -> bool:
        """Return True for joint training, the upper reference of a comparison."""
        return any(run.is_joint for run in self.runs)

    def finished_values(self, name: str) -> list[float | None]:
        """Return one value per finished run, of a summary or a cost."""
        by_run = [
            {**run.matrix.cost, **summary}
            for run, summary in zip(self.runs, self.summaries, strict=True)
            if run.matrix.is_finished
        ]
        return [values.get(name) for values in by_run]

    def mean(self, name: str) -> float | None:
        """Return the mean over finished runs; None if one of them lacks the value."""
        return mean_or_none(self.finished_values(name))

    def std(self, name: str) -> float | None:
        """Return the sample standard deviation (n - 1); None for fewer than two runs."""
        measured = [value for value in self.finished_values(name) if value is not None]
        return (
            statistics.stdev(measured)
            if len(measured) > 1 and len(measured) == len(self.finished_values(name))
            else None
        )


def find_joint_reference(run: Run, runs: Iterable[Run]) -> Run | None:
    """Return the joint run over the same tasks, of the same seed if possible, else the first."""
    same = [
        r
        for r in runs
        if r.is_joint and r is not run and set(r.matrix.tasks) == set(run.matrix.tasks)
    ]
    return next((r for r in same if r.matrix.seed == run.matrix.seed), same[0] if same else None)


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Group runs that differ in seed and order only; sort joint first, then by average performance.

    The label of a group is its strategy, or "joint"; the settings that differ are added where two
    groups would have the same label.
    """
    members_by_key: dict[Any, list[Run]] = {}
    for run in runs:
        members_by_key.setdefault(
            (run.matrix.stream, _arm_name(run), tuple(sorted(run.settings.items()))), []
        ).append(run)
    labels = _group_labels([members[0] for members in members_by_key.values()])
    groups = [
        RunGroup(label, tuple(members), tuple(_summarize(run, runs) for run in members))
        for label, members in zip(labels, members_by_key.values(), strict=True)
    ]
    return sorted(
        groups, key=lambda g: (not g.is_joint, -(g.mean("average_performance") or -1), g.label)
    )


def _summarize(run: Run, runs: Sequence[Run]) -> dict[str, float | None]:
    other = find_joint_reference(run, runs)
    return run.matrix.summary(other.matrix if other else None)


def _arm_name(run: Run) -> str:
    """Return the stage name of a joint run, the strategy of any other."""
    return run.matrix.stages[-1] if run.is_joint else run.matrix.strategy


def _group_labels(representatives: Sequence[Run]) -> list[str]:
    """Return one label per group, from one run of each."""
    names = Counter(map(_arm_name, representatives))
    settings_of_runs = [
        {"stream": r.matrix.stream, "strategy": r.matrix.strategy, **r.settings}
        for r in representatives
    ]
    labels = []
    for run, settings in zip(representatives, settings_of_runs, strict=True):
        same_name = [
            t
            for r, t in zip(representatives, settings_of_runs, strict=True)
            if _arm_name(r) == _arm_name(run)
        ]
        differing_keys = (
            [key for key in settings if len({t.get(key) for t in same_name}) > 1]
            if names[_arm_name(run)] > 1
            else []
        )
        labels.append(
            " ".join(
                [
                    _arm_name(run),
                    *(
                        f"{key.rpartition('.')[2]}={_shorten_fraction(settings[key], {t.get(key) for t in same_name})}"
                        for key in differing_keys[:3]
                    ),
                ]
            )
        )
    return [
        label if labels.count(label) == 1 else f"{label} ({run.path.name})"
        for label, run in zip(labels, representatives, strict=True)
    ]


def _shorten_fraction(value: str, others: Collection[str | None]) -> str:
    """Shorten a long fraction, as a search draws, to three digits if it stays distinct."""
    shortened = {
        other: f"{float(other):.3g}" if LONG_FRACTION.fullmatch(other) else other
        for other in others
        if other is not None
    }
    return shortened[value] if len(set(shortened.values())) == len(shortened) else value


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Load the runs of run and comparison folders; also return the names of runs without a score."""
    paths: list[Path] = []
    pending: list[str] = []
    for folder in folders:
        content = folder_kind(folder)
        if content == "adapt":
            raise DataError(
                f"{folder}: an adapt folder has a curve, not a matrix; compare it with adapt "
                "folders only"
            )
        paths += [folder] if content == "run" else _child_run_folders(folder)
        if content == "comparison":
            started = [
                p.parent.name
                for p in sorted(folder.glob("*/config.yaml"))
                if not (p.parent / "matrix.json").is_file()
            ]
            pending += dict.fromkeys([*started, *comparison.find_pending_runs(folder)])
    return [Run.load(path) for path in dict.fromkeys(paths)], pending


def load_events(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the events of events.jsonl and the number of broken lines."""
    path = folder / "events.jsonl"
    events = []
    broken = 0

    for number, line in untrusted.iter_lines(path) if path.is_file() else ():
        try:
            event = untrusted.parse_json(line, f"{path}:{number}", line=True)
            if is_event(event):
                events.append(event)
            else:
                broken += 1
        except DataError:
            broken += 1
    return events, broken


# Optional parts of an event that pages show.
EVENT_NUMBERS = (
    "time",
    "stage",
    "step",
    "steps",
    "lr",
    "loss",
    "tokens",
    "seconds",
    "bytes",
    "memory_bytes",
    "forgetting",
)
EVENT_TEXTS = ("task", "split")


def is_event(event: Any) -> bool:
    """Return True if a parsed line is an event whose parts have the right types."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    if event["event"] in ("step", "during") and event.get("step") is None:
        return False
    notes, scores = event.get("notes") or {}, event.get("scores") or {}
    return (
        all(event.get(key) is None or untrusted.is_number(event[key]) for key in EVENT_NUMBERS)
        and all(isinstance(event.get(key), str | None) for key in EVENT_TEXTS)
        and isinstance(notes, dict)
        and all(map(untrusted.is_number, notes.values()))
        and isinstance(scores, dict)
        and all(untrusted.is_number(s, 0, 1) for s in scores.values())
    )
